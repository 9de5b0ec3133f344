"""The input strategies of MLA: each holds what it promises, whatever the form, and excuses no right kernel."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from mla_cases import CPU, OPERATORS, axes, case, draws, launched, layer, module, paged

from kerneltest.model import FORMATS, FP32, Case, Size
from kerneltest.oracle.verdict import judge

NAMES = [strategy.name for strategy in paged.mla_paged_attention.inputs]
attention_inputs = module("_inputs").attention
cases_of, gather = module("_cases"), module("torch_gather").gather
SMALL = Size(batch=2, qo_len=6, kv_len=100, heads=4)
TYPICAL = ((5, 60), (1, 33), (2, 90))


def made(operator: str, inputs: str, **more: Any) -> tuple[Case[Any], dict[str, torch.Tensor]]:
    """A typical case and its tensors, the floating-point ones in float64."""
    one = case(*TYPICAL, operator=operator, inputs=inputs, causal=True, **more)
    tensors = OPERATORS[operator].materialize(one).inputs
    return one, {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


def keys_of(one: Case[Any], x: dict[str, torch.Tensor], request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and rotated keys of a request, gathered."""
    first, end = x["kv_indptr"][request : request + 2].tolist()
    table, length = x["kv_indices"][first:end].long(), one.axes.requests[request].kv_len
    latent, rope = (x[name][table].flatten(0, 1)[:length] for name in ("ckv_pages", "kpe_pages"))
    return latent, rope


def rows_of(one: Case[Any], request: int) -> slice:
    first = sum(r.qo_len for r in one.axes.requests[:request])
    return slice(first, first + one.axes.requests[request].qo_len)


def scores(operator: str, one: Case[Any], x: dict[str, torch.Tensor], request: int) -> torch.Tensor:
    """Of all keys of a request, [rows, heads, keys]."""
    latent, rope = keys_of(one, x, request)
    q = x["q_nope"][rows_of(one, request)]
    q = torch.einsum("qhd,hdc->qhc", q, x["w_uk"]) if operator == "mla_attention" else q
    both = torch.einsum("qhc,jc->qhj", q, latent) + torch.einsum("qhc,jc->qhj", x["q_pe"][rows_of(one, request)], rope)
    return both * one.axes.scale


@pytest.mark.parametrize("inputs", NAMES)
def test_a_right_kernel_passes_every_tier(inputs: str) -> None:
    @draws(10)
    @given(paged.mla_paged_attention.cases(SMALL))
    def prop(drawn: Case[Any]) -> None:
        scale = math.log(2.0) if inputs == "dyadic" else None
        changed = dataclasses.replace(drawn.axes, sm_scale=scale)
        one = dataclasses.replace(drawn, inputs=inputs, relation="", axes=changed)
        tensors = dict(paged.materialize(one).inputs)
        terms = paged.reference(one, tensors, "cpu")
        strategy = paged.mla_paged_attention.strategy(inputs)
        budgets = paged.budget(one, terms, gather.numerics(one, CPU), strategy)
        outputs = launched(gather, one, tensors)
        for name, budget in budgets.items():
            verdict = judge(outputs[name], budget)
            assert verdict.ok, (name, verdict)

    prop()


@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_counting_inputs_count(operator: str, dtype: str) -> None:
    one, x = made(operator, "count", dtype=dtype)
    assert not x["q_nope"].any()
    assert not x["q_pe"].any()
    terms = OPERATORS[operator].reference(one, OPERATORS[operator].materialize(one).inputs, "cpu")
    counts = terms.out * terms.keys.unsqueeze(-1)
    assert (counts - counts.round()).abs().max() < 1e-9
    # Each token is in one channel of each of two blocks.
    assert torch.equal(counts.round().sum(-1), 2 * terms.keys)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.parametrize("dims", [axes.SMALL, axes.DEEPSEEK])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dyadic_weights_and_what_projections_make_need_no_rounding(operator: str, dims: Any, dtype: str) -> None:
    one, x = made(operator, "dyadic", dtype=dtype, dims=dims)
    for request in range(3):
        dots = scores(operator, one, x, request) / math.log(2.0)
        assert (dots - dots.round()).abs().max() < 1e-9
        # Weights relative to any running maximum are powers of two that fp16 holds.
        assert -14 <= dots.round().amin() - dots.round().amax() <= -4
    # Both parts of a score matter.
    assert x["q_nope"].any()
    assert x["q_pe"].any()
    fmt = getattr(torch, dtype)
    if operator == "mla_attention":
        exact = [
            torch.einsum("qhd,hdc->qhc", x["q_nope"], x["w_uk"]),
            torch.einsum("psc,hdc->pshd", x["ckv_pages"], x["w_uk"]),
            torch.einsum("psc,hdc->pshd", x["ckv_pages"], x["w_uv"]),
        ]
        for value in exact:
            assert torch.equal(value.to(fmt).double(), value)
        assert len(exact[-1].unique()) > 100
    # V is generic.
    assert len(x["ckv_pages"].unique()) > 100


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_dyadic_inputs_with_another_scale_are_refused(operator: str) -> None:
    with pytest.raises(ValueError, match=r"inputs 'dyadic' need sm_scale = ln 2 = 0\.6931471805599453, got 0\.5"):
        OPERATORS[operator].materialize(case((1, 1), operator=operator, inputs="dyadic", sm_scale=0.5))


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_integer_sums_are_exact_in_any_order(operator: str) -> None:
    _, x = made(operator, "integer", dtype="bfloat16")
    value = x["ckv_pages"]
    assert torch.equal(value, value.round())
    if operator == "mla_attention":
        value = torch.einsum("psc,hdc->pshd", value, x["w_uv"])
        assert torch.equal(value, value.round())
        assert value.abs().max() <= 32
    assert not x["q_nope"].any()


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_needles_outweigh_all_other_keys(operator: str) -> None:
    one, x = made(operator, "needle", dtype="float32", dims=axes.DEEPSEEK)
    found = set()
    for request in range(3):
        s = scores(operator, one, x, request)
        top = s.topk(2, -1)
        assert (top.values[..., 0] - top.values[..., 1] > 8).float().mean() > 0.99
        found |= {(request, int(slot)) for slot in top.indices[..., 0].flatten()}
    assert len(found) > 6


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_large_logits_are_large_and_not_values(operator: str) -> None:
    one, x = made(operator, "large_logits", dtype="float32", heads=5)
    s = scores(operator, one, x, 0)
    assert s.amax() > 280
    assert s.amin() < -280
    assert x["ckv_pages"].abs().max() < 8


