"""Drawing and reducing sequences without a worker: a runner that answers from a rule shows where reducing ends."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from attention_cases import case
from company_rules import (
    NEIGHBOURS,
    OPERATIONS,
    PROFILE,
    TARGET,
    Runner,
    caught,
    has,
    hunted,
    rows,
    unchecked,
)

from kerneltest.engine.casting import Neighbours
from kerneltest.engine.company import BATCH, hunt_sequences, replay_sequence
from kerneltest.engine.programs import plainer, with_other_values
from kerneltest.model import (
    Again,
    Beside,
    Data,
    EmptyCache,
    Graph,
    LaunchContract,
    LaunchSequence,
    Neighbour,
    Place,
    Poison,
    TorchOp,
)
from kerneltest.model.sequence import STEPS

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


def test_sequences_that_could_not_be_played_are_told() -> None:
    trail = hunted(Runner(lambda s: "unsupported: by rule" if len(s.steps) > 1 else None), kinds=("reuse",))
    ran = len(trail.cases)
    assert trail.caught is None
    assert 0 < ran < PROFILE.cpu_sequences
    told = {item.what: item.why for item in trail.unchecked}
    missing = f"rule: {PROFILE.cpu_sequences - ran} of {PROFILE.cpu_sequences} sequences"
    assert told[missing] == "nothing else is left to play: by rule"


def test_two_launches_of_one_size_run_side_by_side() -> None:
    runner = Runner()
    hunted(runner, profile=replace(PROFILE, cpu_sequences=100), kinds=("beside",))
    steps = [(one.case, step.case) for one in runner.sequences for step in one.steps if isinstance(step, Beside)]
    assert {case for case, other in steps if other == with_other_values(case)} == {case for case, _ in steps}
    assert any(other.axes != case.axes for case, other in steps)


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
