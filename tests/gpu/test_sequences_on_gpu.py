"""Launch sequences on a real device: planted bugs that need company are found, and reduced to what they need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1] / "sequences"
# kernel: the kinds of failure it may have, the culprits, and the kinds of steps that a minimal sequence may need.
PLANTED: dict[str, tuple[set[str], set[str | None], set[str]]] = {
    "z1": ({"StaleState"}, {"shared memory"}, {"poison", "neighbour", "torch", "again", "reuse", "beside", "graph"}),
    "z3": ({"StaleState", "Nondeterministic"}, {"shared memory", None}, {"poison", "again", "reuse", "beside", "load"}),
    "z5": ({"Mismatch", "Nondeterministic"}, {None}, {"late_inputs"}),
    "z7": ({"StaleState"}, {"workspace"}, {"again", "graph", "reuse", "page_table"}),
    "z9": ({"OutOfBounds", "Mismatch"}, {"offsets of pages beyond 32 bits", None}, {"far_pages"}),
    "z10": ({"OutOfBounds"}, {"guard page after kv_indices"}, set()),
    "z11": ({"StaleState"}, {"workspace"}, {"poison", "again", "reuse", "page_table", "graph", "beside"}),
    "common": ({"StaleState", "Nondeterministic"}, {None, "something that outlives the launches"}, {"beside"}),
}


def hunt(folder: Path, *arguments: str) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "pytest", "-p", "kerneltest.plugin", "-p", "no:cacheprovider", "-q"),
        *("-c", str(ROOT / "pytest.ini"), "--kernel-suite=planted", "--kernel-device=cuda", "--kernel-seed=5"),
        *(f"--kernel-json={folder / 's.json'}", f"--kernel-report={folder / 'r.html'}", f"--kernel-fixtures={folder}"),
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (folder / "s.json").is_file(), done.stdout + done.stderr
    (folder / "log").write_text(done.stdout)
    return json.loads((folder / "s.json").read_text())


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = hunt(tmp_path_factory.mktemp("planted"), "-k", "in-company and not twin")
    return {failure["kernel"].partition("[")[0]: failure for failure in run["failures"]}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_found_and_reduced_to_what_it_needs(planted: dict[str, Any], name: str) -> None:
    kinds, culprits, steps = PLANTED[name]
    failure = planted[name]
    assert failure["kind"] in kinds
    assert failure["culprit"] in culprits
    assert len(failure["steps"]) <= 2
    assert {step["kind"] for step in failure["steps"]} <= steps
    assert all(step["without"] == "correct" for step in failure["steps"])


def test_twins_are_green_in_company(tmp_path: Path) -> None:
    run = hunt(tmp_path, "-k", "in-company and twin", "--kernel-profile=quick")
    verdicts = {kernel["name"]: kernel["verdict"] for kernel in run["kernels"]}
    assert [verdicts[f"{name}[twin]"] for name in PLANTED] == ["green"] * len(PLANTED)
