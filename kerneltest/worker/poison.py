"""Fill every place that a kernel has no right to depend on, and say how much of the filling was proven."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from kerneltest.model import Coverage, DeadBytes, Device, Pattern, Place
from kerneltest.worker import device as devices
from kerneltest.worker.allocator import BLOCKS, Allocator, CudaAllocator, HostAllocator

if TYPE_CHECKING:
    from kerneltest.worker.onchip import OnChip

# What each place is filled with in one launch.
Plan = Mapping[Place, Pattern]


def fill(tensor: torch.Tensor, pattern: Pattern) -> None:
    """Fill a floating-point tensor with the pattern's value in its own format (Inf is Inf, MAX the largest finite)."""
    if pattern is Pattern.INF:
        tensor.fill_(float("inf"))
    elif pattern is Pattern.MAX:
        tensor.fill_(torch.finfo(tensor.dtype).max)
    else:
        fill_bytes(tensor, pattern)


def fill_bytes(tensor: torch.Tensor, pattern: Pattern) -> None:
    """Fill a tensor of any dtype with the pattern's bytes. Its bits, not its value: a NaN keeps its payload.

    Random bytes are the same ones for tensors of one size.
    """
    bits = as_bits(tensor)
    if pattern is Pattern.RANDOM:
        limits = torch.iinfo(bits.dtype)
        random = torch.Generator(tensor.device).manual_seed(tensor.numel())
        bits.random_(limits.min, limits.max, generator=random)
    else:
        bits.fill_(_signed(pattern.word, tensor.element_size()))


def holds(tensor: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Where ``tensor`` still holds the bytes of a fill, be it by :func:`fill_bytes` or by the allocator's pool."""
    bits, size = as_bits(tensor), tensor.element_size()
    byte = pattern.word & 0xFF
    return (bits == _signed(pattern.word, size)) | (bits == _signed(byte * 0x01010101, size))


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as signed integers of the same width."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def fill_dead(tensors: Mapping[str, torch.Tensor], dead: tuple[DeadBytes, ...], plan: Plan) -> None:
    """Fill the dead elements of the inputs."""
    for part in dead:
        tensor = tensors[part.tensor]
        garbage = torch.empty(1, dtype=tensor.dtype)
        fill(garbage, plan[part.place])
        # As bits: a copy of floats need not keep the payload of a NaN.
        as_bits(tensor)[part.mask] = as_bits(garbage)[0]


class Poisoner:
    """The hidden state of one device: allocator pool, shared memory, registers."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._allocator: Allocator | None = None
        self._chip: OnChip | None = None
        self._why_not = "a CPU has none"
        if device.kind == "cpu":
            self._allocator = HostAllocator()
            return
        try:
            from kerneltest.worker.onchip import OnChip

            self._chip = OnChip(device.ordinal)
            self._allocator = CudaAllocator(device)
        except ImportError as error:
            self._why_not = f"needs the packages cuda-core and cuda-bindings (extra 'cuda'): {error}"

    @property
    def hidden_places(self) -> tuple[Place, ...]:
        """The places outside of inputs and outputs that this device has and that can be filled here."""
        pool = (Place.ALLOCATOR_POOL,) if self._allocator else ()
        chip = (Place.SHARED_MEMORY, Place.REGISTERS) if self._chip else ()
        return (Place.WORKSPACE, *pool, *chip)

    def pool(self, pattern: Pattern) -> AbstractContextManager[None]:
        """While it lasts, memory that the allocator hands out holds the pattern (as far as :meth:`prove` saw)."""
        return self._allocator.poisoned(pattern) if self._allocator else nullcontext()

    def chip(self, plan: Plan) -> None:
        """Fill registers, then shared memory, as the last thing on the stream before the kernel under test.

        In this order, because the registers' fill passes through shared memory, which must be exact.
        """
        if self._chip is not None:
            stream = devices.stream(self.device)
            self._chip.fill_registers(plan[Place.REGISTERS].word, stream)
            self._chip.fill_shared(plan[Place.SHARED_MEMORY].word, stream)

    def fill_chip(self, place: Place, pattern: Pattern) -> None:
        """Fill shared memory or registers alone, as far as that goes: each passes through some of the other."""
        if self._chip is not None:
            fill = self._chip.fill_shared if place is Place.SHARED_MEMORY else self._chip.fill_registers
            fill(pattern.word, devices.stream(self.device))

    def prove(self) -> tuple[Coverage, ...]:
        """Fill each hidden place with NaN and read it back."""
        return (self._prove_pool(), self._prove_chip(Place.SHARED_MEMORY), self._prove_chip(Place.REGISTERS))

    def _prove_pool(self) -> Coverage:
        place = Place.ALLOCATOR_POOL
        if self._allocator is None:
            return Coverage(place=place, share=None, note=self._why_not)
        held = total = 0
        with self.pool(Pattern.NAN):
            # All at once: a block that was given back and handed out again would be counted twice.
            blocks = [
                torch.empty(size, dtype=torch.uint8, device=self.device.torch_name)
                for size, count in BLOCKS
                for _ in range(count)
            ]
        for block in blocks:
            held += int(holds(block, Pattern.NAN).sum())
            total += block.numel()
        note = f"{len(blocks)} blocks of torch.empty, {total >> 20} MiB together"
        return Coverage(place=place, share=held / total, note=note)

    def _prove_chip(self, place: Place) -> Coverage:
        if self._chip is None:
            return Coverage(place=place, share=None, note=self._why_not)
        prove = self._chip.shared_coverage if place is Place.SHARED_MEMORY else self._chip.register_coverage
        share = prove(Pattern.NAN.word, devices.stream(self.device))
        return Coverage(place=place, share=share, note=f"on {self._chip.sm_count} SMs")


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _signed(word: int, size: int) -> int:
    """The first ``size`` bytes of the repeated 32-bit word as a signed integer."""
    return int.from_bytes((word.to_bytes(4, "little") * 2)[:size], "little", signed=True)
