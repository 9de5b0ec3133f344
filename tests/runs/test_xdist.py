"""Kernels spread over the processes of pytest-xdist."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from user_project import HUNT

if TYPE_CHECKING:
    from user_project import Project, Run

pytest.importorskip("xdist")

# Leaves a line for every process: whether it is one of xdist's, its seed, its items, and whether it writes reports.
CONFTEST = """
import json
import os
from pathlib import Path

items = []


def pytest_runtest_setup(item):
    items.append(item.name)


def pytest_unconfigure(config):
    line = {
        "spread": hasattr(config, "workerinput"),
        "seed": config.option.kernel_seed,
        "reports": config.pluginmanager.has_plugin("kerneltest-report"),
        "items": items,
    }
    (Path(__file__).parent / f"process-{os.getpid()}.json").write_text(json.dumps(line))
"""
KERNELS = """
def doubled(call):
    a.healthy(call)
    call.outputs["lse"].mul_(2)
    return call.outputs


good = kernel("mine.good", a.healthy)
bad = kernel("mine.bad", doubled)
"""


@dataclass(frozen=True)
class Spread:
    project: Project
    run: Run

    @property
    def processes(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in self.project.root.glob("process-*.json")]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.project.root / "summary.json").read_text())


@pytest.fixture(scope="module")
def spread(new_project: Callable[[], Project]) -> Spread:
    project = new_project()
    project.suite("mine", mine=KERNELS)
    project.write("conftest.py", CONFTEST)
    run = project.pytest("--kernel-suite=mine", *HUNT, "-n2", "--kernel-json=summary.json")
    assert (project.root / "summary.json").is_file(), run.out + run.err
    return Spread(project, run)


def test_each_process_hunts_one_kernel(spread: Spread) -> None:
    assert (spread.run.code, spread.run.totals) == (1, "1 failed, 1 passed")
    assert sorted(process["items"] for process in spread.processes if process["spread"]) == [
        ["mine.bad"],
        ["mine.good"],
    ]


def test_report_and_summary_are_complete_and_written_once(spread: Spread) -> None:
    kernels = {kernel["name"]: (kernel["verdict"], kernel["cases"]) for kernel in spread.summary["kernels"]}
    assert kernels == {"mine.good": ("green", 9), "mine.bad": ("red", kernels["mine.bad"][1])}
    assert [failure["kernel"] for failure in spread.summary["failures"]] == ["mine.bad"]
    html = (spread.project.root / "reports" / "kerneltest.html").read_text()
    assert "mine.good" in html
    assert "mine.bad" in html
    assert [process["reports"] for process in spread.processes if process["spread"]] == [False, False]
    assert [process["reports"] for process in spread.processes if not process["spread"]] == [True]
    assert len([line for line in spread.run.lines if line.startswith("report: ")]) == 1
    assert len(re.findall(r"^=+ kerneltest =+$", spread.run.out, re.MULTILINE)) == 1


def test_one_seed_for_all_processes(spread: Spread) -> None:
    assert len(spread.processes) == 3
    seed = spread.summary["seed"]
    assert isinstance(seed, int)
    assert {process["seed"] for process in spread.processes} == {seed}
    assert f"kerneltest: profile quick, device cpu, seed {seed}" in spread.run.lines


def test_failure_text_crosses_to_the_controller_whole(spread: Spread) -> None:
    assert "Mismatch in mine.bad" in spread.run.lines
    (replay,) = (line for line in spread.run.lines if line.startswith("  replay: pytest "))
    assert (spread.project.root / replay.split()[2]).is_file()
