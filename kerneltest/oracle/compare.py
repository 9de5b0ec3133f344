"""Compare an output with its budget: first where it is not finite (tier T0), then the hard interval (tier T1)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kerneltest.model import ErrorBudget, Noise
from kerneltest.model.numerics import TYPICAL_ROUNDING, WORST_ROUNDING
from kerneltest.oracle.optional import has_triton as _has_triton
from kerneltest.oracle.rounding import Z, half_ulp, interval

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What one output looks like against its budget.

    ``nonfinite``: elements that are NaN, or infinite where the reference is not, or finite where it is infinite.
    ``outside``: finite elements outside the interval. ``used``: the largest error / (bound + half an ulp) of the
    finite elements. ``first`` is the first bad element, ``worst`` the first with the largest share. ``nonfinite_map``
    (bool, of the output's shape): where the nonfinite elements are.
    With noise in the budget: ``unlikely`` elements lie outside the statistical interval, and ``row_energy`` [...] is
    the mean of error² / variance over the last dimension.
    """

    total: int
    nonfinite: int
    outside: int
    used: float
    first: Index | None
    worst: Index | None
    actual: float = 0.0
    expected: float = 0.0
    bound: float = 0.0
    nonfinite_map: torch.Tensor | None = None
    unlikely: int = 0
    row_energy: torch.Tensor | None = None

    @property
    def ok(self) -> bool:
        return self.nonfinite == 0 and self.outside == 0


def compare(actual: torch.Tensor, budget: ErrorBudget) -> Comparison:
    """Judge ``actual`` (any float dtype) against ``budget`` of the same shape; raises ValueError on another shape.

    It is done where ``budget.ref`` is: on a GPU in one pass, where Triton can be imported. Bounds are judged as they
    are stored: to narrow them here would read and write more bytes than the pass then saves.
    """
    if actual.shape != budget.ref.shape:
        raise ValueError(f"shape {tuple(actual.shape)} against a budget of shape {tuple(budget.ref.shape)}")
    if actual.numel() == 0:
        return Comparison(total=0, nonfinite=0, outside=0, used=0.0, first=None, worst=None)
    if budget.ref.is_cuda and _has_triton():
        return compare_in_one_pass(actual, budget)
    return compare_step_by_step(actual, budget)


def compare_in_one_pass(actual: torch.Tensor, budget: ErrorBudget) -> Comparison:
    """What :func:`compare` does on a GPU; on a CPU it needs Triton's interpreter. At least one element.

    The map of nonfinite elements costs no memory where there are none; only a failure pays for it. The energies of
    16-bit outputs are off by what :mod:`kerneltest.oracle.fused` proves; all else is as in step by step.
    """
    from kerneltest.oracle.fused import launch

    done = launch(actual, budget)
    seen = done.read()
    nonfinite = torch.zeros((), dtype=torch.bool, device=budget.ref.device).expand(actual.shape)
    if seen.nonfinite:
        nonfinite, _ = _nonfinite_and_within(actual.double().to(budget.ref.device), budget)
    return Comparison(
        total=actual.numel(),
        nonfinite=seen.nonfinite,
        outside=seen.outside,
        used=seen.used,
        first=None if seen.first is None else _unravel(seen.first, actual.shape),
        worst=_unravel(seen.worst, actual.shape),
        actual=seen.actual,
        expected=seen.expected,
        bound=seen.bound,
        nonfinite_map=nonfinite,
        unlikely=seen.unlikely,
        row_energy=done.row_energy,
    )


def compare_step_by_step(actual: torch.Tensor, budget: ErrorBudget) -> Comparison:
    """What :func:`compare` does without a GPU or without Triton. At least one element."""
    value = actual.double().to(budget.ref.device)
    inf = budget.ref.isinf()
    nonfinite, within = _nonfinite_and_within(value, budget)
    outside = ~nonfinite & ~inf & ~within
    judged = ~inf & value.isfinite()
    share = torch.where(judged, (value - budget.ref).abs() / (budget.hard + half_ulp(budget)), 0.0)
    bad = nonfinite | outside
    first = _unravel(int(bad.flatten().to(torch.uint8).argmax()), value.shape) if bool(bad.any()) else None
    worst = _unravel(int(share.flatten().argmax()), value.shape)
    unlikely, row_energy = 0, None
    if budget.noise is not None:
        likely_low, likely_high = interval(replace(budget, hard=likely(budget, budget.noise)))
        unlikely = int((~inf & ~((likely_low <= value) & (value <= likely_high))).sum())
        error, expected = value - budget.ref, variance(budget, budget.noise)
        row_energy = torch.where(judged & (expected > 0), error.square() / expected, 0.0).mean(-1)
    at = first if bool(nonfinite.any()) and first is not None else worst
    return Comparison(
        total=value.numel(),
        nonfinite=int(nonfinite.sum()),
        outside=int(outside.sum()),
        used=float(share[worst]),
        first=first,
        worst=worst,
        actual=float(value[at]),
        expected=float(budget.ref[at]),
        bound=float(budget.hard[at]),
        nonfinite_map=nonfinite,
        unlikely=unlikely,
        row_energy=row_energy,
    )


def _nonfinite_and_within(value: torch.Tensor, budget: ErrorBudget) -> tuple[torch.Tensor, torch.Tensor]:
    """Which elements of a float64 output are not finite as they should be, and which lie inside the interval."""
    low, high = interval(budget)
    # Every comparison is written so that NaN fails it.
    as_expected = torch.where(budget.ref > 0, value == budget.ref, value <= budget.minus_inf)
    # An infinite result is right where the interval reaches beyond the format's range.
    within = (low <= value) & (value <= high)
    return ~torch.where(budget.ref.isinf(), as_expected, value.isfinite() | within), within


def likely(budget: ErrorBudget, noise: Noise) -> torch.Tensor:
    """A bound on the error before the last rounding that independent rounding errors respect, but for 4e-16."""
    scale = Z * WORST_ROUNDING / TYPICAL_ROUNDING
    return torch.minimum(budget.hard.double(), noise.det.double() + scale * noise.sigma.double())


def variance(budget: ErrorBudget, noise: Noise) -> torch.Tensor:
    """The expected square of an element's error, the last rounding included; a third of ``det`` counts as noise."""
    return noise.sigma.double().square() + half_ulp(budget).square() / 3 + (noise.det.double() / 3).square()


def narrowed(
    budget: ErrorBudget, hard: torch.dtype = torch.float32, noise: torch.dtype = torch.bfloat16
) -> ErrorBudget:
    """The same budget with ``hard`` as float32 and ``det`` and ``sigma`` as bfloat16, for a pass over fewer bytes.

    Each is rounded up, so bounds stay bounds: by a factor of 1 + 2^-23 or 1 + 2^-7 at most, above subnormal numbers.
    So T1 and ``used`` keep 23 bits; T2's bound and T3's deviations are wider by less than 1 %.
    """

    def up(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        near = value.to(dtype)
        return torch.where(near.double() < value, torch.nextafter(near, torch.full_like(near, torch.inf)), near)

    narrow = budget.noise and replace(
        budget.noise, det=up(budget.noise.det, noise), sigma=up(budget.noise.sigma, noise)
    )
    return replace(budget, hard=up(budget.hard, hard), noise=narrow)


def _unravel(flat: int, shape: torch.Size) -> Index:
    index: list[int] = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))
