"""What a run leaves behind for people and machines, and the way from a failure to its repair."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from user_project import HUNT, MINIMAL_CASE

if TYPE_CHECKING:
    from user_project import Project, Run

MINE = """
def doubled(call):
    a.healthy(call)
    call.outputs["lse"][1:].mul_({factor})
    return call.outputs


def silent(call):
    a.healthy(call)
    return {{"out": call.outputs["out"]}}


bad = kernel("mine.bad", doubled)
good = kernel("mine.good", silent, returns=("out",))
elsewhere = kernel("mine.elsewhere", a.healthy, devices=("cuda",))
"""
NUMBER = r"-?\d[\d.e+-]*"
# Line by line what a person reads.
FAILURE = (
    r"Mismatch in mine\.bad",
    r"  lse: 1 of 2 elements \(50 %\) lie outside their error budget",
    r"  first at request 0, token 1, head 0",
    rf"  worst at request 0, token 1, head 0: got {NUMBER}, reference {NUMBER}, \|error\| {NUMBER}, bound {NUMBER} "
    rf"\({NUMBER} times what is allowed, rounding included\)",
    rf"  minimal case: {re.escape(MINIMAL_CASE)}",
    r"  on: \S.*, torch \d\S+(, triton \d\S+)?",
    r"  found after \d+\.\d s, shrunk for \d+\.\d s; \d+ cases; the minimal one failed again in 3 of 3 runs",
    r"  mine\.good agrees with the reference on this case",
    r"  replay: pytest fixtures/mine\.bad/Mismatch-[0-9a-f]{8}/case\.json --kernel-device=cpu",
)

ELSEWHERE = "found/mine.bad/Mismatch-0123abcd/case.json"


@dataclass(frozen=True)
class Story:
    """From the first run to the repair."""

    project: Project
    first: Run
    command: list[str]
    last_failed: Run
    stopped: Run
    replayed: Run
    elsewhere: Run
    mended: Run


@pytest.fixture(scope="module")
def story(new_project: Callable[[], Project]) -> Story:
    project = new_project()
    project.suite("mine", mine=MINE.format(factor="2"))
    hunt = ["--kernel-suite=mine", *HUNT, "--kernel-seed=7"]
    first = project.pytest(*hunt, "-v", "--kernel-json=out/summary.json", "--junitxml=junit.xml")
    (replay,) = (line for line in first.lines if line.startswith("  replay: "))
    command = shlex.split(replay.removeprefix("  replay: "))
    found = json.loads((project.root / command[1]).read_text())
    found["found_on"] |= {"device": "GPU 9000", "kind": "cuda"}
    project.write(ELSEWHERE, json.dumps(found))
    last_failed, stopped, replayed, elsewhere = project.pytest_at_once(
        [*hunt, "--lf", "--kernel-report=elsewhere/of/mine.html"],
        [*hunt, "-x", "-p", "no:cacheprovider", "--kernel-report=stopped.html", "--kernel-json=stopped.json"],
        [*command[1:], "-p", "no:cacheprovider"],
        [ELSEWHERE, "-p", "no:cacheprovider", "-rs"],
    )
    project.suite("mine", mine=MINE.format(factor="1.0"))
    mended = project.pytest(*command[1:])
    return Story(project, first, command, last_failed, stopped, replayed, elsewhere, mended)


def summary(story: Story) -> dict[str, Any]:
    return json.loads((story.project.root / "out/summary.json").read_text())


def terminal_section(run: Run) -> list[str]:
    (start,) = (number for number, line in enumerate(run.lines) if re.fullmatch("=+ kerneltest =+", line))
    section = run.lines[start + 1 :]
    return section[: next(number for number, line in enumerate(section) if line.startswith("==="))]


def failure_text(run: Run) -> list[str]:
    start = run.lines.index("Mismatch in mine.bad")
    return run.lines[start : start + len(FAILURE)]


def test_a_failing_kernel_fails_the_run(story: Story) -> None:
    assert story.first.code == pytest.ExitCode.TESTS_FAILED
    assert story.first.totals == "1 failed, 1 passed, 1 skipped"


def test_the_failure_is_the_whole_text_and_no_traceback(story: Story) -> None:
    for line, pattern in zip(failure_text(story.first), FAILURE, strict=True):
        assert re.fullmatch(pattern, line)
    start = story.first.lines.index("Mismatch in mine.bad")
    assert story.first.lines[start - 1].strip("_") == " kernel mine.bad "
    assert story.first.lines[start + len(FAILURE)].startswith("---")
    (line,) = (line for line in story.first.lines if line.startswith("FAILED "))
    assert line == "FAILED suites/mine/mine.py::mine.bad - Mismatch in mine.bad"


def test_the_header_says_what_a_repetition_needs(story: Story) -> None:
    assert "kerneltest: profile quick, device cpu, seed 7" in story.first.lines


@pytest.mark.parametrize(("name", "verdict"), [("mine.bad", "FAILED"), ("mine.good", "PASSED")])
def test_verbose_lines_show_a_node_id_that_can_be_pasted(story: Story, name: str, verdict: str) -> None:
    (line,) = (line for line in story.first.lines if re.fullmatch(rf"suites\S+ {verdict} .*", line))
    assert line.split()[0] == f"suites/mine/mine.py::{name}"


def test_terminal_section(story: Story) -> None:
    expected = [
        r"red       mine\.bad: \d+ cases, 0 unsupported, budget used .*, \d+\.\d s",
        r"green     mine\.good: 9 cases, 0 unsupported, budget used out 0\.\d\d, \d+\.\d s",
        r"poison    allocator pool: [\d.]+ % proven \(\d+ blocks of torch\.empty, \d+ MiB together\)",
        r"unchecked mine\.good: agreement with mine\.bad: no case was right in both",
        r"unchecked mine\.good: output lse: the kernel does not return it",
        r"unchecked mine\.elsewhere: needs a cuda device, this is cpu",
        r"unchecked poison in shared memory: a CPU has none",
        r"unchecked poison in registers: a CPU has none",
        rf"report: {re.escape(str(story.project.root))}/reports/kerneltest\.html",
        r"summary: out/summary\.json",
    ]
    lines = terminal_section(story.first)
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line)


def test_html_report_lies_at_the_default_place(story: Story) -> None:
    text = (story.project.root / "reports/kerneltest.html").read_text()
    assert text.lstrip().lower().startswith("<!doctype html>")
    for word in ("mine.bad", "mine.good", "mine.elsewhere", "Mismatch"):
        assert word in text


def test_html_report_lies_where_it_was_asked_for(story: Story) -> None:
    assert "mine.bad" in (story.project.root / "elsewhere/of/mine.html").read_text()
    assert "report: elsewhere/of/mine.html" in story.last_failed.lines


def test_json_summary_has_the_documented_keys(story: Story) -> None:
    run = summary(story)
    assert list(run) == [
        *("schema", "version", "command", "began", "profile", "seed", "device", "libraries", "coverage", "seconds"),
        *("cases", "sequences", "kernels", "failures", "unchecked"),
    ]
    assert run["schema"] == "kerneltest.summary/1"
    assert (run["profile"], run["seed"], run["device"]["kind"]) == ("quick", 7, "cpu")
    assert run["command"].startswith("pytest --kernel-suite=mine ")
    kernel_keys = [
        *(
            "name",
            "suite",
            "hunt",
            "cases",
            "unsupported",
            "launches",
            "inputs",
            "used",
            "slack",
            "energy",
            "before",
            "kinds",
            "repeated",
            "misuses",
            "distribution",
            "verdict",
            "seconds",
            "kept",
        )
    ]
    assert [list(kernel) for kernel in run["kernels"]] == [kernel_keys] * 3
    failure_keys = [
        *("kernel", "kind", "culprit", "what", "steps", "misuse", "case", "fixture", "replay"),
        *("seconds_to_find", "seconds_to_shrink"),
    ]
    assert [list(failure) for failure in run["failures"]] == [failure_keys]
    assert [list(place) for place in run["coverage"]] == [["place", "share", "note"]] * len(run["coverage"])
    assert [list(item) for item in run["unchecked"]] == [["what", "why"]] * len(run["unchecked"])


def test_json_summary_agrees_with_the_terminal(story: Story) -> None:
    run, lines = summary(story), terminal_section(story.first)
    ran = [kernel for kernel in run["kernels"] if kernel["verdict"] != "unchecked"]
    for kernel, line in zip(ran, lines, strict=False):
        used = ", ".join(f"{output} {share:.2f}" for output, share in kernel["used"].items()) or "-"
        assert (
            line.split()
            == (
                f"{kernel['verdict']} {kernel['name']}: {kernel['cases']} cases, {kernel['unsupported']} unsupported, "
                f"budget used {used}, {kernel['seconds']:.1f} s"
            ).split()
        )
    assert run["cases"] == sum(kernel["cases"] for kernel in run["kernels"])
    assert [f"unchecked {item['what']}: {item['why']}" for item in run["unchecked"]] == lines[3:8]


def test_json_summary_holds_the_failure(story: Story) -> None:
    (failure,) = summary(story)["failures"]
    assert (failure["kernel"], failure["kind"], failure["culprit"]) == ("mine.bad", "Mismatch", None)
    assert failure["what"] == "lse: 1 of 2 elements (50 %) lie outside their error budget"
    assert failure["fixture"] == story.command[1]
    assert shlex.split(failure["replay"]) == story.command
    assert failure["case"]["seed"] == 0


def test_junit_report_has_every_item(story: Story) -> None:
    (_, bad, text), (_, good, passed), (_, elsewhere, skipped) = story.project.junit("junit.xml")
    assert (bad, good, elsewhere) == ("mine.bad", "mine.good", "mine.elsewhere")
    assert text == "\n".join(failure_text(story.first))
    assert passed == skipped == ""


def test_fixture_holds_the_minimal_case(story: Story) -> None:
    fixture = json.loads((story.project.root / story.command[1]).read_text())
    assert fixture["schema"] == "kerneltest.case/1"
    assert (fixture["suite"], fixture["kernel"], fixture["kind"]) == ("mine", "mine.bad", "Mismatch")
    assert fixture["case"] == summary(story)["failures"][0]["case"]
    # The other runs found the same bug again: no second folder.
    assert len(list((story.project.root / "fixtures").rglob("case.json"))) == 1


def test_replay_fails_with_the_same_kind(story: Story) -> None:
    assert story.replayed.code == pytest.ExitCode.TESTS_FAILED
    assert story.replayed.totals == "1 failed"
    assert f"FAILED {story.command[1]}::replay - Mismatch in mine.bad" in story.replayed.lines
    assert f"  minimal case: {MINIMAL_CASE}" in story.replayed.lines


def test_replay_passes_once_the_kernel_is_mended(story: Story) -> None:
    assert (story.mended.code, story.mended.totals) == (0, "1 passed")


def test_what_was_found_on_a_gpu_is_not_called_mended_on_a_cpu(story: Story) -> None:
    assert story.elsewhere.totals == "1 skipped"
    assert "found on GPU 9000: what runs on a CPU is another program" in story.elsewhere.out


def test_lf_runs_the_failed_kernel_alone(story: Story) -> None:
    assert story.last_failed.totals.startswith("1 failed")
    assert "passed" not in story.last_failed.totals
    assert "run-last-failure: rerun previous 1 failure" in story.last_failed.out
    verdicts = [line for line in terminal_section(story.last_failed) if line.startswith(("red", "green"))]
    assert [line.split(":")[0] for line in verdicts] == ["red       mine.bad"]


def test_x_stops_after_the_first_failure(story: Story) -> None:
    assert story.stopped.totals == "1 failed"
    assert "stopping after 1 failures" in story.stopped.out
    run = json.loads((story.project.root / "stopped.json").read_text())
    assert [kernel["name"] for kernel in run["kernels"]] == ["mine.bad"]
    assert (story.project.root / "stopped.html").is_file()
