"""Drawing and reducing sequences without a worker: a runner that answers from a rule shows where reducing ends."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from attention_cases import case, paged
from hypothesis import strategies as st

from kerneltest.engine.casting import Neighbours
from kerneltest.engine.company import BATCH, hunt_sequences, replay_sequence
from kerneltest.engine.guards import blamed_on_the_guard
from kerneltest.engine.hunt import Caught, Target, Trail
from kerneltest.engine.job import Company, Job
from kerneltest.engine.profile import PROFILES
from kerneltest.engine.programs import plainer
from kerneltest.model import (
    Again,
    Case,
    Data,
    Device,
    EmptyCache,
    FarPages,
    Finding,
    Graph,
    Guard,
    Kernel,
    LaunchContract,
    LaunchSequence,
    Neighbour,
    Outcome,
    Place,
    Poison,
    Started,
    Status,
    TorchOp,
)
from kerneltest.model.sequence import STEPS

CPU = Device(kind="cpu", ordinal=0, name="", sm=(0, 0), units=1)
PROFILE = replace(PROFILES["quick"], cpu_sequences=120, victims=12)
OPERATIONS = ("cos", "sort")
# What a rule says of a sequence: nothing, a kind of failure, "dead", or "unsupported: " and a reason.
Rule = Callable[[LaunchSequence], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The axes of the neighbours' operator."""

    rows: int


def rows(number: int) -> Case[Any]:
    return Case(operator="norm", axes=Rows(rows=number), inputs="generic", seed=0)


def kernel(name: str, operator: Any, **more: Any) -> Kernel:
    return Kernel(name=name, operator=operator, launch=lambda call: {}, **more)


def neighbour(name: str) -> Target:
    operator = replace(
        paged.paged_prefill,
        name="norm",
        axes=Rows,
        cases=lambda size: st.integers(4, 9).map(rows),
        simpler=lambda case: [rows(case.axes.rows - 1)] if case.axes.rows > 1 else [],
    )
    return Target(kernel=kernel(name, operator), source=Path(f"{name}.py"))


def cases(size: Any) -> st.SearchStrategy[Case[Any]]:
    """As many as it takes, drawn faster than the operator's own."""
    lengths = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=2)
    return st.builds(lambda lengths, seed: case(*lengths, seed=seed), lengths, st.integers(0, 3))


TARGET = Target(
    kernel=kernel(
        "rule", replace(paged.paged_prefill, cases=cases), contract=LaunchContract(replans=True, captured="lengths")
    ),
    source=Path("rule.py"),
)
NEIGHBOURS = {name: neighbour(name) for name in ("one", "two")}


class Runner:
    """Answers launches alone with a digest of its own, and sequences by a rule. A death costs nothing here."""

    def __init__(
        self, rule: Rule = lambda sequence: None, *, name: str = "", guards: bool = False, guilty: str = ""
    ) -> None:
        self.rule, self.name, self.guilty = rule, name, guilty
        self.alone: list[tuple[str, Case[Any]]] = []
        self.played: list[Company] = []
        self.guarded: list[str] = []
        self.lethal: Callable[[str], bool] = lambda name: False
        self.by_itself: list[LaunchSequence] = []
        self.ends_with: Callable[[LaunchSequence], bool] = lambda sequence: False
        self.started = Started(
            device=CPU, torch_ops=OPERATIONS, no_guards=None if guards else "by rule", no_steps={"load": "by rule"}
        )

    def run(self, job: Job, *, deadline: float, cold: float) -> Outcome:
        kernel, case, company, guarded = job.kernel, job.case, job.company, job.guarded
        assert company is not None
        assert company.sequence.case == case
        if company.alone:
            self.alone.append((kernel.name, case))
            if self.lethal(kernel.name):
                return dead(kernel)
            return Outcome(status=Status.PASSED, launches=1, digest=f"{self.name} {case.id}")
        if kernel.name != TARGET.kernel.name:  # what its data do to a neighbour, after itself
            assert [(step.kernel, step.case) for step in company.sequence.neighbours] == [(kernel.name, case)]
            self.by_itself.append(company.sequence)
            return dead(kernel) if self.ends_with(company.sequence) else Outcome(status=Status.PASSED, launches=3)
        assert {step.kernel for step in company.sequence.neighbours} == set(company.neighbours)
        self.played.append(company)
        self.guarded += [guarded] if guarded else []
        said = self.rule(company.sequence)
        if said == "dead" and guarded not in (None, self.guilty):
            said = None
        if said == "dead":
            return dead(kernel)
        if said and said.startswith("unsupported: "):
            reason, fatal, _ = said.removeprefix("unsupported: ").partition(", fatal")
            return Outcome(status=Status.UNSUPPORTED, reason=reason, fatal=bool(fatal))
        if said:
            finding = Finding(kind=said, kernel=kernel.name, key="", what="by rule")
            return Outcome(status=Status.FAILED, launches=3, finding=finding)
        return Outcome(status=Status.PASSED, launches=3, buffers=("k_pages", "q", "out"))

    def close(self) -> None: ...

    @property
    def sequences(self) -> list[LaunchSequence]:
        return [company.sequence for company in self.played]


