"""What has been tried: which launch ran just before which kernel, and which kinds of steps followed each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from kerneltest.model import LaunchSequence, Neighbour, TorchOp
from kerneltest.model.sequence import STEPS

# What shares most with the launch under test is drawn most often: the kernel's own plans and workspaces, then other
# launches; every other kind once.
WEIGHTS = {"again": 4, "neighbour": 2, "torch": 2}
# How much likelier what was never tried is drawn than what was.
NOVELTY = 3
# What stands for the launch under test in a pair of step kinds, and for the beginning.
LAUNCH, BEGIN = "launch", "begin"


@dataclass
class Ledger:
    """Counts over one hunt. ``refused``: kinds of steps that the kernel cannot take, and why.

    ``before``: names of kernels and torch operations by how often each was the last to run before the kernel under
    test. ``kinds``: ordered pairs of step kinds that stood side by side.
    """

    before: Counter[str] = field(default_factory=Counter)
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)

    def note(self, sequence: LaunchSequence) -> None:
        """Count a sequence that was played."""
        names = [BEGIN, *(step.kind for step in sequence.steps), LAUNCH]
        self.kinds.update(pairwise(names))
        launched = [launch_name(step) for step in sequence.steps if isinstance(step, Neighbour | TorchOp)]
        if launched:
            self.before[launched[-1]] += 1

    def refuse(self, reason: str) -> None:
        """Remember that a kind of step cannot be taken; ``reason`` as the worker gives it."""
        kind, _, why = reason.removeprefix("step ").partition(": ")
        if reason.startswith("step ") and kind in STEPS:
            self.refused[kind] = why

    def after(self, kind: str, kinds: Collection[str]) -> list[str]:
        """The kinds to draw from after ``kind``, those often that never followed it."""
        return [
            other
            for other in kinds
            if other not in self.refused
            for _ in range(WEIGHTS.get(other, 1) * (1 if self.kinds[kind, other] else NOVELTY))
        ]

    def weighted(self, names: Sequence[str]) -> list[str]:
        """Names of launches to draw from, those often that never ran just before the kernel under test."""
        return [name for name in names for _ in range(1 if self.before[name] else NOVELTY)]


def launch_name(step: Neighbour | TorchOp) -> str:
    """What a pair matrix calls it."""
    return step.kernel if isinstance(step, Neighbour) else f"torch.{step.op}"