@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_special_inputs_are_special_and_finite(operator: str, dtype: str) -> None:
    one, x = made(operator, "special", dtype=dtype)
    fmt = FORMATS[dtype]
    for name in ("q_nope", "q_pe", "ckv_pages", "kpe_pages"):
        value = OPERATORS[operator].materialize(one).inputs[name]
        assert value.isfinite().all()
        assert ((value == 0) & value.signbit()).any(), name
        assert ((value != 0) & (value.abs().double() < 2.0**fmt.emin)).any(), name
    assert x["kpe_pages"].abs().max() == 2.0 ** (fmt.emax - 2)
    terms = OPERATORS[operator].reference(one, OPERATORS[operator].materialize(one).inputs, "cpu")
    assert terms.out.isfinite().all()
    # Sums of unnormalised weights times V stay in fp32.
    assert float(terms.out.abs().max()) * 90 < FP32.max


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_scaled_values_leave_scores_as_they_are(operator: str) -> None:
    sizes = []
    for seed in range(8):
        one, x = made(operator, "scaled", seed=seed)
        assert 0.05 < scores(operator, one, x, 0).std() < 40
        sizes.append(float(x["ckv_pages"].abs().mean()))
    assert max(sizes) / min(sizes) > 16


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_cases_are_drawn_whole(operator: str) -> None:
    seen: set[str] = set()

    @draws(200)
    @given(OPERATORS[operator].cases(Size(batch=3, qo_len=300, kv_len=1100, heads=16)))
    def prop(one: Case[Any]) -> None:
        a = one.axes
        assert a.total_qo >= 1
        assert a.sm_scale == (math.log(2.0) if one.inputs == "dyadic" else None)
        assert max(r.qo_len for r in a.requests) * a.heads <= 8 * 300
        seen.update((f"heads {a.heads}", f"rank {a.rank}", one.inputs, f"relation {one.relation}"))
        for simpler in OPERATORS[operator].simpler(one):
            assert simpler != one

    prop()
    # A hunt adds those that chance has left out.
    assert len(seen.intersection(NAMES)) >= len(NAMES) - 2
    assert {"heads 128", "heads 20", "rank 512", "rank 32"} <= seen
    assert len([word for word in seen if word.startswith("relation")]) > 10


def test_a_case_becomes_as_simple_as_can_be() -> None:
    one = case(
        (3, 40), (2, 0), dims=axes.DEEPSEEK, heads=5, causal=True, shuffled=True, spare_pages=2, dtype="float16", seed=3
    )
    for _ in range(200):
        simpler = next(iter(paged.mla_paged_attention.simpler(one)), None)
        if simpler is None:
            break
        one = simpler
    assert one.axes.dims == axes.SMALL
    assert (len(one.axes.requests), one.axes.heads, one.axes.page_size, one.seed) == (1, 1, 1, 0)


def test_a_graph_is_captured_for_the_same_queries() -> None:
    one = case((1, 20), (1, 0), (1, 7), dims=axes.DEEPSEEK)

    @draws(30)
    @given(cases_of.captures(one))
    def prop(longer: Case[Any]) -> None:
        for before, after in zip(one.axes.requests, longer.axes.requests, strict=True):
            assert after.qo_len == before.qo_len
            assert after.kv_len >= before.kv_len

    prop()


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_a_lost_slot_is_named(operator: str) -> None:
    one = case((1, 60), operator=operator, inputs="count", heads=3)
    tensors = OPERATORS[operator].materialize(one).inputs
    terms = OPERATORS[operator].reference(one, tensors, "cpu")
    # The output without slot 17: its channels have one count less.
    latent, _ = keys_of(one, {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}, 0)
    value = latent[17].expand(3, -1)
    if operator == "mla_attention":
        value = torch.einsum("hdc,c->hd", tensors["w_uv"].double(), latent[17])
    out = (terms.out * 60 - value) / 59
    said = OPERATORS[operator].explain(one, tensors, {"out": out.float(), "lse": torch.full((1, 3), math.log(59.0))})
    assert said == "request 0: slot 17 not counted in 3 of 3 heads"


def test_places_are_said_in_words() -> None:
    one = case((2, 3), (3, 3), heads=2)
    assert paged.locate(one, "out", (3, 1, 5)) == "request 1, token 1, head 1, dim 5"
    assert layer.locate(one, "lse", (0, 1)) == "request 0, token 0, head 1"
