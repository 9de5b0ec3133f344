"""The error budget of the gated activation SiLU(x) * gate."""

from __future__ import annotations

import torch

from kerneltest.model import FP32, ErrorBudget, Fmt
from kerneltest.model.numerics import DIVISION, EX2_APPROX, FLUSHED


def silu_mul_budget(
    x: torch.Tensor,
    gate: torch.Tensor,
    *,
    out: Fmt,
    exp_rel: float = EX2_APPROX,
    cast_before_gate: Fmt | None = None,
) -> ErrorBudget:
    """The budget of y = x gate / (1 + exp(-x)): ``x`` and ``gate`` of one shape, any float dtype.

    ``cast_before_gate`` is the format that SiLU(x) is rounded to before the gate multiplies it (None: it stays fp32).

    The bound is relative. To the base 2, x meets a constant and a product that are rounded, so exp(-x) is off by
    E = exp(2u |x|) (1 + exp_rel) - 1, the sum 1 + exp(-x) by E / (1 + exp(x)) + u; then come a division, 2^-22, and two
    products. Below the normal range there is an absolute part. A sigmoid under 2^-126 may be flushed to zero:
    exp(-x) overflows near x = -88.7, and a fast division by more than 2^126 returns 0. It is multiplied by |x gate|
    afterwards, so 2^-126 |x gate| is lost, 2^-126 |gate| if it is SiLU(x) that is flushed, 2^-126 if it is y. What the
    subnormal numbers of ``out`` cannot hold is in the last rounding already. A product with 0 is 0.

    Raises ValueError for shapes that differ.
    """
    if x.shape != gate.shape:
        raise ValueError(f"x is {tuple(x.shape)}, the gate {tuple(gate.shape)}")
    x, gate = x.double(), gate.double()
    u = FP32.u
    exponential = torch.exp(2 * u * x.abs()) * (1 + exp_rel) - 1
    denominator = exponential * torch.sigmoid(-x) * (1 + u) + u
    relative = (1 + DIVISION) * (1 + 2 * u) / (1 - denominator) - 1
    floor = FLUSHED * (1 + gate.abs() + (x * gate).abs())
    if cast_before_gate is not None:
        relative = (1 + relative) * (1 + cast_before_gate.u) - 1
        floor = floor + cast_before_gate.eta * gate.abs()
    ref = x * torch.sigmoid(x) * gate
    hard = torch.where((x != 0) & (gate != 0), relative * ref.abs() + floor, 0.0)
    return ErrorBudget(ref=ref, hard=hard, out=out)
