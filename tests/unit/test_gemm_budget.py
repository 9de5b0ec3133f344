"""The GEMM budget by simulation: legal orders and accumulators stay inside, and wrong ones do not.

An accumulator is simulated in float64: its steps add exactly and are then rounded or cut to its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from attention_cases import draws
from hypothesis import given
from hypothesis import strategies as st

from kerneltest.model import BF16, FP16, FP32, IEEE_FP32, WGMMA_8BIT, WGMMA_16BIT, AccModel, ErrorBudget, Fmt
from kerneltest.oracle.compare import likely
from kerneltest.oracle.gemm import gemm_budget
from kerneltest.oracle.rounding import interval
from kerneltest.oracle.verdict import Tier, judge

PROMOTED_8BIT = AccModel(14, "rz", 32, promote=128)
TRUNCATED = AccModel(24, "rz", 1)


def to_bits(x: torch.Tensor, bits: int, rounding: str) -> torch.Tensor:
    _, exponent = torch.frexp(x)
    grid = torch.exp2((exponent - bits).double())
    return ((x / grid).trunc() if rounding == "rz" else (x / grid).round()) * grid


def accumulate(a: torch.Tensor, b: torch.Tensor, acc: AccModel, *, fused: bool = True) -> torch.Tensor:
    """a @ b, a step after the other; not ``fused``, each product is rounded to fp32 first (for a k_step of 1)."""
    total, part = torch.zeros(a.shape[0], b.shape[1]).double(), torch.zeros(a.shape[0], b.shape[1]).double()
    for start in range(0, a.shape[1], acc.k_step):
        k = slice(start, start + acc.k_step)
        products = a[:, k] @ b[k]
        if not fused:
            products = to_bits(products, 24, "rne")
        part = to_bits(part + products, acc.bits, acc.rounding)
        if acc.promote and (start + acc.k_step) % acc.promote == 0:
            total, part = to_bits(total + part, 24, "rne"), torch.zeros_like(part)
    return to_bits(total + part, 24, "rne") if acc.promote else part


def split(a: torch.Tensor, b: torch.Tensor, acc: AccModel, parts: int) -> torch.Tensor:
    """Split K: the parts are added by a tree."""
    sums = [accumulate(x, y, acc) for x, y in zip(a.chunk(parts, 1), b.chunk(parts, 0), strict=True)]
    while len(sums) > 1:
        sums = [to_bits(sum(sums[i : i + 2]), 24, "rne") for i in range(0, len(sums), 2)]  # type: ignore[call-overload]
    return sums[0]


def library(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() @ b.float()).double()


LEGAL: dict[str, tuple[AccModel, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "fused": (IEEE_FP32, lambda a, b: accumulate(a, b, IEEE_FP32)),
    "products rounded": (IEEE_FP32, lambda a, b: accumulate(a, b, IEEE_FP32, fused=False)),
    "backwards": (IEEE_FP32, lambda a, b: accumulate(a.flip(1), b.flip(0), IEEE_FP32)),
    "split": (IEEE_FP32, lambda a, b: split(a, b, IEEE_FP32, 4)),
    "library": (IEEE_FP32, library),
    "truncated": (TRUNCATED, lambda a, b: accumulate(a, b, TRUNCATED)),
    "wgmma": (WGMMA_16BIT, lambda a, b: accumulate(a, b, WGMMA_16BIT)),
    "wgmma split": (WGMMA_16BIT, lambda a, b: split(a, b, WGMMA_16BIT, 2)),
    "wgmma of 8 bits": (WGMMA_8BIT, lambda a, b: accumulate(a, b, WGMMA_8BIT)),
    "wgmma of 8 bits, promoted": (PROMOTED_8BIT, lambda a, b: accumulate(a, b, PROMOTED_8BIT)),
}


def operands(
    kind: str, m: int, k: int, n: int, seed: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    if kind == "same sign":
        a, b = a.abs() + 0.5, b.abs() + 0.5
    elif kind == "cancelling":
        a[:, k // 2 : 2 * (k // 2)] = -a[:, : k // 2]
        b[k // 2 : 2 * (k // 2)] = b[: k // 2]
    elif kind == "outlier":
        a[:, k // 3] *= 2.0**10
    elif kind == "tiny":
        a, b = a * 2.0**-8, b * 2.0**-6
    return a.to(dtype).double(), b.to(dtype).double()


def e4m3(kind: str, m: int, k: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return operands(kind, m, k, n, seed, torch.float8_e4m3fn)


def rounded(x: torch.Tensor, fmt: Fmt) -> torch.Tensor:
    return x.float().to(getattr(torch, fmt.name))


@pytest.mark.parametrize("name", LEGAL)
def test_legal_kernels_stay_inside(name: str) -> None:
    acc, kernel = LEGAL[name]

    @draws(80)
    @given(
        kind=st.sampled_from(["normal", "same sign", "cancelling", "outlier", "tiny"]),
        k=st.integers(4, 300),
        seed=st.integers(0, 2**20),
        out=st.sampled_from([FP32, BF16, FP16]),
        dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]),
    )
    def prop(kind: str, k: int, seed: int, out: Fmt, dtype: torch.dtype) -> None:
        a, b = operands(kind, 5, k, 6, seed, dtype)
        verdict = judge(rounded(kernel(a, b), out), gemm_budget(a, b, acc=acc, out=out))
        assert verdict.ok, verdict

    prop()


@pytest.mark.parametrize("name", LEGAL)
def test_legal_kernels_pass_for_noise(name: str) -> None:
    acc, kernel = LEGAL[name]

    @draws(60)
    @given(k=st.integers(8, 600), n=st.integers(1, 80), seed=st.integers(0, 2**20), out=st.sampled_from([FP32, BF16]))
    def prop(k: int, n: int, seed: int, out: Fmt) -> None:
        a, b = operands("normal", 6, k, n, seed)
        verdict = judge(rounded(kernel(a, b), out), gemm_budget(a, b, acc=acc, out=out, tier="generic"))
        assert verdict.energy is not None
        assert verdict.ok, verdict

    prop()


@pytest.mark.parametrize("acc", [WGMMA_16BIT, WGMMA_8BIT, PROMOTED_8BIT], ids=["16", "8", "8 promoted"])
def test_inputs_that_are_not_of_mean_zero_keep_the_hard_bound(acc: AccModel) -> None:
    # The largest terms first: partial sums are near the end's value all along, which 0.6 |C| does not cover.
    a, b = operands("same sign", 8, 2048, 8, 0, torch.float8_e4m3fn)
    a = a.sort(1, descending=True).values
    budget = gemm_budget(a, b, acc=acc, out=FP32, tier="generic")
    assert budget.noise is not None
    assert torch.equal(budget.noise.det, budget.hard)
    assert judge(rounded(accumulate(a, b, acc), FP32), budget).ok


@pytest.mark.parametrize("kind", ["normal", "same sign", "cancelling", "outlier", "tiny"])
def test_scales_of_blocks_round_once_each(kind: str) -> None:
    # Two blocks of K, each with a scale of both operands: the scales' product, then its product with the block's sum.
    for seed in range(20):
        a, b = e4m3(kind, 6, 256, 7, seed)
        scale = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed)) + 0.1
        total = torch.zeros(6, 7)
        for block in range(2):
            k = slice(128 * block, 128 * block + 128)
            chunk = accumulate(a[:, k], b[k], WGMMA_8BIT).float()
            total = total + chunk * (scale[0, block] * scale[1, block])
        wide_a = a * scale[0].double().repeat_interleave(128)
        wide_b = b * scale[1].double().repeat_interleave(128).unsqueeze(-1)
        for out in (FP32, BF16):
            budget = gemm_budget(wide_a, wide_b, acc=PROMOTED_8BIT, out=out, scale_roundings=2)
            assert judge(rounded(total, out), budget).ok


def test_a_rounded_scale_must_be_declared() -> None:
    # The accumulator is exact on integers, so that only the scale is left.
    a, b = (x.round() for x in operands("normal", 16, 64, 16, 0))
    scale = torch.tensor(1 / 3)
    out = rounded(accumulate(a, b, IEEE_FP32).float() * scale, FP32)
    exact = AccModel(53, "rne", 1)
    for count, ok in ((0, False), (1, True)):
        budget = gemm_budget(a * scale.double(), b, acc=exact, out=FP32, scale_roundings=count)
        assert judge(out.double(), budget_without_last_rounding(budget)).ok is ok


def budget_without_last_rounding(budget: ErrorBudget) -> ErrorBudget:
    return ErrorBudget(ref=budget.ref, hard=budget.hard, out=Fmt("wide", 40, -126, 127))


@pytest.mark.parametrize("out", [FP32, BF16], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(("k_bug", "kind"), [(0, "normal"), (77, "normal"), (255, "same sign"), (100, "cancelling")])
def test_a_dropped_k_is_caught(k_bug: int, kind: str, out: Fmt) -> None:
    for seed in range(5):
        a, b = operands(kind, 16, 256, 16, seed)
        keep = torch.arange(256) != k_bug
        wrong = accumulate(a[:, keep], b[keep], WGMMA_16BIT)
        assert judge(rounded(wrong, out), gemm_budget(a, b, acc=WGMMA_16BIT, out=out)).failed is Tier.HARD


@pytest.mark.parametrize("out", [FP32, BF16], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("kind", ["normal", "same sign"])
def test_an_accumulator_in_bf16_is_caught(kind: str, out: Fmt) -> None:
    for seed in range(5):
        a, b = operands(kind, 16, 128, 16, seed)
        wrong = accumulate(a, b, AccModel(8, "rne", 1))
        assert not judge(rounded(wrong, out), gemm_budget(a, b, acc=IEEE_FP32, out=out)).ok


@pytest.mark.parametrize("out", [FP32, BF16], ids=lambda fmt: fmt.name)
def test_a_promotion_that_does_not_happen_is_caught(out: Fmt) -> None:
    for seed in range(3):
        a, b = e4m3("same sign", 16, 4096, 16, seed)
        budget = gemm_budget(a, b, acc=PROMOTED_8BIT, out=out)
        assert judge(rounded(accumulate(a, b, PROMOTED_8BIT), out), budget).ok
        assert judge(rounded(accumulate(a, b, WGMMA_8BIT), out), budget).failed is Tier.HARD


def aligned(a: torch.Tensor, b: torch.Tensor, bits: int, k_step: int) -> torch.Tensor:
    """A tensor core that cuts every addend of a step to ``bits`` below the largest one."""
    total = torch.zeros(a.shape[0], b.shape[1]).double()
    for start in range(0, a.shape[1], k_step):
        k = slice(start, start + k_step)
        addends = torch.cat([total.unsqueeze(1), a[:, k].unsqueeze(-1) * b[k]], 1)
        _, exponent = torch.frexp(addends)
        grid = torch.exp2((exponent.amax(1, keepdim=True) - bits).double())
        total = to_bits(((addends / grid).trunc() * grid).sum(1), bits, "rz")
    return total


def test_products_cut_before_they_are_added_must_be_declared() -> None:
    a, b = e4m3("same sign", 4, 4096, 4, 0)
    out = rounded(aligned(a, b, 14, 32), FP32)
    assert not judge(out, gemm_budget(a, b, acc=AccModel(14, "rz", 32), out=FP32)).ok
    assert judge(out, gemm_budget(a, b, acc=AccModel(14, "rz", 1), out=FP32)).ok


@pytest.mark.parametrize("acc", [IEEE_FP32, WGMMA_16BIT, WGMMA_8BIT, PROMOTED_8BIT], ids=["32", "16", "8", "8p"])
def test_integers_leave_no_error_and_no_tolerance(acc: AccModel) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-3, 4, (16, 512), generator=generator).double()
    b = torch.randint(-3, 4, (512, 16), generator=generator).double() * 2.0**-5
    budget = gemm_budget(a, b, acc=acc, out=FP32, tier="exact")
    assert not budget.hard.any()
    right = accumulate(a, b, acc)
    assert judge(rounded(right, FP32), budget).ok
    wrong = right.clone()
    wrong[3, 4] += 2.0**-5
    verdict = judge(rounded(wrong, FP32), budget)
    assert (verdict.comparison.outside, verdict.comparison.first) == (1, (3, 4))
    # One part in 2^15 is nothing to the hard bound of 14 bits.
    assert judge(rounded(wrong, FP32), gemm_budget(a, b, acc=WGMMA_8BIT, out=FP32)).ok


@draws(100)
@given(
    k=st.integers(1, 64),
    largest=st.sampled_from([1, 3, 15, 100]),
    exponent=st.integers(-20, 10),
    seed=st.integers(0, 2**20),
    acc=st.sampled_from([AccModel(8, "rz", 1), AccModel(14, "rz", 4), AccModel(10, "rne", 2, promote=8), IEEE_FP32]),
)
def test_what_is_called_exact_is_exact_in_any_order(
    k: int, largest: int, exponent: int, seed: int, acc: AccModel
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-largest, largest + 1, (6, k), generator=generator).double() * 2.0**exponent
    b = torch.randint(-1, 2, (k, 6), generator=generator).double()
    budget = gemm_budget(a, b, acc=acc, out=FP32, tier="exact")
    exact = budget.hard == 0
    for order in (torch.arange(k), torch.randperm(k, generator=generator)):
        got = accumulate(a[:, order], b[order], acc)
        assert torch.equal(got[exact], budget.ref[exact])
        assert judge(rounded(got, FP32), budget).ok


def test_one_bit_too_many_is_not_exact() -> None:
    four = AccModel(4, "rz", 1)
    for values, ok in (([8.0, 7.0], True), ([8.0, 8.0], True), ([8.0, 9.0], False), ([0.25, 3.75], True)):
        budget = gemm_budget(torch.tensor([values]), torch.ones(2, 1), acc=four, out=FP32, tier="exact")
        assert (float(budget.hard) == 0) is ok


def test_a_row_of_zeros_is_zero() -> None:
    budget = gemm_budget(torch.zeros(2, 8), torch.randn(8, 3), acc=IEEE_FP32, out=FP32)
    assert judge(torch.zeros(2, 3), budget).ok
    assert not judge(torch.full((2, 3), 1e-38), budget).ok


def test_small_products_may_be_flushed() -> None:
    a, b = torch.full((1, 9), 2.0**-70), torch.full((9, 1), 2.0**-58)
    assert judge(torch.zeros(1, 1), gemm_budget(a, b, acc=IEEE_FP32, out=FP32)).ok


# What accumulate() emulates: a step is one cut of an exact sum, and nothing is lost in alignment.
ONE_CUT = AccModel(24, "rz", 16)


def test_how_much_of_the_bound_is_used() -> None:
    # Truncation of same-sign data uses a fifth to a third of the linear bound, data of mean zero much less of it.
    used = {}
    for kind in ("same sign", "normal"):
        a, b = operands(kind, 24, 4096, 24, 1)
        wgmma = rounded(accumulate(a, b, ONE_CUT), FP32)
        budget = gemm_budget(a, b, acc=ONE_CUT, out=FP32, tier="generic")
        assert judge(wgmma, budget).ok
        used[kind] = judge(wgmma, budget).used
        if kind == "normal":
            assert budget.noise is not None
            used["noise"] = float(((wgmma.double() - budget.ref).abs() / likely(budget, budget.noise)).max())
    assert 0.1 < used["same sign"] < 0.5
    assert used["normal"] < 0.05
    assert 0.02 < used["noise"] < 0.5


def test_noise_sees_what_the_hard_bound_does_not() -> None:
    # At K = 8192 Σ|a||b| is 0.6 K, partial sums stay near K^½: what one k adds is more often outside.
    a, b = operands("normal", 32, 8192, 32, 0)
    budget = gemm_budget(a, b, acc=ONE_CUT, out=BF16, tier="generic")
    assert judge(rounded(accumulate(a, b, ONE_CUT), BF16), budget).ok
    keep = torch.arange(8192) != 1000
    wrong = judge(rounded(accumulate(a[:, keep], b[keep], ONE_CUT), BF16), budget).comparison
    assert wrong.outside < 0.45 * wrong.total
    assert wrong.unlikely > 0.55 * wrong.total
    assert budget.noise is not None
    pinned = []
    for allowed in (budget, replace(budget, hard=likely(budget, budget.noise))):
        low, high = interval(allowed)
        pinned.append(float((low == high).double().mean()))
    assert pinned[0] < 0.1
    assert pinned[1] > 0.5


def test_the_reference_in_exact_arithmetic() -> None:
    a, b = operands("cancelling", 3, 40, 3, 5, torch.float32)
    budget = gemm_budget(a, b, acc=IEEE_FP32, out=FP32)
    for i in range(3):
        for j in range(3):
            products = [Fraction(x) * Fraction(y) for x, y in zip(a[i].tolist(), b[:, j].tolist(), strict=True)]
            magnitude = sum(map(abs, products))
            assert abs(Fraction(float(budget.ref[i, j])) - sum(products)) <= Fraction(1, 2**47) * magnitude
            assert float(budget.hard[i, j]) == pytest.approx(IEEE_FP32.gamma(40) * float(magnitude), rel=1e-9)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot multiply"):
        gemm_budget(torch.zeros(2, 3), torch.zeros(2, 3), acc=IEEE_FP32, out=FP32)
    with pytest.raises(ValueError, match="scale_roundings"):
        gemm_budget(torch.zeros(2, 3), torch.zeros(3, 3), acc=IEEE_FP32, out=FP32, scale_roundings=-1)