def dead(kernel: Kernel) -> Outcome:
    finding = Finding(kind="Crashed", kernel=kernel.name, key="signal SIGSEGV", what="the worker process died")
    return Outcome(status=Status.FAILED, finding=finding, fatal=True)


def has(sequence: LaunchSequence, step: type[Any], **fields: Any) -> bool:
    return any(
        isinstance(one, step) and all(getattr(one, name) == value for name, value in fields.items())
        for one in sequence.steps
    )


def hunted(runner: Runner, seed: int = 1, profile: Any = PROFILE, kinds: Collection[str] = tuple(STEPS)) -> Trail:
    quiet = Runner(name="quiet", guards=runner.started.no_guards is None)
    return hunt_sequences(TARGET, Neighbours(targets=NEIGHBOURS, seed=1), runner, quiet, profile, seed, kinds)


def caught(runner: Runner, seed: int = 1, kinds: Collection[str] = tuple(STEPS)) -> tuple[Caught, LaunchSequence]:
    found = hunted(runner, seed, kinds=kinds).caught
    assert found is not None
    assert found.sequence is not None
    assert found.sequence.case == found.case
    assert found.complete
    return found, found.sequence


def unchecked(trail: Trail) -> dict[str, str]:
    # That one kind cannot be taken on the device is part of the runner, and not what is tested.
    told = {item.what: item.why for item in trail.unchecked}
    assert told.pop("step load") == "by rule"
    return told


# --- reducing


@pytest.mark.parametrize("seed", range(3))
def test_reduces_to_the_one_step_and_to_the_simplest_cases(seed: int) -> None:
    found, minimal = caught(Runner(lambda s: "StaleState" if has(s, Neighbour, data=Data.NAN) else None), seed)
    (step,) = minimal.steps
    assert isinstance(step, Neighbour)
    assert (step.case, step.data) == (rows(1), Data.NAN)
    assert minimal == LaunchSequence(case=case((1, 0), head_dim=128, page_size=1), steps=minimal.steps)
    assert found.without == ("correct",)
    assert (found.reproduced, found.confirmed_of) == (3, 3)


@pytest.mark.parametrize("seed", range(3))
def test_steps_that_only_fail_together_stay_together(seed: int) -> None:
    def rule(sequence: LaunchSequence) -> str | None:
        return "Mismatch" if has(sequence, TorchOp, op="sort") and has(sequence, Again) else None

    found, minimal = caught(Runner(rule), seed)
    assert sorted(step.kind for step in minimal.steps) == ["again", "torch"]
    assert found.without == ("correct", "correct")


