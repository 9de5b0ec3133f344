"""Poison for memory that nobody owns at the moment, and that the next ``torch.empty`` will hand out."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from kerneltest.model import Device, Pattern
from kerneltest.worker import device as devices

# Bytes and number of blocks that are taken and given back at the start: what a library's own torch.empty is likely to
# ask for, so that it gets memory of the pool and not fresh memory of the driver.
BLOCKS = ((512, 8), (4 << 10, 8), (32 << 10, 8), (256 << 10, 8), (1 << 20, 8), (4 << 20, 4), (32 << 20, 2))


class Allocator(Protocol):
    """A device's memory allocator, seen from below."""

    def poisoned(self, pattern: Pattern) -> AbstractContextManager[None]:
        """A context in which memory that is handed out holds the pattern."""


class HostAllocator:
    """glibc's malloc, from which torch takes the memory of CPU tensors."""

    # mallopt's parameter for the byte that malloc fills new memory with, or rather with its complement.
    M_PERTURB = -6

    def __init__(self) -> None:
        self._mallopt = ctypes.CDLL(None).mallopt

    @contextmanager
    def poisoned(self, pattern: Pattern) -> Iterator[None]:
        # Only the low byte is used, but the whole must not be 0, which switches the filling off.
        self._mallopt(self.M_PERTURB, 0x100 | (~pattern.word & 0xFF))
        try:
            yield
        finally:
            self._mallopt(self.M_PERTURB, 0)


class CudaAllocator:
    """torch's caching allocator. Every cached block that is free is filled in place, by address.

    To allocate, fill and free would leave to chance which blocks come back; the allocator's own list leaves none out.
    Raises ImportError without cuda-bindings.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._driver: Any = importlib.import_module("cuda.bindings.driver")
        blocks = [
            torch.empty(size, dtype=torch.uint8, device=device.torch_name)
            for size, count in BLOCKS
            for _ in range(count)
        ]
        del blocks

    @contextmanager
    def poisoned(self, pattern: Pattern) -> Iterator[None]:
        stream = devices.stream(self._device)
        for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call]
            # A block belongs to the stream it was first used on; on that stream nothing else can touch it now.
            if segment["device"] != self._device.ordinal or segment["stream"] != stream:
                continue
            for block in segment["blocks"]:
                if block["state"] == "inactive":
                    self._fill(block["address"], block["size"], pattern.word, stream)
        yield

    def _fill(self, address: int, size: int, word: int, stream: int) -> None:
        (error,) = self._driver.cuMemsetD32Async(address, word, size // 4, stream)
        if int(error) != 0:
            raise RuntimeError(f"cuMemsetD32Async failed: {error.name}")
