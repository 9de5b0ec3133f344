"""Trials, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Trials of one kind.

    ``equivalent``: flawed answers that equal the healthy kernel's bit by bit; nobody is asked about them. ``flagged``:
    by detector. ``outputs``: elements of ``out`` that were judged. ``margins``: the largest of each statistic.
    ``batches`` and ``flagged_batches``: whole batches, where their requests were judged singly as well. ``notes``: what
    a reader of the table must know.
    """

    trials: int = 0
    equivalent: int = 0
    outputs: int = 0
    batches: int = 0
    flagged: Mapping[str, int] = field(default_factory=dict)
    flagged_batches: Mapping[str, int] = field(default_factory=dict)
    margins: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def judged(self) -> int:
        return self.trials - self.equivalent

    def share(self, detector: str) -> float | None:
        """The share of the judged trials that a detector flagged; None if there are none."""
        return self.flagged.get(detector, 0) / self.judged if self.judged else None

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            trials=self.trials + other.trials,
            equivalent=self.equivalent + other.equivalent,
            outputs=self.outputs + other.outputs,
            batches=self.batches + other.batches,
            flagged=dict(Counter(self.flagged) + Counter(other.flagged)),
            flagged_batches=dict(Counter(self.flagged_batches) + Counter(other.flagged_batches)),
            margins={
                name: max(tally.margins.get(name, 0.0) for tally in (self, other))
                for name in sorted({*self.margins, *other.margins})
            },
            notes=tuple(dict.fromkeys((*self.notes, *other.notes))),
        )
