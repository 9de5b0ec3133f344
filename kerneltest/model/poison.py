"""Where hidden state can lie, what it is filled with, and how much of the filling was proven."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Pattern(Enum):
    """What a place is filled with. ``word`` is the form for raw bytes, typed tensors get the value itself.

    NAN is all ones, a NaN in every floating-point format. FINITE is 0.75 in fp32 and bf16 (1.81 in fp16): a leak of it
    changes an answer without a trace of NaN. INF is Inf in bf16; MAX is close to the largest finite bf16 and fp32. ONE
    is 1 in bf16 and fp32. ZERO is what memory most often holds by luck. RANDOM differs from word to word where a place
    can hold that, and is one odd word elsewhere. PREVIOUS is what the same kernel answered to other data: outputs only.
    """

    NAN = "nan"
    INF = "inf"
    MAX = "max"
    FINITE = "finite"
    ONE = "one"
    ZERO = "zero"
    RANDOM = "random"
    PREVIOUS = "previous"

    @property
    def word(self) -> int:
        """The 32-bit word for raw bytes. Raises ValueError for PREVIOUS, which is no word."""
        if self is Pattern.PREVIOUS:
            raise ValueError("a previous answer is no word")
        return _WORDS[self.value]


_WORDS = {
    "nan": 0xFFFFFFFF,
    "inf": 0x7F807F80,
    "max": 0x7F7F7F7F,
    "finite": 0x3F3F3F3F,
    "one": 0x3F803F80,
    "zero": 0x00000000,
    "random": 0xC2B2AE35,
}


class Place(Enum):
    """Where bytes lie that a kernel has no right to depend on."""

    OUTPUTS = "outputs"
    UNUSED_SLOTS = "unused slots"
    UNREFERENCED_PAGES = "unreferenced pages"
    WORKSPACE = "workspace"
    ALLOCATOR_POOL = "allocator pool"
    SHARED_MEMORY = "shared memory"
    REGISTERS = "registers"

    @property
    def in_inputs(self) -> bool:
        """Whether the caller owns these bytes: dead parts of an input, not hidden state of library or chip."""
        return self in (Place.UNUSED_SLOTS, Place.UNREFERENCED_PAGES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of a place was seen to hold its poison at the start of a worker: share in [0, 1], or why unknown."""

    place: Place
    share: float | None
    note: str = ""

    @property
    def percent(self) -> str:
        """The share in %, rounded down: 100 means all of it. Raises ValueError if it is unknown."""
        if self.share is None:
            raise ValueError(f"the coverage of {self.place.value} is unknown: {self.note}")
        return f"{math.floor(self.share * 10_000) / 100:g} %"