def test_the_order_of_steps_is_kept() -> None:
    def rule(sequence: LaunchSequence) -> str | None:
        kinds = [step.kind for step in sequence.steps]
        if "empty_cache" not in kinds:
            return None
        return "Mismatch" if "reuse" in kinds[kinds.index("empty_cache") :] else None

    _, minimal = caught(Runner(rule), kinds=("torch", "reuse", "empty_cache"))
    assert [step.kind for step in minimal.steps] == ["empty_cache", "reuse"]


def test_what_needs_no_step_is_reduced_to_none() -> None:
    found, minimal = caught(Runner(lambda s: "Mismatch"))
    assert (minimal.steps, found.without) == ((), ())


def test_planning_late_stays_where_it_takes_that() -> None:
    found, minimal = caught(Runner(lambda s: None if s.plan_first else "Mismatch"))
    assert minimal == LaunchSequence(case=found.case, plan_first=False)


def test_the_minimal_sequence_is_one_that_nothing_plainer_shows() -> None:
    def rule(sequence: LaunchSequence) -> str | None:
        long = any(request.kv_len > 4 for request in sequence.case.axes.requests)
        return "Mismatch" if long and has(sequence, Graph) and has(sequence, Neighbour, kernel="two") else None

    _, minimal = caught(Runner(rule))
    kernels = {name: target.kernel for name, target in NEIGHBOURS.items()}
    assert rule(minimal)
    assert not any(map(rule, plainer(minimal, kernels, TARGET.kernel)))
    assert [request.kv_len for request in minimal.case.axes.requests] == [5]


def test_does_not_slide_to_another_bug() -> None:
    def rule(sequence: LaunchSequence) -> str | None:
        return "StaleState" if has(sequence, Again) else "Mismatch" if has(sequence, TorchOp) else None

    for seed in range(3):
        found, minimal = caught(Runner(rule), seed)
        assert (found.finding.kind, [step.kind for step in minimal.steps]) in [
            ("StaleState", ["again"]),
            ("Mismatch", ["torch"]),
        ]


def test_steps_that_fail_once_do_not_mislead() -> None:
    # Once the bug was seen, everything that has any step fails when it is asked first, and never again.
    for seed in range(3):
        asked: Counter[LaunchSequence] = Counter()
        seen: list[LaunchSequence] = []

        def rule(
            sequence: LaunchSequence,
            asked: Counter[LaunchSequence] = asked,
            seen: list[LaunchSequence] = seen,
        ) -> str | None:
            asked[sequence] += 1
            if has(sequence, Again):
                seen.append(sequence)
                return "Mismatch"
            return "Mismatch" if seen and sequence.steps and asked[sequence] == 1 else None

        found, minimal = caught(Runner(rule), seed)
        assert [step.kind for step in minimal.steps] == ["again"]
        assert found.reproduced == 3


def test_what_remains_of_a_bug_by_chance_failed_twice() -> None:
    for seed in range(3):
        chance, failed = random.Random(seed), Counter[LaunchSequence]()

        def rule(
            sequence: LaunchSequence,
            chance: random.Random = chance,
            failed: Counter[LaunchSequence] = failed,
        ) -> str | None:
            if not has(sequence, Poison, place=Place.WORKSPACE) or chance.random() < 0.5:
                return None
            failed[sequence] += 1
            return "Mismatch"

        runner = Runner(rule)
        found, minimal = caught(runner, seed, kinds=("poison",))
        assert has(minimal, Poison, place=Place.WORKSPACE)
        # The very first has nothing to be smaller than, and is taken at its word.
        first = next(sequence for sequence in runner.sequences if failed[sequence])
        assert minimal == first or failed[minimal] - found.reproduced >= 2


# --- what needs no company


def requests(sequence: LaunchSequence) -> int:
    return len(sequence.case.axes.requests)


