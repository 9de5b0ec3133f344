"""Draw cases, run them, and shrink the first failure: one kernel's hunt, from start to record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis import target as breed_for
from hypothesis.errors import Unsatisfiable

from kerneltest.engine.pool import Runner
from kerneltest.engine.profile import Profile
from kerneltest.model import Case, CaseRecord, Finding, Kernel, Outcome, Status, Unchecked

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A kernel and the file that defines it. ``peers``: other kernels of its operator that can run here."""

    kernel: Kernel
    source: Path
    peers: tuple[Target, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Caught:
    """A finding with the case that shows it, after shrinking.

    ``reproduced`` of ``confirmed_of`` further runs of the case showed it again, and, where the verdict rests on chance,
    ``fresh`` of ``fresh_of`` runs with other data. ``others`` are different bugs that the shrinker came across;
    ``complete`` is False if it ran out of time. ``peers``: what other kernels made of the case, by name.
    """

    finding: Finding
    case: Case[Any]
    seconds_to_find: float
    seconds_to_shrink: float
    reproduced: int
    confirmed_of: int
    others: tuple[Finding, ...]
    complete: bool
    fresh: int = 0
    fresh_of: int = 0
    peers: Mapping[str, Outcome] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trail:
    """What a hunt did: every distinct case that ran, refusals by reason, and the catch, if any."""

    cases: tuple[CaseRecord, ...]
    unsupported: dict[str, int]
    launches: int
    seconds: float
    caught: Caught | None
    unchecked: tuple[Unchecked, ...]
    slack: float = 1.0
    wide: frozenset[str] = frozenset()


# How often the minimal case is run again after shrinking, to say whether it fails every time.
CONFIRMATIONS = 3
# With how many other seeds a case is run whose data alone seemed too improbable.
FRESH_SEEDS = 3
# The least number of cases of an input strategy, where one is not enough: what one kind of data hides, another shows.
PORTFOLIO = {"generic": 2}
# A kernel of the same operator runs beside it in one of so many cases.
PEER_EVERY = 4
# Seconds that another kernel gets to compile and give its opinion of a failure.
PEER_PATIENCE = 120.0
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
    lethal_peers: set[str] = field(default_factory=set)
    out_of_time: bool = False
    slowest: float = 0.0

    def check(self, case: Case[Any]) -> None:
        """The property. Raises :class:`_Found` for the bug that is hunted."""
        if self.shows_prey(case):
            raise _Found
        outcome = self.outcomes.get(case)
        if outcome is not None and outcome.status is Status.UNSUPPORTED:
            reject()
        strategy = self.target.kernel.operator.strategy(case.inputs)
        if outcome is not None and outcome.used and strategy.tier != "exact":
            # Cases that use much of the budget are bred for more; on exact inputs a right kernel uses all of it.
            breed_for(max(outcome.used.values()), label=f"share of the error budget, {strategy.name}")

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
        peer = self._peer(case)
        outcome = self._ask(case, peer)
        if outcome.fatal and peer:
            # Whose fault was it? The peer has a hunt of its own to answer for what it does.
            alone = self._ask(case, None)
            if not alone.fatal:
                self.lethal_peers.add(peer.kernel.name)
                outcome = alone
        if outcome.status is Status.PASSED:
            self.slowest = max(self.slowest, outcome.seconds)
        return outcome

    def _ask(self, case: Case[Any], peer: Target | None) -> Outcome:
        outcome = self.runner.run(
            self.target.kernel,
            self.target.source,
            case,
            peer=(peer.kernel, peer.source) if peer else None,
            deadline=self.deadline,
            cold=self.profile.cold_deadline,
        )
        self.launches += outcome.launches
        return outcome

    def _peer(self, case: Case[Any]) -> Target | None:
        """The kernel that runs beside this one, if any does: told by the case alone, so that a replay has the same."""
        number, turn = divmod(int(case.id, 16), PEER_EVERY)
        peers = [peer for peer in self.target.peers if peer.kernel.name not in self.lethal_peers]
        return peers[number % len(peers)] if peers and turn == 0 else None

    @property
    def ran(self) -> dict[Case[Any], Outcome]:
        """The cases that the kernel did not refuse."""
        return {case: outcome for case, outcome in self.outcomes.items() if outcome.status is not Status.UNSUPPORTED}

    @property
    def deadline(self) -> float:
        """Seconds for a case. While a hang is shrunk, ten times the slowest case that passed are enough.

        The whole deadline for every smaller case that hangs as well would leave time for only a few of them.
        """
        if self.prey is None or self.prey.kind != "Hung":
            return self.profile.deadline
        return min(self.profile.deadline, max(LEAST_PATIENCE, 10 * self.slowest))


def hunt(target: Target, runner: Runner, profile: Profile, seed_value: int) -> Trail:
    """Run ``profile.cases`` drawn cases of the kernel, some of each input strategy and relation; shrink a failure.

    Raises :class:`~kerneltest.engine.pool.WorkerFailed` if no worker can be had, and Hypothesis' own errors for a
    strategy that is at fault.
    """
    state = _Hunt(target, runner, profile)
    operator = target.kernel.operator
    strategy = operator.cases(profile.size(_device(runner)))
    _draw(state, strategy, profile.cases, seed_value)
    for inputs in operator.inputs if state.ran else ():
        missing = PORTFOLIO.get(inputs.name, 1) - sum(case.inputs == inputs.name for case in state.ran)
        if missing > 0 and state.minimal is None:
            # Hypothesis begins with the simplest case, which has run already.
            _draw(state, _with_inputs(strategy, inputs.name), missing + 1, seed_value + 1)
    _complete_relations(state)
    _simplify(state)
    return _trail(state)


def _complete_relations(state: _Hunt) -> None:
    """Name each relation that no case named in the first of the cases that it applies to."""
    drawn = list(state.ran)
    for relation in state.target.kernel.operator.relations:
        if state.minimal is None and not any(case.relation == relation.name for case in drawn):
            case = next((case for case in drawn if not case.relation and relation.applies(case)), None)
            if case is not None:
                state.shows_prey(replace(case, relation=relation.name))


def _with_inputs(strategy: SearchStrategy[Case[Any]], inputs: str) -> SearchStrategy[Case[Any]]:
    return strategy.filter(lambda case: case.inputs == inputs)


def _draw(state: _Hunt, strategy: SearchStrategy[Case[Any]], cases: int, seed_value: int) -> None:
    """Let Hypothesis draw that many cases, and shrink the first that fails."""

    @seed(seed_value)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.target, Phase.shrink),
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
    except Unsatisfiable:
        if not state.outcomes:
            raise
        # The kernel refused what was drawn: the caller says so in words of its own.


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
    caught = _catch(state, *state.minimal, confirmations) if state.minimal else None
    ran, kernel = state.ran, state.target.kernel.name
    unchecked = {
        f"{kernel}: output {name}": "the kernel does not return it" for o in ran.values() for name in o.unjudged
    }
    for case, outcome in ran.items():
        if outcome.unchecked_relation:
            unchecked.setdefault(f"{kernel}: relation {case.relation} in some cases", outcome.unchecked_relation)
    for peer in sorted(state.lethal_peers):
        unchecked[f"{kernel}: agreement with {peer}"] = "the worker died of it"
    if confirmations and ran and caught is None:
        used = Counter(case.inputs for case in ran)
        for inputs in state.target.kernel.operator.inputs:
            if not used[inputs.name]:
                unchecked[f"{kernel}: input strategy {inputs.name}"] = "no case of it ran"
        compared = {outcome.compared_with for outcome in ran.values()}
        for other in state.target.peers:
            if other.kernel.name not in compared:
                unchecked.setdefault(f"{kernel}: agreement with {other.kernel.name}", "no case was right in both")
    return Trail(
        cases=tuple(_record(case, outcome) for case, outcome in ran.items()),
        unsupported=dict(state.unsupported),
        launches=state.launches,
        seconds=time.monotonic() - state.begun,
        caught=caught,
        slack=max((outcome.slack for outcome in ran.values()), default=1.0),
        wide=frozenset(name for outcome in ran.values() for name in outcome.wide),
        unchecked=tuple(Unchecked(what=what, why=why) for what, why in sorted(unchecked.items())),
    )


