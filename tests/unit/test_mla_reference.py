"""The references of MLA: three forms that are one function, and each the same as plain numbers say."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from mla_cases import OPERATORS, axes, case, draws, layer, module, paged

from kerneltest.model import Case, Size

forms, terms_of = module("_forms"), module("_layer_terms")
relations, materials_of = module("_relations"), module("_materials")
SMALL = Size(batch=3, qo_len=9, kv_len=90, heads=4)


def exact(value: torch.Tensor) -> torch.Tensor:
    return value


def by_form(form: str, one: Case[Any], inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The form in float64, without rounding anything."""
    rows, dims = (one.axes.total_qo, one.axes.heads), one.axes.dims
    out, lse = torch.zeros(*rows, dims.v_dim, dtype=torch.float64), torch.full(rows, -torch.inf, dtype=torch.float64)
    settings = {"causal": one.axes.causal, "sm_scale": one.axes.scale, "device": "cpu"}
    for own, x in terms_of.requests(inputs, **settings):
        tensors = (x.q_nope.transpose(0, 1), x.q_pe.transpose(0, 1), x.latent, x.rope, x.w_uk, x.w_uv)
        out[own], lse[own] = forms.FORMS[form](*tensors, seen=x.seen, scale=x.scale, rounded=exact)
    return out, lse


@pytest.mark.parametrize("form", sorted(forms.FORMS))
def test_three_forms_are_one_function(form: str) -> None:
    @draws(25)
    @given(layer.mla_attention.cases(SMALL))
    def prop(one: Case[Any]) -> None:
        inputs = layer.materialize(one).inputs
        terms = layer.reference(one, inputs, "cpu")
        out, lse = by_form(form, one, inputs)
        # 1e-12 of what is added up: float64 rounds large scores, and large values, by as much as they are large.
        scores = 1 + float(terms.sizes["projected"].largest.max())
        values = 1 + float(terms.wide_out.max())
        assert (out - terms.out).abs().max() <= 1e-12 * scores * values
        assert torch.equal(lse.isinf(), terms.lse.isinf())
        assert (lse - terms.lse).nan_to_num(nan=0.0).abs().max() <= 1e-12 * scores

    prop()


@pytest.mark.parametrize("form", sorted(forms.FORMS))
def test_three_forms_agree_on_deepseek_dimensions(form: str) -> None:
    one = case((3, 70), (1, 40), operator="mla_attention", dims=axes.DEEPSEEK, heads=3, causal=True)
    inputs = layer.materialize(one).inputs
    terms = layer.reference(one, inputs, "cpu")
    out, lse = by_form(form, one, inputs)
    assert (out - terms.out).abs().max() < 1e-12
    assert (lse - terms.lse).abs().max() < 1e-12


def test_the_layer_is_the_absorbed_operator_between_its_projections() -> None:
    one = case((4, 30), (1, 17), operator="mla_attention", causal=True, dtype="float32")
    inputs = dict(layer.materialize(one).inputs)
    whole = layer.reference(one, inputs, "cpu")
    w_uk, w_uv = inputs.pop("w_uk").double(), inputs.pop("w_uv").double()
    # In float64 from the start: an absorbed query in fp32 is rounded.
    inputs["q_nope"] = torch.einsum("qhd,hdc->qhc", inputs["q_nope"].double(), w_uk)
    inputs["q_pe"] = inputs["q_pe"].double()
    latent = paged.reference(one, inputs, "cpu")
    assert (torch.einsum("qhc,hdc->qhd", latent.out, w_uv) - whole.out).abs().max() < 1e-12
    assert (latent.lse - whole.lse).abs().max() < 1e-12


