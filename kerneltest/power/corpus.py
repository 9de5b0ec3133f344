"""What is on trial comes as a corpus: units of work, each a number of trials, each trial independent of all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kerneltest.power.tally import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Trials that one process runs in one go; what an interrupted run has finished is counted in these.

    ``group`` tells the corpora apart; ``family`` and ``strategy`` say which inputs; ``trials`` counts batches.
    """

    group: str
    subject: str
    family: str
    strategy: str
    trials: int

    @property
    def key(self) -> str:
        return "/".join((self.group, self.subject, self.family, self.strategy, str(self.trials)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Batches of each family and input strategy, for every mutant and for every legal variant; cases of a zoo kernel.

    ``judged``: whether the run is large enough to be held to all of its targets.
    """

    name: str
    mutants: Mapping[str, Mapping[str, int]]
    legal: Mapping[str, Mapping[str, int]]
    zoo: int
    judged: bool


class Corpus(Protocol):
    """A corpus is sent to other processes, so it is data; :meth:`run` is the only thing that computes.

    ``together``: how many units one process had better run in a row, because they share what is slow to start.
    """

    @property
    def together(self) -> int: ...

    def units(self, size: Size) -> Sequence[Unit]: ...

    def run(self, units: Sequence[Unit], seed: int) -> list[Tally]: ...


SIZES = {
    size.name: size
    for size in (
        Size(
            name="quick",
            mutants={
                "normal": {"decode": 2, "prefill": 2, "mla": 2},
                "dyadic": {"decode": 1, "prefill": 1, "mla": 1},
                "count": {"decode": 1, "prefill": 1, "mla": 1},
                "poison": {"decode": 1, "prefill": 1, "mla": 1},
            },
            legal={
                "normal": {"decode": 6, "prefill": 2, "mla": 2},
                "dyadic": {"decode": 2, "prefill": 1, "mla": 1},
                "count": {"decode": 2, "prefill": 1, "mla": 1},
                "poison": {"decode": 2, "prefill": 1, "mla": 1},
            },
            zoo=0,
            judged=False,
        ),
        Size(
            name="default",
            mutants={
                "normal": {"decode": 40, "long": 12, "prefill": 20, "mla": 20},
                "dyadic": {"decode": 16, "long": 6, "prefill": 8, "mla": 10},
                "count": {"decode": 16, "long": 6, "prefill": 8, "mla": 10},
                "poison": {"decode": 16, "long": 6, "prefill": 8, "mla": 10},
            },
            legal={
                "normal": {"decode": 160, "long": 8, "prefill": 40, "mla": 60},
                "dyadic": {"decode": 70, "long": 4, "prefill": 20, "mla": 30},
                "count": {"decode": 60, "long": 4, "prefill": 20, "mla": 30},
                "poison": {"decode": 80, "long": 4, "prefill": 20, "mla": 30},
            },
            zoo=6,
            judged=True,
        ),
    )
}
