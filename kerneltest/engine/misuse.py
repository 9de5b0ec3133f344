"""Hunt one kernel on bad input: a few small cases that are right, each called wrongly in every way there is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from kerneltest.engine.chase import draw
from kerneltest.engine.guards import out_of_bounds
from kerneltest.engine.hunt import Caught, Target, Trail
from kerneltest.engine.job import Bad
from kerneltest.engine.pool import Runner
from kerneltest.engine.profile import Profile
from kerneltest.model import (
    Case,
    CaseRecord,
    Device,
    Finding,
    Guard,
    Misuse,
    Misused,
    MisuseTally,
    Outcome,
    Size,
    Status,
    Unchecked,
)

# What is wrong is wrong in a small case as well.
SMALL = Size(batch=2, qo_len=5, kv_len=20, heads=4, rows=4, vocabulary=300)
# Cases drawn for each that is wanted: those that offer most are taken.
DRAWN_FOR_EACH = 4
# Seconds that a call gets in which a value is wrong, at least: nothing is compiled for a value.
PATIENCE = 5.0
# What is wrong with a tensor's form may be compiled for, or be met by code that was not loaded before.
OF_FORM = ("dtype", "device", "shape", "strides", "alignment", "parameter")
COMPILER_PATIENCE = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MisuseTrail(Trail):
    """What a hunt on bad input did. ``found``: one finding of each kind for each kind of misuse of each argument."""

    found: tuple[Caught, ...] = ()
    tally: MisuseTally = field(default_factory=MisuseTally)


@dataclass
class _Hunt:
    """The state of one hunt."""

    target: Target
    runner: Runner
    profile: Profile
    begun: float = field(default_factory=time.monotonic)
    chosen_at: float = 0.0
    launches: int = 0
    slowest: float = 0.0
    unsupported: Counter[str] = field(default_factory=Counter)
    outcomes: dict[Misused, Outcome] = field(default_factory=dict)
    found: dict[str, Caught] = field(default_factory=dict)
    trusted: Counter[str] = field(default_factory=Counter)
    known: int = 0
    late: int = 0
    unlisted: set[Case[Any]] = field(default_factory=set)

    @property
    def device(self) -> Device:
        device = self.runner.started.device
        assert device is not None, "the caller checks that the worker has a device"
        return device

    def ask(self, case: Case[Any], misuse: Bad, patience: float = 1.0) -> Outcome:
        """Run a case that something is wrong with, or list what can be; in ``patience`` times its deadline."""
        outcome = self.runner.run(
            self.target.job(case, misuse=misuse),
            deadline=patience * self._deadline(misuse),
            cold=self.profile.cold_deadline,
        )
        self.launches += outcome.launches
        if outcome.status is Status.PASSED:
            self.slowest = max(self.slowest, outcome.seconds)
        return outcome

    def _deadline(self, misuse: Bad) -> float:
        if misuse == "list":
            return self.profile.deadline
        if misuse.kind in OF_FORM:
            compiler = self.device.kind == "cuda"
            return min(self.profile.cold_deadline, COMPILER_PATIENCE) if compiler else self.profile.deadline
        return min(self.profile.deadline, max(PATIENCE, 10 * self.slowest))

    def cases(self, seed_value: int) -> dict[Case[Any], tuple[Misuse, ...]]:
        """Small cases that are right, simplest first, then those that add most; with what can be wrong with each."""
        kernel, started, wanted = self.target.kernel, self.runner.started, self.profile.misused
        asked: dict[Case[Any], tuple[Misuse, ...]] = {}
        modules: set[str] = set()

        def collect(case: Case[Any]) -> None:
            module = kernel.specialisation(case)
            if case in asked or (module not in modules and len(modules) == self.profile.modules):
                return
            if any(asked.values()) and time.monotonic() - self.begun > self.profile.misuse_seconds(self.device) / 2:
                self.unlisted.add(case)  # those that kill their worker take long
                return
            outcome = self.ask(case, "list")
            asked[case] = outcome.misuses
            if outcome.status is Status.UNSUPPORTED:
                self.unsupported[outcome.reason or "no reason given"] += 1
            elif outcome.status is Status.PASSED:
                modules.add(module)

        guard = Guard.NONE if started.no_guards else Guard.AFTER
        cases = kernel.operator.cases(_small(self.profile.size(self.device))).filter(self.profile.wants)
        draw(
            cases.map(lambda case: replace(case, relation="", guard=guard)),
            collect,
            DRAWN_FOR_EACH * wanted,
            seed_value,
        )
        left = sorted((case for case in asked if asked[case]), key=lambda case: (len(str(case)), str(case)))
        chosen: dict[Case[Any], tuple[Misuse, ...]] = {}
        covered: set[tuple[str, str, str, str]] = set()
        while left and len(chosen) < wanted:
            best = left[0]
            if chosen:
                best = max(left, key=lambda case: sum(misuse.name not in covered for misuse in asked[case]))
            left.remove(best)
            # What no case before had comes first, should time run out; what may have to be compiled for comes last.
            chosen[best] = tuple(sorted(asked[best], key=lambda it: (it.name in covered, it.kind == "dtype")))
            covered |= {misuse.name for misuse in asked[best]}
        self.chosen_at = time.monotonic()
        return chosen

    def check(self, case: Case[Any], misuse: Misuse) -> None:
        """Run a misuse, unless it is left to the caller, or its like has been found, or time is up."""
        if misuse.kind in self.target.kernel.contract.trusts:
            self.trusted[misuse.kind] += 1
        elif misuse.key in self.found:
            self.known += 1
        elif time.monotonic() - self.chosen_at > self.profile.misuse_seconds(self.device):
            self.late += 1
        else:
            self.run(Misused(case=case, misuse=misuse), confirmations=1)

    def run(self, misused: Misused, confirmations: int) -> None:
        """Run a misuse, and keep what comes of it."""
        case, misuse = misused.case, misused.misuse
        outcome = self.ask(case, misuse)
        if outcome.finding is not None and outcome.finding.kind == "Hung":
            outcome = self.ask(case, misuse, patience=2.0)  # a busy machine is no hang
        finding = self._about(outcome, misused)
        if outcome.finding is not None and finding is None:
            # Of a case that was right when it was asked before: it has a hunt of its own to be found in.
            outcome = Outcome(status=Status.UNSUPPORTED, reason="the case failed without anything being wrong")
        if outcome.status is Status.UNSUPPORTED:
            self.unsupported[outcome.reason or "no reason given"] += 1
            return
        self.outcomes[misused] = replace(outcome, finding=finding)
        if finding is None:
            return
        since = time.monotonic() - self.begun
        if outcome.fatal:
            confirmations = 0  # each costs a worker, and neither a guard page nor a hang comes by chance
        again = [self._about(self.ask(case, misuse), misused) for _ in range(confirmations)]
        self.found[misuse.key] = Caught(
            finding=finding,
            case=case,
            misuse=misuse,
            seconds_to_find=since,
            seconds_to_shrink=0.0,
            reproduced=sum(other is not None and _alike(other, finding) for other in again),
            confirmed_of=confirmations,
            others=(),
            complete=True,
        )

    def _about(self, outcome: Outcome, misused: Misused) -> Finding | None:
        """The finding of an outcome, a death included, as one about the misuse."""
        finding, misuse = outcome.finding, misused.misuse
        if finding is None or finding.key == misuse.key:
            return finding
        if not outcome.died:
            return None
        if _faulted(finding) and misused.case.guard is not Guard.NONE:
            without = self.ask(replace(misused.case, guard=Guard.NONE), misuse)
            if not without.died:
                finding = out_of_bounds(finding, misused.case.guard)
        return replace(finding, key=misuse.key, culprit=str(misuse))

    def trail(self) -> MisuseTrail:
        kernel = self.target.kernel
        unchecked = [
            Unchecked(
                what=f"{kernel.name}: bad input, {kind} ({_calls(number)})",
                why=f"left to the caller: {self._why(kind)}",
            )
            for kind, number in sorted(self.trusted.items())
        ]
        if self.late:
            why = f"{self.profile.misuse_seconds(self.device):g} s were over"
            unchecked.append(Unchecked(what=f"{kernel.name}: bad input, {_calls(self.late)} more", why=why))
        if self.unlisted:
            why = (
                f"half of {self.profile.misuse_seconds(self.device):g} s were over before it was known what they offer"
            )
            unchecked.append(
                Unchecked(what=f"{kernel.name}: bad input in further cases ({len(self.unlisted)})", why=why)
            )
        found = tuple(self.found.values())
        return MisuseTrail(
            cases=tuple(_record(misused, outcome) for misused, outcome in self.outcomes.items()),
            unsupported=dict(self.unsupported),
            launches=self.launches,
            seconds=time.monotonic() - self.begun,
            caught=found[0] if found else None,
            unchecked=tuple(unchecked),
            found=found,
            tally=self._tally(),
        )

    def _why(self, kind: str) -> str:
        return self.target.kernel.contract.trusts[kind]

    def _tally(self) -> MisuseTally:
        passed = {misused: outcome for misused, outcome in self.outcomes.items() if outcome.finding is None}
        reactions = Counter(outcome.reaction for outcome in passed.values())
        # The same words about a case larger or smaller are the same to a reader.
        unclear = dict.fromkeys(
            f"{misused.misuse}: {outcome.reason}"
            for misused, outcome in passed.items()
            if outcome.reaction == "raised without a clear message"
        )
        return MisuseTally(
            raised=reactions["raised"] + reactions["raised without a clear message"],
            right=reactions["right"],
            failed=len(self.outcomes) - len(passed) + self.known,
            trusted=self.trusted.total(),
            unclear=tuple(unclear),
        )


def hunt_misuse(target: Target, runner: Runner, profile: Profile, seed_value: int) -> MisuseTrail:
    """Call ``profile.misused`` small cases of the kernel wrongly, in every way there is.

    Raises :class:`~kerneltest.engine.pool.WorkerFailed` if no worker can be had.
    """
    state = _Hunt(target, runner, profile)
    for case, misuse in _each(state.cases(seed_value)):
        state.check(case, misuse)
    return state.trail()


def replay_misuse(target: Target, runner: Runner, profile: Profile, misused: Misused) -> MisuseTrail:
    """Make one given call, whatever the kernel leaves to its caller."""
    state = _Hunt(target, runner, profile)
    state.run(misused, confirmations=0)
    return state.trail()


def _each(cases: dict[Case[Any], tuple[Misuse, ...]]) -> Iterator[tuple[Case[Any], Misuse]]:
    return ((case, misuse) for case, misuses in cases.items() for misuse in misuses)


def _small(size: Size) -> Size:
    return replace(
        size,
        batch=min(size.batch, SMALL.batch),
        qo_len=min(size.qo_len, SMALL.qo_len),
        kv_len=min(size.kv_len, SMALL.kv_len),
        heads=min(size.heads, SMALL.heads),
        rows=min(size.rows, SMALL.rows),
        vocabulary=min(size.vocabulary, SMALL.vocabulary),
    )


def _faulted(finding: Finding) -> bool:
    """Whether a guard page may be what the worker died of: an abort, or an exit, is something else."""
    signal = finding.key.startswith(("signal SIGSEGV", "signal SIGBUS"))
    return finding.kind == "Crashed" and (signal or not finding.key.startswith(("signal", "exit")))


def _alike(one: Finding, other: Finding) -> bool:
    return one.identity == other.identity


def _calls(number: int) -> str:
    return f"{number} call{'' if number == 1 else 's'}"


def _record(misused: Misused, outcome: Outcome) -> CaseRecord:
    note = outcome.finding.kind if outcome.finding else ": ".join(filter(None, (outcome.reaction, outcome.reason)))
    return CaseRecord(
        id=misused.id,
        text=str(misused),
        inputs=misused.case.inputs,
        status=outcome.status,
        seconds=outcome.seconds,
        note=note,
    )
