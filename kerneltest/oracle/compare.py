"""Compare an output with its budget: first where it is not finite (tier T0), then the hard interval (tier T1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kerneltest.model import ErrorBudget
from kerneltest.oracle.rounding import half_ulp, interval

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What one output looks like against its budget.

    ``nonfinite``: elements that are NaN, or infinite where the reference is not, or finite where it is infinite.
    ``outside``: finite elements outside the interval. ``used``: the largest error / (bound + half an ulp) of the
    finite elements. ``first`` is the first bad element, ``worst`` the one with the largest share.
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

    @property
    def ok(self) -> bool:
        return self.nonfinite == 0 and self.outside == 0


def compare(actual: torch.Tensor, budget: ErrorBudget) -> Comparison:
    """Judge ``actual`` (any float dtype) against ``budget`` of the same shape; raises ValueError on another shape."""
    if actual.shape != budget.ref.shape:
        raise ValueError(f"shape {tuple(actual.shape)} against a budget of shape {tuple(budget.ref.shape)}")
    if actual.numel() == 0:
        return Comparison(total=0, nonfinite=0, outside=0, used=0.0, first=None, worst=None)
    value = actual.double().to(budget.ref.device)
    low, high = interval(budget)
    inf = budget.ref.isinf()
    # Every comparison is written so that NaN fails it.
    as_expected = torch.where(budget.ref > 0, value == budget.ref, value <= budget.minus_inf)
    # An infinite result is right where the interval reaches beyond the format's range.
    within = (low <= value) & (value <= high)
    nonfinite = ~torch.where(inf, as_expected, value.isfinite() | within)
    outside = ~nonfinite & ~inf & ~within
    judged = ~inf & value.isfinite()
    share = torch.where(judged, (value - budget.ref).abs() / (budget.hard + half_ulp(budget)), 0.0)
    bad = nonfinite | outside
    first = _unravel(int(bad.flatten().to(torch.uint8).argmax()), value.shape) if bool(bad.any()) else None
    worst = _unravel(int(share.flatten().argmax()), value.shape)
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
    )


def _unravel(flat: int, shape: torch.Size) -> Index:
    index: list[int] = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))
