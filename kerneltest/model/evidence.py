"""What a series of draws has shown so far: counts, and how much they speak against the distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kerneltest.model.case import Case


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The draws in each bin of one partition of the categories, and the probabilities that the bins should have."""

    partition: str
    probabilities: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.probabilities) != len(self.counts) or min(self.counts, default=0) < 0:
            raise ValueError(f"{self.partition}: {len(self.probabilities)} bins, and no count for each of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that was drawn of one case of one kernel, over all runs.

    ``library``: name and version, or "" for a kernel that needs none; ``device``: ``cpu`` or ``cuda``; ``config``: the
    case's id. With ``kernel`` they are what makes two series one. ``draws``: how many, ``next_draw``: the first
    :attr:`Call.draw` that was not used. ``log_e``: of the e-process (natural logarithm), ``highest``: over all looks at
    it. ``impossible``: draws of probability 0, one of which is enough to reject. ``detectable``: the smallest total
    variation distance that all these draws together would have shown, see :mod:`kerneltest.oracle.eprocess`.
    """

    kernel: str
    library: str
    device: str
    config: str
    draws: int = 0
    next_draw: int = 0
    partitions: tuple[Counts, ...] = ()
    log_e: float = 0.0
    highest: float = 0.0
    impossible: int = 0
    detectable: float = 1.0

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.kernel, self.library, self.device, self.config)

    @property
    def log10_e(self) -> float:
        """The highest that E ever was, as a power of ten; infinite after an impossible draw."""
        return math.inf if self.impossible else self.highest / math.log(10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Draw on from ``evidence``: so many ``draws``, or as many as ``seconds`` allow, but none beyond a rejection.

    ``limit``: the natural logarithm of E that rejects.
    """

    evidence: Evidence
    draws: int
    seconds: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A case whose draws were rejected, and how many it took."""

    case: Case[Any]
    draws: int
