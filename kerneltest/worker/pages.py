"""Address space with holes: regions of memory whose neighbours, and whose middle if need be, nobody may touch."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from dataclasses import dataclass
from typing import Protocol

import torch

# Ranges of byte offsets [begin, end) in a region, multiples of the granule, ascending, neither empty nor overlapping.
Parts = tuple[tuple[int, int], ...]


class NoGuards(Exception):
    """There are no guard pages on this device; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Address space with memory in its ``parts``; to touch a byte of the rest, or next to the region, is a fault.

    ``data`` is all of it as bytes. It does not own the memory: it must not be used after the region was dropped.
    """

    data: torch.Tensor
    parts: Parts

    @property
    def committed(self) -> int:
        """Bytes of memory, as opposed to address space."""
        return sum(end - begin for begin, end in self.parts)


class Pages(Protocol):
    """Where regions come from."""

    granule: int  # bytes that are mapped or not as a whole
    head: int  # bytes at the start of a region that must be mapped, for torch to believe that it is memory

    def take(self, span: int, parts: Parts) -> Region:
        """A region of ``span`` bytes, a multiple of the granule, with unmapped granules on both sides.

        What its memory holds is undefined. Raises RuntimeError when there is no memory or no address space left.
        """

    def drop(self, region: Region) -> None:
        """Give back memory and address space. Waits for the device."""


# The value on Linux; Python's mmap does not have it before 3.13.
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value


class HostPages:
    """Anonymous memory of this process."""

    granule = mmap.PAGESIZE
    head = 0

    def __init__(self) -> None:
        """Raises :class:`NoGuards` outside of Linux."""
        if not sys.platform.startswith("linux"):
            raise NoGuards("guard pages on a CPU need Linux")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        self._libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

    def take(self, span: int, parts: Parts) -> Region:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        reserved = self._libc.mmap(None, span + 2 * self.granule, 0, flags, -1, 0)
        if reserved == _MAP_FAILED:
            raise _failed("mmap")
        start = reserved + self.granule
        for begin, end in parts:
            if self._libc.mprotect(start + begin, end - begin, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
                error = _failed("mprotect")
                self._libc.munmap(reserved, span + 2 * self.granule)
                raise error
        array = (ctypes.c_uint8 * span).from_address(start)
        return Region(torch.frombuffer(array, dtype=torch.uint8), parts)

    def drop(self, region: Region) -> None:
        start, span = region.data.data_ptr(), region.data.numel()
        if self._libc.munmap(start - self.granule, span + 2 * self.granule) != 0:
            raise _failed("munmap")


def _failed(name: str) -> RuntimeError:
    return RuntimeError(f"{name} failed: {os.strerror(ctypes.get_errno())}")
