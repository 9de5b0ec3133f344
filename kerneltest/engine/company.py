"""Hunt one kernel in company: play launch sequences around it, and reduce what fails to the steps that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from kerneltest.engine.casting import Cast, Neighbours, assemble
from kerneltest.engine.chase import Chase, draw
from kerneltest.engine.guards import blamed_on_the_guard, named, out_of_bounds
from kerneltest.engine.hunt import CONFIRMATIONS, Caught, Target, Trail, opinions
from kerneltest.engine.job import Company
from kerneltest.engine.ledger import LAUNCH, Ledger
from kerneltest.engine.pool import Runner
from kerneltest.engine.profile import Profile
from kerneltest.engine.programs import plainer, sequences, step_of
from kerneltest.model import (
    Case,
    CaseRecord,
    Data,
    FarPages,
    Finding,
    Guard,
    Kernel,
    LaunchSequence,
    Neighbour,
    Outcome,
    Status,
    TorchOp,
    Unchecked,
)
from kerneltest.model.sequence import STEPS

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# Sequences drawn before the weights are made anew.
BATCH = 20
# Deadlines of a case that a sequence gets: one that fails is played dozens of times over to find its culprit.
PLAYS = 3
# Hypothesis makes a failing sequence smaller as it does anything; to leave out one step or number after the other, as
# is done then, knows more of sequences. This share of the time for shrinking is for the former.
HYPOTHESIS_SHARE = 0.25
# Sequences of a kind of step that was left out.
ALONE = 4


@dataclass
class _Company:
    """The state of one hunt of sequences. ``quiet`` runs launches alone, and nothing else ever runs in it."""

    target: Target
    neighbours: Mapping[str, Target]
    runner: Runner
    quiet: Runner | None
    profile: Profile
    chase: Chase[LaunchSequence] = field(init=False)
    ledger: Ledger = field(default_factory=Ledger)
    fresh: dict[Case[Any], str | None] = field(default_factory=dict)
    lethal: set[str] = field(default_factory=set)
    spoilt: dict[tuple[str, Data], str] = field(default_factory=dict)
    launches: int = 0
    repeated: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chase = Chase(self.ask, self.profile.shrink_seconds, twice=True)

    @property
    def kernels(self) -> dict[str, Kernel]:
        return {name: target.kernel for name, target in self.neighbours.items()}

    def ask(self, sequence: LaunchSequence) -> Outcome:
        """Play a sequence in the worker; a death that is a neighbour's own is not held against the kernel."""
        known = [step.kernel for step in sequence.neighbours if step.kernel in self.lethal]
        if known:
            return Outcome(status=Status.UNSUPPORTED, reason=f"the neighbour {known[0]} kills the worker by itself")
        if reason := next(filter(None, map(self.spoilt.get, _spoilt(sequence))), None):
            return Outcome(status=Status.UNSUPPORTED, reason=reason)
        outcome = self.play(sequence)
        if outcome.fatal and outcome.status is Status.UNSUPPORTED and len(_spoilt(sequence)) == 1:
            self.spoilt[_spoilt(sequence)[0]] = outcome.reason or ""
        elif outcome.fatal and (guilty := self._lethal_neighbour(sequence)):
            self.lethal.add(guilty)
            return Outcome(status=Status.UNSUPPORTED, reason=f"the neighbour {guilty} kills the worker by itself")
        outcome = self._blamed_on_what_is_unmapped(outcome, sequence)
        if outcome.status is Status.UNSUPPORTED:
            self.ledger.refuse(outcome.reason or "")
        else:
            self.ledger.note(sequence)
        if outcome.repeated:
            self.repeated.append(outcome.repeated)
        return outcome

    def play(self, sequence: LaunchSequence, guarded: str | None = None) -> Outcome:
        neighbours = {step.kernel: self.neighbours[step.kernel] for step in sequence.neighbours}
        company = Company(
            sequence=sequence,
            neighbours={name: (target.kernel, target.source) for name, target in neighbours.items()},
            fresh=self.digest(sequence.case),
            suspect=self.chase.prey.key if self.chase.prey else None,
        )
        return self._run(self.runner, self.target, sequence.case, company, guarded)

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
            other = self.neighbours[step.kernel]
            if step.kernel != self.target.kernel.name and self.alone(self.runner, other, step.case).fatal:
                return step.kernel
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
            beyond = not self.play(sequence.without(far.index(True))).fatal
        else:
            beyond = prey.kind == "OutOfBounds"
        return replace(outcome, finding=_far_out_of_bounds(finding)) if beyond else outcome


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
    state = _Company(target, neighbours.targets, runner, quiet, profile)
    cast = assemble(state.alone, target, neighbours, runner, quiet, profile, kinds, seed_value)
    if quiet is not None:
        state.fresh |= cast.digests
    if not cast.cases:
        return _trail(state, cast)
    device = runner.started.device
    assert device is not None, "the caller checks that the worker has a device"
    chase, batch, wanted = state.chase, 0, profile.sequences(device)
    chase.patience = profile.shrink_seconds * HYPOTHESIS_SHARE
    while len(chase.ran) < wanted and chase.minimal is None and batch < 3 * wanted // BATCH + 3:
        batch += 1
        left = min(BATCH, wanted - len(chase.ran))
        # Hypothesis begins with the simplest sequence, which has run already.
        draw(sequences(cast, state.ledger), chase.check, left + (batch > 1), seed_value + batch)
    _complete_kinds(state, cast, seed_value)
    if profile.every_pair:
        _complete_pairs(state, cast, seed_value)
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
    state = _Company(target, neighbours, runner, quiet, profile)
    state.chase.shows_prey(sequence)
    return _trail(state, None)


