"""Every planted bug of a sampler, filter or selection is found and called by its right name; every twin is green."""

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

# kernel: (kind of failure, words of what was found)
PLANTED: dict[str, tuple[str, str]] = {
    "softmax[squared]": ("Mismatch", "probs"),
    "softmax[row 0]": ("Mismatch", "probs"),
    "from_probs[off by one]": ("WrongSupport", ""),
    "from_probs[lane]": ("WrongSupport", "never were"),
    "from_probs[indices]": ("WrongSupport", ""),
    "inverse[next numbers]": ("Mismatch", "random numbers"),
    "inverse[reversed]": ("Mismatch", "random numbers"),
    "from_logits[finite]": ("WrongSupport", "the filter excludes"),
    "top_p[relative]": ("WrongSupport", ""),
    "top_p[inclusive]": ("WrongSupport", "the filter excludes"),
    "top_p[row 0]": ("WrongSupport", ""),
    "top_k[off by one]": ("WrongSupport", "the filter excludes"),
    "top_k[row 0]": ("WrongSupport", ""),
    "min_p[of the sum]": ("WrongSupport", "never were"),
    "top_k_top_p[joint]": ("WrongSupport", "the filter excludes"),
    "top_k_top_p_logits[joint]": ("WrongSupport", "the filter excludes"),
    "top_p_renorm[trimmed]": ("WrongSupport", "missing"),
    "top_p_renorm[relative]": ("WrongSupport", ""),
    "top_p_renorm[lane]": ("WrongSupport", "missing"),
    "top_p_renorm[not renormalised]": ("Mismatch", "given the tokens kept"),
    "top_k_renorm[trimmed]": ("WrongSupport", "missing"),
    "top_k_renorm[row 0]": ("WrongSupport", ""),
    "mask[finite]": ("Mismatch", "neither -Inf nor"),
    "mask[off by one]": ("WrongSupport", "the filter excludes"),
    "mask[row 0]": ("WrongSupport", ""),
    "select[off by one]": ("WrongSupport", ""),
    "select[unsorted]": ("Mismatch", "descending"),
    "jitter[promised]": ("Nondeterministic", ""),
    "chain[accepted]": ("WrongSupport", "counts of accepted tokens"),
    "chain[residual]": ("WrongSupport", "exceeds the draft"),
}
TWINS = sorted({name.split("[")[0] + "[twin]" for name in PLANTED})
# What shows in one case of 20 or fewer, because a token has to come up, or to stay away, gets the cases of a usual run.
SUBTLE = ("lane", "relative", "inclusive", "joint", "of the sum", "row 0")
# Draws that repeat are in the support: only the distribution shows them.
INVISIBLE = "from_probs[seed]"
HUNTS = "not bad-input and not distribution"


def hunt(folder: Path, words: str, profile: str) -> dict[str, Any]:
    """Run some of the kernels in a pytest of its own and return its summary."""
    folder.mkdir()
    summary = folder / "summary.json"
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "-p", "no:cacheprovider", "-q"]
    options = [
        "--kernel-suite=samplers",
        "--kernel-sequences=0",
        "--kernel-device=cpu",
        f"--kernel-profile={profile}",
        "--kernel-seed=5",
        f"--kernel-json={summary}",
        f"--kernel-report={folder / 'report.html'}",
        f"--kernel-fixtures={folder / 'fixtures'}",
    ]
    # Small tensors: threads would wait for each other most of the time.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options, "-k", words], capture_output=True, text=True, cwd=HERE, env=environment, check=False
    )
    assert summary.is_file(), done.stdout + done.stderr
    return json.loads(summary.read_text())


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("samplers")
    subtle = " or ".join(f"({' and '.join(words.split())})" for words in SUBTLE)
    words = {
        "subtle": f"({subtle}) and not twin and {HUNTS}",
        "planted": f"not twin and not ({subtle}) and {HUNTS}",
        "twins": f"twin and {HUNTS}",
    }
    profiles = {"subtle": "default"}

    def run(name: str) -> dict[str, Any]:
        return hunt(folder / name, words[name], profiles.get(name, "quick"))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(words, pool.map(run, words), strict=True))


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_found(runs: dict[str, dict[str, Any]], name: str) -> None:
    kind, words = PLANTED[name]
    failures = [*runs["planted"]["failures"], *runs["subtle"]["failures"]]
    (failure,) = (failure for failure in failures if failure["kernel"] == name)
    assert (failure["kind"], words in failure["what"]) == (kind, True), failure["what"]


@pytest.mark.parametrize("name", [*TWINS, INVISIBLE])
def test_twin_is_green(runs: dict[str, dict[str, Any]], name: str) -> None:
    (kernel,) = (
        kernel
        for run in runs.values()
        for kernel in run["kernels"]
        if (kernel["name"], kernel["hunt"]) == (name, "cases")
    )
    assert kernel["verdict"] == "green", [failure["text"] for failure in kernel["failures"]]
    assert kernel["cases"] >= 15
