"""Elementary functions of the special-function unit over every fp32 of a domain."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from kerneltest.model.numerics import EX2_APPROX, TANH_APPROX

_TINY = 2.0**-126  # the smallest normal: .ftz flushes what is below
_MAX = (2.0 - 2.0**-23) * 2.0**127


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """All fp32 of the ``spans``, each from its first number to its last, both included and of one sign.

    ``metric`` is the kind of error that means something there, ``declared`` kerneltest's bound on it, by name.
    """

    function: str
    kernel: str
    where: str
    spans: tuple[tuple[float, float], ...]
    metric: Literal["relative", "absolute"]
    declared: tuple[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Worst:
    """The largest errors over a domain, rounded up to fp32, and an x that has them."""

    absolute: float
    absolute_at: float
    relative: float
    relative_at: float


def _both(low: float, high: float) -> tuple[tuple[float, float], ...]:
    return ((low, high), (-low, -high))


def _trigonometric() -> Iterator[Domain]:
    functions = (("sin.approx.f32", "sin_approx"), ("cos.approx.f32", "cos_approx"), ("__sincosf", "sincos_fast"))
    for function, kernel in functions:
        for where, high in (
            ("|x| <= pi", math.pi),
            ("|x| <= 2 pi", 2 * math.pi),
            ("|x| <= 64", 64.0),
            ("|x| <= 100 pi", 100 * math.pi),
            ("|x| <= 1e3", 1e3),
            ("|x| <= 1e5", 1e5),
        ):
            yield Domain(function=function, kernel=kernel, where=where, spans=_both(_TINY, high), metric="absolute")


DOMAINS = (
    Domain(
        function="ex2.approx.ftz.f32",
        kernel="ex2_approx",
        where="normal results: -126 <= x < 128",
        spans=((_TINY, 128 * (1 - 2.0**-24)), (-_TINY, -126.0)),
        metric="relative",
        declared=("EX2_APPROX", EX2_APPROX),
    ),
    Domain(
        function="tanh.approx.f32",
        kernel="tanh_approx",
        where="|x| <= 20",
        spans=_both(_TINY, 20.0),
        metric="relative",
        declared=("TANH_APPROX", TANH_APPROX),
    ),
    *_trigonometric(),
    Domain(
        function="rcp.approx.ftz.f32",
        kernel="rcp_approx",
        where="normal results",
        spans=_both(_TINY, 2.0**126),
        metric="relative",
    ),
    Domain(
        function="rsqrt.approx.ftz.f32",
        kernel="rsqrt_approx",
        where="all normal x > 0",
        spans=((_TINY, _MAX),),
        metric="relative",
    ),
    Domain(
        function="lg2.approx.ftz.f32",
        kernel="lg2_approx",
        where="0.5 <= x <= 2",
        spans=((0.5, 2.0),),
        metric="absolute",
    ),
    Domain(
        function="lg2.approx.ftz.f32",
        kernel="lg2_approx",
        where="other normal x > 0",
        spans=((_TINY, 0.5), (2.0, _MAX)),
        metric="relative",
    ),
)

# Kernel, first bit pattern, how many -> the records of the largest absolute and relative error.
Sweep = Callable[[str, int, int], tuple[int, int]]


def worst(domain: Domain, sweep: Sweep) -> Worst:
    """The largest errors over all spans of a domain."""
    records = [sweep(domain.kernel, *bit_patterns(*span)) for span in domain.spans]
    absolute, relative = (read_record(max(column)) for column in zip(*records, strict=True))
    return Worst(absolute=absolute[0], absolute_at=absolute[1], relative=relative[0], relative_at=relative[1])


def on_device(kernel: str, first: int, count: int) -> tuple[int, int]:
    """Run a kernel of elementary.cu over ``count`` bit patterns."""
    import torch

    from benchmarks.calibration import cuda

    records = torch.zeros(2, dtype=torch.int64, device="cuda")
    blocks = 16 * torch.cuda.get_device_properties().multi_processor_count
    cuda.launch("elementary.cu", kernel, (blocks, 1), 256, first, count, records)
    absolute, relative = records.tolist()
    return absolute, relative


def bit_patterns(first: float, last: float) -> tuple[int, int]:
    """The bits of the fp32 ``first``, and how many fp32 there are up to the one nearest to ``last``, that included.

    Magnitudes grow with the bits. Raises ValueError where they do not from ``first`` to ``last``.
    """
    low, high = (struct.unpack("<I", struct.pack("<f", x))[0] for x in (first, last))
    if high < low or (low ^ high) >> 31:
        raise ValueError(f"no run of bit patterns leads from {first} to {last}")
    return low, high - low + 1


def read_record(record: int) -> tuple[float, float]:
    """(error, x) of a 64-bit record: the bits of both as fp32, the error's first."""
    x, error = struct.unpack("<ff", struct.pack("<Q", record))
    return error, x
