"""Samplers in a whole run: items, reports, the store of evidence, and a fixture that draws again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from user_project import Project

SUITE = (Path(__file__).parents[1] / "unit" / "tiny_samplers.py").read_text()
HUNT = ("--kernel-suite=tiny", "--kernel-device=cpu", "--kernel-sequences=0", "--kernel-misused=0")


def tiny(project: Project) -> Project:
    project.write("suites/tiny/kernels.py", SUITE)
    return project


def test_a_whole_run_reports_and_its_fixture_replays(new_project: Callable[[], Project]) -> None:
    project = tiny(new_project())
    hunted = (*HUNT, "--kernel-draws=200000", "--kernel-json=summary.json")
    run = project.pytest(*hunted, "-k", "distribution and (right or even_ids or small)")
    assert run.code == 1
    assert run.totals == "1 failed, 2 passed, 11 deselected"
    assert "WrongDistribution in tiny.even_ids" in run.out
    assert "green     tiny.right distribution: 3 configs, 0 unsupported, 6" in run.out
    assert "red       tiny.even_ids distribution: 1 configs" in run.out
    store = project.root / ".kerneltest" / "evidence"
    assert len(list(store.glob("*/*.json"))) == 5
    kernels = {one["name"]: one for one in json.loads((project.root / "summary.json").read_text())["kernels"]}
    told = kernels["tiny.right"]["distribution"]
    assert (told["limit"], len(told["configs"])) == (9.0, 3)
    assert told["draws"] == told["drawn"] > 600_000
    assert 0.005 < told["detectable"] < 0.05
    assert kernels["tiny.right"]["hunt"] == "distribution"
    assert 'id="distributions"' in (project.root / "reports" / "kerneltest.html").read_text()

    (fixture,) = (project.root / "fixtures").glob("*/WrongDistribution-*/case.json")
    assert json.loads(fixture.read_text())["draws"] > 0
    replayed = project.pytest(str(fixture))
    assert replayed.totals == "1 failed"
    assert "WrongDistribution in tiny.even_ids" in replayed.out
    project.write("suites/tiny/kernels.py", SUITE.replace("1.05", "1"))
    assert project.pytest(str(fixture)).totals == "1 passed"

    (path,) = (store / "tiny.small").glob("*.json")
    path.write_text("{}")
    broken = project.pytest(*hunted, "-k", "small-distribution")
    assert f"{path}: no evidence that this release can read" in broken.out
    assert "Traceback" not in broken.out


def test_options(new_project: Callable[[], Project]) -> None:
    project = tiny(new_project())
    listed, none, negative = project.pytest_each(
        [*HUNT, "--collect-only", "-q"],
        [*HUNT, "--collect-only", "-q", "--kernel-draws=0"],
        [*HUNT, "--kernel-draws=-1"],
    )
    assert sum(node.endswith("-distribution") for node in listed.node_ids) == 7
    assert len(none.node_ids) == 7
    assert not any("distribution" in node for node in none.node_ids)
    assert negative.code == 4
    assert "--kernel-draws: expected 0 or more, got -1" in negative.err