def _catch(state: _Hunt, case: Case[Any], finding: Finding, confirmations: int) -> Caught:
    """Ask the minimal case again, with its own data and with others, and what other kernels make of it."""
    ended = time.monotonic()

    def again(other: Case[Any]) -> bool:
        found = state.run_again(other).finding
        return found is not None and found.identity == finding.identity

    reproduced = sum(again(case) for _ in range(confirmations))
    seeds = range(case.seed + 1, case.seed + 1 + FRESH_SEEDS) if finding.by_chance and confirmations else ()
    fresh = [again(replace(case, seed=seed % 2**32)) for seed in seeds]
    peers = {}
    for peer in state.target.peers if confirmations else ():
        cold = min(state.profile.cold_deadline, PEER_PATIENCE)
        peers[peer.kernel.name] = state.runner.run(peer.kernel, peer.source, case, deadline=state.deadline, cold=cold)
    return Caught(
        finding=finding,
        case=case,
        seconds_to_find=state.found_at - state.begun,
        seconds_to_shrink=ended - state.found_at,
        reproduced=reproduced,
        confirmed_of=confirmations,
        fresh=sum(fresh),
        fresh_of=len(fresh),
        others=tuple(state.others.values()),
        complete=not state.out_of_time,
        peers=peers,
    )


def _record(case: Case[Any], outcome: Outcome) -> CaseRecord:
    note = outcome.finding.kind if outcome.finding else ""
    return CaseRecord(
        id=case.id,
        text=str(case),
        inputs=case.inputs,
        status=outcome.status,
        seconds=outcome.seconds,
        used=outcome.used,
        energy=outcome.energy,
        note=note,
    )


def _device(runner: Runner) -> Any:
    device = runner.started.device
    assert device is not None, "the caller checks that the worker has a device"
    return device
