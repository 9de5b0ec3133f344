"""Draw cases, run them, and shrink the first failure: one kernel's hunt, from start to record."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis.errors import HypothesisException

from kerneltest.engine.pool import Runner
from kerneltest.engine.profile import Profile
from kerneltest.model import Case, CaseRecord, Finding, Kernel, Outcome, Status, Unchecked


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A kernel and the file that defines it."""

    kernel: Kernel
    source: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Caught:
    """A finding with the case that shows it, after shrinking.

    ``others`` are different bugs that the shrinker came across; ``complete`` is False if it ran out of time.
    """

    finding: Finding
    case: Case[Any]
    seconds_to_find: float
    seconds_to_shrink: float
    reproduced: int
    confirmed_of: int
    others: tuple[Finding, ...]
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Trail:
    """What a hunt did: every distinct case that ran, refusals by reason, and the catch, if any."""

    cases: tuple[CaseRecord, ...]
    unsupported: dict[str, int]
    launches: int
    seconds: float
    caught: Caught | None
    unchecked: tuple[Unchecked, ...]


# How often the minimal case is run again after shrinking, to say whether it fails every time.
CONFIRMATIONS = 3
LEAST_PATIENCE = 2.0


class _Found(Exception):
    """Raised inside the property: the finding with the identity that the hunt is after."""


@dataclass
class _Hunt:
    """The state of one hunt. Hypothesis calls :meth:`check` for every case it draws."""

    target: Target
    runner: Runner
    profile: Profile
    begun: float = field(default_factory=time.monotonic)
    outcomes: dict[Case[Any], Outcome] = field(default_factory=dict)
    unsupported: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    prey: Finding | None = None
    found_at: float = 0.0
    minimal: tuple[Case[Any], Finding] | None = None
    others: dict[tuple[str, str, str], Finding] = field(default_factory=dict)
    out_of_time: bool = False
    slowest: float = 0.0

    def check(self, case: Case[Any]) -> None:
        """The property. Raises :class:`_Found` for the bug that is hunted."""
        if self.shows_prey(case):
            raise _Found
        if case in self.outcomes and self.outcomes[case].status is Status.UNSUPPORTED:
            reject()

    def shows_prey(self, case: Case[Any]) -> bool:
        """Whether the case fails with the bug that is hunted, which is the first that was met."""
        if self.prey and case not in self.outcomes and time.monotonic() - self.found_at > self.profile.shrink_seconds:
            self.out_of_time = True
            return False
        finding = (self.outcomes.get(case) or self.run(case)).finding
        if finding is None:
            return False
        if self.prey is None:
            self.prey, self.found_at = finding, time.monotonic()
        if finding.identity == self.prey.identity:
            self.minimal = (case, finding)
            return True
        self.others.setdefault(finding.identity, finding)
        return False

    def run(self, case: Case[Any]) -> Outcome:
        """Run a case and keep its outcome: asked again, shrinking cannot contradict itself."""
        outcome = self.outcomes[case] = self.run_again(case)
        if outcome.status is Status.UNSUPPORTED:
            self.unsupported[outcome.reason or "no reason given"] += 1
        return outcome

    def run_again(self, case: Case[Any]) -> Outcome:
        """Run a case in the worker, whatever is known of it."""
        outcome = self.runner.run(
            self.target.kernel, self.target.source, case, deadline=self.deadline, cold=self.profile.cold_deadline
        )
        self.launches += outcome.launches
        if outcome.status is Status.PASSED:
            self.slowest = max(self.slowest, outcome.seconds)
        return outcome

    @property
    def deadline(self) -> float:
        """Seconds for a case. While a hang is shrunk, ten times the slowest case that passed are enough.

        The whole deadline for every smaller case that hangs as well would leave time for only a few of them.
        """
        if self.prey is None or self.prey.kind != "Hung":
            return self.profile.deadline
        return min(self.profile.deadline, max(LEAST_PATIENCE, 10 * self.slowest))


def hunt(target: Target, runner: Runner, profile: Profile, seed_value: int) -> Trail:
    """Run ``profile.cases`` drawn cases of the kernel and shrink the first failure.

    Raises :class:`~kerneltest.engine.pool.WorkerFailed` if no worker can be had, and Hypothesis' own errors for a
    strategy that is at fault.
    """
    state = _Hunt(target, runner, profile)
    strategy = target.kernel.operator.cases(profile.size(_device(runner)))

    @seed(seed_value)
    @settings(
        max_examples=profile.cases,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(case=strategy)
    def prop(case: Case[Any]) -> None:
        state.check(case)

    try:
        prop()
    except _Found:
        pass
    except HypothesisException:
        if state.outcomes and all(o.status is Status.UNSUPPORTED for o in state.outcomes.values()):
            pass  # every draw was refused: the caller says so in words of its own
        else:
            raise
    _simplify(state)
    return _trail(state)


def _simplify(state: _Hunt) -> None:
    """Take the steps that the operator knows and Hypothesis does not, for as long as one of them keeps the bug."""
    simpler = state.target.kernel.operator.simpler
    while state.minimal is not None and any(state.shows_prey(case) for case in simpler(state.minimal[0])):
        pass  # any() stops at the first that shows it, which is the new minimal case


def replay(target: Target, runner: Runner, profile: Profile, case: Case[Any]) -> Trail:
    """Run one given case, without drawing or shrinking."""
    state = _Hunt(target, runner, profile)
    outcome = state.run(case)
    if outcome.finding:
        state.prey, state.found_at, state.minimal = outcome.finding, time.monotonic(), (case, outcome.finding)
    return _trail(state, confirmations=0)


def _trail(state: _Hunt, confirmations: int = CONFIRMATIONS) -> Trail:
    caught = None
    if state.minimal:
        case, finding = state.minimal
        ended = time.monotonic()
        reproduced = 0
        for _ in range(confirmations):
            again = state.run_again(case).finding
            reproduced += again is not None and again.identity == finding.identity
        caught = Caught(
            finding=finding,
            case=case,
            seconds_to_find=state.found_at - state.begun,
            seconds_to_shrink=ended - state.found_at,
            reproduced=reproduced,
            confirmed_of=confirmations,
            others=tuple(state.others.values()),
            complete=not state.out_of_time,
        )
    ran = {case: outcome for case, outcome in state.outcomes.items() if outcome.status is not Status.UNSUPPORTED}
    unjudged = sorted({name for outcome in ran.values() for name in outcome.unjudged})
    return Trail(
        cases=tuple(_record(case, outcome) for case, outcome in ran.items()),
        unsupported=dict(state.unsupported),
        launches=state.launches,
        seconds=time.monotonic() - state.begun,
        caught=caught,
        unchecked=tuple(
            Unchecked(what=f"{state.target.kernel.name}: output {name}", why="the kernel does not return it")
            for name in unjudged
        ),
    )


def _record(case: Case[Any], outcome: Outcome) -> CaseRecord:
    note = outcome.finding.kind if outcome.finding else ""
    return CaseRecord(
        id=case.id, text=str(case), status=outcome.status, seconds=outcome.seconds, used=outcome.used, note=note
    )


def _device(runner: Runner) -> Any:
    device = runner.started.device
    assert device is not None, "the caller checks that the worker has a device"
    return device
