"""A run that was cut off, continued: what had ended is not hunted again, and the report has all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from user_project import HUNT

if TYPE_CHECKING:
    from user_project import Project, Run

# Each launch leaves a line with the kernel's name.
KERNELS = """
from pathlib import Path

LAUNCHES = Path(__file__).parents[2] / "launches"


def noted(name, launch):
    def note(call):
        with LAUNCHES.open("a") as file:
            file.write(name + "\\n")
        return launch(call)

    return note


def doubled(call):
    a.healthy(call)
    call.outputs["lse"].mul_(2)
    return call.outputs


bad = kernel("mine.bad", noted("bad", doubled))
good = kernel("mine.good", noted("good", a.healthy))
"""
CONTINUED = ("--kernel-suite=mine", "--kernel-continue=kept", "--kernel-seed=1", *HUNT)


@dataclass
class Continued:
    """The parts of a run, what was launched in each, and their summaries."""

    project: Project
    runs: dict[str, Run] = field(default_factory=dict)
    launched: dict[str, set[str]] = field(default_factory=dict)
    summaries: dict[str, Any] = field(default_factory=dict)

    def part(self, label: str, *arguments: str) -> None:
        launches = self.project.write("launches", "")
        self.runs[label] = self.project.pytest(*CONTINUED, f"--kernel-json={label}.json", *arguments)
        self.launched[label] = set(launches.read_text().split())
        self.summaries[label] = json.loads((self.project.root / f"{label}.json").read_text())

    def kernel(self, label: str, name: str) -> Any:
        (found,) = [one for one in self.summaries[label]["kernels"] if one["name"] == name]
        return found


@pytest.fixture(scope="module")
def continued(new_project: Callable[[], Project]) -> Continued:
    run = Continued(new_project())
    run.project.suite("mine", mine=KERNELS)
    run.part("first", "-k", "bad")
    run.part("second")
    run.part("third")
    run.part("other", "--kernel-seed=2", "-k", "good")
    run.project.write("suites/mine/_new.py", "")
    run.part("changed", "-k", "good")
    return run


def test_only_what_had_not_ended_is_hunted(continued: Continued) -> None:
    kept = {label: {one["name"] for one in run["kernels"] if one["kept"]} for label, run in continued.summaries.items()}
    assert kept == {
        "first": set(),
        "second": {"mine.bad"},
        "third": {"mine.bad", "mine.good"},
        "other": set(),
        "changed": set(),
    }
    # Hunted, a kernel has the other one for a peer.
    assert {label for label, launched in continued.launched.items() if not launched} == {"third"}


def test_what_was_red_is_red_with_the_same_words(continued: Continued) -> None:
    first, second = (continued.runs[label] for label in ("first", "second"))
    assert (first.totals, second.totals) == ("1 failed, 1 deselected", "1 failed, 1 passed")
    begin, end = "Mismatch in mine.bad", "  replay: "
    told = [run.out[run.out.index(begin) : run.out.index(end)] for run in (first, second)]
    assert told[0] == told[1]
    assert (first.code, second.code) == (1, 1)


def test_the_summary_has_all_of_it_and_says_what_was_kept(continued: Continued) -> None:
    before, after = (continued.kernel(label, "mine.bad") for label in ("first", "second"))
    assert before["kept"] == ""
    assert after == {**before, "kept": after["kept"]}
    assert after["kept"] >= continued.summaries["first"]["began"]
    assert continued.kernel("second", "mine.good")["kept"] == ""
    assert continued.summaries["second"]["failures"] == continued.summaries["first"]["failures"]
    assert f"kept from {after['kept']}" in continued.runs["second"].out


def test_the_report_says_so_too(continued: Continued) -> None:
    report = (continued.project.root / "reports" / "kerneltest.html").read_text()
    assert "kept from" not in report  # that of the last part, which hunted all it has
    run = continued.project.pytest(*CONTINUED, "-k", "good", "--kernel-report=again.html")
    assert run.code == 0
    assert "kept from" in (continued.project.root / "again.html").read_text()


def test_it_needs_a_seed(continued: Continued) -> None:
    run = continued.project.pytest("--kernel-suite=mine", "--kernel-continue=kept")
    assert run.code == pytest.ExitCode.USAGE_ERROR
    assert run.err.strip() == (
        "ERROR: --kernel-continue: needs --kernel-seed, or the rest of the run would draw other cases"
    )


def test_a_file_that_holds_no_hunt_is_named(continued: Continued) -> None:
    paths = list((continued.project.root / "kept").glob("*/*.json"))
    assert paths
    for path in paths:
        path.write_text("{}")
    run = continued.project.pytest(*CONTINUED, "-k", "good")
    assert run.code == 1
    assert any(
        f"{path.relative_to(continued.project.root)}: no hunt that this release can read" in run.out for path in paths
    )
    assert "kept.py" not in run.out
