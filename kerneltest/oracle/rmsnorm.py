"""The error budget of RMSNorm, alone or fused with the addition of a residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kerneltest.model import FP32, AccModel, ErrorBudget, Fmt
from kerneltest.model.numerics import FLUSHED
from kerneltest.oracle.rounding import interval

# Relative error of rsqrt.approx.f32 is 2^-22.9 as the PTX manual documents it; that of 1 / sqrt is no larger.
RSQRT = 2.0**-22


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSNormNumerics:
    """The declared arithmetic of an RMSNorm kernel.

    ``row_sum``: how the squares of a row are added; its ``k_step`` is the number of lanes that add side by side, its
    ``extra`` the depth of the tree that joins them.
    ``cast_before_weight``: the format that the normalised row is rounded to before the weight multiplies it (None: it
    stays in fp32). For the fused addition ``residual`` is the format that the sum is stored in, and ``normalises``
    says whether the row that is normalised is the stored one or the sum in fp32.

    Raises ValueError for arithmetic that cannot be.
    """

    row_sum: AccModel
    out: Fmt
    cast_before_weight: Fmt | None = None
    residual: Fmt | None = None
    normalises: Literal["stored", "sum"] = "stored"

    def __post_init__(self) -> None:
        if self.normalises not in ("stored", "sum"):
            raise ValueError(f"normalises must be 'stored' or 'sum', got {self.normalises!r}")


def rmsnorm_budget(
    x: torch.Tensor, weight: torch.Tensor, eps: float, numerics: RMSNormNumerics, *, weight_bias: float = 0.0
) -> ErrorBudget:
    """The budget of y = x (weight + weight_bias) / (Σx²/D + eps)^½: ``x`` [..., D], ``weight`` [D], any float dtype.

    ``weight_bias`` is 1 where the kernel multiplies by 1 + weight, as Gemma does.

    Nothing cancels, so the bound is relative. The mean of squares is off by γ(D), and by four roundings: 1 / D, the
    product with it, eps as a float32, the sum with it. Its root halves that. The inverse root is off by 2^-22; two
    products, the sum with a ``weight_bias`` and ``cast_before_weight`` are roundings each. Numbers below the normal
    range may be flushed to zero, and 0 stays 0.

    Raises ValueError unless eps is positive, and where the mean of squares may be off by half or more.
    """
    return _budget(x.double(), torch.zeros_like(x, dtype=torch.float64), weight, eps, numerics, weight_bias)


def fused_add_rmsnorm_budgets(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    numerics: RMSNormNumerics,
    *,
    weight_bias: float = 0.0,
) -> dict[str, ErrorBudget]:
    """The budgets of ``residual`` = x + residual, stored in ``numerics.residual``, and of ``out``, its RMSNorm.

    The norm is that of the *stored* sum if the declaration says so. A kernel may add in fp32 and then round
    once more, so a few sums have two legal values, one on either side of a tie: the row is taken from the middle, and
    half their distance is passed on as an error of the input.

    Raises ValueError as :func:`rmsnorm_budget` does, for shapes that differ, and without a format of the sum.
    """
    if numerics.residual is None:
        raise ValueError("a fused addition must declare the format of the stored sum in 'residual'")
    if x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)}, the residual {tuple(residual.shape)}")
    total = x.double() + residual.double()
    in_fp32 = FP32.u * total.abs()
    flushed = torch.where(total != 0, FLUSHED, 0.0)
    # A sum stored in fp32 is rounded once, and the interval knows of the last rounding.
    before_rounding = flushed if numerics.residual.t >= FP32.t else in_fp32 + flushed
    stored = ErrorBudget(ref=total, hard=before_rounding, out=numerics.residual)
    if numerics.normalises == "sum":
        row, error = total, in_fp32 + flushed
    else:
        low, high = interval(stored)
        row, error = (low + high) / 2, (high - low) / 2
    return {"residual": stored, "out": _budget(row, error, weight, eps, numerics, weight_bias)}


def _budget(
    x: torch.Tensor,
    x_error: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    numerics: RMSNormNumerics,
    weight_bias: float,
) -> ErrorBudget:
    if eps <= 0:
        raise ValueError(f"eps must be positive, got {eps}")
    u, gamma = FP32.u, numerics.row_sum.gamma(x.shape[-1])
    factor = weight.double() + weight_bias
    mean_square = x.square().mean(-1, keepdim=True) + eps
    inverse = mean_square.rsqrt()
    moved = (x_error * (2 * x.abs() + x_error)).mean(-1, keepdim=True) + 2 * FLUSHED
    square_error = gamma + 4 * u * (1 + gamma) + (1 + gamma + 4 * u) * moved / mean_square
    if not bool((square_error < 0.5).all()):
        raise ValueError("the mean of squares may be off by half or more: eps or the declared row_sum is too small")
    relative = (1 + RSQRT) * (1 + (3 if weight_bias else 2) * u) / (1 - square_error).sqrt() - 1
    flushed = FLUSHED * (1 + factor.abs() + inverse)
    if cast := numerics.cast_before_weight:
        relative = (1 + relative) * (1 + cast.u) - 1
        flushed = flushed + cast.eta * factor.abs()
    ref = x * inverse * factor
    spread = factor.abs() * inverse * (x.abs() * relative + x_error * (1 + relative))
    hard = torch.where((x != 0) & (factor != 0), spread + flushed, spread)
    return ErrorBudget(ref=ref, hard=hard, out=numerics.out)
