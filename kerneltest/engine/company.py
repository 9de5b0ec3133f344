"""Hunt one kernel in company: play launch sequences around it, and reduce what fails to the steps that it takes."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kerneltest.engine.casting import Cast, Neighbours, assemble, simplicity
from kerneltest.engine.chase import Chase, draw
from kerneltest.engine.completing import complete_kinds, complete_pairs
from kerneltest.engine.guards import blamed_on_the_guard, named, out_of_bounds
from kerneltest.engine.hunt import CONFIRMATIONS, Caught, Target, Trail, opinions
from kerneltest.engine.job import Company
from kerneltest.engine.ledger import Ledger
from kerneltest.engine.pool import Runner
from kerneltest.engine.profile import NOT_WANTED, Profile
from kerneltest.engine.programs import plainer, sequences
from kerneltest.model import (
    Case,
    CaseRecord,
    Data,
    FarPages,
    Finding,
    Guard,
    Kernel,
    LaunchSequence,
    Outcome,
    Status,
    Unchecked,
)
from kerneltest.model.sequence import STEPS

# Sequences drawn before the weights are made anew.
BATCH = 20
# Deadlines of a case that a sequence gets: one that fails is played dozens of times over to find its culprit.
PLAYS = 3
# Why a sequence is not played around a case that needs no company to fail.
FAILS_ALONE = "the case fails with nothing around it"
# Hypothesis makes a failing sequence smaller as it does anything; to leave out one step or number after the other, as
# is done then, knows more of sequences. This share of the time for shrinking is for the former.
HYPOTHESIS_SHARE = 0.25


@dataclass
class _Company:
    """The state of one hunt of sequences. ``quiet`` runs launches alone, and nothing else ever runs in it.

    ``company_only``: what fails with nothing around it is set ``aside``, to see what company does to the other cases.
    """

    target: Target
    neighbours: Neighbours
    runner: Runner
    quiet: Runner | None
    profile: Profile
    chase: Chase[LaunchSequence] = field(init=False)
    ledger: Ledger = field(default_factory=Ledger)
    fresh: dict[Case[Any], str | None] = field(default_factory=dict)
    company_only: bool = False
    aside: dict[Case[Any], Outcome] = field(default_factory=dict)
    launches: int = 0
    repeated: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chase = Chase(self.ask, self.profile.shrink_seconds, twice=True)

    @property
    def kernels(self) -> dict[str, Kernel]:
        return {name: target.kernel for name, target in self.neighbours.targets.items()}

    def ask(self, sequence: LaunchSequence) -> Outcome:
        """Play a sequence in the worker; a death that is a neighbour's own is not held against the kernel."""
        if not self.profile.wants(sequence.case):
            return Outcome(status=Status.UNSUPPORTED, reason=NOT_WANTED)
        known = [step.kernel for step in sequence.neighbours if step.kernel in self.neighbours.lethal]
        if known:
            return Outcome(status=Status.UNSUPPORTED, reason=f"the neighbour {known[0]} kills the worker by itself")
        if reason := next(filter(None, map(self.neighbours.spoilt.get, _spoilt(sequence))), None):
            return Outcome(status=Status.UNSUPPORTED, reason=reason)
        if self.company_only and self._needs_no_company(sequence):
            return Outcome(status=Status.UNSUPPORTED, reason=FAILS_ALONE)
        outcome = self.play(sequence)
        if outcome.fatal and outcome.status is Status.UNSUPPORTED and len(_spoilt(sequence)) == 1:
            self.neighbours.spoilt[_spoilt(sequence)[0]] = outcome.reason or ""
        elif outcome.died and (guilty := self._lethal_neighbour(sequence)):
            self.neighbours.lethal.add(guilty)
            return Outcome(status=Status.UNSUPPORTED, reason=f"the neighbour {guilty} kills the worker by itself")
        elif outcome.died and (why := self._ended_by_its_data(sequence)):
            return Outcome(status=Status.UNSUPPORTED, reason=why)
        outcome = self._blamed_on_what_is_unmapped(outcome, sequence)
        if outcome.finding and self.company_only and self.chase.prey is None and self._set_aside(sequence):
            return Outcome(status=Status.UNSUPPORTED, reason=FAILS_ALONE)
        if outcome.status is Status.UNSUPPORTED:
            self.ledger.refuse(outcome.reason or "")
        else:
            self.ledger.note(sequence)
        if outcome.repeated:
            self.repeated.append(outcome.repeated)
        return outcome

    def _needs_no_company(self, sequence: LaunchSequence) -> bool:
        """Whether its case was set aside, or one that cannot even be launched is launched as well.

        One that merely answers wrongly is company like any other.
        """
        return any(
            case == sequence.case or _not_launched(outcome)
            for case, outcome in self.aside.items()
            if case in sequence.cases
        )

    def _set_aside(self, sequence: LaunchSequence) -> bool:
        """Whether one of its cases, with nothing around it, is to blame for what came of a sequence.

        Not where the sequence ran: it may have left there what makes the case fail.
        """
        for case in dict.fromkeys(sequence.cases):
            bare = LaunchSequence(case=case)
            for _ in range(CONFIRMATIONS):  # one that fails by chance needs no company either
                outcome = self._blamed_on_what_is_unmapped(self.play(bare, runner=self.quiet), bare)
                if outcome.finding:
                    self.aside[case] = outcome
                    break
        return self._needs_no_company(sequence)

    def play(self, sequence: LaunchSequence, guarded: str | None = None, runner: Runner | None = None) -> Outcome:
        """Play it in that worker, or in the one for sequences."""
        neighbours = {step.kernel: self.neighbours.targets[step.kernel] for step in sequence.neighbours}
        company = Company(
            sequence=sequence,
            neighbours={name: (target.kernel, target.source) for name, target in neighbours.items()},
            fresh=self.digest(sequence.case),
            suspect=self.chase.prey.key if self.chase.prey else None,
        )
        return self._run(runner or self.runner, self.target, sequence.case, company, guarded)

    def digest(self, case: Case[Any]) -> str | None:
        """What the case alone gives where nothing but launches alone ever ran; None if that cannot be told."""
        if self.quiet is None:
            return None
        if case not in self.fresh:
            outcome = self.alone(self.quiet, self.target, case)
            self.fresh[case] = outcome.digest if outcome.status is Status.PASSED else None
        return self.fresh[case]

    def alone(self, runner: Runner, target: Target, case: Case[Any]) -> Outcome:
        """One launch with nothing around it."""
        return self._run(runner, target, case, Company(sequence=LaunchSequence(case=case), alone=True))

    def _run(
        self, runner: Runner, target: Target, case: Case[Any], company: Company, guarded: str | None = None
    ) -> Outcome:
        outcome = runner.run(
            target.job(case, company=company, guarded=guarded),
            deadline=PLAYS * self.profile.deadline,
            cold=self.profile.cold_deadline,
        )
        self.launches += outcome.launches
        return outcome

    def _lethal_neighbour(self, sequence: LaunchSequence) -> str | None:
        """A neighbour whose launch, all alone, ends the worker as well. It has a hunt of its own to answer for it."""
        for step in sequence.neighbours:
            other = self.neighbours.targets[step.kernel]
            if step.kernel != self.target.kernel.name and self.alone(self.runner, other, step.case).died:
                return step.kernel
        return None

    def _ended_by_its_data(self, sequence: LaunchSequence) -> str | None:
        """Why a neighbour does not come back from the NaN or Inf among its inputs, with nothing else around; noted."""
        for step in sequence.neighbours:
            other = self.neighbours.targets[step.kernel]
            if step.data is Data.FINITE or step.kernel == self.target.kernel.name:
                continue
            company = Company(
                sequence=LaunchSequence(case=step.case, steps=(step,)),
                neighbours={step.kernel: (other.kernel, other.source)},
            )
            outcome = self._run(self.runner, other, step.case, company)
            if outcome.died and outcome.finding:
                why = f"the neighbour {step.kernel} does not survive {step.data.value}: {outcome.finding.what}"
                return self.neighbours.spoilt.setdefault((step.kernel, step.data), why)
        return None

    def _blamed_on_what_is_unmapped(self, outcome: Outcome, sequence: LaunchSequence) -> Outcome:
        def unguarded(case: Case[Any]) -> Outcome:
            return self.play(replace(sequence, case=case))

        outcome = blamed_on_the_guard(outcome, sequence.case, self.chase.prey, unguarded)
        finding, far = outcome.finding, [isinstance(step, FarPages) for step in sequence.steps]
        if finding is None or finding.kind != "Crashed" or not any(far):
            return outcome
        prey = self.chase.prey
        if prey is None or prey.kind not in ("Crashed", "OutOfBounds"):
            beyond = not self.play(sequence.without(far.index(True))).died
        else:
            beyond = prey.kind == "OutOfBounds"
        return replace(outcome, finding=_far_out_of_bounds(finding)) if beyond else outcome


