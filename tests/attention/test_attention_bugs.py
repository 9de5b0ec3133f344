"""Each planted bug of an attention operator is found, called by its right name and shrunk; every twin is green."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ONE_STATE = {"rows": 1, "heads": 1}
# kernel: kind of failure, output, and axes that the minimal case must have
PLANTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "empty_states": ("NonFinite", "out", {**ONE_STATE, "states": 2}),
    "plain_mean": ("Mismatch", "out", {**ONE_STATE, "states": 2}),
    "wrong_base": ("Mismatch", "out", {**ONE_STATE, "states": 2}),
    "ignored_mask": ("Mismatch", "out", {"masked": True}),
    "one_too_far": ("Mismatch", "k_cache", {"requests": [{"before": 0, "new": 1}], "page_size": 4}),
    "wrong_page": ("Mismatch", "k_cache", {"requests": [{"before": 1, "new": 4}], "page_size": 4}),
    "cleared_tail": ("Mismatch", "k_cache", {"requests": [{"before": 0, "new": 1}], "page_size": 4}),
    "swapped_tokens": ("Mismatch", "kpe_cache", {"page_size": 1, "shuffled": False}),
    "last_key": ("Mismatch", "out", {"requests": [{"qo_len": 1, "kv_len": 1}], "page_size": 1}),
    "offsets_of_queries": ("Mismatch", "out", {"causal": False, "kv_heads": 1, "group": 1}),
    "top_left": ("Mismatch", "out", {"requests": [{"qo_len": 1, "kv_len": 2}], "causal": True}),
    "interleaved_heads": ("Mismatch", "out", {"kv_heads": 2, "group": 2}),
    "next_block_row": ("Mismatch", "out", {"kv_heads": 1, "group": 1, "masked": False}),
}


def hunt(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the planted suite in a pytest of its own and return its summary."""
    summary = folder / "summary.json"
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "-p", "no:cacheprovider", "-q"]
    options = [
        "--kernel-suite=planted_attention",
        "--kernel-sequences=0",
        "--kernel-misused=0",
        "--kernel-device=cpu",
        "--kernel-profile=quick",
        "--kernel-seed=3",
        f"--kernel-json={summary}",
        f"--kernel-report={folder / 'report.html'}",
        f"--kernel-fixtures={folder / 'fixtures'}",
    ]
    done = subprocess.run([*command, *options, *arguments], capture_output=True, text=True, cwd=HERE, check=False)
    assert summary.is_file(), done.stdout + done.stderr
    return json.loads(summary.read_text())


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return hunt(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_found_and_shrunk(summary: dict[str, Any], name: str) -> None:
    kind, output, minimal = PLANTED[name]
    (failure,) = (failure for failure in summary["failures"] if failure["kernel"] == f"bugs.{name}[planted]")
    assert (failure["kind"], failure["what"].split(":")[0]) == (kind, output)
    axes = failure["case"]["axes"]
    assert {key: axes[key] for key in minimal} == minimal


@pytest.mark.parametrize("name", PLANTED)
def test_twin_is_green(summary: dict[str, Any], name: str) -> None:
    (kernel,) = (kernel for kernel in summary["kernels"] if kernel["name"] == f"bugs.{name}[twin]")
    assert kernel["verdict"] == "green"
    assert kernel["cases"] >= 15
