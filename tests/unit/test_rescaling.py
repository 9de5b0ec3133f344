"""The budget of an output that is rounded, multiplied by the scale of V and rounded again."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import case, paged
from attention_kernel import kernel

from kerneltest import discovery
from kerneltest.model import BF16, FORMATS, FP16, FP32, IEEE_FP32, ErrorBudget, Fmt, Numerics
from kerneltest.oracle.verdict import Verdict, judge

rounded_before_scale = importlib.import_module(f"{discovery.PACKAGE}.attention._rescaling").rounded_before_scale
SCALE = 1.6875


@pytest.mark.parametrize("fmt", [BF16, FP16], ids=lambda fmt: fmt.name)
def test_the_bound_holds_for_any_error_before_and_is_reached(fmt: Fmt) -> None:
    dtype = getattr(torch, fmt.name)
    random = torch.Generator().manual_seed(0)
    exact = torch.randn(200_000, generator=random, dtype=torch.float64) * SCALE
    exact[:1000] *= 2.0**fmt.emin
    error = exact.abs() * 2.0**-12
    before = ErrorBudget(ref=exact, hard=error, out=fmt)
    budget = rounded_before_scale(before, fmt, SCALE)
    for sign in (-1, 0, 1):
        x = (exact + sign * error) / SCALE
        # In float32 first: torch rounds float64 to 16 bits by way of it, and here that is what a kernel does.
        twice = x.float().to(dtype).double() * SCALE
        off = (twice - exact).abs()
        assert bool((off <= budget.hard * (1 + 1e-6) + 1e-40).all())
    assert float((off / budget.hard).max()) > 0.5


def verdict(seed: int, declared: Fmt | None, inputs_of: str = "generic", scale: float = SCALE) -> Verdict:
    """Of a kernel that multiplies rounded outputs, judged by what is declared."""
    of = case((40, 200), (3, 70), head_dim=128, kv_heads=2, group=2, kv_dtype="float8_e4m3fn", seed=seed)
    of = replace(of, inputs=inputs_of, axes=replace(of.axes, v_scale=scale))
    inputs = paged.materialize(of).inputs
    unscaled: Any = replace(of, axes=replace(of.axes, v_scale=1.0))
    out = kernel(unscaled, inputs)["out"].float().mul(scale).bfloat16()
    numerics = Numerics(
        qk=IEEE_FP32, pv=IEEE_FP32, p=BF16, out=FORMATS[of.axes.dtype], dequant=FP32, unscaled=declared, lse_base=None
    )
    terms = paged.reference(of, inputs, "cpu")
    return judge(out, paged.budget(of, terms, numerics, paged.paged_prefill.strategy(inputs_of))["out"])


def test_what_is_declared_is_excused_and_nothing_else() -> None:
    for seed in range(4):
        seen = verdict(seed, BF16)
        assert seen.ok
        assert seen.energy is not None
        # The noise is of the size that is expected, so that there is no room for more.
        assert 0.5 < seen.energy < 1.3
    # Where nothing else is rounded, one rounding is told from two.
    for inputs in ("count", "integer"):
        assert verdict(0, BF16, inputs).ok
        assert not verdict(0, None, inputs).ok
        assert verdict(0, None, inputs, scale=2.0).ok


def test_a_scale_of_one_is_no_rounding() -> None:
    of = case((4, 20), v_scale=1.0)
    terms = paged.reference(of, paged.materialize(of).inputs, "cpu")
    strategy = paged.paged_prefill.strategy("generic")
    plain = Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=BF16, out=BF16)
    one, other = (paged.budget(of, terms, replace(plain, unscaled=fmt), strategy)["out"] for fmt in (None, BF16))
    assert torch.equal(one.hard, other.hard)
    assert replace(plain, unscaled=BF16).plain.unscaled is None
