"""Where two launches differ, and the words for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kerneltest.model import Finding, Pattern
from kerneltest.oracle.rounding import interval
from kerneltest.worker.execution import Execution
from kerneltest.worker.memory import Damage
from kerneltest.worker.poison import as_bits
from kerneltest.worker.staging import Observation

if TYPE_CHECKING:
    import torch

# How often a pair of launches is repeated before its difference is blamed on anything else.
REPEATS = 3


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
    """Whether some elements hold still, and are one thing or another by what a hidden place was filled with.

    A kernel that reads stale memory moves by itself where its own blocks leave some for each other. Where elements move
    by chance a few seem to hold still: the place that most depend on is the one.
    """
    zero, most = execution.uniform(Pattern.ZERO), 0
    found: Finding | None = None
    for place in execution.rig.poisoner.hidden_places:
        clean = [execution.observe(zero) for _ in range(REPEATS)]
        filled = [execution.observe({**zero, place: Pattern.NAN}) for _ in range(REPEATS)]
        if any(seen.problem for seen in (*clean, *filled)):
            continue
        for name, a in clean[0].outputs.items():
            b = filled[0].outputs[name]
            differs = unequal(a, b)
            for one, other in zip(clean, filled, strict=True):
                differs &= ~unequal(a, one.outputs[name]) & ~unequal(b, other.outputs[name])
            if int(differs.sum()) > most:
                most = int(differs.sum())
                found = finding(
                    execution,
                    "StaleState",
                    key=place.value,
                    what=f"{name}: {share(differs)} depend on what the {place.value} held before the launch",
                    details=(
                        "other elements differ between identical launches",
                        two_values(execution, name, first(differs), filled[0], clean[0]),
                    ),
                    culprit=place.value,
                )
    return found


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
