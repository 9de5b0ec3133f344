"""Which end of a buffer touches memory that nobody may touch."""

from __future__ import annotations

from enum import Enum


class Guard(Enum):
    """An unmapped page right AFTER the last byte of every buffer, right BEFORE its first byte, or none.

    One page cannot end at both ends of a buffer of any size: which end is drawn for each case. The other end, and both
    without a guard, has a red zone: bytes that are painted before the launch and read after it.
    """

    NONE = ""
    AFTER = "after"
    BEFORE = "before"
