"""The budget of a whole MLA layer by simulation: no form's declared rounding leaves it, and each comes near it.

The kernels are the suite's own forms, with a rounding that is the declared one, or as bad as the declaration allows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from mla_cases import CPU, axes, case, draws, launched, layer, module

from kerneltest.model import BF16, FORMATS, FP16, FP32, Case, Size
from kerneltest.oracle.compare import Comparison, compare

forms, terms_of, budget_of = module("_forms"), module("_layer_terms"), module("_layer_budget")
torch_layer, numerics_of = module("torch_layer"), module("_numerics")
FORMS = sorted(forms.FORMS)
NAMES = [strategy.name for strategy in layer.mla_attention.inputs]
SMALL = Size(batch=2, qo_len=5, kv_len=90, heads=4)


def judged(one: Case[Any], outputs: dict[str, torch.Tensor], numerics: Any, **tier: str) -> dict[str, Comparison]:
    terms = layer.reference(one, layer.materialize(one).inputs, "cpu")
    strategy = layer.mla_attention.strategy(one.inputs)
    budgets = layer.budget(one, terms, numerics, dataclasses.replace(strategy, **tier))
    for budget in budgets.values():
        assert not budget.ref.isnan().any()
        assert budget.hard.isfinite().all()
        assert (budget.hard >= 0).all()
    return {name: compare(outputs[name], budget) for name, budget in budgets.items()}


def answered(form: str, one: Case[Any], rounded: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The form in float64 but for ``rounded``, rounded to the format of the case at the end."""
    rows, dims = (one.axes.total_qo, one.axes.heads), one.axes.dims
    out, lse = torch.zeros(*rows, dims.v_dim, dtype=torch.float64), torch.full(rows, -torch.inf, dtype=torch.float64)
    inputs = layer.materialize(one).inputs
    for own, x in terms_of.requests(inputs, causal=one.axes.causal, sm_scale=one.axes.scale, device="cpu"):
        tensors = (x.q_nope.transpose(0, 1), x.q_pe.transpose(0, 1), x.latent, x.rope, x.w_uk, x.w_uv)
        out[own], lse[own] = forms.FORMS[form](*tensors, seen=x.seen, scale=x.scale, rounded=rounded)
    return {"out": out.to(getattr(torch, one.axes.dtype)), "lse": lse.float()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inputs", NAMES)
def test_what_each_form_rounds_stays_inside(form: str, inputs: str) -> None:
    kernel = getattr(torch_layer, form)

    @draws(8)
    @given(layer.mla_attention.cases(SMALL))
    def prop(drawn: Case[Any]) -> None:
        scale = 0.6931471805599453 if inputs == "dyadic" else None
        one = dataclasses.replace(
            drawn, inputs=inputs, relation="", axes=dataclasses.replace(drawn.axes, sm_scale=scale)
        )
        outputs = launched(kernel, one, dict(layer.materialize(one).inputs))
        for name, result in judged(one, outputs, kernel.numerics(one, CPU)).items():
            assert result.ok, (name, result)

    prop()


class Adversary:
    """Rounds to a format as badly as a declaration of round-to-nearest allows: by u of each number, in the worst way.

    ``away``: in which direction, a sign or a tensor of signs for each of the calls in turn.
    """

    def __init__(self, unit: float, away: list[torch.Tensor | float]) -> None:
        self.unit, self.away, self.calls = unit, away, 0

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        sign = self.away[min(self.calls, len(self.away) - 1)]
        self.calls += 1
        return value + self.unit * value.abs() * sign


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_the_worst_rounding_that_is_declared_stays_inside_of_the_hard_bound(form: str, dtype: str) -> None:
    largest = 0.0
    for seed in range(6):
        one = case((2, 23), (1, 40), operator="mla_attention", dtype=dtype, causal=seed % 2 == 1, seed=seed)
        numerics = getattr(torch_layer, form).numerics(one, CPU)
        random = torch.Generator().manual_seed(seed)
        for kind in range(4):

            def signs(value: torch.Tensor, kind: int = kind, random: torch.Generator = random) -> torch.Tensor:
                # All up, all down, at random, or towards what makes the first half of the keys heavier.
                if kind < 2:
                    return torch.full_like(value, 1.0 - 2 * kind)
                if kind == 2:
                    return torch.randn(value.shape, generator=random, dtype=torch.float64).sign()
                half = torch.ones_like(value)
                half[..., value.shape[-1] // 2 :] = -1
                return half

            def rounded(value: torch.Tensor, signs: Any = signs) -> torch.Tensor:
                return value + FORMATS[dtype].u * value.abs() * signs(value)

            results = judged(one, answered(form, one, rounded), numerics, tier="hard")
            assert all(result.ok for result in results.values()), (kind, results)
            largest = max(largest, results["out"].used)
    # Scores off in one direction for some keys and another for others are rare: the bound is for those.
    assert 0.1 < largest < 1


@pytest.mark.parametrize("form", FORMS)
def test_scores_off_in_the_worst_way_come_near_the_hard_bound(form: str) -> None:
    """Two keys of opposite values, and each rounded operand off so that one gains what the other loses."""
    one = case((1, 2), operator="mla_attention", heads=1, dtype="bfloat16", page_size=1)
    numerics = getattr(torch_layer, form).numerics(one, CPU)
    best = 0.0
    for seed in range(20):
        drawn = dataclasses.replace(one, seed=seed)
        x = next(terms_of.requests(layer.materialize(drawn).inputs, causal=False, sm_scale=1.0, device="cpu"))[1]
        # What makes the first key's score larger than the second's, channel by channel.
        if form == "absorbed":
            towards = (x.latent[0] - x.latent[1]).sign()
            worst = [towards, 1.0, 1.0]
        else:
            q = x.q_nope[0, 0].sign()
            worst = [torch.stack([q, -q]), 1.0, 1.0]
        results = judged(drawn, answered(form, drawn, Adversary(BF16.u, worst)), numerics, tier="hard")
        assert results["out"].ok, results
        best = max(best, results["out"].used, results["lse"].used)
    assert best > 0.25


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_budget_of_a_right_form_is_used_but_not_used_up(form: str, dtype: str) -> None:
    kernel = getattr(torch_layer, form)
    used: dict[str, list[float]] = {"out": [], "lse": []}
    for seed in range(6):
        one = case((3, 60), (1, 20), operator="mla_attention", dtype=dtype, dims=axes.DEEPSEEK, seed=seed)
        results = judged(one, launched(kernel, one, dict(layer.materialize(one).inputs)), kernel.numerics(one, CPU))
        assert all(result.ok for result in results.values())
        for name, result in results.items():
            used[name].append(result.used)
    # A budget that nobody comes near would catch nobody. That of fp32 is for sums in any order; a BLAS has a good one.
    assert (0.01 if dtype == "float32" else 0.05) < max(used["out"]) < 1
    assert max(used["lse"]) < 1
    if dtype != "float32":
        assert max(used["lse"]) > 0.05


def drop_a_key(form: str, one: Case[Any], dropped: int) -> dict[str, torch.Tensor]:
    """The answer to a case of one request that never saw one of its keys."""
    inputs, outputs, fmt = layer.materialize(one).inputs, {}, getattr(torch, one.axes.dtype)

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.to(fmt).double()

    for _, x in terms_of.requests(inputs, causal=one.axes.causal, sm_scale=one.axes.scale, device="cpu"):
        x.seen[:, dropped] = False
        tensors = (x.q_nope.transpose(0, 1), x.q_pe.transpose(0, 1), x.latent, x.rope, x.w_uk, x.w_uv)
        out, lse = forms.FORMS[form](*tensors, seen=x.seen, scale=x.scale, rounded=rounded)
        outputs = {"out": out.to(fmt), "lse": lse.float()}
    return outputs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inputs", ["count", "dyadic", "integer"])
def test_one_lost_key_of_hundreds_shows_on_exact_inputs(form: str, inputs: str) -> None:
    one = case((1, 120), operator="mla_attention", inputs=inputs, dims=axes.DEEPSEEK, heads=2)
    results = judged(one, drop_a_key(form, one, 57), getattr(torch_layer, form).numerics(one, CPU))
    assert not results["out"].ok
    assert not results["lse"].ok


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_scale_of_a_percent_shows_in_the_log_sum_exp(form: str) -> None:
    kernel = getattr(torch_layer, form)
    one = case((2, 100), operator="mla_attention", dims=axes.DEEPSEEK)
    inputs = dict(layer.materialize(one).inputs)
    louder = dataclasses.replace(one, axes=dataclasses.replace(one.axes, sm_scale=one.axes.scale * 1.01))
    results = judged(one, launched(kernel, louder, inputs), kernel.numerics(one, CPU))
    assert not results["lse"].ok


@pytest.mark.parametrize("form", FORMS)
def test_undeclared_rounding_is_no_excuse(form: str) -> None:
    """A form that keeps its keys, values, queries and latents in fp32 is not allowed what one in bf16 is."""
    one = case((2, 50), operator="mla_attention", dims=axes.DEEPSEEK, dtype="bfloat16")
    kernel = getattr(torch_layer, form)
    said = kernel.numerics(one, CPU)
    terms = layer.reference(one, layer.materialize(one).inputs, "cpu")
    strategy = layer.mla_attention.strategy("generic")
    narrow = layer.budget(one, terms, said, strategy)
    wide = layer.budget(one, terms, dataclasses.replace(said, key=FP32, value=FP32, query=FP32, latent=FP32), strategy)
    for name in ("out", "lse"):
        assert (wide[name].hard <= narrow[name].hard).all()
        assert wide[name].hard.mean() < 0.8 * narrow[name].hard.mean()


def test_numerics_that_cannot_be_are_refused() -> None:
    plain = torch_layer.absorbed.numerics(case((1, 1), operator="mla_attention"), CPU)
    with pytest.raises(ValueError, match="the absorbed form has no key to round to bfloat16"):
        dataclasses.replace(plain, key=BF16)
    with pytest.raises(ValueError, match="the decompressed form has no latent to round to float16"):
        dataclasses.replace(plain, form="decompressed", query=FP32, latent=FP16)
    with pytest.raises(ValueError, match="form must be 'decompressed' or 'absorbed', got 'both'"):
        dataclasses.replace(plain, form="both")
    assert plain.plain.latent is FP32


def test_the_declared_tile_is_the_block() -> None:
    assert torch_layer.COMPRESSED_TILE == forms.BLOCK