def test_cases_that_fail_alone_do_not_hide_what_company_does_to_others() -> None:
    def rule(sequence: LaunchSequence) -> str | None:
        return "Mismatch" if requests(sequence) == 2 else "StaleState" if has(sequence, EmptyCache) else None

    hidden = 0
    for seed in range(6):
        runner = Runner(rule)
        trail = hunted(runner, seed)
        assert trail.caught is not None
        assert trail.caught.finding.kind == "StaleState"
        assert trail.caught.sequence is not None
        assert [step.kind for step in trail.caught.sequence.steps] == ["empty_cache"]
        told = [why for what, why in unchecked(trail).items() if what.endswith("of its cases in company")]
        found = next(number for number, sequence in enumerate(runner.sequences) if rule(sequence) == "StaleState")
        met = any(requests(sequence) == 2 for sequence in runner.sequences[:found])
        assert told == ["they fail alone: Mismatch: by rule"] * met
        hidden += met
    assert hidden > 0


def test_what_fails_alone_is_reported_if_company_does_nothing() -> None:
    runner = Runner(lambda s: "Mismatch" if requests(s) == 2 else None)
    trail = hunted(runner)
    assert trail.caught is not None
    assert (trail.caught.finding.kind, trail.caught.reproduced) == ("Mismatch", 3)
    minimal = trail.caught.sequence
    assert minimal == LaunchSequence(case=trail.caught.case)
    assert requests(minimal) == 2
    kernels = {name: target.kernel for name, target in NEIGHBOURS.items()}
    assert all(requests(one) == 1 for one in plainer(minimal, kernels, TARGET.kernel))
    # All others were played in company, as many as there would have been without them.
    assert len([record for record in trail.cases if not record.note]) >= PROFILE.cpu_sequences
    assert trail.unsupported["the case fails with nothing around it"] > 0
    assert unchecked(trail) == {}


def test_a_case_that_kills_the_worker_alone_is_not_launched_before_others() -> None:
    def rule(sequence: LaunchSequence) -> str | None:
        return "dead" if any(len(one.axes.requests) == 2 for one in sequence.cases) else None

    for seed in range(3):
        trail = hunted(Runner(rule), seed)
        assert trail.caught is not None
        assert trail.caught.finding.kind == "Crashed"
        assert trail.caught.sequence is not None
        assert trail.caught.sequence.steps == ()


def test_a_case_that_raises_alone_is_not_launched_before_others() -> None:
    def rule(sequence: LaunchSequence) -> str | None:
        return "LaunchRaised" if any(len(one.axes.requests) == 2 for one in sequence.cases) else None

    for seed in range(3):
        found = hunted(Runner(rule), seed).caught
        assert found is not None
        assert found.sequence is not None
        assert found.sequence.steps == ()


def test_a_wrong_case_launched_before_is_still_company() -> None:
    def rule(sequence: LaunchSequence) -> str | None:
        before = any(has(sequence, Again, case=one) for one in sequence.cases if len(one.axes.requests) == 2)
        return "StaleState" if before and requests(sequence) == 1 else "Mismatch" if requests(sequence) == 2 else None

    found = [hunted(Runner(rule), seed).caught for seed in range(6)]
    assert "StaleState" in {one.finding.kind for one in found if one}


# --- deaths


def test_a_neighbour_that_dies_alone_is_not_blamed_on_the_kernel() -> None:
    runner = Runner(lambda s: "dead" if has(s, Neighbour, kernel="two") else None)
    # It lives through the cases that it is first tried with.
    runner.lethal = lambda name: name == "two" and bool(runner.played)
    trail = hunted(runner)
    assert trail.caught is None
    assert unchecked(trail) == {"rule: after two": "the worker died of it alone"}
    assert trail.unsupported["the neighbour two kills the worker by itself"] > 0
    assert trail.before["one"] > 0
    assert "two" not in trail.before


def test_what_a_neighbour_does_not_survive_is_not_asked_twice() -> None:
    reason = "unsupported: the neighbour two does not survive nan"
    runner = Runner(lambda s: f"{reason}, fatal" if has(s, Neighbour, kernel="two", data=Data.NAN) else None)
    trail = hunted(runner, profile=replace(PROFILE, cpu_sequences=200), kinds=("neighbour",))
    assert trail.caught is None
    alone = [s for s in runner.sequences if has(s, Neighbour, kernel="two", data=Data.NAN) and spoilt(s) == 1]
    assert len(alone) == 1
    assert trail.unsupported["the neighbour two does not survive nan"] > 1
    assert unchecked(trail) == {"rule: after two with nan": "the neighbour two does not survive nan"}


