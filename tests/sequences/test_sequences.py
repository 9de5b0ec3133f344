"""Every bug that only company shows is found and reduced to the step that it takes; every healthy twin is green."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
NEEDS_CUDA = {"graph", "stream", "beside", "load", "few_sms", "late_inputs"}
ON_CPU = {"poison", "neighbour", "torch", "again", "reuse", "page_table", "empty_cache", "far_pages", "repeat"}
# Without other kernels, of which some are lethal and each would be tried before each.
STEPS = ",".join(sorted(ON_CPU - {"neighbour"}))
PROCESS = "something that ran in this process before"

# kernel: (kind of failure, culprit, kinds of the steps that it takes)
PLANTED: dict[str, tuple[str, str | None, list[str]]] = {
    "counter": ("StaleState", "workspace", ["again"]),
    "accumulator": ("StaleState", "workspace", []),
    "unwritten": ("StaleState", "outputs", ["poison"]),
    "memory": ("StaleState", "workspace", ["reuse"]),
    "table": ("StaleState", "workspace", ["page_table"]),
    "shape": ("StaleState", PROCESS, []),
    "outlives": ("StaleState", "something that outlives the launches", ["again"]),
    "one_plan": ("Mismatch", None, ["again"]),
    "stray": ("OutOfBounds", None, ["again"]),
    "repeat": ("Nondeterministic", None, ["repeat"]),
    "replan": ("Mismatch", None, ["again"]),
    "far_offset": ("OutOfBounds", "offsets of pages beyond 32 bits", ["far_pages"]),
    "write_behind": ("OutOfBounds", "red zone after out", []),
    "read_behind": ("OutOfBounds", "guard page after q", []),
}
RUNS = {
    "planted": [
        "-k",
        "in-company and not twin and not cuda and not far_offset and not behind",
        f"--kernel-steps={STEPS}",
    ],
    # Each try may cost a worker.
    "lethal": [
        "-k",
        "in-company and not twin and (far_offset or behind)",
        "--kernel-steps=far_pages",
        "--kernel-sequences=4",
    ],
    "twins": ["-k", "in-company and twin and not cuda", f"--kernel-steps={STEPS}", "--kernel-sequences=12"],
}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "-p", "no:cacheprovider", "-q"]
    options = [
        "--kernel-device=cpu",
        "--kernel-profile=quick",
        "--kernel-sequences=60",
        "--kernel-seed=11",
        f"--kernel-json={folder / 'summary.json'}",
        f"--kernel-report={folder / 'report.html'}",
        f"--kernel-fixtures={folder / 'fixtures'}",
    ]
    # Small tensors: threads would wait for each other most of the time.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "300", "NO_COLOR": "1"}
    return subprocess.run(
        [*command, *options, *arguments], capture_output=True, text=True, cwd=HERE, env=environment, check=False
    )


def summary(folder: Path, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    path = folder / "summary.json"
    assert path.is_file(), done.stdout + done.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("company")


@pytest.fixture(scope="session")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The summary of each run, two of them at a time."""

    def hunt(name: str) -> dict[str, Any]:
        (own := folder / name).mkdir()
        return summary(own, run(own, "--kernel-suite=planted", *RUNS[name]))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(hunt, RUNS), strict=True))


@pytest.fixture(scope="session")
def failures(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = [*runs["planted"]["failures"], *runs["lethal"]["failures"]]
    return {failure["kernel"]: failure for failure in found}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_found_and_reduced(failures: dict[str, Any], name: str) -> None:
    kind, culprit, steps = PLANTED[name]
    failure = failures[f"{name}[planted]"]
    assert (failure["kind"], failure["culprit"]) == (kind, culprit)
    assert [step["kind"] for step in failure["steps"]] == steps
    assert [step["without"] for step in failure["steps"]] == ["correct"] * len(steps)
    assert len(failure["case"]["axes"]["requests"]) == 1


def test_a_plan_that_keeps_what_it_was_made_with_is_said_to_be_planned_anew(failures: dict[str, Any]) -> None:
    (step,) = failures["replan[planted]"]["steps"]
    assert step["text"].startswith("planned anew")


def test_a_dirty_counter_takes_the_same_workspace(failures: dict[str, Any]) -> None:
    (step,) = failures["counter[planted]"]["steps"]
    assert "on the same workspace" in step["text"]


def test_twins_are_green(runs: dict[str, dict[str, Any]]) -> None:
    assert {kernel["name"]: kernel["verdict"] for kernel in runs["twins"]["kernels"]} == {
        f"{name}[twin]": "green" for name in PLANTED
    }


def test_a_twin_is_played_with_every_step_that_needs_no_gpu(tmp_path: Path) -> None:
    done = run(tmp_path, "--kernel-suite=planted", "-k", "in-company and replan and twin", "--kernel-sequences=25")
    report = summary(tmp_path, done)
    (kernel,) = report["kernels"]
    assert (kernel["verdict"], kernel["hunt"]) == ("green", "sequences")
    assert {kind for pair in kernel["kinds"] for kind in pair.split(" > ")} == {*ON_CPU, "begin", "launch"}
    assert any(not name.startswith("torch.") for name in kernel["before"])
    unchecked = {item["what"]: item["why"] for item in report["unchecked"]}
    for kind in NEEDS_CUDA:
        assert unchecked[f"step {kind}"] == "a CPU has neither streams nor graphs"


def fixture_of(folder: Path, name: str) -> Path:
    (path,) = (folder / "planted" / "fixtures" / f"{name}-planted").rglob("case.json")
    return path


def test_a_fixture_replays_red(runs: dict[str, dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    done = run(tmp_path, str(fixture_of(folder, "memory")))
    report = summary(tmp_path, done)
    (failure,) = report["failures"]
    assert (failure["kernel"], failure["kind"]) == ("memory[planted]", "StaleState")
    assert [step["kind"] for step in failure["steps"]] == ["reuse"]
    assert (
        "StaleState in memory[planted] after the same kernel on other data in the same buffers: workspace"
        in done.stdout
    )


def test_a_fixture_of_another_release_says_which_step_and_what_is_known(
    runs: dict[str, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    data = json.loads(fixture_of(folder, "memory").read_text())
    data["sequence"]["steps"][0]["step"] = "reincarnate"
    path = tmp_path / "StaleState-00000000" / "case.json"
    path.parent.mkdir()
    path.write_text(json.dumps(data))
    done = run(tmp_path, str(path))
    assert done.returncode == 1
    assert (
        "sequence.steps[0]: unknown step 'reincarnate'; this release knows poison, neighbour, torch, again"
        in done.stdout
    )