def _not_launched(outcome: Outcome) -> bool:
    return outcome.fatal or (outcome.finding is not None and outcome.finding.kind == "LaunchRaised")


def _spoilt(sequence: LaunchSequence) -> list[tuple[str, Data]]:
    """The neighbours with NaN or Inf among their inputs, which not all of them survive."""
    return [(step.kernel, step.data) for step in sequence.neighbours if step.data is not Data.FINITE]


def _far_out_of_bounds(death: Finding) -> Finding:
    guard = out_of_bounds(death, Guard.AFTER)
    return replace(
        guard,
        key="far pages",
        what="with its pages at high page numbers the launch touches memory that holds no page",
        culprit="offsets of pages beyond 32 bits",
    )


def hunt_sequences(
    target: Target,
    neighbours: Neighbours,
    runner: Runner,
    quiet: Runner | None,
    profile: Profile,
    seed_value: int,
    kinds: Collection[str] = tuple(STEPS),
) -> Trail:
    """Play ``profile.sequences`` drawn sequences around the kernel, and reduce the first failure.

    ``neighbours``: every kernel that can run here. ``kinds``: the kinds of steps to draw. Raises
    :class:`~kerneltest.engine.pool.WorkerFailed` if no worker can be had.
    """
    state = _Company(target, neighbours, runner, quiet, profile, company_only=True)
    cast = assemble(state.alone, target, neighbours, runner, quiet, profile, kinds, seed_value)
    if quiet is not None:
        state.fresh |= cast.digests
    if not cast.cases:
        return _trail(state, cast)
    device = runner.started.device
    assert device is not None, "the caller checks that the worker has a device"
    chase, batch, wanted = state.chase, 0, profile.sequences(device)
    chase.patience = profile.shrink_seconds * HYPOTHESIS_SHARE
    while len(chase.ran) < wanted and chase.minimal is None and cast.cases and batch < 3 * wanted // BATCH + 3:
        batch += 1
        left = min(BATCH, wanted - len(chase.ran))
        # Hypothesis begins with the simplest sequence, which has run already.
        draw(sequences(cast, state.ledger), chase.check, left + (batch > 1), seed_value + batch)
        cast = cast.without(state.aside)
    if cast.cases:
        complete_kinds(chase, state.ledger, cast, seed_value)
        if profile.every_pair:
            complete_pairs(chase, state.ledger, cast, seed_value)
    if chase.minimal is None and state.aside:
        _chase_what_fails_alone(state)
    chase.patience, chase.out_of_time = profile.shrink_seconds, False
    while chase.minimal is not None and any(
        map(chase.shows_prey, plainer(chase.minimal[0], state.kernels, target.kernel))
    ):
        pass  # any() stops at the first that shows it, which is the new minimal sequence
    return _trail(state, cast)


