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
        rounding costs no slack. (torch rounds float64 to 16 bits by way of float32; a composition of
        monotone roundings is monotone, so this holds for it too.)
        """
        dtype = getattr(torch, self.out.name)
        return (self.ref - self.hard).to(dtype).double(), (self.ref + self.hard).to(dtype).double()

    def half_ulp(self) -> torch.Tensor:
        """Half the spacing of the output format at ``ref``."""
        _, exponent = torch.frexp(self.ref.abs().clamp(min=2.0**self.out.emin))
        return torch.ldexp(torch.ones_like(self.ref), exponent - 1 - self.out.t)
