"""What moves by chance is not blamed on a hidden place, and what follows one is, whatever moves beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kerneltest.model import Pattern, Place
from kerneltest.worker.differences import unstable
from kerneltest.worker.staging import Observation

ROWS, COLUMNS = 400, 8
PLACES = (Place.WORKSPACE, Place.ALLOCATOR_POOL, Place.SHARED_MEMORY, Place.REGISTERS)


class Chance:
    """A kernel each row of whose output is 0 or 1 as a coin falls, but for those that follow a place."""

    def __init__(self, seed: int, followers: int = 0, heads: float = 0.5) -> None:
        self.kernel = SimpleNamespace(
            name="chance",
            deterministic=True,
            operator=SimpleNamespace(certified=(), locate=lambda case, name, index: f"row {index[0]}"),
        )
        self.case, self.budgets, self.launches = None, {}, 0
        self.rig = SimpleNamespace(poisoner=SimpleNamespace(hidden_places=PLACES))
        self.random, self.followers, self.heads = torch.Generator().manual_seed(seed), followers, heads

    def uniform(self, pattern: Pattern) -> dict[Place, Pattern]:
        return dict.fromkeys(Place, pattern)

    def observe(self, plan: dict[Place, Pattern]) -> Observation:
        self.launches += 1
        rows = (torch.rand(ROWS, 1, generator=self.random) < self.heads).float()
        rows[: self.followers] = float(plan[Place.SHARED_MEMORY] is Pattern.NAN)
        return Observation(plan=plan, outputs={"out": rows.repeat(1, COLUMNS)}, mutated=())

    def found(self) -> Any:
        execution: Any = self
        return unstable(execution, self.observe(self.uniform(Pattern.NAN)), self.observe(self.uniform(Pattern.ZERO)))


@pytest.mark.parametrize("heads", [0.5, 0.1])
def test_rows_that_move_by_chance_follow_no_place(heads: float) -> None:
    for seed in range(20):
        assert Chance(seed, heads=heads).found().kind == "Nondeterministic"


def test_rows_that_follow_a_place_are_found_among_others() -> None:
    chance = Chance(0, followers=3)
    finding = chance.found()
    assert (finding.kind, finding.culprit) == ("StaleState", "shared memory")
    assert finding.what.startswith("out: 24 of 3200 elements")
    assert chance.launches < 100
