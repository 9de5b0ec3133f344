"""The error budget of a matrix product, plain or of scaled low-precision operands."""

from __future__ import annotations

from typing import Literal

import torch

from kerneltest.model import FP32, AccModel, ErrorBudget, Fmt, Noise
from kerneltest.model.numerics import FLUSHED
from kerneltest.oracle.rounding import Z

# Hoeffding: a sum of terms x of random sign passes t |x|₂ with a probability of 2 exp(-t² / 2), here 3e-14.
WANDER = 8.0
# The mean of |partial sum| / |sum| is (1 + 1 / steps) / 2 where the terms share a drift.
DRIFT = 0.6


def gemm_budget(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    acc: AccModel,
    out: Fmt,
    scale_roundings: int = 0,
    tier: Literal["exact", "hard", "generic"] = "hard",
) -> ErrorBudget:
    """The budget of ``a @ b``: ``a`` [..., M, K], ``b`` [..., K, N], any float dtype, for an output [..., M, N].

    Quantised operands are given dequantised: in float64 their values times their scales. ``scale_roundings`` counts
    the fp32 multiplications by scales that a product passes on its way to the output, that of two scales included.

    With K products and n = ``scale_roundings`` the bound is (γ(K) + n u (1 + γ(K))) Σ|a||b|, whatever the order.
    It needs no second-order term: truncation only ever shrinks, and (1 - u)^n >= 1 - n u; for rounding to nearest see
    Jeannerod and Rump, SIAM J. Matrix Anal. Appl. 34 (2013). Numbers below the normal range may be flushed to zero:
    each product and each sum, 2^-126. The range of the accumulator is taken to be that of float32.

    ``exact``: no error where every partial sum is a number of the accumulator, whatever the order; the hard bound
    elsewhere. ``generic``: independent products of mean zero, whose partial sums stay within 8 (Σ a²b²)^½ and whose
    errors have a direction only where the accumulator cuts its sums: within (bias + 8.5 deviations of ``acc``) times
    (0.6 |C| + 8 (Σ a²b²)^½). A sum C beyond that is no such case and keeps the hard bound.

    Raises ValueError for shapes that do not fit, and for a negative ``scale_roundings``.
    """
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"cannot multiply {tuple(a.shape)} by {tuple(b.shape)}")
    if scale_roundings < 0:
        raise ValueError(f"scale_roundings must not be negative, got {scale_roundings}")
    a, b = a.double(), b.double()
    k = a.shape[-1]
    ref, magnitude = a @ b, a.abs() @ b.abs()
    gamma = acc.gamma(k)
    relative = gamma + scale_roundings * FP32.u * (1 + gamma)
    # A sum of nothing but zeros is zero.
    flushed = torch.where(magnitude > 0, (2 * k + scale_roundings) * FLUSHED, 0.0)
    hard = relative * magnitude + flushed
    if tier == "exact":
        hard = torch.where(_is_exact(a, b, magnitude, acc), 0.0, hard)
    noise = None
    if tier == "generic":
        wander = WANDER * (a.square() @ b.square()).sqrt()
        likely = min(gamma, acc.bias(k) + Z * acc.deviation(k)) + scale_roundings * FP32.u * (1 + gamma)
        det = torch.where(ref.abs() <= wander, likely * (DRIFT * ref.abs() + wander) + flushed, hard)
        noise = _no_noise(torch.minimum(det, hard))
    return ErrorBudget(ref=ref, hard=hard, out=out, noise=noise)


def _no_noise(det: torch.Tensor) -> Noise:
    """The last rounding is the only noise; elements share none of it."""
    rows = det.shape[:-1]
    return Noise(
        det=det,
        sigma=torch.zeros_like(det),
        freedom=det.new_full(rows, torch.inf),
        along=lambda weight: (det.new_zeros(rows), (det * weight.abs()).sum(-1)),
    )


def _is_exact(a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor, acc: AccModel) -> torch.Tensor:
    """Where every sum of some of the products fits the accumulator, [..., M, N].

    Such sums are multiples of one power of two, the unit, and at most Σ|a||b|: they fit when that is 2^bits units. No
    multiplication by a scale rounds then either: it leads from one multiple of the unit to another.
    """
    exponent = _unit_exponent(a).unsqueeze(-1) + _unit_exponent(b.mT).unsqueeze(-2)
    unit = torch.ldexp(torch.ones_like(magnitude), exponent)
    if acc.promote is None:
        fits = magnitude <= 2.0**acc.bits * unit
    else:
        largest = a.abs().amax(-1, keepdim=True) * b.abs().amax(-2, keepdim=True)
        chunk = torch.minimum(magnitude, acc.promote * largest)
        fits = (chunk <= 2.0**acc.bits * unit) & (magnitude <= 2.0**FP32.t * unit)
    return fits & (exponent >= FP32.emin)


def _unit_exponent(x: torch.Tensor) -> torch.Tensor:
    """[..., K] to [...]: the exponent of the largest power of two that divides every element; large if all are zero."""
    mantissa, exponent = torch.frexp(x)
    digits = torch.ldexp(mantissa.abs(), exponent.new_tensor(53)).long()
    _, lowest = torch.frexp((digits & -digits).double())
    return torch.where(x != 0, exponent - 53 + lowest - 1, 1000).amin(-1)
