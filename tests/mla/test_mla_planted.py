"""Every planted bug of MLA is found, called by its right name, and shrunk; every healthy twin is green."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# kernel: (kinds of failure that it may be found by, axes that the minimal case must have)
PLANTED: dict[str, tuple[set[str], dict[str, Any]]] = {
    "latent_scale": ({"Mismatch"}, {"causal": False, "heads": 1}),
    "no_rope": ({"Mismatch"}, {"causal": False, "heads": 1}),
    "next_page": ({"Mismatch", "NonFinite"}, {"heads": 1}),
    "base_2": ({"Mismatch"}, {"causal": False, "heads": 1, "page_size": 1}),
    "latent_cut": ({"Mismatch"}, {"causal": False, "heads": 1, "page_size": 1}),
    "tile_edge": ({"Mismatch"}, {"causal": True, "heads": 1}),
    # Of a right causal mask only heads that do not divide a tile are wrong.
    "tile_floor": ({"Mismatch", "NonFinite"}, {"causal": True, "heads": 5}),
    "truncated": ({"Mismatch"}, {}),
    "shifted_value": ({"Mismatch"}, {"causal": False, "heads": 1, "page_size": 1}),
    "last_page": ({"NonFinite"}, {"causal": False, "heads": 1, "page_size": 16}),
    "plain_mean": ({"Mismatch"}, {"causal": False, "heads": 1}),
    "w_uk_head": ({"Mismatch"}, {"causal": False, "heads": 2}),
    "w_uv_head": ({"Mismatch"}, {"causal": False, "heads": 2}),
}


def hunt(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the planted bugs in a pytest of its own and return its summary."""
    summary = folder / "summary.json"
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "-p", "no:cacheprovider", "-q"]
    options = [
        "--kernel-suite=mla_planted",
        "--kernel-sequences=0",
        "--kernel-misused=0",
        "--kernel-device=cpu",
        "--kernel-seed=11",
        "--kernel-profile=quick",
        f"--kernel-json={summary}",
        f"--kernel-report={folder / 'report.html'}",
        f"--kernel-fixtures={folder / 'fixtures'}",
    ]
    done = subprocess.run([*command, *options, *arguments], capture_output=True, text=True, cwd=HERE, check=False)
    assert summary.is_file(), done.stdout + done.stderr
    return json.loads(summary.read_text())


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    quick = hunt(tmp_path_factory.mktemp("planted"), "-k", "planted] and not tile_floor")
    # Heads that no tile divides, and a tile's edge on their query's diagonal: rare.
    longer = hunt(tmp_path_factory.mktemp("rare"), "-k", "tile_floor", "--kernel-profile=default")
    return {failure["kernel"]: failure for failure in (*quick["failures"], *longer["failures"])}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_found_and_shrunk(planted: dict[str, Any], name: str) -> None:
    kinds, minimal = PLANTED[name]
    failure = planted[f"mla.{name}[planted]"]
    assert failure["kind"] in kinds
    axes = failure["case"]["axes"]
    assert {key: axes[key] for key in minimal} == minimal
    # What shows by chance alone needs many rows to show.
    assert len(axes["requests"]) == 1 or name == "truncated"


def test_slots_behind_the_last_key_are_named(planted: dict[str, Any]) -> None:
    assert planted["mla.last_page[planted]"]["culprit"] == "unused slots"


def test_the_tile_edge_is_shrunk_to_the_first_row_that_can_show_it(planted: dict[str, Any]) -> None:
    # Row 7 of a tile of 8 needs a key beyond its own to leak, which takes 9 queries.
    (request,) = planted["mla.tile_edge[planted]"]["case"]["axes"]["requests"]
    assert request["qo_len"] == 9


def test_a_query_in_two_tiles_is_shrunk_along_the_diagonal(planted: dict[str, Any]) -> None:
    # Of 16 rows of 5 heads each, the last belongs to query 3, the only one to see the first key of the second tile.
    (request,) = planted["mla.tile_floor[planted]"]["case"]["axes"]["requests"]
    assert request == {"qo_len": 4, "kv_len": 17}


def test_twins_are_green(tmp_path: Path) -> None:
    run = hunt(tmp_path, "-k", "twin]")
    assert {kernel["name"]: kernel["verdict"] for kernel in run["kernels"]} == {
        "mla.absorbed[twin]": "green",
        "mla.layer[twin]": "green",
    }
    assert all(kernel["cases"] >= 15 for kernel in run["kernels"])
