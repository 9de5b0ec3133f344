"""The SiLU budget by simulation in float32: legal kernels stay inside, down to where exponentials overflow."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from attention_cases import draws
from hypothesis import given
from hypothesis import strategies as st

from kerneltest.model import BF16, FP16, FP32, Fmt
from kerneltest.oracle.silu_mul import silu_mul_budget
from kerneltest.oracle.verdict import judge

FORMATS = st.sampled_from([BF16, FP16, FP32])
LOG2_E = torch.tensor(1.4426950408889634)


def dtype_of(fmt: Fmt) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, fmt.name)
    return dtype


def flush(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 2.0**-126, 0.0, x)


def base_2(x: torch.Tensor, low: float = 0.0) -> torch.Tensor:
    """exp(-x) by way of ex2.approx, off by ``low`` of itself; subnormal results are flushed."""
    power = (-x * LOG2_E).double()
    return flush((torch.exp2(power) * (1 + low)).float())


LEGAL: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "division": lambda x, g: x / (1 + (-x).exp()) * g,
    "sigmoid": lambda x, g: x * torch.sigmoid(x) * g,
    "gate first": lambda x, g: (x * g) * (1 / (1 + (-x).exp())),
    "library": lambda x, g: torch.nn.functional.silu(x) * g,
    "base 2": lambda x, g: flush(flush(x / (1 + base_2(x))) * g),
    "base 2, high": lambda x, g: flush(flush(x / (1 + base_2(x, 2.0**-22.1))) * g),
    "base 2, reciprocal": lambda x, g: flush(flush(x * flush(1 / (1 + base_2(x, -(2.0**-22.1))))) * g),
    # A fast division by more than 2^126 gives 0.
    "fast division": lambda x, g: torch.where(1 + base_2(x) > 2.0**126, 0.0, flush(x / (1 + base_2(x))) * g),
}


def inputs(count: int, fmt: Fmt, seed: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, gate = torch.randn(2, count, generator=generator) * torch.tensor([[scale], [1.0]])
    x[0] = 0
    gate[1] = 0
    return x.to(dtype_of(fmt)), gate.to(dtype_of(fmt))


@pytest.mark.parametrize("name", LEGAL)
def test_legal_kernels_stay_inside(name: str) -> None:
    @draws(200)
    @given(scale=st.sampled_from([1e-4, 1.0, 10.0, 60.0, 200.0]), fmt=FORMATS, out=FORMATS, seed=st.integers(0, 2**20))
    def prop(scale: float, fmt: Fmt, out: Fmt, seed: int) -> None:
        x, gate = inputs(500, fmt, seed, scale)
        verdict = judge(LEGAL[name](x.float(), gate.float()).to(dtype_of(out)), silu_mul_budget(x, gate, out=out))
        assert verdict.ok, verdict

    prop()


@pytest.mark.parametrize("name", LEGAL)
@pytest.mark.parametrize("out", [BF16, FP32], ids=lambda fmt: fmt.name)
def test_where_the_exponential_overflows(name: str, out: Fmt) -> None:
    # 2^-126 |gate| alone, as a floor, is 88 times too low: the sigmoid is flushed before it is multiplied by x.
    x = torch.linspace(-110.0, -80.0, 4001)
    for size in (1e-3, 1.0, 1e4, 1e30):
        gate = torch.full_like(x, size)
        budget = silu_mul_budget(x, gate, out=out)
        assert judge(LEGAL[name](x, gate).to(dtype_of(out)), budget).ok
        assert not judge(torch.full_like(x, torch.nan), budget).ok
    lost = (budget.ref - LEGAL["fast division"](x, gate)).abs().max() / 1e30
    assert float(lost) > 80 * 2.0**-126


def test_a_rounded_exponent_counts_twice() -> None:
    # log2 e and the product with it are rounded. With an exponential and a division at their documented worst the
    # relative error of a legal kernel is more than (|x| + 8) u + 2^-21.
    x = -torch.linspace(44.3, 46.0, 40_001)
    gate = torch.ones_like(x)
    worst = ((x / (1 + base_2(x, -(2.0**-22)))).double() * (1 + 2.0**-22)).float()
    budget = silu_mul_budget(x, gate, out=FP32)
    assert judge(worst, budget).ok
    u = FP32.u
    assert bool(((worst - budget.ref).abs() > budget.ref.abs() * ((x.double().abs() + 8) * u + 2.0**-21)).any())


MUTANTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "by tanh": lambda x, g: 0.5 * x * (1 + torch.tanh(x / 2)) * g,
    "gelu": lambda x, g: torch.nn.functional.gelu(x, approximate="tanh") * g,
    "quick gelu": lambda x, g: x * torch.sigmoid(1.702 * x) * g,
    "hard": lambda x, g: torch.nn.functional.hardswish(x) * g,
    "sigmoid in bf16": lambda x, g: x * torch.sigmoid(x).bfloat16().float() * g,
    "exponential in bf16": lambda x, g: x / (1 + (-x).exp().bfloat16().float()) * g,
    "silu in bf16": lambda x, g: (x * torch.sigmoid(x)).bfloat16().float() * g,
    "log2 e of 16 bits": lambda x, g: x / (1 + torch.exp2(-x * LOG2_E.half().float())) * g,
    "clamped at -20": lambda x, g: x / (1 + (-x.clamp(min=-20)).exp()) * g,
    "swapped": lambda x, g: torch.nn.functional.silu(g) * x,
}


@pytest.mark.parametrize("out", [BF16, FP16, FP32], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_caught(name: str, out: Fmt) -> None:
    for seed in range(5):
        # Below x = -20 there is less than 4e-8: subnormal numbers of fp16 show it if the gate is large.
        x, gate = inputs(4000, out, seed, 10.0)
        gate = gate * 64
        budget = silu_mul_budget(x, gate, out=out)
        for kernel, ok in ((LEGAL["library"], True), (MUTANTS[name], False)):
            assert judge(kernel(x.float(), gate.float()).to(dtype_of(out)), budget).ok is ok


@draws(100)
@given(fmt=st.sampled_from([BF16, FP16]), scale=st.sampled_from([1e-3, 1.0, 20.0]), seed=st.integers(0, 2**20))
def test_a_cast_before_the_gate_must_be_declared(fmt: Fmt, scale: float, seed: int) -> None:
    x, gate = inputs(2000, fmt, seed, scale)
    out = (torch.nn.functional.silu(x.float()).to(dtype_of(fmt)).float() * gate.float()).to(dtype_of(fmt))
    assert judge(out, silu_mul_budget(x, gate, out=fmt, cast_before_gate=fmt)).ok
    assert not judge(out, silu_mul_budget(x, gate, out=fmt)).ok


def test_zero_times_anything_is_zero() -> None:
    x, gate = torch.tensor([0.0, 3.0, -200.0]), torch.tensor([5.0, 0.0, 0.0])
    budget = silu_mul_budget(x, gate, out=FP32)
    assert judge(torch.tensor([0.0, 0.0, -0.0]), budget).ok
    assert judge(torch.full((3,), 1e-40), budget).comparison.outside == 3


def test_how_much_of_the_bound_is_used() -> None:
    x, gate = inputs(20_000, FP32, 0, 3.0)
    budget = silu_mul_budget(x, gate, out=FP32)
    used = {name: judge(kernel(x, gate), budget).used for name, kernel in LEGAL.items()}
    assert all(0.15 < share < 0.95 for share in used.values()), used


def test_the_reference_in_50_digits() -> None:
    x, gate = inputs(60, FP32, 4, 30.0)
    budget = silu_mul_budget(x, gate, out=FP32)
    with mpmath.workdps(50):
        for v, g, ref in zip(x.tolist(), gate.tolist(), budget.ref.tolist(), strict=True):
            exact = mpmath.mpf(v) * mpmath.mpf(g) / (1 + mpmath.exp(-mpmath.mpf(v)))
            assert abs(exact - ref) <= 1e-15 * abs(exact)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="the gate"):
        silu_mul_budget(torch.zeros(2, 3), torch.zeros(3), out=BF16)
