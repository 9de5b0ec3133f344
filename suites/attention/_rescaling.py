"""What it costs to multiply an output by the scale of V after it was rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kerneltest.model import ErrorBudget, Fmt, Noise
from kerneltest.model.numerics import TYPICAL_ROUNDING

if TYPE_CHECKING:
    import torch


def rounded_before_scale(budget: ErrorBudget, fmt: Fmt, scale: float, *, slack: float = 1.0) -> ErrorBudget:
    """The budget of an output that was rounded to ``fmt``, and then multiplied by ``scale`` and rounded again.

    ``budget``: of the scaled output with the last rounding alone. With x the exact output and e the bound on its error
    before any rounding, the first rounding is off by u (|x| + e), and by η scale below the format's normal range, where
    x and e are those after the scale. On generic inputs it is noise of standard deviation 0.425 u |x|.
    """
    ref = budget.ref.abs()
    first = slack * (fmt.u * ref + scale * fmt.eta)
    hard = (1 + fmt.u) * budget.hard + first
    return replace(budget, hard=hard, noise=_noise(budget.noise, ref, fmt, slack * scale * fmt.eta, slack))


def _noise(noise: Noise | None, ref: torch.Tensor, fmt: Fmt, floor: float, slack: float) -> Noise | None:
    if noise is None:
        return None
    along, own = noise.along, slack * TYPICAL_ROUNDING * fmt.u * ref

    def with_rounding(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        deviation, bias = along(weight)
        return (deviation.square() + (weight * own).square().sum(-1)).sqrt(), bias + floor * weight.abs().sum(-1)

    return replace(
        noise, det=noise.det + floor, sigma=(noise.sigma.square() + own.square()).sqrt(), along=with_rounding
    )
