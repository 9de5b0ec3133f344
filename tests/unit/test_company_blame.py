"""Who is to blame for what came of a sequence: the case alone, a neighbour, its data, or a page that is not there."""

from __future__ import annotations

from dataclasses import replace

import pytest
from attention_cases import case
from company_rules import (
    NEIGHBOURS,
    PROFILE,
    TARGET,
    Runner,
    caught,
    has,
    hunted,
    unchecked,
)

from kerneltest.engine.casting import Neighbours
from kerneltest.engine.company import hunt_sequences
from kerneltest.engine.guards import blamed_on_the_guard
from kerneltest.engine.profile import Chosen
from kerneltest.engine.programs import plainer
from kerneltest.model import (
    Again,
    Data,
    EmptyCache,
    FarPages,
    Finding,
    Guard,
    LaunchSequence,
    Neighbour,
    Outcome,
    Status,
)

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


def test_a_case_that_fails_alone_where_a_sequence_ran_may_be_right_where_none_did() -> None:
    """What a sequence leaves in its process makes the case fail there, and is not to hide the sequence."""
    spoilt = []

    def rule(sequence: LaunchSequence) -> str | None:
        if has(sequence, EmptyCache):
            spoilt.append(sequence)
            return "StaleState"
        return "Mismatch" if spoilt else None

    found = hunted(Runner(rule), quiet=lambda sequence: None).caught
    assert found is not None
    assert found.finding.kind == "StaleState"
    assert found.sequence is not None
    assert [step.kind for step in found.sequence.steps] == ["empty_cache"]


def test_what_failed_alone_once_is_told_if_it_does_not_again() -> None:
    failed = []

    def once(sequence: LaunchSequence) -> str | None:
        if requests(sequence) == 2 and not failed:
            failed.append(sequence)
            return "Mismatch"
        return None

    trail = hunted(Runner(once), quiet=lambda s: "Mismatch" if requests(s) == 2 else None)
    assert trail.caught is None
    assert unchecked(trail) == {"rule: 1 of its cases in company": "they fail alone: Mismatch: by rule"}


def test_what_was_left_out_is_not_what_a_sequence_is_shrunk_to() -> None:
    def rule(sequence: LaunchSequence) -> str | None:
        return "StaleState" if has(sequence, EmptyCache) or sequence.case.seed == 0 else None

    left_out = replace(PROFILE, only=(Chosen(axis="page_size", value=1, equal=False),))
    found = hunted(Runner(rule), profile=left_out).caught
    assert found is not None
    assert found.case.axes.page_size != 1


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


def test_a_process_that_a_neighbours_data_spoil_is_no_death_of_the_neighbour() -> None:
    """It is spoilt as well where the neighbour is played alone on them, which is no excuse for the kernel."""
    runner = Runner(lambda s: "spoilt" if has(s, Neighbour, kernel="two", data=Data.NAN) else None)
    runner.spoils = lambda sequence: has(sequence, Neighbour, kernel="two", data=Data.NAN)
    found = hunted(runner, profile=replace(PROFILE, cpu_sequences=200), kinds=("neighbour",)).caught
    assert found is not None
    assert found.finding.kind == "StaleState"


def test_a_process_that_is_spoilt_is_no_page_beyond_the_guard() -> None:
    runner = Runner(lambda s: "spoilt" if s.case.guard is not Guard.NONE else None, guards=True)
    found = hunted(runner).caught
    assert found is not None
    assert found.finding.kind == "StaleState"


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
    found, minimal = caught(runner, seed=2)  # which draws both ends
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
