"""Draw cases, run them, and shrink the first failure: one kernel's hunt, from start to record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import target as breed_for

from kerneltest.engine.chase import Chase, draw
from kerneltest.engine.guards import blamed_on_the_guard, guarded, named
from kerneltest.engine.job import Job
from kerneltest.engine.pool import Runner
from kerneltest.engine.profile import NOT_WANTED, Profile
from kerneltest.model import (
    Case,
    CaseRecord,
    Finding,
    Guard,
    Kernel,
    LaunchSequence,
    Misuse,
    Operator,
    Outcome,
    Status,
    Unchecked,
)

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A kernel and the file that defines it. ``peers``: other kernels of its operator that can run here."""

    kernel: Kernel
    source: Path
    peers: tuple[Target, ...] = ()

    def job(self, case: Case[Any], **more: Any) -> Job:
        """What a worker is asked for, to run a case of the kernel; ``more``: the other fields of a :class:`Job`."""
        return Job(kernel=self.kernel, source=self.source, case=case, **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caught:
    """A finding with the case that shows it, after shrinking.

    ``reproduced`` of ``confirmed_of`` further runs of the case showed it again, and, where the verdict rests on chance,
    ``fresh`` of ``fresh_of`` runs with other data. ``others`` are different bugs that the shrinker came across;
    ``complete`` is False if it ran out of time. ``peers``: what other kernels made of the case, by name. ``sequence``:
    the steps around the case, if it takes any to fail; ``without``: what comes of it without each of them. ``misuse``:
    what is wrong with the call. ``draws``: how many it took to see that they follow another distribution.
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
    sequence: LaunchSequence | None = None
    without: tuple[str, ...] = ()
    misuse: Misuse | None = None
    draws: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trail:
    """What a hunt did: every distinct case that ran, refusals by reason, and the catch, if any.

    Of a hunt of sequences: ``before``, how often each other launch was the last before the kernel's; ``kinds``, pairs
    of step kinds side by side; ``repeated``, launches compared with the first of their kind, and those that differed.
    """

    cases: tuple[CaseRecord, ...]
    unsupported: dict[str, int]
    launches: int
    seconds: float
    caught: Caught | None
    unchecked: tuple[Unchecked, ...]
    slack: float = 1.0
    wide: frozenset[str] = frozenset()
    before: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    repeated: tuple[int, int] = (0, 0)


# How often the minimal case is run again after shrinking, to say whether it fails every time.
CONFIRMATIONS = 3
# With how many other seeds a case is run whose data alone seemed too improbable.
FRESH_SEEDS = 3
# The least number of cases of an input strategy, where one is not enough: what one kind of data hides, another shows.
PORTFOLIO = {"generic": 2}
# One in so many cases is bred for the share of the error budget that it uses.
BRED = 4
# A kernel of the same operator runs beside it in one of so many cases.
PEER_EVERY = 4
# Seconds that another kernel gets to compile and give its opinion of a failure.
PEER_PATIENCE = 120.0
LEAST_PATIENCE = 2.0


@dataclass
class _Hunt:
    """The state of one hunt of cases."""

    target: Target
    runner: Runner
    profile: Profile
    chase: Chase[Case[Any]] = field(init=False)
    launches: int = 0
    lethal_peers: set[str] = field(default_factory=set)
    slowest: float = 0.0
    modules: set[str] = field(default_factory=set)
    peers_modules: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chase = Chase(self.run_again, self.profile.shrink_seconds)

    def check(self, case: Case[Any]) -> None:
        """The property that Hypothesis is given."""
        outcome = self.chase.check(case)
        strategy = self.target.kernel.operator.strategy(case.inputs)
        if outcome is not None and outcome.used and strategy.tier != "exact":
            # Cases that use much of the budget are bred for more; on exact inputs a right kernel uses all of it.
            breed_for(max(outcome.used.values()), label=f"share of the error budget, {strategy.name}")

    def run_again(self, case: Case[Any]) -> Outcome:
        """Run a case in the worker, whatever is known of it."""
        if not self.profile.wants(case):
            return Outcome(status=Status.UNSUPPORTED, reason=NOT_WANTED)
        module, limit = self.target.kernel.specialisation(case), self.profile.compiles
        if limit is not None and module not in self.modules and len(self.modules) >= limit:
            return Outcome(status=Status.UNSUPPORTED, reason=f"this run compiles {limit} specialisations at most")
        outcome = self._run(case)
        if outcome.status is not Status.UNSUPPORTED:
            self.modules.add(module)
        return outcome

    def _run(self, case: Case[Any]) -> Outcome:
        peer = self._peer(case)
        outcome = self._ask(case, peer)
        if outcome.died and peer:
            # Whose fault was it? The peer has a hunt of its own to answer for what it does.
            alone = self._ask(case, None)
            if not alone.died:
                self.lethal_peers.add(peer.kernel.name)
                outcome = alone
        if outcome.status is Status.PASSED:
            self.slowest = max(self.slowest, outcome.seconds)
        return blamed_on_the_guard(outcome, case, self.chase.prey, self._ask)

    def _ask(self, case: Case[Any], peer: Target | None = None, guarded: str | None = None) -> Outcome:
        beside = (peer.kernel, peer.source) if peer else None
        job = self.target.job(case, peer=beside, guarded=guarded)
        outcome = self.runner.run(job, deadline=self.deadline, cold=self.profile.cold_deadline)
        self.launches += outcome.launches
        return outcome

    def _peer(self, case: Case[Any]) -> Target | None:
        """The kernel that runs beside this one, if any does: told by the case alone, so that a replay has the same."""
        number, turn = divmod(int(case.id, 16), PEER_EVERY)
        ready = [peer for peer in self.target.peers if self._compiled(peer.kernel, case)]
        peers = [peer for peer in ready if peer.kernel.name not in self.lethal_peers]
        return peers[number % len(peers)] if peers and turn == 0 else None

    def _compiled(self, peer: Kernel, case: Case[Any]) -> bool:
        """Whether the limit allows the peer to be compiled for this case; the first cases say what for."""
        module, limit = peer.specialisation(case), self.profile.compiles
        allowed = self.peers_modules.setdefault(peer.name, set())
        if limit is None or len(allowed) < limit:
            allowed.add(module)
        return module in allowed

    @property
    def deadline(self) -> float:
        """Seconds for a case. While a hang is shrunk, ten times the slowest case that passed are enough.

        The whole deadline for every smaller case that hangs as well would leave time for only a few of them.
        """
        prey = self.chase.prey
        if prey is None or prey.kind != "Hung":
            return self.profile.deadline
        return min(self.profile.deadline, max(LEAST_PATIENCE, 10 * self.slowest))


def hunt(target: Target, runner: Runner, profile: Profile, seed_value: int) -> Trail:
    """Run ``profile.cases`` drawn cases of the kernel, some of each input strategy and relation; shrink a failure.

    Raises :class:`~kerneltest.engine.pool.WorkerFailed` if no worker can be had, and Hypothesis' own errors for a
    strategy that is at fault.
    """
    state = _Hunt(target, runner, profile)
    operator, chase = target.kernel.operator, state.chase
    strategy = guarded(operator.cases(profile.size(_device(runner))).filter(profile.wants), runner.started)
    draw(strategy, state.check, profile.cases, seed_value, bred=profile.cases // BRED)
    for inputs in operator.inputs if chase.ran else ():
        missing = PORTFOLIO.get(inputs.name, 1) - sum(case.inputs == inputs.name for case in chase.ran)
        if missing > 0 and chase.minimal is None:
            # Hypothesis begins with the simplest case, which has run already.
            draw(_with_inputs(strategy, inputs.name), state.check, missing + 1, seed_value + 1)
    _complete_relations(state)
    _simplify(state)
    return _trail(state)


def _complete_relations(state: _Hunt) -> None:
    """Name each relation that no case named in the first of the cases that it applies to."""
    chase = state.chase
    drawn = list(chase.ran)
    for relation in state.target.kernel.operator.relations:
        if chase.minimal is None and not any(case.relation == relation.name for case in drawn):
            case = next((case for case in drawn if not case.relation and relation.applies(case)), None)
            if case is not None:
                chase.shows_prey(replace(case, relation=relation.name))


def _with_inputs(strategy: SearchStrategy[Case[Any]], inputs: str) -> SearchStrategy[Case[Any]]:
    return strategy.filter(lambda case: case.inputs == inputs)


def _simplify(state: _Hunt) -> None:
    """Take the steps that the operator knows and Hypothesis does not, for as long as one of them keeps the bug."""
    chase, operator = state.chase, state.target.kernel.operator
    while chase.minimal is not None and any(map(chase.shows_prey, simpler(operator, chase.minimal[0]))):
        pass  # any() stops at the first that shows it, which is the new minimal case


def simpler(operator: Operator, case: Case[Any]) -> Iterator[Case[Any]]:
    """Cases one step simpler."""
    if case.guard is not Guard.NONE:
        yield replace(case, guard=Guard.NONE)
    yield from operator.simpler(case)


def replay(target: Target, runner: Runner, profile: Profile, case: Case[Any]) -> Trail:
    """Run one given case, without drawing or shrinking."""
    state = _Hunt(target, runner, profile)
    state.chase.shows_prey(case)
    return _trail(state, confirmations=0)


def _trail(state: _Hunt, confirmations: int = CONFIRMATIONS) -> Trail:
    chase, kernel = state.chase, state.target.kernel.name
    caught = _catch(state, *chase.minimal, confirmations) if chase.minimal else None
    ran = chase.ran
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
        unsupported=dict(chase.unsupported),
        launches=state.launches,
        seconds=time.monotonic() - chase.begun,
        caught=caught,
        slack=max((outcome.slack for outcome in ran.values()), default=1.0),
        wide=frozenset(name for outcome in ran.values() for name in outcome.wide),
        unchecked=tuple(Unchecked(what=what, why=why) for what, why in sorted(unchecked.items())),
    )


def _catch(state: _Hunt, case: Case[Any], finding: Finding, confirmations: int) -> Caught:
    """Ask the minimal case again, with its own data and with others, and what other kernels make of it."""
    ended, chase = time.monotonic(), state.chase
    reproduced = sum(chase.again(case, finding) for _ in range(confirmations))
    seeds = range(case.seed + 1, case.seed + 1 + FRESH_SEEDS) if finding.by_chance and confirmations else ()
    fresh = [chase.again(replace(case, seed=seed % 2**32), finding) for seed in seeds]
    finding = named(finding, case, lambda other, buffer: state._ask(other, guarded=buffer))
    peers = opinions(state.target, state.runner, state.profile, case) if confirmations else {}
    return Caught(
        finding=finding,
        case=case,
        seconds_to_find=chase.found_at - chase.begun,
        seconds_to_shrink=ended - chase.found_at,
        reproduced=reproduced,
        confirmed_of=confirmations,
        fresh=sum(fresh),
        fresh_of=len(fresh),
        others=tuple(chase.others.values()),
        complete=not chase.out_of_time,
        peers=peers,
    )


def opinions(target: Target, runner: Runner, profile: Profile, case: Case[Any]) -> dict[str, Outcome]:
    """What the peers make of a case, by name."""
    cold = min(profile.cold_deadline, PEER_PATIENCE)
    return {peer.kernel.name: runner.run(peer.job(case), deadline=profile.deadline, cold=cold) for peer in target.peers}


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
