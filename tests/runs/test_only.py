"""Hunts of cases with chosen values alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from user_project import HUNT

if TYPE_CHECKING:
    from user_project import Project, Run

KERNELS = """
good = kernel("mine.good", a.healthy)
refusing = kernel("mine.refusing", a.healthy, unsupported=lambda case, device: "it has no pages of four")
"""
VALUES = {"those there are": "page_size=4,dtype=float32", "none": "page_size=5", "others": "page_size!=4"}


@pytest.fixture(scope="module")
def runs(new_project: Callable[[], Project]) -> dict[str, Run]:
    project = new_project()
    project.suite("mine", mine=KERNELS)
    commands = [["-rs", "--kernel-suite=mine", f"--kernel-only={values}", *HUNT] for values in VALUES.values()]
    return dict(zip(VALUES, project.pytest_at_once(*commands), strict=True))


def test_a_kernel_that_refuses_all_of_them_is_skipped_with_its_reason(runs: dict[str, Run]) -> None:
    run = runs["those there are"]
    assert (run.code, run.totals) == (0, "1 passed, 1 skipped")
    assert "it supports none of the cases that --kernel-only leaves: it has no pages of four" in run.out


def test_a_value_is_left_out(runs: dict[str, Run]) -> None:
    run = runs["others"]
    assert (run.code, run.totals) == (1, "2 failed")
    assert run.out.count("NothingChecked in mine.") == 2


def test_values_that_no_case_has_leave_nothing_green(runs: dict[str, Run]) -> None:
    run = runs["none"]
    assert (run.code, run.totals) == (1, "2 failed")
    assert run.out.count("NothingChecked in mine.") == 2