def _complete_kinds(state: _Company, cast: Cast, seed_value: int) -> None:
    """Play each kind of step that no sequence had, in a few by itself."""
    for kind in cast.kinds:
        played = any(kind in pair for pair in state.ledger.kinds)
        if state.chase.minimal is None and not played and kind not in state.ledger.refused:
            draw(_around(cast, step_of(kind, cast)), state.chase.check, ALONE, seed_value)


def _complete_pairs(state: _Company, cast: Cast, seed_value: int) -> None:
    """Play what the draw left out: every launch just before the kernel, every kind of step behind every other."""
    chase, ledger = state.chase, state.ledger
    left_out: list[SearchStrategy[Any]] = [
        st.builds(Neighbour, kernel=st.just(name), case=st.sampled_from(cases))
        for name, cases in cast.neighbours.items()
        if not ledger.before[name]
    ]
    left_out += [
        st.builds(TorchOp, op=st.just(op), elements=st.just(1 << 16))
        for op in (cast.torch_ops if TorchOp.kind in cast.kinds else ())
        if not ledger.before[f"torch.{op}"]
    ]
    for launch in left_out:
        if chase.minimal is None:
            draw(_around(cast, lambda _case, launch=launch: launch), chase.check, 2, seed_value)  # type: ignore[misc]
    for first in cast.kinds:
        for second in (*cast.kinds, LAUNCH):
            if chase.minimal is not None or ledger.kinds[first, second] or {first, second} & ledger.refused.keys():
                continue
            pair = [step_of(kind, cast) for kind in (first, second) if kind != LAUNCH]
            draw(_around(cast, *pair), chase.check, 2, seed_value)


def _around(cast: Cast, *steps: Callable[[Case[Any]], SearchStrategy[Any]]) -> SearchStrategy[LaunchSequence]:
    """Sequences of just these steps around any case."""

    def build(case: Case[Any]) -> SearchStrategy[LaunchSequence]:
        made = [step(case) for step in steps]
        return st.builds(lambda *chosen: LaunchSequence(case=case, steps=chosen), *made)

    return st.sampled_from(cast.cases).flatmap(build)


def _trail(state: _Company, cast: Cast | None) -> Trail:
    chase, kernel, started = state.chase, state.target.kernel.name, state.runner.started
    caught = _catch(state, *chase.minimal, CONFIRMATIONS if cast else 0) if chase.minimal else None
    unchecked = {f"{kernel}: step {kind}": why for kind, why in state.ledger.refused.items()}
    if cast is not None:
        unchecked |= {f"step {kind}": why for kind, why in started.no_steps.items()}
        if state.quiet is None:
            unchecked["equality with a fresh worker"] = "there is no second worker with --kernel-isolation=inprocess"
        unchecked |= {f"{kernel}: after {name}": "the worker died of it alone" for name in sorted(state.lethal)}
        unchecked |= {f"{kernel}: after {name} with {data.value}": why for (name, data), why in state.spoilt.items()}
        for name in sorted(state.neighbours.keys() - cast.neighbours.keys()) if "neighbour" in cast.kinds else ():
            unchecked[f"{kernel}: after {name}"] = "it ran none of the cases drawn for it"
    return Trail(
        cases=tuple(_record(sequence, outcome) for sequence, outcome in chase.ran.items()),
        unsupported=dict(chase.unsupported),
        launches=state.launches,
        seconds=time.monotonic() - chase.begun,
        caught=caught,
        unchecked=tuple(Unchecked(what=what, why=why) for what, why in sorted(unchecked.items())),
        before=dict(state.ledger.before),
        kinds={f"{first} > {second}": count for (first, second), count in sorted(state.ledger.kinds.items())},
        repeated=(sum(total for total, _ in state.repeated), sum(differ for _, differ in state.repeated)),
    )


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