def test_a_neighbour_that_its_data_end_is_to_blame_and_not_the_kernel() -> None:
    """It hangs on NaN wherever it is launched; nobody but it is asked to prove that, and once."""
    runner = Runner(lambda s: "dead" if has(s, Neighbour, kernel="two", data=Data.NAN) else None)
    runner.ends_with = lambda sequence: has(sequence, Neighbour, kernel="two", data=Data.NAN)
    trail = hunted(runner, profile=replace(PROFILE, cpu_sequences=200), kinds=("neighbour",))
    assert trail.caught is None
    asked = [step.data for sequence in runner.by_itself for step in sequence.neighbours if step.kernel == "two"]
    assert asked.count(Data.NAN) == 1
    why = "the neighbour two does not survive nan: the worker process died"
    assert trail.unsupported[why] > 1
    assert unchecked(trail) == {"rule: after two with nan": why}


def spoilt(sequence: LaunchSequence) -> int:
    return sum(step.data is not Data.FINITE for step in sequence.neighbours)


def test_what_one_hunt_learns_of_a_neighbour_the_next_one_knows() -> None:
    reason = "unsupported: the neighbour two does not survive nan, fatal"
    neighbours = Neighbours(targets=NEIGHBOURS, seed=1)
    asked = []
    for _ in range(2):
        runner = Runner(lambda s: reason if has(s, Neighbour, kernel="two", data=Data.NAN) else None)
        trail = hunt_sequences(TARGET, neighbours, runner, None, PROFILE, 1, ("neighbour",))
        asked.append(sum(has(s, Neighbour, kernel="two", data=Data.NAN) for s in runner.sequences))
        assert "rule: after two with nan" in {item.what for item in trail.unchecked}
    assert asked[0] > asked[1] == 0


def test_a_neighbour_that_never_lives_is_not_drawn() -> None:
    runner = Runner()
    runner.lethal = lambda name: name == "two"
    trail = hunted(runner)
    assert [name for name, _ in runner.alone].count("two") == 1  # each death takes a new worker
    assert unchecked(trail) == {"rule: after two": "it ran none of the cases drawn for it"}
    assert not any(has(sequence, Neighbour, kernel="two") for sequence in runner.sequences)
    assert any(has(sequence, Neighbour, kernel="one") for sequence in runner.sequences)


def test_a_death_behind_a_neighbour_that_lives_is_the_kernels_own() -> None:
    found, minimal = caught(Runner(lambda s: "dead" if has(s, Neighbour, kernel="two") else None))
    assert found.finding.kind == "Crashed"
    assert [step.kind for step in minimal.steps] == ["neighbour"]
    assert found.without == ("correct",)


@pytest.mark.parametrize("guard", [Guard.AFTER, Guard.BEFORE])
def test_a_death_that_takes_a_guard_page_names_the_buffer(guard: Guard) -> None:
    runner = Runner(lambda s: "dead" if s.case.guard is guard else None, guards=True, guilty="q")
    found, minimal = caught(runner)
    assert (found.finding.kind, found.finding.key) == ("OutOfBounds", f"guard page {guard.value}")
    assert found.finding.culprit == f"guard page {guard.value} q"
    assert ("behind the end of q" if guard is Guard.AFTER else "before the beginning of q") in found.finding.what
    assert (minimal.steps, minimal.case.guard) == ((), guard)
    assert runner.guarded == ["k_pages", "q"]


def test_a_death_that_takes_no_guard_page_stays_a_crash() -> None:
    found, minimal = caught(Runner(lambda s: "dead" if has(s, EmptyCache) else None, guards=True, guilty="q"))
    assert (found.finding.kind, found.finding.culprit) == ("Crashed", None)
    assert minimal.case.guard is Guard.NONE