def replay_sequence(
    target: Target,
    neighbours: Mapping[str, Target],
    runner: Runner,
    quiet: Runner | None,
    profile: Profile,
    sequence: LaunchSequence,
) -> Trail:
    """Play one given sequence, without drawing or reducing."""
    state = _Company(target, Neighbours(targets=neighbours, seed=0), runner, quiet, profile)
    state.chase.shows_prey(sequence)
    return _trail(state, None)


def _chase_what_fails_alone(state: _Company) -> None:
    """No company did anything: what was set aside is all there is to report, the simplest that fails again."""
    state.company_only, chase = False, state.chase
    chase.outcomes = {one: outcome for one, outcome in chase.outcomes.items() if outcome.reason != FAILS_ALONE}
    for case in sorted(state.aside, key=simplicity):
        if chase.shows_prey(LaunchSequence(case=case)):
            break


def _trail(state: _Company, cast: Cast | None) -> Trail:
    chase = state.chase
    caught = _catch(state, *chase.minimal, CONFIRMATIONS if cast else 0) if chase.minimal else None
    return Trail(
        cases=tuple(_record(sequence, outcome) for sequence, outcome in chase.ran.items()),
        unsupported=dict(chase.unsupported),
        launches=state.launches,
        seconds=time.monotonic() - chase.begun,
        caught=caught,
        unchecked=tuple(Unchecked(what=what, why=why) for what, why in sorted(_unchecked(state, cast).items())),
        before=dict(state.ledger.before),
        kinds={f"{first} > {second}": count for (first, second), count in sorted(state.ledger.kinds.items())},
        repeated=(sum(total for total, _ in state.repeated), sum(differ for _, differ in state.repeated)),
    )


