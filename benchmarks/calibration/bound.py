"""Errors of whole dot products beside the bound that kerneltest declares for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.calibration.probes import Operand
from kerneltest.model import AccModel

# float64 a [M, K] and b [N, K], values of the operand's format -> float64 [M, N] on their device, a @ b.T as computed.
Product = Callable[[Tensor, Tensor], Tensor]

LENGTHS = tuple(2**i for i in range(4, 17))
DESIGNED_LENGTHS = (64, 512, 4096, 65536)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The largest error of dot products of length ``k``, as a share of Σ|a||b|, and the bound ``gamma``."""

    data: str
    k: int
    error: float
    gamma: float

    @property
    def used(self) -> float:
        """The share of the bound that is used; above 1 it is none."""
        return self.error / self.gamma


def random_operands(data: str, operand: Operand, rows: int, k: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """float64 a and b [rows, k] of the format: uniform in (0, 1) for "same-sign", standard normal for "zero-mean"."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = {"same-sign": torch.rand, "zero-mean": torch.randn}[data]
    a, b = (draw(rows, k, generator=generator, dtype=torch.float64, device=device) for _ in range(2))
    return a.to(operand.dtype).double(), b.to(operand.dtype).double()


def designed_operands(operand: Operand, k: int, device: str) -> tuple[Tensor, Tensor]:
    """float64 a and b [n, k] whose products are 1 and then nothing but values just below 2^-t, a row for each t.

    Where 2^-t is the last bit that a step keeps, every product is lost. No random data do that.
    """
    # On the host: a GPU's log2 and pow of powers of two are not exact.
    powers = 2.0 ** -torch.arange(4, 29, dtype=torch.float64)
    a = torch.full((len(powers), k), 2.0 - 2.0 ** (1 - operand.t), dtype=torch.float64)
    # The narrow formats need both factors for their range: 1 is 2^top, split in halves.
    exponent = torch.log2(powers) - 1 + operand.top
    half = torch.floor(exponent / 2)
    a = a * (2.0 ** (exponent - half))[:, None]
    b = (2.0**half)[:, None].expand(-1, k).clone()
    a[:, 0] = b[:, 0] = 2.0 ** (operand.top // 2)
    if not (torch.equal(a.to(operand.dtype).double(), a) and torch.equal(b.to(operand.dtype).double(), b)):
        raise ValueError(f"{operand.name} does not hold the designed operands")
    return a.to(device), b.to(device)


def sweep(
    product: Product,
    operand: Operand,
    model: AccModel,
    *,
    rows: int,
    device: str,
    lengths: Sequence[int] = LENGTHS,
    designed_lengths: Sequence[int] = DESIGNED_LENGTHS,
) -> list[Point]:
    """Largest errors on random data of ``lengths``, rows * rows dot products each, and on designed data."""
    points = []
    for data in ("same-sign", "zero-mean"):
        for k in lengths:
            a, b = random_operands(data, operand, rows, k, k, device)
            error = (product(a, b) - a @ b.T).abs() / (a.abs() @ b.abs().T)
            points.append(_point(data, k, error, model))
    for k in designed_lengths:
        a, b = designed_operands(operand, k, device)
        error = (product(a, b) - a @ b.T).abs() / (a @ b.T)
        # Rows of a belong to rows of b: elsewhere the products are other powers of two, which is as good.
        points.append(_point("designed", k, error, model))
    return points


def _point(data: str, k: int, error: Tensor, model: AccModel) -> Point:
    # A NaN must not pass for a small error.
    return Point(data=data, k=k, error=float(error.nan_to_num(nan=math.inf).max()), gamma=model.gamma(k))


def needed_extra(points: Iterable[Point], model: AccModel) -> float:
    """The smallest ``extra`` of ``model``, its other constants as they are, with which gamma holds for all points.

    A whole number, or infinite where an error is.
    """
    needed = 0.0
    for point in points:
        without = replace(model, extra=0).gamma(point.k)
        each = replace(model, extra=1).gamma(point.k) - without
        steps = (point.error - without) / each
        needed = max(needed, math.ceil(steps) if steps < math.inf else steps)
    return needed


def needed_k_step(points: Iterable[Point], model: AccModel) -> int | None:
    """The largest ``k_step`` of ``model`` up to its own with which gamma holds for all points; None if not even 1."""
    points = list(points)
    for k_step in range(model.k_step, 0, -1):
        candidate = replace(model, k_step=k_step)
        if all(point.error <= candidate.gamma(point.k) for point in points):
            return k_step
    return None