def plain(one: Case[Any], inputs: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Absorbed MLA in numpy, a row and a key at a time."""
    x = {name: value.double().numpy() for name, value in inputs.items()}
    a, row = one.axes, 0
    out, lse = np.zeros((a.total_qo, a.heads, a.rank)), np.full((a.total_qo, a.heads), -np.inf)
    for number, request in enumerate(a.requests):
        for query in range(request.qo_len):
            last = query + request.kv_len - request.qo_len if a.causal else request.kv_len - 1
            for head in range(a.heads):
                scores, values = [], []
                for key in range(max(last + 1, 0)):
                    page = int(x["kv_indices"][int(x["kv_indptr"][number]) + key // a.page_size])
                    latent, rope = (x[name][page, key % a.page_size] for name in ("ckv_pages", "kpe_pages"))
                    dot = (x["q_nope"][row, head] * latent).sum() + (x["q_pe"][row, head] * rope).sum()
                    scores.append(dot * a.scale)
                    values.append(latent)
                if scores:
                    weights = np.exp(np.array(scores) - max(scores))
                    out[row, head] = (weights[:, None] * np.array(values)).sum(0) / weights.sum()
                    lse[row, head] = max(scores) + math.log(weights.sum())
            row += 1
    return out, lse


@pytest.mark.parametrize("causal", [False, True])
def test_the_absorbed_reference_is_what_plain_loops_give(causal: bool) -> None:
    for inputs in ("generic", "needle", "count"):
        one = case((3, 5), (0, 4), (4, 2), (1, 0), (1, 33), causal=causal, shuffled=True, spare_pages=1, inputs=inputs)
        tensors = dict(paged.materialize(one).inputs)
        terms = paged.reference(one, tensors, "cpu")
        out, lse = plain(one, tensors)
        assert np.abs(terms.out.numpy() - out).max() < 1e-12
        assert np.array_equal(np.isinf(lse), terms.lse.isinf().numpy())
        some = np.isfinite(lse)
        assert np.abs(terms.lse.numpy()[some] - lse[some]).max() < 1e-12


def test_the_layer_reference_is_what_fifty_digits_give() -> None:
    one = case((1, 4), operator="mla_attention", heads=1, dtype="float32")
    inputs = layer.materialize(one).inputs
    terms = layer.reference(one, inputs, "cpu")
    with mpmath.workdps(50):
        x = {name: value.double() for name, value in inputs.items()}

        def vector(value: torch.Tensor) -> mpmath.matrix:
            return mpmath.matrix(value.reshape(-1).tolist())

        def product(w: torch.Tensor, c: mpmath.matrix) -> mpmath.matrix:
            return mpmath.matrix(w.tolist()) * c

        scores, values = [], []
        for key in range(4):
            latent, rope = vector(x["ckv_pages"][0, key]), vector(x["kpe_pages"][0, key])
            nope = mpmath.fdot(vector(x["q_nope"]), product(x["w_uk"][0], latent))
            scores.append((nope + mpmath.fdot(vector(x["q_pe"]), rope)) * mpmath.mpf(one.axes.scale))
            values.append(product(x["w_uv"][0], latent))
        weights = [mpmath.exp(score) for score in scores]
        total = mpmath.fsum(weights)
        for channel in range(one.axes.dims.v_dim):
            right = mpmath.fsum(w * v[channel] for w, v in zip(weights, values, strict=True)) / total
            assert abs(float(terms.out[0, 0, channel]) - float(right)) < 1e-14
        assert abs(float(terms.lse[0, 0]) - float(mpmath.log(total))) < 1e-14


def test_the_scale_is_that_of_the_head_before_absorption() -> None:
    assert case((1, 1), dims=axes.DEEPSEEK).axes.scale == 1 / math.sqrt(192)


@pytest.mark.parametrize("operator", ["mla_paged_attention", "mla_attention"])
@pytest.mark.parametrize("name", [relation.name for relation in relations.RELATIONS])
def test_relations_hold_for_the_reference(operator: str, name: str) -> None:
    module_of = {"mla_paged_attention": paged, "mla_attention": layer}[operator]
    relation = OPERATORS[operator].relation(name)
    numerics = module("torch_gather").numerics(case((1, 1)), None)
    applied = 0
    for causal in (False, True):
        one = case((3, 40), (1, 0), (5, 20), (0, 9), operator=operator, causal=causal, shuffled=True, spare_pages=2)
        if not relation.applies(one):
            continue
        made = module_of.materialize(one)
        original = module_of.reference(one, made.inputs, "cpu")
        for related in relation.transform(one, made):
            answers = []
            for variant in related.variants:
                found = module_of.reference(variant.case, variant.materials.inputs, "cpu")
                assert variant.materials.outputs["out"].shape == tuple(found.out.shape)
                assert {dead.tensor for dead in variant.materials.dead} <= {"ckv_pages", "kpe_pages"}
                zero = {which: torch.zeros_like(getattr(found, which)) for which in ("out", "lse")}
                answers.append({w: bounded(getattr(found, w), zero[w]) for w in ("out", "lse")})
            for which, mapped in related.back(answers, numerics).items():
                right = getattr(original, which)
                known = mapped.error < torch.inf
                same = (mapped.value == right) | ((mapped.value - right).abs() <= 1e-12 + mapped.error)
                assert bool((same | ~known).all()), (which, name)
                applied += int(known.sum())
    assert applied > 0


def bounded(value: torch.Tensor, error: torch.Tensor) -> Any:
    from kerneltest.model import Bounded

    return Bounded(value=value, error=error)


def test_a_relation_tells_a_wrong_scale_of_heads() -> None:
    # A head permutation that forgot the projections would not hold: it is the test that can fail.
    one = case((2, 12), operator="mla_attention", heads=3)
    made = layer.materialize(one)
    (related,) = layer.mla_attention.relation("head_permutation").transform(one, made)
    (variant,) = related.variants
    wrong = {**variant.materials.inputs, "w_uk": made.inputs["w_uk"]}
    found = layer.reference(variant.case, wrong, "cpu")
    back = related.back([{"out": bounded(found.out, torch.zeros_like(found.out))}], None)
    assert (back["out"].value - layer.reference(one, made.inputs, "cpu").out).abs().max() > 1e-3