def _unchecked(state: _Company, cast: Cast | None) -> dict[str, str]:
    """What was not looked at, and why. ``cast``: None for a replay, which plays what it is given."""
    kernel, others, started = state.target.kernel.name, state.neighbours, state.runner.started
    told = {f"{kernel}: step {kind}": why for kind, why in state.ledger.refused.items()}
    if cast is None:
        return told
    told |= {f"step {kind}": why for kind, why in started.no_steps.items()}
    if state.quiet is None:
        told["equality with a fresh worker"] = "there is no second worker with --kernel-isolation=inprocess"
    told |= {f"{kernel}: after {name}": "the worker died of it alone" for name in sorted(others.lethal)}
    told |= {f"{kernel}: after {name} with {data.value}": why for (name, data), why in others.spoilt.items()}
    told |= {f"{kernel}: after {name} with nan or inf": why for name, why in cast.finite.items()}
    if state.aside and (state.company_only or state.chase.minimal is None):
        kinds = sorted({_verdict(outcome) for outcome in state.aside.values()})
        told[f"{kernel}: {len(state.aside)} of its cases in company"] = f"they fail alone: {'; '.join(kinds)}"
    chase, wanted = state.chase, state.profile.sequences(started.device) if started.device else 0
    if chase.minimal is None and len(chase.ran) < wanted and chase.unsupported:
        why = max(chase.unsupported, key=lambda reason: chase.unsupported[reason])
        told[f"{kernel}: {wanted - len(chase.ran)} of {wanted} sequences"] = f"nothing else is left to play: {why}"
    for name in sorted(others.targets.keys() - cast.neighbours.keys()) if "neighbour" in cast.kinds else ():
        told[f"{kernel}: after {name}"] = "it ran none of the cases drawn for it"
    return told


def _catch(state: _Company, sequence: LaunchSequence, finding: Finding, confirmations: int) -> Caught:
    """Ask the minimal sequence again, and what comes of it without each of its steps."""
    chase, ended = state.chase, time.monotonic()
    without = []
    for number in range(len(sequence.steps)) if confirmations else ():
        less = sequence.without(number)
        outcome = chase.outcomes.get(less)
        if outcome is None or outcome.finding:  # one that failed did not do so twice
            outcome = state.ask(less)
        without.append(_verdict(outcome))
    reproduced = sum(chase.again(sequence, finding) for _ in range(confirmations))
    if confirmations:
        finding = named(
            finding, sequence.case, lambda case, buffer: state.play(replace(sequence, case=case), guarded=buffer)
        )
    return Caught(
        finding=finding,
        case=sequence.case,
        sequence=sequence,
        without=tuple(without),
        seconds_to_find=chase.found_at - chase.begun,
        seconds_to_shrink=ended - chase.found_at,
        reproduced=reproduced,
        confirmed_of=confirmations,
        others=tuple(chase.others.values()),
        complete=not chase.out_of_time,
        peers=opinions(state.target, state.runner, state.profile, sequence.case) if confirmations else {},
    )


def _verdict(outcome: Outcome) -> str:
    if outcome.finding:
        return f"{outcome.finding.kind}: {outcome.finding.what}"
    return "correct" if outcome.status is Status.PASSED else f"cannot be played: {outcome.reason}"


def _record(sequence: LaunchSequence, outcome: Outcome) -> CaseRecord:
    return CaseRecord(
        id=sequence.id,
        text=str(sequence),
        inputs=sequence.case.inputs,
        status=outcome.status,
        seconds=outcome.seconds,
        used=outcome.used,
        note=outcome.finding.kind if outcome.finding else "",
    )
