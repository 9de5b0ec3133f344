"""Hunt one sampler: draw from a portfolio of distributions, add to what earlier runs have counted, judge it all."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from kerneltest.engine.evidence import ALPHA, LIMIT, Store, nothing_yet
from kerneltest.engine.hunt import Caught, Target, Trail
from kerneltest.engine.pool import Runner
from kerneltest.engine.profile import Profile
from kerneltest.model import (
    Case,
    CaseRecord,
    DistributionRecord,
    Drawn,
    Evidence,
    Outcome,
    Series,
    Status,
    Unchecked,
)

# A rejected case is drawn again from nothing, for so many times the draws that it took, and the seconds.
AGAIN = 2
# Seconds for a fixture, which must have the draws that it once took.
REPLAY_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributionTrail(Trail):
    """What a hunt of distributions did: each configuration that was drawn from is a case."""

    distributions: tuple[DistributionRecord, ...] = ()


@dataclass
class _Hunt:
    """The state of one hunt."""

    target: Target
    runner: Runner
    profile: Profile
    begun: float = field(default_factory=time.monotonic)
    cases: list[CaseRecord] = field(default_factory=list)
    distributions: list[DistributionRecord] = field(default_factory=list)
    unsupported: Counter[str] = field(default_factory=Counter)
    unchecked: list[Unchecked] = field(default_factory=list)
    launches: int = 0
    slack: float = 1.0
    caught: Caught | None = None
    short: list[int] = field(default_factory=list)  # draws of the configurations that ran out of time

    def draw(self, case: Case[Any], evidence: Evidence, draws: int, seconds: float) -> Outcome:
        """Draw on from the evidence in the worker."""
        series = Series(evidence=evidence, draws=draws, seconds=seconds, limit=LIMIT)
        deadline, cold = (limit + seconds for limit in (self.profile.deadline, self.profile.cold_deadline))
        outcome = self.runner.run(self.target.job(case, series=series), deadline=deadline, cold=cold)
        self.launches += outcome.launches
        return outcome

    def note(self, case: Case[Any], before: Evidence, outcome: Outcome) -> None:
        """Keep what a series came to."""
        if outcome.status is Status.UNSUPPORTED:
            self.unsupported[outcome.reason or "no reason given"] += 1
            return
        self.slack = max(self.slack, outcome.slack)
        note = outcome.finding.kind if outcome.finding else ""
        self.cases.append(
            CaseRecord(
                id=case.id,
                text=str(case),
                inputs=case.inputs,
                status=outcome.status,
                seconds=outcome.seconds,
                note=note,
            )
        )
        if (seen := outcome.evidence) is not None:
            self.distributions.append(
                DistributionRecord(
                    config=case.id,
                    text=str(case),
                    drawn=seen.draws - before.draws,
                    draws=seen.draws,
                    log10_e=seen.log10_e if math.isfinite(seen.log10_e) else None,
                    limit=-math.log10(ALPHA),
                    detectable=seen.detectable,
                )
            )

    def leave(self, case: Case[Any], why: str) -> None:
        self.unchecked.append(Unchecked(what=f"{self.target.kernel.name}: distribution of config {case.id}", why=why))

    def catch(self, case: Case[Any], before: Evidence, outcome: Outcome, seconds: float, *, replayed: bool) -> None:
        """Keep a failure, and ask again: where chance decided with other random numbers, otherwise with the same."""
        assert outcome.finding is not None
        found_at = time.monotonic()
        seen, by_chance = outcome.evidence or before, outcome.finding.by_chance
        again = None
        if by_chance and not replayed:
            fresh = replace(nothing_yet(self.target.kernel, case, self.runner.started, 0), next_draw=seen.next_draw)
            again = self.draw(case, fresh, AGAIN * seen.draws, AGAIN * max(seconds, outcome.seconds))
        elif not replayed:
            again = self.draw(case, before, seen.draws - before.draws, seconds)
        same = again is not None and again.finding is not None and again.finding.identity == outcome.finding.identity
        self.caught = Caught(
            finding=outcome.finding,
            case=case,
            seconds_to_find=found_at - self.begun,
            seconds_to_shrink=0.0,
            reproduced=0 if by_chance else int(same),
            confirmed_of=0 if by_chance or again is None else 1,
            fresh=int(same) if by_chance else 0,
            fresh_of=int(by_chance and again is not None),
            others=(),
            complete=True,
            draws=max(seen.draws, 1),
        )

    def trail(self) -> DistributionTrail:
        return DistributionTrail(
            cases=tuple(self.cases),
            unsupported=dict(self.unsupported),
            launches=self.launches,
            seconds=time.monotonic() - self.begun,
            caught=self.caught,
            unchecked=tuple(self.unchecked),
            slack=self.slack,
            distributions=tuple(self.distributions),
        )


def hunt_distribution(
    target: Target, runner: Runner, profile: Profile, store: Store, seed_value: int
) -> DistributionTrail:
    """Draw from each configuration of the kernel's portfolio until one is rejected, and add to the store.

    Raises :class:`~kerneltest.engine.pool.WorkerFailed` if no worker can be had, and
    :class:`~kerneltest.engine.evidence.BadEvidence` for a file of the store that is none.
    """
    state, device = _Hunt(target, runner, profile), runner.started.device
    draws = target.kernel.operator.draws
    assert draws is not None, "the caller checks that the operator draws"
    assert device is not None, "the caller checks that the worker has a device"
    wanted, seconds = profile.draws(device), profile.draw_seconds
    portfolio = tuple(filter(profile.wants, draws.cases(profile.size(device))))
    for number, case in enumerate(portfolio, 1):
        before = nothing_yet(target.kernel, case, runner.started, seed_value)
        if store.full(before):
            state.leave(case, f"{store.folder} holds the evidence of as many series as may share the false alarms")
            continue
        before = store.load(before)
        outcome = state.draw(case, before, wanted, seconds)
        if outcome.finding is None and outcome.reason is not None and outcome.status is Status.PASSED:
            state.leave(case, f"{outcome.reason} ({store.path(before)})")
            continue
        state.note(case, before, outcome)
        if outcome.evidence is not None:
            store.save(outcome.evidence)
        if outcome.finding is not None:
            state.catch(case, before, _told_where(outcome, store), seconds, replayed=False)
            if number < len(portfolio):
                why = f"not drawn from after config {case.id} failed"
                rest = f"{target.kernel.name}: the distributions of {len(portfolio) - number} more configs"
                state.unchecked.append(Unchecked(what=rest, why=why))
            break
        if outcome.evidence is not None and outcome.evidence.draws - before.draws < wanted:
            state.short.append(outcome.evidence.draws - before.draws)
    if state.short:
        why = (
            f"{len(state.short)} of {len(portfolio)} configs were drawn from less often in {seconds:g} s, "
            f"the slowest {min(state.short):,} times"
        )
        state.unchecked.append(Unchecked(what=f"{target.kernel.name}: {wanted:,} draws of each config", why=why))
    return state.trail()


def replay_distribution(
    target: Target, runner: Runner, profile: Profile, subject: Drawn, seed_value: int
) -> DistributionTrail:
    """Draw from one configuration, from nothing, twice as often as it once took to reject it.

    Where time did not allow for even as many draws as that took, nothing is known, and the trail has no case.
    """
    state, case = _Hunt(target, runner, profile), subject.case
    before = nothing_yet(target.kernel, case, runner.started, seed_value)
    outcome = state.draw(case, before, AGAIN * subject.draws, REPLAY_SECONDS)
    drawn = outcome.evidence.draws if outcome.evidence else 0
    if outcome.status is Status.PASSED and drawn < subject.draws:
        why = f"{drawn:,} draws in {REPLAY_SECONDS:g} s; it once took {subject.draws:,} to reject the distribution"
        state.leave(case, why)
        return state.trail()
    state.note(case, before, outcome)
    if outcome.finding is not None:
        state.catch(case, before, outcome, REPLAY_SECONDS, replayed=True)
    return state.trail()


def _told_where(outcome: Outcome, store: Store) -> Outcome:
    """A rejection with the file that keeps it, and with it the kernel red."""
    if outcome.finding is None or outcome.evidence is None:
        return outcome
    where = f"counted in {store.path(outcome.evidence)}: remove that once the kernel has changed"
    return replace(outcome, finding=replace(outcome.finding, details=(*outcome.finding.details, where)))
