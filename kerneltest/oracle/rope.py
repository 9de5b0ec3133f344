"""The error budget of rotary position embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kerneltest.model import FP32, ErrorBudget, Fmt
from kerneltest.model.numerics import FLUSHED

# The product of position and frequency, the constant 1 / 2π of a reduction to one turn, and the product with that.
ANGLE_ROUNDINGS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeNumerics:
    """The declared arithmetic of a kernel that rotates.

    ``sincos_error``: absolute error of a sine or cosine at the angle that it is given, over all angles that occur;
    where they come from a table, that of its entries. ``freq_rel``: relative error of the frequencies where a kernel
    computes them again rather than reading the table of the reference. ``products``: the format that x cos and x sin
    are rounded to before they are added.

    Raises ValueError for errors that are negative.
    """

    out: Fmt
    sincos_error: float
    freq_rel: float = 0.0
    products: Fmt = FP32

    def __post_init__(self) -> None:
        if self.sincos_error < 0 or self.freq_rel < 0:
            raise ValueError(f"errors must not be negative, got {self.sincos_error} and {self.freq_rel}")


def rope_budget(
    x: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    numerics: RopeNumerics,
    *,
    interleaved: bool,
) -> ErrorBudget:
    """The budget of x rotated by the angles position * inv_freq, in pairs of channels.

    ``x`` [tokens, heads, D] in any float dtype, ``positions`` [tokens] integers below 2^24, ``inv_freq`` [R / 2] in
    float32, radians per token, with R <= D; channels from R on are copied. Pairs are channels (2i, 2i + 1) if
    ``interleaved``, else (i, i + R / 2).

    The reference is what the float32 ``inv_freq`` means: at long positions no kernel agrees with another table.
    The angle is off by (3u + freq_rel) |θ|, so a sine or cosine by δ = min(2, that) + sincos_error. A pair
    (x1, x2) is then off by (|x1| + |x2|) δ, and by the roundings of two products and a sum:
    (u_products + u) (|x1 cos| + |x2 sin|). Numbers below the normal range may be flushed to zero, and 0 stays 0.

    Raises ValueError for shapes that do not fit and for a table that is not float32.
    """
    _check(x, positions, inv_freq)
    x, half = x.double(), inv_freq.numel()
    theta = (positions.double().unsqueeze(-1) * inv_freq.double()).unsqueeze(-2)
    delta = ((ANGLE_ROUNDINGS * FP32.u + numerics.freq_rel) * theta.abs()).clamp(max=2.0) + numerics.sincos_error
    cos, sin = theta.cos(), theta.sin()
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    x1, x2 = x[..., first], x[..., second]
    products = numerics.products
    rounding = products.u + FP32.u
    turned = (x1.abs() + x2.abs()) * delta * (1 + rounding)
    floor = torch.where((x1 != 0) | (x2 != 0), 3 * FLUSHED + (2 * products.eta if products.t < FP32.t else 0.0), 0.0)
    ref, hard = x.clone(), torch.zeros_like(x)
    ref[..., first] = x1 * cos - x2 * sin
    ref[..., second] = x2 * cos + x1 * sin
    hard[..., first] = turned + rounding * ((x1 * cos).abs() + (x2 * sin).abs()) + floor
    hard[..., second] = turned + rounding * ((x2 * cos).abs() + (x1 * sin).abs()) + floor
    return ErrorBudget(ref=ref, hard=hard, out=numerics.out)


def _check(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> None:
    if inv_freq.dtype != torch.float32:
        raise ValueError(f"inv_freq is the kernel's own table and float32, got {inv_freq.dtype}")
    if x.dim() != 3 or positions.shape != x.shape[:1] or inv_freq.dim() != 1 or 2 * inv_freq.numel() > x.shape[-1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, positions, inv_freq))
        raise ValueError(f"x, positions and inv_freq do not fit: {shapes}")
