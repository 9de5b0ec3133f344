"""The interval: what a right kernel may return always passes, one step further fails, and NaN never passes."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from attention_cases import draws
from hypothesis import given
from hypothesis import strategies as st

from kerneltest.model import BF16, FP16, FP32, ErrorBudget, Fmt
from kerneltest.oracle.compare import compare
from kerneltest.oracle.rounding import round_to

FORMATS = {fmt.name: fmt for fmt in (BF16, FP16, FP32)}
INF, NAN = math.inf, math.nan


def rounded(x: Fraction, fmt: Fmt) -> float:
    """To nearest, ties to even, in exact arithmetic, for x of at most 53 bits far from the largest of the format."""
    _, exponent = math.frexp(float(x))
    ulp = Fraction(2) ** (max(exponent - 1, fmt.emin) + 1 - fmt.t)
    return float(round(x / ulp) * ulp)


def neighbour(x: float, fmt: Fmt, towards: float) -> float:
    """The next number of the format; -0 and 0 are one number."""
    dtype = getattr(torch, fmt.name)
    integer = torch.int32 if dtype.itemsize == 4 else torch.int16
    up = towards > x
    if x == 0:
        bits, negative = 1, not up
    else:
        bits = int(torch.tensor(abs(x), dtype=dtype).view(integer))
        negative = x < 0
        bits += 1 if up != negative else -1
    value = float(torch.tensor(bits, dtype=integer).view(dtype))
    return -value if negative else value


def budget(ref: float | list[float], hard: float | list[float], fmt: Fmt) -> ErrorBudget:
    ref, hard = (torch.as_tensor(value, dtype=torch.float64).reshape(-1) for value in (ref, hard))
    return ErrorBudget(ref=ref, hard=hard, out=fmt)


def output(values: float | list[float], fmt: Fmt) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1).to(getattr(torch, fmt.name))


@st.composite
def judged(draw: st.DrawFn) -> tuple[Fmt, Fraction, Fraction, Fraction]:
    """A format, ref, e and an x no further than e from ref, many of them at ties of the format.

    x is a number of the precision in which a kernel holds its result before the last rounding: float32 for the
    16-bit formats. (For float32 the few extra bits of a float64 stand in for the real numbers.)
    """
    fmt = draw(st.sampled_from([BF16, FP16, FP32]))
    bits = 49 if fmt is FP32 else 22

    def integer(low: int, high: int) -> st.SearchStrategy[int]:
        near_ties = st.builds(
            lambda odd, shift, off: ((2 * odd + 1) << shift) + off,
            st.integers(-(2**fmt.t), 2**fmt.t),
            st.integers(0, bits - fmt.t),
            st.integers(-1, 1),
        )
        return st.integers(low, high) | near_ties.map(lambda n: min(max(n, low), high))

    ref = draw(integer(-(2**bits), 2**bits))
    e = draw(st.just(0) | integer(0, 2**4) | integer(0, 2**bits))
    x = draw(st.sampled_from([ref - e, ref + e]) | integer(ref - e, ref + e))
    # The last exponents reach the subnormal numbers of the format.
    scale = Fraction(2) ** draw(st.sampled_from([-bits, 0, fmt.emin - fmt.t - 2, fmt.emin - bits + 4]))
    if fmt is FP16:
        scale = min(scale, Fraction(1, 2**8))
    if fmt is BF16:
        scale = max(scale, Fraction(2) ** -149)
    return fmt, ref * scale, e * scale, x * scale


@draws(600)
@given(judged())
def test_what_a_right_kernel_rounds_to_always_passes(example: tuple[Fmt, Fraction, Fraction, Fraction]) -> None:
    fmt, ref, e, x = example
    assert abs(Fraction(float(x)) - ref) <= e
    result = compare(output(rounded(x, fmt), fmt), budget(float(ref), float(e), fmt))
    assert result.ok
    assert (result.nonfinite, result.outside, result.first) == (0, 0, None)
    # Half an ulp is measured at ref; at the result, past a power of two, it may be twice that.
    assert 0 <= result.used <= 1


@draws(300)
@given(judged(), st.booleans())
def test_one_number_outside_the_interval_fails(example: tuple[Fmt, Fraction, Fraction, Fraction], above: bool) -> None:
    fmt, ref, e, _ = example
    edge = rounded(ref + e if above else ref - e, fmt)
    wrong = neighbour(edge, fmt, INF if above else -INF)
    assert wrong > edge if above else wrong < edge
    result = compare(output(wrong, fmt), budget(float(ref), float(e), fmt))
    assert (result.ok, result.nonfinite, result.outside, result.first) == (False, 0, 1, (0,))
    assert compare(output(edge, fmt), budget(float(ref), float(e), fmt)).ok


@pytest.mark.parametrize("name", FORMATS)
def test_ties_go_to_even_and_leave_one_number(name: str) -> None:
    fmt = FORMATS[name]
    one, next_, after = 1.0, 1 + 2 * fmt.u, 1 + 4 * fmt.u
    tie, next_tie = 1 + fmt.u, 1 + 3 * fmt.u
    for ref, right, wrong in ((tie, one, next_), (next_tie, after, next_)):
        assert compare(output(right, fmt), budget(ref, 0.0, fmt)).ok
        assert not compare(output(wrong, fmt), budget(ref, 0.0, fmt)).ok
    # The smallest error that crosses the tie lets both numbers in.
    for value in (one, next_):
        assert compare(output(value, fmt), budget(tie, fmt.u / 2**8, fmt)).ok


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("hard", [0.0, 1.0, INF])
@pytest.mark.parametrize("ref", [0.0, 1.0, INF, -INF])
def test_nan_fails_whatever_is_allowed(name: str, hard: float, ref: float) -> None:
    fmt = FORMATS[name]
    result = compare(output(NAN, fmt), budget(ref, hard, fmt))
    assert (result.ok, result.nonfinite, result.outside, result.used) == (False, 1, 0, 0.0)
    assert result.first == (0,)
    assert math.isnan(result.actual)


def test_nan_everywhere() -> None:
    ref = torch.zeros(3, 4, 5, dtype=torch.float64)
    result = compare(
        torch.full((3, 4, 5), NAN, dtype=torch.bfloat16), ErrorBudget(ref=ref, hard=torch.ones_like(ref), out=BF16)
    )
    assert (result.ok, result.total, result.nonfinite, result.outside) == (False, 60, 60, 0)
    assert (result.used, result.first) == (0.0, (0, 0, 0))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("ref", "actual", "nonfinite"),
    [
        (INF, INF, 0),
        (-INF, -INF, 0),
        (INF, -INF, 1),
        (-INF, INF, 1),
        (-INF, 0.0, 1),
        (INF, 60000.0, 1),
        (-INF, NAN, 1),
        (0.0, INF, 1),
        (0.0, -INF, 1),
        (50000.0, INF, 1),
    ],
)
def test_infinity_must_be_where_the_reference_has_it(name: str, ref: float, actual: float, nonfinite: int) -> None:
    fmt = FORMATS[name]
    for hard in (0.0, 1.0, 2.0**12):
        result = compare(output(actual, fmt), budget(ref, hard, fmt))
        assert (result.nonfinite, result.outside, result.ok) == (nonfinite, 0, nonfinite == 0)
        assert result.used == 0.0


@pytest.mark.parametrize(
    ("actual", "ok"),
    [(-INF, True), (-60000.0, True), (-50000.0, True), (-49999.0, False), (0.0, False), (INF, False), (NAN, False)],
)
def test_a_declared_stand_in_for_minus_infinity(actual: float, ok: bool) -> None:
    ref = torch.tensor([-INF], dtype=torch.float64)
    allowed = ErrorBudget(ref=ref, hard=torch.zeros_like(ref), out=FP32, minus_inf=-50000.0)
    assert compare(output(actual, FP32), allowed).ok is ok
    # Elsewhere it means nothing.
    assert not compare(output(-50000.0, FP32), ErrorBudget(ref=-ref, hard=ref.exp(), out=FP32, minus_inf=-50000.0)).ok
    assert not compare(output(-50000.0, FP32), ErrorBudget(ref=ref.exp(), hard=ref.exp(), out=FP32, minus_inf=-5e4)).ok


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 128)])
def test_nothing_to_compare_is_no_failure(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape, dtype=torch.float64)
    result = compare(empty.bfloat16(), ErrorBudget(ref=empty, hard=empty, out=BF16))
    assert (result.ok, result.total, result.used, result.first, result.worst) == (True, 0, 0.0, None, None)


@pytest.mark.parametrize(("actual", "ref"), [((2, 3), (3, 2)), ((6,), (2, 3)), ((1, 3), (2, 3)), ((0,), (0, 4))])
def test_another_shape_is_refused(actual: tuple[int, ...], ref: tuple[int, ...]) -> None:
    expected = torch.zeros(ref, dtype=torch.float64)
    with pytest.raises(ValueError, match="shape") as caught:
        compare(torch.zeros(actual), ErrorBudget(ref=expected, hard=expected, out=FP32))
    assert str(actual) in str(caught.value)
    assert str(ref) in str(caught.value)


def test_counts_and_places_of_a_made_up_output() -> None:
    # bf16 at 1: spacing 2^-7, so half of it is 2^-8 = 1/256. Bound 3/256, so an error of n/256 uses n/4.
    unit = 2.0**-8
    ref = torch.ones(2, 3, dtype=torch.float64)
    allowed = ErrorBudget(ref=ref, hard=torch.full_like(ref, 3 * unit), out=BF16)
    right = torch.tensor([[0, 2, 0], [-1, 0, 0]], dtype=torch.float64) * unit + 1
    result = compare(right.bfloat16(), allowed)
    assert (result.ok, result.total, result.used, result.first, result.worst) == (True, 6, 0.5, None, (0, 1))

    # 1 + 3/256 is a tie, to even is 1 + 4/256: the last number inside, which uses all of it. 1 + 6/256 is outside.
    edge = right.clone()
    edge[1, 2] = 1 + 4 * unit
    result = compare(edge.bfloat16(), allowed)
    assert (result.ok, result.used, result.worst) == (True, 1.0, (1, 2))

    wrong = edge.clone()
    wrong[0, 2], wrong[1, 1] = 1 + 6 * unit, 1 - 8 * unit
    result = compare(wrong.bfloat16(), allowed)
    assert (result.ok, result.nonfinite, result.outside, result.used) == (False, 0, 2, 2.0)
    assert (result.first, result.worst) == ((0, 2), (1, 1))
    assert (result.actual, result.expected, result.bound) == (1 - 8 * unit, 1.0, 3 * unit)

    # What is not finite is shown first, and has no share.
    wrong[1, 0] = NAN
    wrong[1, 2] = INF
    result = compare(wrong.bfloat16(), allowed)
    assert (result.nonfinite, result.outside, result.used) == (2, 2, 2.0)
    assert result.worst == (1, 1)


def test_a_wider_output_than_the_budget_is_judged_by_the_budget() -> None:
    # A kernel that promises bf16 but returns float32 may not hide between two numbers of bf16.
    allowed = budget(1.0, 0.0, BF16)
    assert compare(torch.tensor([1.0]), allowed).ok
    assert not compare(torch.tensor([1.0 + 2.0**-20]), allowed).ok


@pytest.mark.parametrize("name", FORMATS)
def test_overflow_is_right_where_the_interval_leaves_the_format(name: str) -> None:
    fmt = FORMATS[name]
    top = output(fmt.max, fmt)
    assert bool(top.isfinite())
    near = budget(fmt.max, fmt.max * fmt.u, fmt)  # the upper end rounds to Inf
    assert compare(output(INF, fmt), near).ok
    assert not compare(output(-INF, fmt), near).ok
    assert not compare(output(INF, fmt), budget(fmt.max, 0.0, fmt)).ok


def test_rounding_is_done_once() -> None:
    # By way of float32 this would first become the tie 1 + 3 * 2^-8 and then round up to 1 + 2^-6.
    assert round_to(torch.tensor([1 + 3 * 2.0**-8 - 2.0**-40], dtype=torch.float64), BF16).item() == 1 + 2.0**-7


@given(value=st.floats(allow_nan=False, width=32))
@draws(500)
def test_rounding_agrees_with_torch_where_torch_rounds_once(value: float) -> None:
    single = torch.tensor([value], dtype=torch.float32)
    for fmt in (BF16, FP16):
        expected = single.to(getattr(torch, fmt.name)).double()
        assert round_to(single.double(), fmt).item() == expected.item()