@pytest.mark.parametrize("signal", ["SIGFPE", "SIGILL"])
def test_no_guard_page_divides_by_zero(signal: str) -> None:
    key = f"signal {signal}"
    finding = Finding(kind="Crashed", kernel="rule", key=key, what=f"the worker process died: {key}")
    outcome, guarded = (
        Outcome(status=Status.FAILED, finding=finding, fatal=True),
        replace(case((1, 3)), guard=Guard.AFTER),
    )
    out_of_bounds = replace(finding, kind="OutOfBounds")
    for prey in (None, out_of_bounds):
        assert blamed_on_the_guard(outcome, guarded, prey, lambda case: Outcome(status=Status.PASSED)) is outcome


def test_a_death_that_takes_far_pages_is_out_of_bounds() -> None:
    found, minimal = caught(Runner(lambda s: "dead" if has(s, FarPages) else None))
    assert (found.finding.kind, found.finding.key) == ("OutOfBounds", "far pages")
    assert found.finding.culprit == "offsets of pages beyond 32 bits"
    assert minimal.steps == (FarPages(),)
    assert found.without == ("correct",)


def test_a_death_beside_far_pages_stays_a_crash() -> None:
    found, minimal = caught(Runner(lambda s: "dead" if has(s, EmptyCache) else None))
    assert found.finding.kind == "Crashed"
    assert minimal.steps == (EmptyCache(),)


# --- what is drawn


def test_a_neighbour_that_needs_finite_inputs_is_given_no_others() -> None:
    contract = LaunchContract(needs_finite="its loop has no end")
    one = replace(NEIGHBOURS["one"], kernel=replace(NEIGHBOURS["one"].kernel, contract=contract))
    runner, neighbours = Runner(), Neighbours(targets={**NEIGHBOURS, "one": one}, seed=1)
    trail = hunt_sequences(TARGET, neighbours, runner, None, PROFILE, 1, ("neighbour",))
    given = {(step.kernel, step.data) for sequence in runner.sequences for step in sequence.neighbours}
    assert given == {("one", Data.FINITE), *(("two", data) for data in Data)}
    assert {item.what: item.why for item in trail.unchecked}["rule: after one with nan or inf"] == contract.needs_finite


def test_a_kind_of_step_that_is_refused_is_not_drawn_again() -> None:
    runner = Runner(lambda s: "unsupported: step graph: not declared" if has(s, Graph) else None)
    trail = hunted(runner)
    assert unchecked(trail) == {"rule: step graph": "not declared"}
    refused = [number for number, sequence in enumerate(runner.sequences) if has(sequence, Graph)]
    # Weights are made anew from one batch to the next.
    beginning = next(number for number, _ in enumerate(runner.sequences) if number - len(refused) >= BATCH)
    assert 0 < max(refused) <= beginning
    assert len(trail.cases) == PROFILE.cpu_sequences
    assert trail.unsupported == {"step graph: not declared": len({runner.sequences[n] for n in refused})}
    assert not any("graph" in pair for pair in trail.kinds)


def test_a_step_that_is_refused_here_is_drawn_again_elsewhere() -> None:
    runner = Runner(lambda s: "unsupported: step graph here: no keys" if has(s, Graph) and len(s.steps) > 1 else None)
    trail = hunted(runner)
    assert unchecked(trail) == {}
    assert "begin > graph" in trail.kinds


def test_every_kind_is_played_even_in_few_sequences() -> None:
    for seed in range(3):
        trail = hunted(Runner(), seed, replace(PROFILE, cpu_sequences=2))
        assert {kind for pair in trail.kinds for kind in pair.split(" > ")} == {
            *(set(STEPS) - {"load"}),
            "begin",
            "launch",
        }
        assert len(trail.cases) < 80


