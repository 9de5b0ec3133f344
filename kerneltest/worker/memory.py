"""Memory for the buffers of a kernel under test that tells when the kernel leaves them.

An access beyond the guarded end of a buffer is a fault. Around the rest of it lie red zones: bytes that are painted
before the launch and read after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import torch

from kerneltest.model import Device
from kerneltest.model.guard import Guard
from kerneltest.worker.pages import HostPages, NoGuards, Pages, Parts, Region
from kerneltest.worker.vmm import CudaPages

RED_ZONE = 256  # bytes, and the alignment of a buffer whose end is not guarded
# NaN in fp16 and fp8 E5M2, huge in every other format and as an index: to read it shows as well.
PAINT = 0x7E
# What vectorised loads need.
_VECTOR = 16
# Regions that wait for their next use: bytes of memory by kind of device, and how many. FlashInfer alone asks for up to
# three workspaces of 300 MiB a launch.
_IDLE_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
_IDLE_REGIONS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Bytes ``before`` or ``after`` a buffer that were written: how many, and how far off the nearest one lies.

    ``offset`` is 0 for the byte next to the buffer. It counts away from the buffer on both sides.
    """

    label: str
    side: Literal["before", "after"]
    offset: int
    count: int


class Memory:
    """The memory that a worker gives to kernels on one device. Not for two threads at a time."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.guards: str | None = None  # why there are no guard pages here; None if there are
        self._pages: Pages | None = None
        try:
            self._pages = HostPages() if device.kind == "cpu" else CudaPages(device)
        except NoGuards as reason:
            self.guards = str(reason)
        self.only: str | None = None  # the label of the one buffer that is guarded, if not all are
        self.labels: dict[str, None] = {}  # of the buffers that were asked for
        self._idle: dict[tuple[int, Parts], list[Region]] = {}  # by span and parts, least recently used first
        self._idle_bytes = self._idle_regions = 0

    def arena(self, guard: Guard) -> Arena:
        """Buffers for one launch. Where there are no guard pages (``guards``), every arena is one without a guard."""
        return Arena(self, guard if self._pages else Guard.NONE)

    @property
    def pages(self) -> Pages:
        """Raises RuntimeError where there are no guard pages."""
        if self._pages is None:
            raise RuntimeError(self.guards)
        return self._pages

    def take(self, span: int, parts: Parts) -> Region:
        """A region as :meth:`Pages.take` gives it, with what its last user left in it.

        The latest to be given back is the first to come back, so that repeated launches find their buffers where they
        were.
        """
        if idle := self._idle.get((span, parts)):
            return self._picked(idle, -1)
        try:
            return self.pages.take(span, parts)
        except RuntimeError:
            if not self._idle_regions:
                raise
            self._shrink(0, 0)
            return self.pages.take(span, parts)

    def give_back(self, region: Region) -> None:
        """Keep a region for its next use. Raises RuntimeError when the device is lost."""
        key = (region.data.numel(), region.parts)
        self._idle[key] = [*self._idle.pop(key, ()), region]
        self._idle_bytes += region.committed
        self._idle_regions += 1
        self._shrink(_IDLE_BYTES[self.device.kind], _IDLE_REGIONS)

    def _picked(self, idle: list[Region], index: int) -> Region:
        region = idle.pop(index)
        self._idle_bytes -= region.committed
        self._idle_regions -= 1
        return region

    def _shrink(self, most_bytes: int, most_regions: int) -> None:
        while self._idle_bytes > most_bytes or self._idle_regions > most_regions:
            key, oldest = next(iter(self._idle.items()))
            if oldest:
                self.pages.drop(self._picked(oldest, 0))
            else:
                del self._idle[key]


@dataclass(frozen=True, slots=True)
class _Zone:
    label: str
    side: Literal["before", "after"]
    data: torch.Tensor
    distance: int  # from the buffer to the zone's nearest byte


class Arena:
    """The buffers of one launch, inside a ``with``. None of its tensors may be used after that.

    All is asynchronous on torch's stream: the caller waits for the kernel under test before it reads the damage or
    leaves.
    """

    def __init__(self, memory: Memory, guard: Guard) -> None:
        self._memory, self._guard = memory, guard
        self._regions: list[Region] = []
        self._zones: list[_Zone] = []

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # In this order the next arena that asks for the same buffers gets them at the same addresses.
        regions, self._regions, self._zones = self._regions[::-1], [], []
        try:
            for region in regions:
                self._memory.give_back(region)
        except RuntimeError:
            if error is None:  # otherwise it is that error which lost the device
                raise

    def tensor(self, label: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of undefined content.

        It starts at a multiple of 256 bytes. Guarded AFTER, it ends where the guard begins instead, except that
        floating-point and uint8 tensors start at a multiple of 16, which leaves up to 15 bytes of red zone.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        self._memory.labels[label] = None
        if self._guard is Guard.NONE or self._memory.only not in (None, label):
            room = nbytes + 2 * RED_ZONE
            data = torch.empty(room + RED_ZONE, dtype=torch.uint8, device=self._memory.device.torch_name)
            start = -data.data_ptr() % RED_ZONE + RED_ZONE
        else:
            span = _size_class(nbytes + _VECTOR + RED_ZONE, self._memory.pages.granule)
            data = self._take(span, ((0, span),))
            start = 0 if self._guard is Guard.BEFORE else _aligned(span - nbytes, dtype)
        self._paint(label, "before", data, max(start - RED_ZONE, 0), start, 0)
        self._paint(label, "after", data, start + nbytes, min(start + nbytes + RED_ZONE, data.numel()), 0)
        return _typed(data, start, nbytes, shape, dtype)

    def far(self, label: str, shape: Sequence[int], dtype: torch.dtype, first: int) -> torch.Tensor:
        """A tensor of which only ``[first:]`` may be touched and takes memory; it ends as if guarded AFTER.

        A few other bytes are mapped, rounded to whole granules and at the start of the tensor. They are red zones too,
        whose offsets count from ``[first:]``. Raises ValueError when there is no element ``first``, RuntimeError where
        there are no guard pages.
        """
        if not 0 <= first < shape[0]:
            raise ValueError(f"{label} has no element {first}: its shape is {tuple(shape)}")
        pages = self._memory.pages
        nbytes = math.prod(shape) * dtype.itemsize
        span = _rounded(max(nbytes, 1), pages.granule)
        start = _aligned(span - nbytes, dtype)
        used = start + first * (nbytes // shape[0])
        tail = min(used // pages.granule * pages.granule, span - pages.granule)
        head = ((0, pages.head),) if pages.head else ()
        parts = (*head, (tail, span)) if tail > pages.head else ((0, span),)
        data = self._take(span, parts)
        for begin, end in parts:
            near = min(end, used)
            self._paint(label, "before", data, begin, near, used - near)
        self._paint(label, "after", data, start + nbytes, span, 0)
        return _typed(data, start, nbytes, shape, dtype)

    def damage(self) -> tuple[Damage, ...]:
        """What was written outside of the buffers, in their order. Synchronises."""
        if not self._zones:
            return ()
        # All at once: each look at a single zone would wait for the device.
        seen = torch.cat([zone.data for zone in self._zones])
        if torch.equal(seen, torch.full_like(seen, PAINT)):
            return ()
        return tuple(damage for zone in self._zones if (damage := _damage(zone)))

    def _take(self, span: int, parts: Parts) -> torch.Tensor:
        region = self._memory.take(span, parts)
        self._regions.append(region)
        return region.data

    def _paint(
        self, label: str, side: Literal["before", "after"], data: torch.Tensor, begin: int, end: int, distance: int
    ) -> None:
        if begin < end:
            zone = data[begin:end].fill_(PAINT)
            self._zones.append(_Zone(label, side, zone, distance))


def _damage(zone: _Zone) -> Damage | None:
    written = (zone.data != PAINT).nonzero().flatten().tolist()
    if not written:
        return None
    nearest = written[0] if zone.side == "after" else zone.data.numel() - 1 - written[-1]
    return Damage(label=zone.label, side=zone.side, offset=zone.distance + nearest, count=len(written))


def _typed(data: torch.Tensor, start: int, nbytes: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return data[start : start + nbytes].view(dtype).view(tuple(shape))


def _aligned(start: int, dtype: torch.dtype) -> int:
    """The last place up to ``start`` where a tensor may begin.

    Floats are loaded in vectors; indices one by one, so that the first one past the end is to be a fault.
    """
    vectors = dtype.is_floating_point or dtype.is_complex or dtype == torch.uint8
    return start // _VECTOR * _VECTOR if vectors else start


def _rounded(nbytes: int, step: int) -> int:
    return -(-nbytes // step) * step


def _size_class(nbytes: int, granule: int) -> int:
    """At least ``nbytes``, at most a quarter more than whole granules: few sizes, for regions to be used again."""
    return _rounded(nbytes, max(granule, 1 << max(nbytes.bit_length() - 3, 0)))
