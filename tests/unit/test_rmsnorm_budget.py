"""The RMSNorm budget by simulation in float32: legal kernels stay inside, and what fixed tolerances excuse does not."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from attention_cases import draws
from hypothesis import given
from hypothesis import strategies as st

from kerneltest.model import BF16, FP16, FP32, IEEE_FP32, AccModel, Fmt
from kerneltest.oracle.rmsnorm import RMSNormNumerics, fused_add_rmsnorm_budgets, rmsnorm_budget
from kerneltest.oracle.rounding import interval
from kerneltest.oracle.verdict import judge

# 32 lanes that add side by side, then a tree of 5 levels.
WARP = AccModel(24, "rne", 32, extra=5)
EPS = 1e-6
FORMATS = st.sampled_from([BF16, FP16, FP32])


def dtype_of(fmt: Fmt) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, fmt.name)
    return dtype


def row_sum(x: torch.Tensor, order: str) -> torch.Tensor:
    """Σ over the last dimension in float32; the square of each element is rounded, unless ``order`` is fused."""
    if order == "library":
        return x.square().sum(-1, keepdim=True)
    if order == "one chain":
        total = torch.zeros_like(x[..., :1])
        for column in x.split(1, -1):
            total = total + column.square()
        return total
    lanes = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    total = torch.zeros_like(lanes[..., 0, :])
    for i in range(lanes.shape[-2]):
        if order == "fused":
            total = (total.double() + lanes[..., i, :].double().square()).float()
        else:
            total = total + lanes[..., i, :].square()
    while total.shape[-1] > 1:
        first, second = total.chunk(2, -1)
        total = first + second
    return total


def kernel(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: Fmt,
    *,
    eps: float = EPS,
    order: str = "fused",
    late: bool = False,
    bias: float = 0.0,
    cast: Fmt | None = None,
    count: int | None = None,
) -> torch.Tensor:
    """``late``: the weight meets x before the inverse root does. ``count``: what Σx² is divided by."""
    x, factor = x.float(), weight.float() + bias
    mean = row_sum(x, order) * (1 / torch.tensor(float(count or x.shape[-1])))
    root = 1 / (mean + eps).sqrt() if late else (mean + eps).rsqrt()
    if cast is not None:
        return ((x * root).to(dtype_of(cast)).float() * factor).to(dtype_of(out))
    return (x * factor * root if late else x * root * factor).to(dtype_of(out))


def row(rows: int, dim: int, fmt: Fmt, seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator) * scale
    weight = 1 + 0.2 * torch.randn(dim, generator=generator)
    return x.to(dtype_of(fmt)), weight.to(dtype_of(fmt))


@pytest.mark.parametrize("late", [False, True], ids=["weight last", "weight first"])
@pytest.mark.parametrize("order", ["fused", "lanes", "library", "one chain"])
def test_legal_kernels_stay_inside(order: str, late: bool) -> None:
    @draws(200)
    @given(
        dim=st.integers(1, 300),
        fmt=FORMATS,
        out=FORMATS,
        bias=st.sampled_from([0.0, 1.0]),
        eps=st.sampled_from([1e-5, 1e-6, 1e-12]),
        scale=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]),
        seed=st.integers(0, 2**20),
    )
    def prop(dim: int, fmt: Fmt, out: Fmt, bias: float, eps: float, scale: float, seed: int) -> None:
        x, weight = row(6, dim, fmt, seed, scale)
        x[0] = 0
        # How a library adds is its own business: any order.
        declared = RMSNormNumerics(row_sum=IEEE_FP32 if order in ("library", "one chain") else WARP, out=out)
        budget = rmsnorm_budget(x, weight, eps, declared, weight_bias=bias)
        verdict = judge(kernel(x, weight, out, eps=eps, order=order, late=late, bias=bias), budget)
        assert verdict.ok, verdict

    prop()


@draws(150)
@given(dim=st.integers(8, 600), fmt=st.sampled_from([BF16, FP16]), seed=st.integers(0, 2**20))
def test_a_cast_before_the_weight_must_be_declared(dim: int, fmt: Fmt, seed: int) -> None:
    x, weight = row(16, dim, fmt, seed)
    out = kernel(x, weight, fmt, cast=fmt)
    said = RMSNormNumerics(row_sum=WARP, out=fmt, cast_before_weight=fmt)
    assert judge(out, rmsnorm_budget(x, weight, EPS, said)).ok
    assert not judge(out, rmsnorm_budget(x, weight, EPS, RMSNormNumerics(row_sum=WARP, out=fmt))).ok


@pytest.mark.parametrize("dim", [64, 1024, 4096, 8192])
@pytest.mark.parametrize("fmt", [BF16, FP16, FP32], ids=lambda fmt: fmt.name)
def test_a_mean_over_one_element_less_is_caught(fmt: Fmt, dim: int) -> None:
    x, weight = row(8, dim, fmt, 0)
    declared = RMSNormNumerics(row_sum=WARP, out=fmt)
    right, wrong = kernel(x, weight, fmt), kernel(x, weight, fmt, count=dim - 1)
    for i in range(8):
        # In each row, on its own.
        budget = rmsnorm_budget(x[i], weight, EPS, declared)
        assert judge(right[i], budget).ok
        assert not judge(wrong[i], budget).ok
    if fmt is BF16 and dim >= 1024:
        assert torch.allclose(wrong.float(), right.float(), rtol=1e-2, atol=1e-2)


def test_an_eps_that_is_forgotten_shows_where_it_matters() -> None:
    declared = RMSNormNumerics(row_sum=WARP, out=BF16)
    for scale, caught in ((1e-3, True), (1e-2, True), (1e3, False)):
        x, weight = row(4, 512, BF16, 0, scale)
        assert judge(kernel(x, weight, BF16, eps=0.0), rmsnorm_budget(x, weight, EPS, declared)).ok is not caught


def without_the_last(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    mean = row_sum(x[:, :-1].float(), "fused") / x.shape[-1]
    return (x.float() * (mean + 1e-5).rsqrt() * (1 + weight.float())).bfloat16()


def eps_outside_of_the_root(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    root = (row_sum(x.float(), "fused") / x.shape[-1]).sqrt() + 1e-5
    return (x.float() / root * (1 + weight.float())).bfloat16()


def factor_in_bf16(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return kernel(x, 1 + weight, BF16, eps=1e-5)


def bias_forgotten(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return kernel(x, weight, BF16, eps=1e-5)


@pytest.mark.parametrize("wrong", [without_the_last, eps_outside_of_the_root, factor_in_bf16, bias_forgotten])
def test_other_wrong_kernels_are_caught(wrong: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    x, weight = row(8, 512, BF16, 0, 0.05)
    weight = (weight - 1) * 0.37
    budget = rmsnorm_budget(x, weight, 1e-5, RMSNormNumerics(row_sum=WARP, out=BF16), weight_bias=1.0)
    assert judge(kernel(x, weight, BF16, eps=1e-5, bias=1.0), budget).ok
    assert not judge(wrong(x, weight), budget).ok


def fused(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, fmt: Fmt, normalises: str
) -> dict[str, torch.Tensor]:
    total = x.float() + residual.float()
    stored = total.to(dtype_of(fmt))
    return {"residual": stored, "out": kernel(stored if normalises == "stored" else total, weight, fmt)}


@pytest.mark.parametrize("normalises", ["stored", "sum"])
def test_a_fused_addition(normalises: str) -> None:
    @draws(150)
    @given(
        dim=st.integers(16, 400),
        fmt=FORMATS,
        scale=st.sampled_from([1e-3, 1.0, 300.0]),
        seed=st.integers(0, 2**20),
    )
    def prop(dim: int, fmt: Fmt, scale: float, seed: int) -> None:
        x, weight = row(16, dim, fmt, seed)
        residual, _ = row(16, dim, fmt, seed + 1, scale)
        outputs = fused(x, residual, weight, fmt, normalises)
        said = {
            name: RMSNormNumerics(row_sum=WARP, out=fmt, residual=fmt, normalises=name) for name in ("stored", "sum")
        }
        budgets = fused_add_rmsnorm_budgets(x, residual, weight, EPS, said[normalises])
        for name in ("residual", "out"):
            assert judge(outputs[name], budgets[name]).ok, name
        # For 16 bits, which of the two is normalised is a fact that shows.
        other = fused_add_rmsnorm_budgets(x, residual, weight, EPS, said["sum" if normalises == "stored" else "stored"])
        if fmt is not FP32:
            assert not judge(outputs["out"], other["out"]).ok

    prop()


def test_a_sum_near_a_tie_has_two_legal_values() -> None:
    # In fp32 1 + 2^-8 + 2^-30 is the tie 1 + 2^-8, and that is 1 in bf16; in one rounding it is 1 + 2^-7.
    x, residual = torch.full((1, 4), 1 + 2.0**-7), torch.tensor([[-(2.0**-8) + 2.0**-30] * 3 + [0.0]])
    weight = torch.ones(4)
    declared = RMSNormNumerics(row_sum=WARP, out=BF16, residual=BF16)
    budgets = fused_add_rmsnorm_budgets(x.bfloat16(), residual.double(), weight, EPS, declared)
    for value in (1.0, 1 + 2.0**-7):
        stored = torch.tensor([[value] * 3 + [1 + 2.0**-7]]).bfloat16()
        assert judge(stored, budgets["residual"]).ok
        assert judge(kernel(stored, weight, BF16), budgets["out"]).ok
    assert not judge(torch.tensor([[1 + 2.0**-6] * 3 + [1 + 2.0**-7]]).bfloat16(), budgets["residual"]).ok


def test_nearly_every_output_is_pinned_to_one_bf16() -> None:
    x, weight = row(16, 4096, BF16, 0)
    low, high = interval(rmsnorm_budget(x, weight, EPS, RMSNormNumerics(row_sum=WARP, out=BF16)))
    assert float((low == high).double().mean()) > 0.995


def test_how_much_of_the_bound_is_used() -> None:
    # Sums of squares in lanes are far from their worst case; with few elements the other roundings are in view.
    used = {}
    for dim in (16, 4096):
        x, weight = row(64, dim, FP32, 0)
        budget = rmsnorm_budget(x, weight, EPS, RMSNormNumerics(row_sum=WARP, out=FP32))
        used[dim] = judge(kernel(x, weight, FP32), budget).used
    assert 0.2 < used[16] < 0.9
    assert 0.03 < used[4096] < 0.9


def test_the_reference_in_50_digits() -> None:
    x, weight = row(2, 33, FP32, 3, 1e-3)
    budget = rmsnorm_budget(x, weight, EPS, RMSNormNumerics(row_sum=WARP, out=FP32), weight_bias=1.0)
    with mpmath.workdps(50):
        for i in range(2):
            values = [mpmath.mpf(v) for v in x[i].tolist()]
            root = mpmath.sqrt(sum(v * v for v in values) / len(values) + mpmath.mpf(EPS))
            for j, v in enumerate(values):
                exact = v / root * (1 + mpmath.mpf(weight[j].item()))
                assert abs(exact - budget.ref[i, j].item()) <= 1e-15 * abs(exact)


def test_what_cannot_be_is_refused() -> None:
    x, weight = row(2, 8, BF16, 0)
    declared = RMSNormNumerics(row_sum=WARP, out=BF16)
    with pytest.raises(ValueError, match="eps must be positive"):
        rmsnorm_budget(x, weight, 0.0, declared)
    with pytest.raises(ValueError, match="off by half"):
        rmsnorm_budget(torch.zeros(2, 8), weight, 1e-38, declared)
    with pytest.raises(ValueError, match="off by half"):
        rmsnorm_budget(x, weight, EPS, RMSNormNumerics(row_sum=AccModel(4, "rz", 1), out=BF16))
    with pytest.raises(ValueError, match="format of the stored sum"):
        fused_add_rmsnorm_budgets(x, x, weight, EPS, declared)
    with pytest.raises(ValueError, match="the residual"):
        fused_add_rmsnorm_budgets(x, x[:1], weight, EPS, RMSNormNumerics(row_sum=WARP, out=BF16, residual=BF16))
    with pytest.raises(ValueError, match="normalises"):
        RMSNormNumerics(row_sum=WARP, out=BF16, normalises="both")  # type: ignore[arg-type]
