"""The hunt on a real device: on-chip poison names its culprit, a lost context and a spinning kernel are survived."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kerneltest import discovery
from kerneltest.engine.job import Job
from kerneltest.engine.pool import WorkerPool
from kerneltest.model import Case, Start, Status

pytestmark = pytest.mark.gpu
ZOO = Path(__file__).parents[1] / "zoo"
FILE = ZOO / "suites" / "zoo" / "kernels_cuda.py"


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("zoo")
    arguments = [
        *(sys.executable, "-m", "pytest", "-p", "kerneltest.plugin", "-p", "no:cacheprovider"),
        *("-c", str(ZOO / "pytest.ini"), "-k", "cuda and not hung", "-q"),
        *(
            "--kernel-suite=zoo",
            "--kernel-sequences=0",
            "--kernel-misused=0",
            "--kernel-device=cuda",
            "--kernel-seed=7",
        ),
        *(f"--kernel-json={folder / 's.json'}", f"--kernel-report={folder / 'r.html'}", f"--kernel-fixtures={folder}"),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ZOO, check=False)
    assert (folder / "s.json").is_file(), done.stdout + done.stderr
    return json.loads((folder / "s.json").read_text())


def failure(summary: dict[str, Any], kernel: str) -> dict[str, Any]:
    (found,) = (f for f in summary["failures"] if f["kernel"] == kernel)
    return found


def test_all_of_shared_memory_is_proven(summary: dict[str, Any]) -> None:
    shares = {place["place"]: place["share"] for place in summary["coverage"]}
    assert shares["shared memory"] == 1.0
    assert shares["allocator pool"] == 1.0


def test_stale_shared_memory_is_found_with_its_culprit(summary: dict[str, Any]) -> None:
    found = failure(summary, "zoo.z1_cuda[planted]")
    assert (found["kind"], found["culprit"]) == ("StaleState", "shared memory")
    assert found["case"]["axes"]["requests"] == [{"qo_len": 1, "kv_len": 1}]


def test_lost_context_is_a_crash_and_is_shrunk(summary: dict[str, Any]) -> None:
    found = failure(summary, "zoo.z13_cuda[planted]")
    assert found["kind"] == "Crashed"
    assert found["case"]["axes"]["requests"] == [{"qo_len": 1, "kv_len": 65}]


def test_the_run_goes_on_and_the_twin_is_green(summary: dict[str, Any]) -> None:
    assert {k["name"]: k["verdict"] for k in summary["kernels"]}["zoo.torch_cuda[twin]"] == "green"


def test_spinning_kernel_is_killed_and_the_device_is_free_again() -> None:
    roots = [ZOO / "suites", discovery.builtin_root()]
    discovery.use_roots(roots)
    kernel = discovery.load_kernels(FILE)["zoo.hung_cuda[planted]"]
    pool = WorkerPool(Start(device="cuda", suite_roots=tuple(map(str, roots)), libraries=()), {})

    def run(kv_len: int) -> Any:
        axes = kernel.operator.axes
        request = {"qo_len": 1, "kv_len": kv_len}
        shape = {"dtype": "bfloat16", "head_dim": 64, "kv_heads": 1, "group": 1, "page_size": 16}
        layout = {"causal": False, "shuffled": False, "spare_pages": 0}
        data = {
            "operator": "paged_prefill",
            "axes": {"requests": [request], **shape, **layout},
            "inputs": "generic",
            "seed": 0,
        }
        return pool.run(Job(kernel=kernel, source=FILE, case=Case.from_json(data, axes)), deadline=5.0, cold=120.0)

    try:
        assert run(1).status is Status.PASSED
        hung = run(65)
        assert hung.finding is not None
        assert hung.finding.kind == "Hung"
        assert run(2).status is Status.PASSED
    finally:
        pool.close()
