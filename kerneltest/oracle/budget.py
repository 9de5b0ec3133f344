"""An error budget: what the output must be, and how far the declared arithmetic may take it from there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kerneltest.model import Fmt


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBudget:
    """For one output tensor: ``ref`` and the bound ``hard`` on its absolute error before the last
    rounding, both float64.

    ``out`` is the format of that last rounding. ``ref`` may hold ±Inf where the contract says so; never NaN. Where it
    is -Inf, the kernel may return ``minus_inf`` or anything below.
    """

    ref: torch.Tensor
    hard: torch.Tensor
    out: Fmt
    minus_inf: float = float("-inf")

    def interval(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[RN(ref - hard), RN(ref + hard)] in the output format, as float64.

        Rounding is monotone, so a right kernel's rounded result cannot leave the rounded interval: the final
        rounding costs no slack.
        """
        return round_to(self.ref - self.hard, self.out), round_to(self.ref + self.hard, self.out)

    def half_ulp(self) -> torch.Tensor:
        """Half the spacing of the output format at the far end of the interval."""
        return _spacing(self.ref.abs() + self.hard, self.out) / 2


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
