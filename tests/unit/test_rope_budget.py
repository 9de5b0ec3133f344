"""The RoPE budget by simulation in float32: legal rotations stay inside, and wrong angles and pairs do not."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from attention_cases import draws
from hypothesis import given
from hypothesis import strategies as st

from kerneltest.model import BF16, FP16, FP32, Fmt
from kerneltest.oracle.rope import RopeNumerics, rope_budget
from kerneltest.oracle.verdict import judge

# sin and cos of a library: an ulp of a result of at most 1.
LIBRARY = 2.0**-23
# An entry of a table in bf16: half an ulp below 1, on top of the library's.
TABLE_BF16 = 2.0**-9 + LIBRARY
FORMATS = st.sampled_from([BF16, FP16, FP32])


def dtype_of(fmt: Fmt) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, fmt.name)
    return dtype


def table(half: int, base: float = 1e4) -> torch.Tensor:
    return (base ** -(torch.arange(half).double() / half)).float()


def tokens(count: int, dim: int, fmt: Fmt, seed: int) -> torch.Tensor:
    return torch.randn(count, 2, dim, generator=torch.Generator().manual_seed(seed)).to(dtype_of(fmt))


def kernel(
    x: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    out: Fmt,
    *,
    interleaved: bool,
    variant: str = "plain",
    bug: str = "",
) -> torch.Tensor:
    half = inv_freq.numel()
    where = positions + 1 if bug == "position" else positions
    theta = where.float().unsqueeze(-1) * inv_freq
    if bug == "float16 angle":
        theta = theta.half().float()
    if bug == "bfloat16 frequency":
        theta = where.float().unsqueeze(-1) * inv_freq.bfloat16().float()
    if variant == "turns":
        # As hardware does: a reduction to turns by a rounded 1 / 2π, and no care for the rest.
        theta = (theta * torch.tensor(1 / (2 * math.pi))).double() * (2 * math.pi)
    cos, sin = theta.cos().float().unsqueeze(-2), theta.sin().float().unsqueeze(-2)
    if variant == "table of bf16":
        cos, sin = cos.bfloat16().float(), sin.bfloat16().float()
    if bug == "sign":
        sin = -sin
    wide = x.float()
    if interleaved != (bug == "pairs"):
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    x1, x2 = wide[..., first], wide[..., second]
    y = wide.clone()
    if variant == "fused":
        y[..., first] = (x1.double() * cos.double() - (x2 * sin).double()).float()
        y[..., second] = (x2.double() * cos.double() + (x1 * sin).double()).float()
    elif variant == "products of bf16":
        y[..., first] = (x1 * cos).bfloat16().float() - (x2 * sin).bfloat16().float()
        y[..., second] = (x2 * cos).bfloat16().float() + (x1 * sin).bfloat16().float()
    else:
        y[..., first] = x1 * cos - x2 * sin
        y[..., second] = x2 * cos + x1 * sin
    if bug == "tail":
        y[..., 2 * half :] = 0
    return y.to(dtype_of(out))


DECLARED = {
    "plain": {"sincos_error": LIBRARY},
    "fused": {"sincos_error": LIBRARY},
    "turns": {"sincos_error": LIBRARY},
    "table of bf16": {"sincos_error": TABLE_BF16},
    "products of bf16": {"sincos_error": LIBRARY, "products": BF16},
}


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("variant", DECLARED)
def test_legal_kernels_stay_inside(variant: str, interleaved: bool) -> None:
    @draws(200)
    @given(
        half=st.integers(1, 64),
        tail=st.sampled_from([0, 6]),
        start=st.sampled_from([0, 1, 1000, 131_000, 1_000_000]),
        fmt=FORMATS,
        out=FORMATS,
        seed=st.integers(0, 2**20),
    )
    def prop(half: int, tail: int, start: int, fmt: Fmt, out: Fmt, seed: int) -> None:
        x, positions, inv_freq = tokens(7, 2 * half + tail, fmt, seed), start + torch.arange(7), table(half)
        x[0] = 0
        budget = rope_budget(
            x, positions, inv_freq, RopeNumerics(out=out, **DECLARED[variant]), interleaved=interleaved
        )
        verdict = judge(kernel(x, positions, inv_freq, out, interleaved=interleaved, variant=variant), budget)
        assert verdict.ok, verdict

    prop()


@pytest.mark.parametrize("out", [BF16, FP16, FP32], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(
    ("bug", "start"),
    [
        ("position", 0),
        ("position", 4000),
        ("position", 1_000_000),
        ("float16 angle", 4),
        ("float16 angle", 4000),
        ("bfloat16 frequency", 100),
        ("pairs", 3),
        ("sign", 3),
        ("tail", 3),
    ],
)
def test_wrong_kernels_are_caught(bug: str, start: int, interleaved: bool, out: Fmt) -> None:
    for seed in range(3):
        x, positions, inv_freq = tokens(8, 136, out, seed), start + torch.arange(8), table(64)
        numerics = RopeNumerics(out=out, sincos_error=LIBRARY)
        budget = rope_budget(x, positions, inv_freq, numerics, interleaved=interleaved)
        assert judge(kernel(x, positions, inv_freq, out, interleaved=interleaved), budget).ok
        assert not judge(kernel(x, positions, inv_freq, out, interleaved=interleaved, bug=bug), budget).ok


@pytest.mark.parametrize("variant", ["table of bf16", "products of bf16"])
def test_arithmetic_of_16_bits_must_be_declared(variant: str) -> None:
    x, positions, inv_freq = tokens(16, 128, BF16, 0), torch.arange(16), table(64)
    out = kernel(x, positions, inv_freq, BF16, interleaved=False, variant=variant)
    budget = rope_budget(x, positions, inv_freq, RopeNumerics(out=BF16, sincos_error=LIBRARY), interleaved=False)
    assert not judge(out, budget).ok


def test_frequencies_computed_again_must_be_declared() -> None:
    x, positions, inv_freq = tokens(16, 128, FP32, 0), 131_000 + torch.arange(16), table(64)
    again = inv_freq * (1 + 2.0**-20)
    out = kernel(x, positions, again, FP32, interleaved=False)
    for freq_rel, ok in ((0.0, False), (2.0**-19, True)):
        numerics = RopeNumerics(out=FP32, sincos_error=LIBRARY, freq_rel=freq_rel)
        assert judge(out, rope_budget(x, positions, inv_freq, numerics, interleaved=False)).ok is ok


def test_channels_that_do_not_turn_are_copied() -> None:
    x, positions, inv_freq = tokens(3, 20, BF16, 0), torch.arange(3), table(8)
    budget = rope_budget(x, positions, inv_freq, RopeNumerics(out=BF16, sincos_error=LIBRARY), interleaved=False)
    assert torch.equal(budget.ref[..., 16:], x[..., 16:].double())
    assert not budget.hard[..., 16:].any()


def test_how_much_of_the_bound_is_used() -> None:
    used = {}
    for start in (0, 4000, 131_000):
        x, positions, inv_freq = tokens(64, 128, FP32, 0), start + torch.arange(64), table(64)
        budget = rope_budget(x, positions, inv_freq, RopeNumerics(out=FP32, sincos_error=LIBRARY), interleaved=False)
        used[start] = judge(kernel(x, positions, inv_freq, FP32, interleaved=False), budget).used
    assert all(0.2 < share < 0.9 for share in used.values()), used


def test_a_float32_angle_at_a_long_position_is_as_far_off_as_the_budget_says() -> None:
    # Half an ulp of 131 071 radians is 2^-8: the reference on the float32 table still knows the angle, kernels do not.
    x, positions, inv_freq = torch.ones(1, 1, 2), torch.tensor([131_071]), torch.tensor([1.0 - 2.0**-24])
    budget = rope_budget(x, positions, inv_freq, RopeNumerics(out=FP32, sincos_error=LIBRARY), interleaved=False)
    assert 0.01 < float(budget.hard.max()) < 0.1


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_the_reference_in_50_digits(interleaved: bool) -> None:
    x, positions, inv_freq = tokens(2, 12, FP32, 1), torch.tensor([3, 1_000_003]), table(5)
    budget = rope_budget(x, positions, inv_freq, RopeNumerics(out=FP32, sincos_error=0.0), interleaved=interleaved)
    with mpmath.workdps(50):
        for token, position in enumerate(positions.tolist()):
            for i, frequency in enumerate(inv_freq.tolist()):
                first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + 5)
                x1, x2 = (mpmath.mpf(x[token, 1, channel].item()) for channel in (first, second))
                theta = mpmath.mpf(position) * mpmath.mpf(frequency)
                turned = mpmath.mpc(x1, x2) * mpmath.expj(theta)
                for channel, exact in ((first, turned.real), (second, turned.imag)):
                    assert abs(exact - budget.ref[token, 1, channel].item()) < 1e-15 * (abs(x1) + abs(x2))


def test_what_cannot_be_is_refused() -> None:
    x, positions, inv_freq = tokens(3, 8, BF16, 0), torch.arange(3), table(4)
    numerics = RopeNumerics(out=BF16, sincos_error=LIBRARY)
    with pytest.raises(ValueError, match="float32"):
        rope_budget(x, positions, inv_freq.double(), numerics, interleaved=False)
    for bad in ((x[0], positions, inv_freq), (x, positions[:2], inv_freq), (x, positions, table(5))):
        with pytest.raises(ValueError, match="do not fit"):
            rope_budget(*bad, numerics, interleaved=False)
    with pytest.raises(ValueError, match="negative"):
        RopeNumerics(out=BF16, sincos_error=-1.0)
