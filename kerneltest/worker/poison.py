"""Fill every place that a kernel has no right to depend on, and say how much of the filling was proven."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from kerneltest.model import Coverage, DeadBytes, Device, Pattern, Place
from kerneltest.worker import device as devices

if TYPE_CHECKING:
    from kerneltest.worker.onchip import OnChip

# What each place is filled with in one launch.
Plan = Mapping[Place, Pattern]

# Blocks that the allocator's pool is seeded with: what a library's own torch.empty is likely to get back.
POOL_BLOCKS = tuple((bytes_, 8) for bytes_ in (512, 4 << 10, 32 << 10, 256 << 10, 1 << 20)) + (
    (4 << 20, 4),
    (32 << 20, 2),
)

M_PERTURB = -6  # glibc's mallopt parameter


def fill(tensor: torch.Tensor, pattern: Pattern) -> None:
    """Fill a floating-point tensor with the pattern's value in its own format (Inf is Inf, MAX the largest finite)."""
    if pattern is Pattern.INF:
        tensor.fill_(float("inf"))
    elif pattern is Pattern.MAX:
        tensor.fill_(torch.finfo(tensor.dtype).max)
    else:
        fill_bytes(tensor, pattern)


def fill_bytes(tensor: torch.Tensor, pattern: Pattern) -> None:
    """Fill a tensor of any dtype with the pattern's bytes. Its bits, not its value: a NaN keeps its payload."""
    bits = as_bits(tensor)
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
        self._chip: OnChip | None = None
        self._why_no_chip = "a CPU has none"
        if device.kind == "cuda":
            try:
                from kerneltest.worker.onchip import OnChip

                self._chip = OnChip(device.ordinal)
            except ImportError as error:
                self._why_no_chip = f"needs the packages cuda-core and cuda-bindings (extra 'cuda'): {error}"

    @property
    def hidden_places(self) -> tuple[Place, ...]:
        """The places outside of inputs and outputs that this device has and that can be filled here."""
        on_chip = (Place.SHARED_MEMORY, Place.REGISTERS) if self._chip else ()
        return (Place.WORKSPACE, Place.ALLOCATOR_POOL, *on_chip)

    @contextmanager
    def pool(self, pattern: Pattern) -> Iterator[None]:
        """While it lasts, memory that the allocator hands out holds the pattern (as far as :meth:`prove` saw)."""
        if self.device.kind == "cuda":
            self._seed_cuda_pool(pattern)
            yield
            return
        # glibc fills what malloc hands out with the complement of this byte; a multiple of 256 keeps it switched on for 0xFF.
        mallopt = _mallopt()
        mallopt(M_PERTURB, 0x100 | (~pattern.word & 0xFF))
        try:
            yield
        finally:
            mallopt(M_PERTURB, 0)

    def chip(self, plan: Plan) -> None:
        """Fill registers, then shared memory, as the last thing on the stream before the kernel under test."""
        if self._chip is not None:
            stream = devices.stream(self.device)
            self._chip.fill_registers(plan[Place.REGISTERS].word, stream)
            self._chip.fill_shared(plan[Place.SHARED_MEMORY].word, stream)

    def prove(self) -> tuple[Coverage, ...]:
        """Fill each hidden place with NaN and read it back."""
        proven = [
            Coverage(place=Place.ALLOCATOR_POOL, share=self._prove_pool(), note="blocks of a fresh torch.empty"),
        ]
        for place in (Place.SHARED_MEMORY, Place.REGISTERS):
            if self._chip is None:
                proven.append(Coverage(place=place, share=None, note=self._why_no_chip))
                continue
            prove = self._chip.shared_coverage if place is Place.SHARED_MEMORY else self._chip.register_coverage
            share = prove(Pattern.NAN.word, devices.stream(self.device))
            proven.append(Coverage(place=place, share=share, note=f"on {self._chip.sm_count} SMs"))
        return tuple(proven)

    def _prove_pool(self) -> float:
        held = total = 0
        with self.pool(Pattern.NAN):
            for bytes_, count in POOL_BLOCKS:
                # All of a size at once: a block that was given back and handed out again would be counted twice.
                blocks = [torch.empty(bytes_, dtype=torch.uint8, device=self.device.torch_name) for _ in range(count)]
                held += sum(int(holds(block, Pattern.NAN).sum()) for block in blocks)
                total += bytes_ * count
        return held / total

    def _seed_cuda_pool(self, pattern: Pattern) -> None:
        blocks = []
        for bytes_, count in POOL_BLOCKS:
            for _ in range(count):
                blocks.append(torch.empty(bytes_, dtype=torch.uint8, device=self.device.torch_name))
                fill_bytes(blocks[-1].view(torch.int32), pattern)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _signed(word: int, size: int) -> int:
    """The first ``size`` bytes of the repeated 32-bit word as a signed integer."""
    return int.from_bytes((word.to_bytes(4, "little") * 2)[:size], "little", signed=True)


def _mallopt() -> ctypes._NamedFuncPointer:
    return ctypes.CDLL(None).mallopt
