"""The axes of chain speculative sampling."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Axes of a case: ``rows`` requests, each with a chain of ``tokens`` from a ``vocabulary``.

    ``shared``: all rows hold the same values. ``device_seed``: the state of the random numbers is in device memory.
    Raises ValueError for a size below 1.
    """

    rows: int
    tokens: int
    vocabulary: int
    shared: bool = False
    device_seed: bool = False

    def __post_init__(self) -> None:
        if min(self.rows, self.tokens, self.vocabulary) < 1:
            raise ValueError(f"sizes must be at least 1, got {self.rows}, {self.tokens} and {self.vocabulary}")
