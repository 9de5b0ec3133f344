"""A hunt on bad input, against a runner that answers by rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pick_kernel import CPU, case, kernel

from kerneltest.engine.hunt import Target
from kerneltest.engine.job import Job
from kerneltest.engine.misuse import hunt_misuse, replay_misuse
from kerneltest.engine.profile import PROFILES
from kerneltest.engine.text import misuse_text
from kerneltest.model import (
    Case,
    Conclusion,
    DecodeError,
    Finding,
    Guard,
    KernelRecord,
    LaunchContract,
    Misuse,
    Misused,
    MisuseTally,
    Outcome,
    RunRecord,
    Started,
    Status,
    decode,
    encode,
)
from kerneltest.report.html import html
from kerneltest.report.listener import _lines as lines
from kerneltest.report.summary import as_dict

MISUSES = tuple(
    Misuse(role="input", argument=argument, kind=kind, change=change, says=f"is {change}")
    for argument in ("q", "k")
    for kind, change in (("dtype", "int64"), ("dtype", "float64"), ("indptr", "falling"))
)


class Rule:
    """Lists MISUSES for each case, and answers to each what ``rule`` says."""

    def __init__(self, rule: Callable[[Case[Any], Misuse], Outcome]) -> None:
        self.rule = rule
        self.started = Started(device=CPU, no_guards="none here")
        self.asked: list[Misuse] = []

    def run(self, job: Job, *, deadline: float, cold: float) -> Outcome:
        if job.misuse == "list":
            return Outcome(status=Status.PASSED, misuses=MISUSES)
        assert isinstance(job.misuse, Misuse)
        self.asked.append(job.misuse)
        return self.rule(job.case, job.misuse)

    def close(self) -> None: ...


RIGHT = Outcome(status=Status.PASSED, reaction="right")
RAISED = Outcome(status=Status.PASSED, reaction="raised", reason="ValueError: no")
MUMBLED = Outcome(status=Status.PASSED, reaction="raised without a clear message", reason="ValueError: no message")
PROFILE = replace(PROFILES["default"], misused=2)


def accepted(misuse: Misuse, kind: str = "BadInputAccepted", *, fatal: bool = False) -> Outcome:
    key = "signal SIGABRT" if kind == "Crashed" else misuse.key
    finding = Finding(kind=kind, kernel="pick", key=key, what=f"it was {misuse}", culprit=str(misuse))
    return Outcome(status=Status.FAILED, finding=finding, fatal=fatal)


def target(**contract: Any) -> Target:
    return Target(kernel=kernel(contract=LaunchContract(**contract)), source=Path("pick.py"))


def test_every_misuse_of_every_case_is_run_and_counted() -> None:
    runner = Rule(lambda case, misuse: {"int64": RIGHT, "float64": RAISED}.get(misuse.change, MUMBLED))
    trail = hunt_misuse(target(), runner, PROFILE, 1)
    assert len(runner.asked) == len(trail.cases) == 2 * len(MISUSES)
    unclear = ("q is falling: ValueError: no message", "k is falling: ValueError: no message")
    assert trail.tally == MisuseTally(raised=8, right=4, unclear=unclear)
    assert (trail.found, trail.caught, trail.unchecked) == ((), None, ())


def test_a_bug_is_found_once_for_each_kind_of_misuse_and_argument() -> None:
    runner = Rule(lambda case, misuse: accepted(misuse) if misuse.kind == "dtype" else RAISED)
    trail = hunt_misuse(target(), runner, PROFILE, 1)
    assert [(caught.finding.key, caught.reproduced, caught.confirmed_of) for caught in trail.found] == [
        ("dtype of q", 1, 1),
        ("dtype of k", 1, 1),
    ]
    # Each twice, and not in the other case, nor with another dtype.
    assert sum(misuse.kind == "dtype" for misuse in runner.asked) == 4
    assert (trail.tally.failed, trail.tally.raised) == (8, 4)
    assert trail.caught is trail.found[0]
    assert trail.caught.case == min((caught.case for caught in trail.found), key=str)


def test_a_death_is_about_the_misuse_and_is_not_asked_again() -> None:
    runner = Rule(lambda case, misuse: accepted(misuse, "Crashed", fatal=True) if misuse.argument == "k" else RIGHT)
    trail = hunt_misuse(target(), runner, replace(PROFILE, misused=1), 1)
    assert [caught.finding.key for caught in trail.found] == ["indptr of k", "dtype of k"]
    assert [caught.finding.culprit for caught in trail.found] == ["k is falling", "k is int64"]
    assert len(runner.asked) == 5  # float64 has the key of int64


def test_a_death_that_takes_a_guard_page_is_out_of_bounds() -> None:
    def rule(case: Case[Any], misuse: Misuse) -> Outcome:
        if case.guard is Guard.NONE or misuse.kind != "indptr":
            return RIGHT
        finding = Finding(kind="Crashed", kernel="pick", key="signal SIGSEGV", what="dead")
        return Outcome(status=Status.FAILED, finding=finding, fatal=True)

    runner = Rule(rule)
    runner.started = Started(device=CPU)
    trail = hunt_misuse(target(), runner, PROFILE, 1)
    assert {(caught.finding.kind, caught.finding.key) for caught in trail.found} == {
        ("OutOfBounds", "indptr of q"),
        ("OutOfBounds", "indptr of k"),
    }


def test_what_is_trusted_is_not_run_and_listed_with_its_reason() -> None:
    runner = Rule(lambda case, misuse: RAISED)
    trail = hunt_misuse(target(trusts={"indptr": "it lies on the device"}), runner, PROFILE, 1)
    assert {misuse.kind for misuse in runner.asked} == {"dtype"}
    assert (trail.tally.trusted, trail.tally.total) == (4, 12)
    (unchecked,) = trail.unchecked
    assert unchecked.what == "pick: bad input, indptr (4 calls)"
    assert unchecked.why == "left to the caller: it lies on the device"


def test_what_there_was_no_time_for_is_listed() -> None:
    trail = hunt_misuse(target(), Rule(lambda case, misuse: RAISED), replace(PROFILE, cpu_misuse_seconds=-1.0), 1)
    assert trail.cases == ()
    assert [unchecked.what for unchecked in trail.unchecked] == [
        "pick: bad input, 6 calls more",
        "pick: bad input in further cases (1)",
    ]


def test_a_case_that_fails_by_itself_is_not_held_against_the_misuse() -> None:
    def rule(case: Case[Any], misuse: Misuse) -> Outcome:
        finding = Finding(kind="Mismatch", kernel="pick", key="out", what="wrong anyway")
        return Outcome(status=Status.FAILED, finding=finding)

    trail = hunt_misuse(target(), Rule(rule), PROFILE, 1)
    assert (trail.found, trail.cases) == ((), ())
    assert trail.unsupported == {"the case failed without anything being wrong": 12}


def test_a_replay_asks_also_what_is_trusted() -> None:
    runner = Rule(lambda case, misuse: accepted(misuse))
    trail = replay_misuse(target(trusts={"indptr": "why"}), runner, PROFILE, Misused(case=case(), misuse=MISUSES[2]))
    assert trail.caught is not None
    assert len(runner.asked) == 1


def test_the_text_lists_every_finding_before_the_first_in_full() -> None:
    trail = hunt_misuse(target(), Rule(lambda case, misuse: accepted(misuse)), PROFILE, 1)
    lines = misuse_text(trail.found, trail.tally, "FULL TEXT").splitlines()
    assert lines[0] == "4 findings in pick on bad input, of 12 calls with something wrong"
    assert lines[1:5] == [
        "  BadInputAccepted: q is falling",
        "  BadInputAccepted: k is falling",
        "  BadInputAccepted: q is int64",
        "  BadInputAccepted: k is int64",
    ]
    assert lines[-1] == "FULL TEXT"
    assert misuse_text(trail.found[:1], trail.tally, "FULL TEXT") == "FULL TEXT"


def test_reports_say_what_became_of_each_call() -> None:
    tally = MisuseTally(raised=5, right=4, failed=3, trusted=2, unclear=("q is <int64>: KeyError: 1",))
    record = KernelRecord(
        name="pick", suite="mine", verdict=Conclusion.RED, seconds=1.0, hunt="misuse", misuses=tally, device=CPU
    )
    run = RunRecord(
        began="", seconds=1.0, command="", version="", profile="quick", seed=1, kernels=(record,), unchecked=()
    )
    page = html(run)
    assert '<a href="#misuse">Bad input</a>' in page
    assert "q is &lt;int64&gt;: KeyError: 1" in page
    assert "pick on bad input" in page
    (kernel,) = as_dict(run)["kernels"]
    assert kernel["misuses"] == encode(tally)
    assert lines(run)[0] == (
        "red       pick on bad input: 14 misuses: 5 raised, 4 answered rightly, 3 neither, 2 left to the caller, "
        "1 unclear errors, 1.0 s"
    )


def test_a_misuse_survives_json() -> None:
    for misuse in MISUSES:
        assert decode(Misuse, encode(misuse)) == misuse
    misused = Misused(case=case(), misuse=MISUSES[0])
    assert Misused.from_json(case(), misused.to_json()) == misused
    assert misused.id != replace(misused, misuse=MISUSES[1]).id
    with pytest.raises(DecodeError, match=r"misuse: 'colour' is no kind of misuse; valid: dtype, device"):
        Misused.from_json(case(), encode(MISUSES[0]) | {"kind": "colour"})


def test_a_contract_cannot_trust_in_what_is_no_kind_of_misuse() -> None:
    with pytest.raises(ValueError, match="'colour' is no kind of misuse; valid: dtype"):
        LaunchContract(trusts={"colour": "why"})