def test_every_pair_is_played_where_the_profile_says_so() -> None:
    trail = hunted(Runner(), 1, replace(PROFILE, cpu_sequences=10, every_pair=True))
    assert set(trail.before) == {*NEIGHBOURS, *(f"torch.{op}" for op in OPERATIONS)}
    kinds = [kind for kind in STEPS if kind != "load"]
    assert {f"{first} > {second}" for first in kinds for second in (*kinds, "launch")} <= set(trail.kinds)
    assert sum(trail.kinds[pair] for pair in trail.kinds if pair.endswith("> launch")) == len(trail.cases)


def test_only_the_kinds_that_were_asked_for_are_drawn() -> None:
    runner = Runner()
    hunted(runner, kinds=("torch", "reuse"))
    assert {step.kind for sequence in runner.sequences for step in sequence.steps} == {"torch", "reuse"}
    assert {name for name, _ in runner.alone} <= {"rule"}


def test_steps_that_share_the_plan_need_a_kernel_that_plans_anew() -> None:
    runner, target = Runner(), replace(TARGET, kernel=replace(TARGET.kernel, contract=LaunchContract()))
    hunt_sequences(target, Neighbours(targets={}, seed=1), runner, None, PROFILE, 1, ("again",))
    drawn = {step.keeps.value for sequence in runner.sequences for step in sequence.steps if isinstance(step, Again)}
    assert drawn == {"nothing", "workspace"}
    hunted(planning := Runner(), kinds=("again",))
    drawn = {step.keeps.value for s in planning.sequences for step in s.steps if isinstance(step, Again)}
    assert drawn == {"nothing", "workspace", "plan", "resized"}


def test_the_same_seed_draws_the_same_sequences() -> None:
    asked = []
    for seed in (5, 5, 6):
        hunted(runner := Runner(), seed)
        asked.append([sequence.id for sequence in runner.sequences])
    assert asked[0] == asked[1] != asked[2]


# --- the quiet worker


def test_sequences_are_held_against_what_the_quiet_worker_gives() -> None:
    quiet, runner = Runner(name="quiet"), Runner(name="busy")
    trail = hunt_sequences(TARGET, Neighbours(targets=NEIGHBOURS, seed=1), runner, quiet, PROFILE, 1)
    assert all(company.fresh == f"quiet {company.sequence.case.id}" for company in runner.played)
    assert len(runner.played) >= PROFILE.cpu_sequences
    # Nothing but the kernel alone ever runs there, and each case once.
    assert quiet.played == []
    assert {name for name, _ in quiet.alone} == {"rule"}
    assert len(quiet.alone) == len(set(quiet.alone))
    assert unchecked(trail) == {}


def test_without_a_quiet_worker_that_is_told() -> None:
    runner = Runner()
    trail = hunt_sequences(TARGET, Neighbours(targets=NEIGHBOURS, seed=1), runner, None, PROFILE, 1)
    assert unchecked(trail) == {
        "equality with a fresh worker": "there is no second worker with --kernel-isolation=inprocess"
    }
    assert all(company.fresh is None for company in runner.played)


def test_a_case_that_dies_in_the_quiet_worker_has_no_digest() -> None:
    quiet, runner = Runner(name="quiet"), Runner()
    quiet.lethal = lambda name: True
    hunt_sequences(TARGET, Neighbours(targets=NEIGHBOURS, seed=1), runner, quiet, PROFILE, 1)
    assert runner.played
    assert all(company.fresh is None for company in runner.played)


def test_replay_plays_the_one_sequence() -> None:
    sequence = LaunchSequence(case=case((1, 1)), steps=(EmptyCache(), Neighbour(kernel="one", case=rows(3))))
    quiet, runner = Runner(name="quiet"), Runner(lambda s: "Mismatch")
    trail = replay_sequence(TARGET, NEIGHBOURS, runner, quiet, PROFILE, sequence)
    assert trail.caught is not None
    assert trail.caught.sequence == sequence
    assert runner.sequences == [sequence]
    assert runner.played[0].fresh == f"quiet {sequence.case.id}"
