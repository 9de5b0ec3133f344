"""What the plugin costs a project that does not use it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from user_project import Project, Run

CONFTEST = """
import json
import sys


def pytest_unconfigure():
    print("LOADED " + json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] in OURS)))


OURS = ("kerneltest", "kerneltest_suites", "torch", "triton", "jinja2")
"""


@pytest.fixture
def unrelated(new_project: Callable[[], Project]) -> Project:
    project = new_project()
    project.write("conftest.py", CONFTEST)
    return project


def loaded(output: str) -> list[str]:
    (line,) = (line for line in output.splitlines() if line.startswith("LOADED "))
    return json.loads(line.removeprefix("LOADED "))


def test_an_unrelated_project_imports_nothing_but_the_hooks(unrelated: Project) -> None:
    run = unrelated.pytest()
    assert run.code == 0
    assert loaded(run.out) == ["kerneltest", "kerneltest.plugin"]
    assert not (unrelated.root / "reports").exists()
    assert not any(line.startswith("kerneltest:") for line in run.lines)


@pytest.fixture
def strangers(unrelated: Project) -> Run:
    """A collection in a project where case.json is a name like any other."""
    for folder in ("data", "Mismatch", "a/Mismatch-0123abc", "a/mismatch-0123abcd", "a/Release-unstable"):
        unrelated.write(f"tests/{folder}/case.json", "{}")
    return unrelated.pytest("--collect-only", "-q")


def test_a_case_json_of_somebody_else_is_not_collected(strangers: Run) -> None:
    assert (strangers.code, strangers.node_ids) == (0, ["tests/test_plain.py::test_plain"])


def test_a_case_json_of_somebody_else_costs_nothing(strangers: Run) -> None:
    assert loaded(strangers.out) == ["kerneltest", "kerneltest.plugin"]
