"""Every hole in a kernel's checks is found, called by its name and replayed; a kernel without one is green."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# kernel: (kind of failure, kind of misuse, argument)
PLANTED = {
    "reinterprets": ("BadInputAccepted", "dtype", "rows"),
    # The rows that are missing are those that indices point at.
    "overreads": ("OutOfBounds", "index out of range", "rows"),
    "loops": ("Hung", "indptr", "indptr"),
    "aborts": ("Crashed", "index out of range", "indices"),
    "remembers": ("StaleState", "dtype", "rows"),
    "forgives": ("BadInputAccepted", "nan", "scale"),
    "flattens": ("BadInputAccepted", "strides", "out"),
    "overfills": ("OutOfBounds", "workspace", "workspace"),
}
# It believes the axes as well, where they are not those of the tensor.
SEEN_AS_WELL = {"overreads": [("OutOfBounds", "parameter", "rows")]}


def run(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The summary and the output of a pytest of its own."""
    summary = folder / "summary.json"
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "-p", "no:cacheprovider", "-q"]
    options = [
        "--kernel-sequences=0",
        "--kernel-device=cpu",
        "--kernel-seed=11",
        f"--kernel-json={summary}",
        f"--kernel-report={folder / 'report.html'}",
        f"--kernel-fixtures={folder / 'fixtures'}",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "300", "NO_COLOR": "1"}
    done = subprocess.run(
        [*command, *options, *arguments], capture_output=True, text=True, cwd=HERE, env=environment, check=False
    )
    assert summary.is_file(), done.stdout + done.stderr
    return json.loads(summary.read_text()), done.stdout


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("misuse")


@pytest.fixture(scope="session")
def planted(folder: Path) -> tuple[dict[str, Any], str]:
    # Of the profile nothing counts but the time that it leaves: most findings here cost a worker.
    options = ("--kernel-profile=nightly", "--kernel-misused=1")
    return run(folder, "--kernel-suite=planted", *options, "-k", "on-bad-input and not twin")


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return run(tmp_path_factory.mktemp("twins"), "--kernel-suite=planted", "-k", "on-bad-input and twin")


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_hole_is_found_and_nothing_else(planted: tuple[dict[str, Any], str], name: str) -> None:
    found = [failure for failure in planted[0]["failures"] if failure["kernel"] == f"{name}[planted]"]
    assert [(f["kind"], f["misuse"]["kind"], f["misuse"]["argument"]) for f in found] == [
        PLANTED[name],
        *SEEN_AS_WELL.get(name, []),
    ]


def test_the_text_names_what_was_wrong_and_what_came_of_it(planted: tuple[dict[str, Any], str]) -> None:
    out = planted[1]
    assert "BadInputAccepted in reinterprets[planted] on bad input: rows is int32 instead of float32" in out
    assert "Hung in loops[planted] on bad input: indptr falls" in out
    assert "Crashed in aborts[planted] on bad input: indices begins with -1" in out
    assert "the worker process died: signal SIGABRT" in out
    assert "StaleState in remembers[planted] on bad input: after a call in which rows is float16" in out


def test_a_hunt_is_one_red_item_with_a_record_of_each_finding(planted: tuple[dict[str, Any], str]) -> None:
    summary = planted[0]
    assert {kernel["name"]: (kernel["hunt"], kernel["verdict"]) for kernel in summary["kernels"]} == {
        f"{name}[planted]": ("misuse", "red") for name in PLANTED
    }
    for failure in summary["failures"]:
        assert Path(HERE, failure["fixture"]).is_file()


def test_a_kernel_that_checks_everything_is_green(twins: tuple[dict[str, Any], str]) -> None:
    summary, out = twins
    assert {kernel["name"]: kernel["verdict"] for kernel in summary["kernels"]} == {
        "healthy[twin]": "green",
        "mumbles[twin]": "green",
        "trusts[twin]": "green",
    }
    (healthy,) = (kernel for kernel in summary["kernels"] if kernel["name"] == "healthy[twin]")
    tally = healthy["misuses"]
    # Both cases that there are.
    assert (tally["raised"], tally["right"]) > (60, 15)
    assert (tally["failed"], tally["trusted"], tally["unclear"]) == (0, 0, [])
    total = tally["raised"] + tally["right"]
    line = f"{total} misuses: {tally['raised']} raised, {tally['right']} answered rightly, 0 left to the caller"
    assert f"healthy[twin] on bad input: {line}, 0 unclear errors" in out


def test_an_error_that_says_nothing_is_listed_and_not_red(twins: tuple[dict[str, Any], str]) -> None:
    (mumbles,) = (kernel for kernel in twins[0]["kernels"] if kernel["name"] == "mumbles[twin]")
    assert "rows is int32 instead of float32: ValueError: no message" in mumbles["misuses"]["unclear"]


def test_what_a_kernel_leaves_to_its_caller_is_not_tried_and_listed(twins: tuple[dict[str, Any], str]) -> None:
    summary = twins[0]
    (trusts,) = (kernel for kernel in summary["kernels"] if kernel["name"] == "trusts[twin]")
    assert trusts["misuses"]["trusted"] > 0
    unchecked = {item["what"].partition(" (")[0]: item["why"] for item in summary["unchecked"]}
    for kind in ("index out of range", "indptr"):
        assert unchecked[f"trusts[twin]: bad input, {kind}"] == "left to the caller: values are not looked at"


@pytest.mark.parametrize("name", ["reinterprets", "overreads"])
def test_a_fixture_replays_it(planted: tuple[dict[str, Any], str], folder: Path, tmp_path: Path, name: str) -> None:
    path = next((folder / "fixtures" / f"{name}-planted").rglob("case.json"))
    summary, out = run(tmp_path, str(path))
    (failure,) = summary["failures"]
    assert (failure["kind"], failure["misuse"]["kind"], failure["misuse"]["argument"]) == PLANTED[name]
    assert f"in {name}[planted] on bad input: rows" in out


def test_a_fixture_of_another_release_says_what_is_known(
    planted: tuple[dict[str, Any], str], folder: Path, tmp_path: Path
) -> None:
    data = json.loads(next((folder / "fixtures" / "reinterprets-planted").rglob("case.json")).read_text())
    data["misuse"]["kind"] = "colour"
    path = tmp_path / "BadInputAccepted-00000000" / "case.json"
    path.parent.mkdir()
    path.write_text(json.dumps(data))
    _, out = run(tmp_path, str(path))
    assert "misuse: 'colour' is no kind of misuse; valid: dtype, device, shape" in out
