"""The checks: each a function from an execution to a finding or nothing, in the order in which they mean something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from kerneltest.model import Finding, Pattern, Place
from kerneltest.oracle.verdict import Tier, Verdict
from kerneltest.worker.agreement import agrees_with_its_peer
from kerneltest.worker.differences import (
    count,
    difference,
    finding,
    first,
    locate,
    out_of_bounds,
    share,
    two_values,
    unstable,
)
from kerneltest.worker.execution import Execution
from kerneltest.worker.poison import holds
from kerneltest.worker.relations import relation_holds
from kerneltest.worker.staging import Observation


def first_finding(execution: Execution) -> Finding | None:
    """The first thing that any check finds wrong, or None."""
    found = next((found for check in CHECKS if (found := check(execution))), None)
    return found and explained(execution, found)


def outputs_have_the_right_form(execution: Execution) -> Finding | None:
    for seen in execution.observations:
        if seen.problem:
            return finding(execution, "WrongOutput", key="form", what=seen.problem)
    return None


def inputs_are_intact(execution: Execution) -> Finding | None:
    for seen in execution.observations:
        if seen.mutated:
            names = ", ".join(seen.mutated)
            return finding(execution, "InputMutated", key=names, what=f"the launch changed its input {names}")
    return None


def buffers_keep_their_bounds(execution: Execution) -> Finding | None:
    """No red zone around a buffer was written to."""
    for seen in execution.observations:
        if seen.damage:
            return out_of_bounds(execution, seen.damage)
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
                return finding(execution, "WrongOutput", key="form", what=alone.problem)
            still = kept & holds(alone.outputs[name], observations[0].plan[place])
            if bool(still.any()):
                return finding(
                    execution,
                    "Unwritten",
                    key=name,
                    what=f"{name}: {share(still)} were not written",
                    details=(f"first at {locate(execution, name, first(still))}",),
                    culprit=place.value,
                )
    return None


def answer_is_independent_of_poison(execution: Execution) -> Finding | None:
    """Two poisons, one answer: needs no reference and no tolerance, so finite stale data shows as well."""
    benign = execution.observations[-1]
    for seen in execution.observations[:-1]:
        name, differs = difference(execution, seen, benign)
        if name is None or differs is None:
            continue
        if moving := unstable(execution, seen, benign):
            # Without a promise of equal bits some launches are wrong by themselves, whatever they found in memory.
            if execution.kernel.deterministic or moving.kind == "StaleState":
                return moving
            return wrong(execution, seen) or wrong(execution, benign)
        culprits = _culprits(execution, seen, benign)
        return _depends_on(execution, name, differs, seen, benign, culprits)
    return None


def outputs_lie_within_budget(execution: Execution) -> Finding | None:
    """All tiers of the oracle, against the float64 reference."""
    findings = (rejected(execution, name, verdict) for name, verdict in execution.verdicts.items())
    return next(filter(None, findings), None)


def outputs_are_certified(execution: Execution) -> Finding | None:
    """What no error budget can judge, by the operator's certificate.

    Launches of a kernel that promises equal bits were the same under every poison; of others each has to be right.
    """
    launches = execution.observations[: 1 if execution.kernel.deterministic else None]
    return next(filter(None, (uncertified(execution, seen) for seen in launches)), None)


def wrong(execution: Execution, seen: Observation) -> Finding | None:
    """What budgets and certificate say against one launch."""
    findings = (rejected(execution, name, verdict) for name, verdict in execution.judged(seen).items())
    return next(filter(None, findings), None) or uncertified(execution, seen)


def uncertified(execution: Execution, seen: Observation) -> Finding | None:
    """What the certificate says against one launch."""
    for found in execution.rejections(seen):
        return finding(
            execution,
            found.kind,
            key=found.output,
            what=f"{found.output}: {found.what}",
            details=found.details,
            by_chance=found.by_chance,
        )
    return None


def rejected(execution: Execution, name: str, verdict: Verdict) -> Finding | None:
    seen, where = verdict.comparison, ""
    if verdict.failed is Tier.FINITE:
        assert seen.first is not None
        return finding(
            execution,
            "NonFinite",
            key=name,
            what=f"{name}: {count(seen.nonfinite, seen.total)} differ from the reference in being finite",
            details=(
                f"first at {locate(execution, name, seen.first)}: got {seen.actual:g}, reference {seen.expected:.6g}",
            ),
        )
    if verdict.failed is None:
        return None
    assert seen.worst is not None
    worst = (
        f"worst at {locate(execution, name, seen.worst)}: got {seen.actual:.9g}, reference {seen.expected:.9g}, "
        f"|error| {abs(seen.actual - seen.expected):.3g}, bound {seen.bound:.3g} "
        f"({seen.used:.3g} times what is allowed, rounding included)"
    )
    if verdict.failed is Tier.HARD:
        assert seen.first is not None
        return finding(
            execution,
            "Mismatch",
            key=name,
            what=f"{name}: {count(seen.outside, seen.total)} lie outside their error budget",
            details=(f"first at {locate(execution, name, seen.first)}", worst),
        )
    if verdict.where:
        # A row or a token has fewer indices than an element: the words of its first element are those of both.
        index = (*verdict.where, *(0,) * (execution.budgets[name].ref.dim() - len(verdict.where)))
        where = f", most at {locate(execution, name, index)}"
    return finding(
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
    buffers_keep_their_bounds,
    outputs_are_written,
    answer_is_independent_of_poison,
    outputs_lie_within_budget,
    outputs_are_certified,
    relation_holds,
    agrees_with_its_peer,
)


def _culprits(execution: Execution, seen: Observation, benign: Observation) -> list[Place]:
    """The places that change the answer all by themselves; if none does, all of them together."""
    alone = []
    for place in execution.places:
        launched = execution.observe({**benign.plan, place: seen.plan[place]})
        if difference(execution, launched, benign)[0] is not None:
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
    index = first(differs)
    culprit = " and ".join(place.value for place in culprits) or "several places together"
    patterns = f"{_fill(seen).value} and {_fill(benign).value}"
    dead_input = bool(culprits) and all(place.in_inputs for place in culprits)
    finite = bool(seen.outputs[name][differs].isfinite().all())
    return finding(
        execution,
        # Garbage in the dead part of an input is the caller's right: what comes of it is judged as an answer.
        # Any other place is hidden state, and to depend on it at all is the bug.
        "NonFinite" if dead_input and not finite else "StaleState",
        key=culprit,
        what=f"{name}: {share(differs)} depend on what the {culprit} held before the launch",
        details=(
            f"the same inputs were run with {patterns} in the {culprit}",
            two_values(execution, name, index, seen, benign),
        ),
        culprit=culprit,
    )


def explained(execution: Execution, found: Finding) -> Finding:
    """A finding of wrong values with what the operator can say of their cause, from the first launch that tells."""
    if found.kind not in ("Mismatch", "NonFinite", "StaleState"):
        return found
    explain, inputs = execution.kernel.operator.explain, execution.materials.inputs
    causes = (explain(execution.case, inputs, seen.outputs) for seen in execution.observations)
    cause = next(filter(None, causes), None)
    return replace(found, details=(*found.details, cause)) if cause else found


def _fill(seen: Observation) -> Pattern:
    return seen.plan[Place.OUTPUTS]
