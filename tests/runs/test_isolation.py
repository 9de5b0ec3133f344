"""Kernels run in a process of their own, or in pytest's if that is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from user_project import HUNT

if TYPE_CHECKING:
    from user_project import Project, Run

CONFTEST = """
import os
import sys


def pytest_unconfigure():
    print(f"CONTROLLER {os.getpid()} torch={'torch' in sys.modules} triton={'triton' in sys.modules}")
"""
KERNELS = """
import os
from pathlib import Path

FOLDER = Path(__file__).parents[2]


def noisy(call):
    (FOLDER / os.environ["PID_FILE"]).write_text(str(os.getpid()))
    print('{"status": "failed"}')
    print("no newline at the end", end="", flush=True)
    os.write(1, b"from the depths of a library\\n")
    return a.healthy(call)


def doubled(call):
    a.healthy(call)
    call.outputs["lse"].mul_(2)
    return call.outputs


def exits(call):
    once = FOLDER / "has-exited"
    if not once.exists():
        once.touch()
        print("last words")
        os._exit(3)
    return a.healthy(call)


noisy = kernel("mine.noisy", noisy)
bad = kernel("mine.bad", doubled)
exits = kernel("mine.exits", exits)
after = kernel("mine.after", a.healthy)
"""


@dataclass(frozen=True)
class Both:
    """The same kernels with a worker and without one."""

    project: Project
    worker: Run
    inprocess: Run

    def kernels(self, name: str) -> dict[str, dict[str, object]]:
        run = json.loads((self.project.root / f"{name}.json").read_text())
        kinds = {failure["kernel"]: failure["kind"] for failure in run["failures"]}
        keys = ("verdict", "cases", "launches", "used")
        return {k["name"]: {key: k[key] for key in keys} | {"kind": kinds.get(k["name"])} for k in run["kernels"]}


@pytest.fixture(scope="module")
def both(new_project: Callable[[], Project]) -> Both:
    project = new_project()
    project.suite("mine", mine=KERNELS)
    project.write("conftest.py", CONFTEST)
    hunt = ["--kernel-suite=mine", *HUNT, "--kernel-seed=5"]
    worker = project.pytest(*hunt, "--kernel-json=worker.json", PID_FILE="worker.pid")
    inprocess = project.pytest(
        *hunt, "--kernel-isolation=inprocess", "--kernel-json=inprocess.json", PID_FILE="inprocess.pid"
    )
    return Both(project, worker, inprocess)


def controller(run: Run) -> tuple[str, str]:
    """The pid of pytest, and what of torch it had imported when it ended."""
    (line,) = (line for line in run.lines if line.startswith("CONTROLLER "))
    _, pid, imported = line.split(" ", 2)
    return pid, imported


def test_pytest_itself_never_imports_torch(both: Both) -> None:
    assert controller(both.worker)[1] == "torch=False triton=False"
    assert controller(both.inprocess)[1].startswith("torch=True")  # or the line above proves nothing


def test_kernels_run_in_another_process_unless_asked_otherwise(both: Both) -> None:
    def ran_in(name: str) -> str:
        return (both.project.root / f"{name}.pid").read_text()

    assert ran_in("worker") != controller(both.worker)[0]
    assert ran_in("inprocess") == controller(both.inprocess)[0]


def test_both_come_to_the_same_verdict(both: Both) -> None:
    worker, inprocess = both.kernels("worker"), both.kernels("inprocess")
    assert {name: kernel["verdict"] for name, kernel in inprocess.items()} == {
        "mine.noisy": "green",
        "mine.bad": "red",
        "mine.exits": "green",  # it exits but once
        "mine.after": "green",
    }
    del worker["mine.exits"], inprocess["mine.exits"]
    assert worker == inprocess


def test_what_a_kernel_prints_does_not_break_the_protocol(both: Both) -> None:
    noisy = both.kernels("worker")["mine.noisy"]
    assert (noisy["verdict"], noisy["cases"]) == ("green", 9)


def test_a_kernel_that_ends_its_process_is_a_finding(both: Both) -> None:
    assert both.worker.code == pytest.ExitCode.TESTS_FAILED
    start = both.worker.lines.index("Crashed in mine.exits")
    text = both.worker.lines[start : start + 20]
    assert text[1] == "  the worker process died: exit status 3"
    assert "  stderr: last words" in text
    # It does not crash a second time, and the text does not pretend that it does.
    count = next(line for line in text if line.startswith("  found after"))
    assert re.search(r"failed again in 0 of 3 runs$", count)


def test_the_kernels_after_a_crash_still_run(both: Both) -> None:
    after = both.kernels("worker")["mine.after"]
    assert (after["verdict"], after["cases"]) == ("green", 9)
    assert "2 failed, 2 passed" in both.worker.out


def test_a_crash_is_not_blamed_with_the_words_of_another_kernel(both: Both) -> None:
    start = both.worker.lines.index("Crashed in mine.exits")
    text = both.worker.lines[start : both.worker.lines.index("  stderr: last words", start)]
    assert not any("the depths of a library" in line for line in text)


def test_a_worker_that_cannot_start_fails_every_kernel_in_words(new_project: Callable[[], Project]) -> None:
    project = new_project()
    project.suite("mine", mine='one = kernel("mine.one", a.healthy)\ntwo = kernel("mine.two", a.healthy)')
    broken = project.write("broken/torch.py", "raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    run = project.pytest("--kernel-suite=mine", *HUNT, "--junitxml=junit.xml", PYTHONPATH=str(broken.parent))
    assert (run.code, run.totals) == (pytest.ExitCode.TESTS_FAILED, "2 failed")
    for _, name, text in project.junit("junit.xml"):
        assert name in ("mine.one", "mine.two")
        lines = text.splitlines()
        assert lines[0] == "the worker process could not start: exit status 1"
        assert lines[-1] == "  ImportError: libcudart.so.12: cannot open shared object file"
        assert f"unchecked suites/mine/mine.py::{name}: {lines[0]}" in run.lines
