"""The emulated kernel as a corpus: every mutant, and every legal variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kerneltest.power.corpus import Size, Unit
from kerneltest.power.emulation import Planted
from kerneltest.power.problems import FAMILIES, STRATEGIES, draw, generator
from kerneltest.power.subjects import LEGAL, MUTANTS
from kerneltest.power.tally import Tally
from kerneltest.power.trials import correct, flawed

MUTANT, VARIANT = "mutant", "legal"


@dataclass(frozen=True, slots=True)
class Emulated:
    """Mutants and legal variants of one small kernel, in every family and under every input strategy."""

    together = 1

    def units(self, size: Size) -> Sequence[Unit]:
        mutants = (
            Unit(group=MUTANT, subject=mutant.name, family=family, strategy=strategy, trials=batches.get(family, 0))
            for mutant in MUTANTS.values()
            for strategy, batches in size.mutants.items()
            for family in mutant.families
        )
        legal = (
            Unit(group=VARIANT, subject=name, family=family, strategy=strategy, trials=count)
            for name in LEGAL
            for strategy, batches in size.legal.items()
            for family, count in batches.items()
        )
        return [unit for unit in (*mutants, *legal) if unit.trials]

    def run(self, units: Sequence[Unit], seed: int) -> list[Tally]:
        return [_tally(unit, seed) for unit in units]


def _tally(unit: Unit, seed: int) -> Tally:
    one = _flawed if unit.group == MUTANT else _correct
    return sum((one(unit, seed, trial) for trial in range(unit.trials)), Tally())


def _flawed(unit: Unit, seed: int, trial: int) -> Tally:
    mutant, random = MUTANTS[unit.subject], _generator(unit, seed, trial)
    at, victim = torch.rand(2, generator=random).tolist()
    problem = draw(FAMILIES[unit.family], STRATEGIES[unit.strategy], random)
    planted = Planted(flaw=mutant.flaw, at=at)
    return flawed(problem, mutant.how, planted, int(victim * len(problem.lengths)))


def _correct(unit: Unit, seed: int, trial: int) -> Tally:
    problem = draw(FAMILIES[unit.family], STRATEGIES[unit.strategy], _generator(unit, seed, trial))
    return correct(problem, LEGAL[unit.subject])


def _generator(unit: Unit, seed: int, trial: int) -> torch.Generator:
    return generator(seed, unit.family, unit.strategy, unit.subject, trial)
