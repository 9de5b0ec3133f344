"""The checks: each a function from an execution to a finding or nothing, in the order in which they mean something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from kerneltest.model import Finding, Pattern, Place
from kerneltest.oracle.rounding import interval
from kerneltest.oracle.verdict import Tier, Verdict
from kerneltest.worker.agreement import agrees_with_its_peer
from kerneltest.worker.execution import Execution, Observation
from kerneltest.worker.poison import as_bits, holds
from kerneltest.worker.relations import relation_holds

# How often a pair of launches is repeated before its difference is blamed on a poison.
REPEATS = 3


def first_finding(execution: Execution) -> Finding | None:
    """The first thing that any check finds wrong, or None."""
    finding = next((finding for check in CHECKS if (finding := check(execution))), None)
    return finding and _explained(execution, finding)


def outputs_have_the_right_form(execution: Execution) -> Finding | None:
    for seen in execution.observations:
        if seen.problem:
            return _finding(execution, "WrongOutput", key="form", what=seen.problem)
    return None


def inputs_are_intact(execution: Execution) -> Finding | None:
    for seen in execution.observations:
        if seen.mutated:
            names = ", ".join(seen.mutated)
            return _finding(execution, "InputMutated", key=names, what=f"the launch changed its input {names}")
    return None


def outputs_are_written(execution: Execution) -> Finding | None:
    """An element that equals the fill of its buffer under every pattern was never written."""
    observations = execution.observations
    for name in observations[0].outputs:
        kept = torch.stack([holds(seen.outputs[name], _fill(seen)) for seen in observations]).all(0)
        if not bool(kept.any()):
            continue
        # Every place held the same pattern, so a leak from elsewhere could look the same: fill the buffer alone, be it
        # the caller's or one that the kernel allocated for itself.
        for place in (Place.OUTPUTS, Place.ALLOCATOR_POOL):
            alone = execution.observe({**observations[-1].plan, place: observations[0].plan[place]})
            if alone.problem:
                return _finding(execution, "WrongOutput", key="form", what=alone.problem)
            still = kept & holds(alone.outputs[name], observations[0].plan[place])
            if bool(still.any()):
                return _finding(
                    execution,
                    "Unwritten",
                    key=name,
                    what=f"{name}: {_share(still)} were not written",
                    details=(f"first at {_locate(execution, name, _first(still))}",),
                    culprit=place.value,
                )
    return None


def answer_is_independent_of_poison(execution: Execution) -> Finding | None:
    """Two poisons, one answer: needs no reference and no tolerance, so finite stale data shows as well."""
    benign = execution.observations[-1]
    for seen in execution.observations[:-1]:
        name, differs = _difference(execution, seen, benign)
        if name is None or differs is None:
            continue
        if execution.kernel.deterministic and (unstable := _unstable(execution, seen, benign)):
            return unstable
        culprits = _culprits(execution, seen, benign)
        return _depends_on(execution, name, differs, seen, benign, culprits)
    return None


def outputs_lie_within_budget(execution: Execution) -> Finding | None:
    """All tiers of the oracle, against the float64 reference."""
    rejected = (_rejected(execution, name, verdict) for name, verdict in execution.verdicts.items())
    return next(filter(None, rejected), None)


def _rejected(execution: Execution, name: str, verdict: Verdict) -> Finding | None:
    seen, where = verdict.comparison, ""
    if verdict.failed is Tier.FINITE:
        assert seen.first is not None
        return _finding(
            execution,
            "NonFinite",
            key=name,
            what=f"{name}: {_count(seen.nonfinite, seen.total)} differ from the reference in being finite",
            details=(
                f"first at {_locate(execution, name, seen.first)}: got {seen.actual:g}, reference {seen.expected:.6g}",
            ),
        )
    if verdict.failed is None:
        return None
    assert seen.worst is not None
    worst = (
        f"worst at {_locate(execution, name, seen.worst)}: got {seen.actual:.9g}, reference {seen.expected:.9g}, "
        f"|error| {abs(seen.actual - seen.expected):.3g}, bound {seen.bound:.3g} "
        f"({seen.used:.3g} times what is allowed, rounding included)"
    )
    if verdict.failed is Tier.HARD:
        assert seen.first is not None
        return _finding(
            execution,
            "Mismatch",
            key=name,
            what=f"{name}: {_count(seen.outside, seen.total)} lie outside their error budget",
            details=(f"first at {_locate(execution, name, seen.first)}", worst),
        )
    if verdict.where:
        # A row or a token has fewer indices than an element: the words of its first element are those of both.
        first = (*verdict.where, *(0,) * (execution.budgets[name].ref.dim() - len(verdict.where)))
        where = f", most at {_locate(execution, name, first)}"
    return _finding(
        execution,
        "Mismatch",
        key=f"{name}, {verdict.failed.name.lower()}",
        what=f"{name}: errors that rounding does not make on random inputs: {verdict.failed.value}{where}",
        details=(
            f"{seen.unlikely} of {seen.total} elements beyond the statistical interval; mean energy "
            f"{verdict.energy:.3g}, largest of a row {verdict.worst_energy:.3g}; bias of a row {verdict.z_row:.3g}, "
            f"of the case {verdict.z_case:.3g} standard deviations",
            worst,
        ),
        by_chance=True,
    )


CHECKS: tuple[Callable[[Execution], Finding | None], ...] = (
    outputs_have_the_right_form,
    inputs_are_intact,
    outputs_are_written,
    answer_is_independent_of_poison,
    outputs_lie_within_budget,
    relation_holds,
    agrees_with_its_peer,
)


def _difference(
    execution: Execution, one: Observation, other: Observation
) -> tuple[str, torch.Tensor] | tuple[None, None]:
    """The first output whose bits differ, and where. Two NaNs are equal, whatever their payload."""
    for name, a in one.outputs.items():
        b = other.outputs.get(name)
        if b is None:  # a launch whose outputs had the wrong form has none
            continue
        differs = (as_bits(a) != as_bits(b)) & ~(a.isnan() & b.isnan())
        if not execution.kernel.deterministic and name in execution.budgets:
            # Without a promise of equal bits, only leaving the budget under one of the poisons counts.
            differs &= _outside(execution, name, a) ^ _outside(execution, name, b)
        if bool(differs.any()):
            return name, differs
    return None, None


def _outside(execution: Execution, name: str, value: torch.Tensor) -> torch.Tensor:
    low, high = (bound.cpu() for bound in interval(execution.budgets[name]))
    return ~((low <= value.double()) & (value.double() <= high))


def _unstable(execution: Execution, *observations: Observation) -> Finding | None:
    """Before anything is blamed on a poison: do identical launches agree?"""
    for _ in range(REPEATS):
        for before in observations:
            again = execution.observe(before.plan)
            name, moved = _difference(execution, again, before)
            if name is not None and moved is not None:
                return _finding(
                    execution,
                    "Nondeterministic",
                    key=name,
                    what=f"{name}: {_share(moved)} differ between two identical launches",
                    details=(_two_values(execution, name, _first(moved), again, before),),
                )
    return None


def _culprits(execution: Execution, seen: Observation, benign: Observation) -> list[Place]:
    """The places that change the answer all by themselves; if none does, all of them together."""
    alone = []
    for place in execution.places:
        launched = execution.observe({**benign.plan, place: seen.plan[place]})
        if _difference(execution, launched, benign)[0] is not None:
            alone.append(place)
    return alone


def _depends_on(
    execution: Execution,
    name: str,
    differs: torch.Tensor,
    seen: Observation,
    benign: Observation,
    culprits: list[Place],
) -> Finding:
    first = _first(differs)
    culprit = " and ".join(place.value for place in culprits) or "several places together"
    patterns = f"{_fill(seen).value} and {_fill(benign).value}"
    dead_input = bool(culprits) and all(place.in_inputs for place in culprits)
    finite = bool(seen.outputs[name][differs].isfinite().all())
    return _finding(
        execution,
        # Garbage in the dead part of an input is the caller's right: what comes of it is judged as an answer.
        # Any other place is hidden state, and to depend on it at all is the bug.
        "NonFinite" if dead_input and not finite else "StaleState",
        key=culprit,
        what=f"{name}: {_share(differs)} depend on what the {culprit} held before the launch",
        details=(
            f"the same inputs were run with {patterns} in the {culprit}",
            _two_values(execution, name, first, seen, benign),
        ),
        culprit=culprit,
    )


def _two_values(execution: Execution, name: str, index: tuple[int, ...], one: Observation, other: Observation) -> str:
    a, b = float(one.outputs[name][index]), float(other.outputs[name][index])
    return f"first at {_locate(execution, name, index)}: {a:.9g} in one launch, {b:.9g} in the other"


def _explained(execution: Execution, finding: Finding) -> Finding:
    """A finding of wrong values with what the operator can say of their cause, from the first launch that tells."""
    if finding.kind not in ("Mismatch", "NonFinite", "StaleState"):
        return finding
    explain, inputs = execution.kernel.operator.explain, execution.materials.inputs
    causes = (explain(execution.case, inputs, seen.outputs) for seen in execution.observations)
    cause = next(filter(None, causes), None)
    return replace(finding, details=(*finding.details, cause)) if cause else finding


def _finding(
    execution: Execution,
    kind: str,
    *,
    key: str,
    what: str,
    details: tuple[str, ...] = (),
    culprit: str | None = None,
    by_chance: bool = False,
) -> Finding:
    return Finding(
        kind=kind,
        kernel=execution.kernel.name,
        key=key,
        what=what,
        details=details,
        culprit=culprit,
        by_chance=by_chance,
    )


def _fill(seen: Observation) -> Pattern:
    return seen.plan[Place.OUTPUTS]


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])


def _share(mask: torch.Tensor) -> str:
    return _count(int(mask.sum()), mask.numel())


def _count(count: int, total: int) -> str:
    return f"{count} of {total} elements ({100 * count / total:.3g} %)"


def _locate(execution: Execution, name: str, index: tuple[int, ...]) -> str:
    return execution.kernel.operator.locate(execution.case, name, index)
