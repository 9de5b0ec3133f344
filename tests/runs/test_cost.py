"""What the plugin costs a project that does not use it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from user_project import Project

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
    project.write("tests/test_plain.py", "def test_plain(): pass\n")
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


def test_a_case_json_of_somebody_else_is_left_alone(unrelated: Project) -> None:
    for folder in ("data", "Mismatch", "a/Mismatch-0123abc", "a/mismatch-0123abcd", "a/Release-unstable"):
        unrelated.write(f"tests/{folder}/case.json", "{}")
    run = unrelated.pytest("--collect-only", "-q")
    assert run.code == 0
    assert run.node_ids == ["tests/test_plain.py::test_plain"]
    assert loaded(run.out) == ["kerneltest", "kerneltest.plugin"]
