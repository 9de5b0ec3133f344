"""Where two launches differ, and the words for it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kerneltest.model import Finding, Pattern, Place
from kerneltest.oracle.rounding import interval
from kerneltest.worker.execution import Execution
from kerneltest.worker.memory import Damage
from kerneltest.worker.poison import as_bits
from kerneltest.worker.staging import Observation

if TYPE_CHECKING:
    import torch

# How often a pair of launches is repeated before its difference is blamed on anything else.
REPEATS = 3
# The chance, at most, that of the elements which move by themselves any seems to follow what a place held.
BY_CHANCE = 2.0**-20


def difference(
    execution: Execution, one: Observation, other: Observation, *, exact: bool | None = None
) -> tuple[str, torch.Tensor] | tuple[None, None]:
    """The first output whose bits differ, and where.

    Without a promise of equal bits (``exact``: whether there is one; the kernel's own word if None), only leaving the
    budget in one of the launches counts, or what the certificate says of one of them and not of the other.
    """
    if exact is None:
        exact = execution.kernel.deterministic
    for name, a in one.outputs.items():
        b = other.outputs.get(name)
        if b is None:  # a launch whose outputs had the wrong form has none
            continue
        differs = unequal(a, b)
        if not exact and name in execution.budgets:
            differs &= _outside(execution, name, a) ^ _outside(execution, name, b)
        if bool(differs.any()) and (exact or not _alike(execution, name, one, other)):
            return name, differs
    return None, None


def _alike(execution: Execution, name: str, one: Observation, other: Observation) -> bool:
    """Whether a certificate accepts that output in both launches, or rejects it in both.

    What is only improbable does not count: it happens without anybody's doing.
    """
    if name not in execution.kernel.operator.certified:
        return False
    rejected = [
        any(found.output == name and not found.by_chance for found in execution.rejections(seen))
        for seen in (one, other)
    ]
    return rejected[0] == rejected[1]


def _outside(execution: Execution, name: str, value: torch.Tensor) -> torch.Tensor:
    low, high = (bound.cpu() for bound in interval(execution.budgets[name]))
    return ~((low <= value.double()) & (value.double() <= high))


def unstable(execution: Execution, *observations: Observation) -> Finding | None:
    """Before anything is blamed: do identical launches agree?"""
    for _ in range(REPEATS):
        for before in observations:
            again = execution.observe(before.plan)
            name, moved = difference(execution, again, before)
            if name is not None and moved is not None:
                return _stale_all_the_same(execution) or finding(
                    execution,
                    "Nondeterministic",
                    key=name,
                    what=f"{name}: {share(moved)} differ between two identical launches",
                    details=(two_values(execution, name, first(moved), again, before),),
                )
    return None


def _stale_all_the_same(execution: Execution) -> Finding | None:
    """Whether some elements are one thing or another by what a hidden place was filled with.

    A kernel that reads stale memory moves by itself where its own blocks leave some for each other. An element that
    moves by chance seems to follow anything: one that is as often one thing as another follows n pairs of launches with
    a probability of 2^(1 - 2n). There are so many pairs that this happens to none with more than :data:`BY_CHANCE`; the
    place that most elements follow is the one.
    """
    places, most = execution.rig.poisoner.hidden_places, 0
    found: Finding | None = None
    for place in places:
        clean, filled, followers = _followers(execution, place, len(places))
        for name, followed in followers.items():
            if int(followed.sum()) > most:
                most = int(followed.sum())
                found = finding(
                    execution,
                    "StaleState",
                    key=place.value,
                    what=f"{name}: {share(followed)} depend on what the {place.value} held before the launch",
                    details=(
                        "other elements differ between identical launches",
                        two_values(execution, name, first(followed), filled, clean),
                    ),
                    culprit=place.value,
                )
    return found


def _followers(
    execution: Execution, place: Place, places: int
) -> tuple[Observation, Observation, dict[str, torch.Tensor]]:
    """A launch with the place clean, one with it filled, and which elements of each output differ as these do.

    Both are launched in turn, so that nothing that changes only once looks like the place's doing.
    """
    zero = execution.uniform(Pattern.ZERO)
    clean, filled = execution.observe(zero), execution.observe({**zero, place: Pattern.NAN})
    if clean.problem or filled.problem:
        return clean, filled, {}
    followers = {name: unequal(value, filled.outputs[name]) for name, value in clean.outputs.items()}
    elements = sum(mask.numel() for mask in followers.values())
    for _ in range(math.ceil((1 + math.log2(max(elements, 1) * places / BY_CHANCE)) / 2) - 1):
        for before in (clean, filled):
            if not any(bool(mask.any()) for mask in followers.values()):
                return clean, filled, {}
            again = execution.observe(before.plan)
            if again.problem:
                return clean, filled, {}
            for name, mask in followers.items():
                mask.logical_and_(~unequal(before.outputs[name], again.outputs[name]))
    return clean, filled, followers


def unequal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where bits differ. Two NaNs are equal, whatever their payload."""
    return (as_bits(a) != as_bits(b)) & ~(a.isnan() & b.isnan())


def out_of_bounds(execution: Execution, damage: tuple[Damage, ...]) -> Finding:
    """A red zone was written to."""
    worst = damage[0]
    edge = "behind the end of" if worst.side == "after" else "before the beginning of"
    return finding(
        execution,
        "OutOfBounds",
        key=f"{worst.label}, {worst.side}",
        what=f"the launch wrote {worst.count} bytes {edge} {worst.label}, the first at a distance of {worst.offset}",
        details=tuple(f"also {other.count} bytes {other.side} {other.label}" for other in damage[1:]),
        culprit=f"red zone {worst.side} {worst.label}",
    )


def finding(
    execution: Execution,
    kind: str,
    *,
    key: str,
    what: str,
    details: tuple[str, ...] = (),
    culprit: str | None = None,
    by_chance: bool = False,
) -> Finding:
    """A finding about the kernel under test."""
    return Finding(
        kind=kind,
        kernel=execution.kernel.name,
        key=key,
        what=what,
        details=details,
        culprit=culprit,
        by_chance=by_chance,
    )


def two_values(execution: Execution, name: str, index: tuple[int, ...], one: Observation, other: Observation) -> str:
    """One element in both launches."""
    a, b = float(one.outputs[name][index]), float(other.outputs[name][index])
    return f"first at {locate(execution, name, index)}: {a:.9g} in one launch, {b:.9g} in the other"


def first(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])


def share(mask: torch.Tensor) -> str:
    return count(int(mask.sum()), mask.numel())


def count(number: int, total: int) -> str:
    return f"{number} of {total} elements ({100 * number / total:.3g} %)"


def locate(execution: Execution, name: str, index: tuple[int, ...]) -> str:
    return execution.kernel.operator.locate(execution.case, name, index)
