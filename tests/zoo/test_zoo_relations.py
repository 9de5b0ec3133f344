"""Every relation goes red on a bug that nothing else can see, under its own name, and stays green beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_zoo import hunt

RELATIONS = (
    "page_permutation",
    "value_sign",
    "value_scale",
    "score_scale",
    "head_permutation",
    "batch_order",
    "batch_size",
    "repeat",
    "split",
    "decode",
    "as_mask",
    "key_permutation",
    "duplicate_keys",
)


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return hunt(tmp_path_factory.mktemp("relations"), "-k", "broken or sound", "--kernel-profile=quick")


@pytest.mark.parametrize("relation", RELATIONS)
def test_broken_relation_is_found_and_named(summary: dict[str, Any], relation: str) -> None:
    (failure,) = (failure for failure in summary["failures"] if failure["kernel"] == f"zoo.{relation}[broken]")
    assert failure["kind"] == "RelationBroken"
    assert failure["case"]["relation"] == relation
    assert "not what the same kernel answers with" in failure["what"]


@pytest.mark.parametrize("relation", RELATIONS)
def test_sound_kernel_is_green(summary: dict[str, Any], relation: str) -> None:
    (kernel,) = (kernel for kernel in summary["kernels"] if kernel["name"] == f"zoo.{relation}[sound]")
    assert kernel["verdict"] == "green"
    assert kernel["cases"] >= 10


def test_its_fixture_replays_it(tmp_path: Path) -> None:
    (first,) = hunt(tmp_path, "-k", "broken and split", "--kernel-profile=quick")["failures"]
    path = next((tmp_path / "fixtures").rglob("case.json"))
    (again,) = hunt(tmp_path, str(path), "-k", "replay")["failures"]
    assert (again["kind"], again["case"]) == ("RelationBroken", first["case"])
