"""Rounding to a floating-point format, and the interval in it that an error budget allows."""

from __future__ import annotations

import torch

from kerneltest.model import ErrorBudget, Fmt

# Standard deviations that no sum of independent errors reaches: 2 exp(-8.5² / 2) = 4e-16 for each element.
Z = 8.5


def interval(budget: ErrorBudget) -> tuple[torch.Tensor, torch.Tensor]:
    """[RN(ref - hard), RN(ref + hard)] in the output format, as float64.

    Rounding is monotone, so a right kernel's rounded result cannot leave the rounded interval: the final rounding
    costs no slack.
    """
    return round_to(budget.ref - budget.hard, budget.out), round_to(budget.ref + budget.hard, budget.out)


def half_ulp(budget: ErrorBudget) -> torch.Tensor:
    """Half the spacing of the output format at the far end of the interval."""
    return _spacing(budget.ref.abs() + budget.hard, budget.out) / 2


def round_to(value: torch.Tensor, fmt: Fmt) -> torch.Tensor:
    """Round float64 to the nearest number of ``fmt``, ties to even, overflow to Inf; the result is float64.

    In one step: torch's own conversion to 16 bits goes by way of float32, and rounding twice is not rounding.
    """
    spacing = _spacing(value, fmt)
    rounded = torch.where(value.isfinite(), torch.round(value / spacing) * spacing, value)
    return torch.where(rounded.abs() > fmt.max, torch.copysign(torch.full_like(value, torch.inf), value), rounded)


def _spacing(value: torch.Tensor, fmt: Fmt) -> torch.Tensor:
    """The distance between neighbours of ``fmt`` at ``value``: 2^(e - t + 1) from 2^e up to 2^(e + 1)."""
    _, exponent = torch.frexp(value.abs().clamp(min=2.0**fmt.emin).nan_to_num(posinf=fmt.max))
    return torch.ldexp(torch.ones_like(value), exponent - fmt.t)
