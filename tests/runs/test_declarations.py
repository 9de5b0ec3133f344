"""What a kernel declares of its arithmetic: nothing, the impossible, or too much, is a failure of that kernel alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from user_project import HUNT

if TYPE_CHECKING:
    from user_project import Project

KERNELS = """
from dataclasses import replace

from kerneltest.model import BF16, FP32, IEEE_FP32, AccModel, Kernel, Numerics

FP32_THROUGHOUT = {"qk": IEEE_FP32, "pv": IEEE_FP32, "p": FP32, "out": FP32}


def declares(**what):
    return lambda case, device: Numerics(**FP32_THROUGHOUT | what)


healthy = kernel("bad.healthy", a.healthy)
silent = Kernel(name="bad.silent", operator=healthy.operator, launch=a.healthy, devices=("cpu",))
narrow = kernel("bad.narrow", a.healthy, numerics=declares(p=BF16))
base = kernel("bad.base", a.healthy, numerics=declares(lse_base="10"))
loose = kernel("bad.loose", a.healthy, numerics=declares(qk=AccModel(8, "rz", 1), pv=AccModel(8, "rz", 1)))
slack = kernel("bad.slack", a.healthy, numerics=declares(slack=1.5))
"""


@pytest.fixture(scope="module")
def hunted(new_project: Callable[[], Project]) -> tuple[str, dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    project = new_project()
    project.suite("bad", kernels=KERNELS)
    # As many cases as it takes to say that a budget is never used.
    cheap = project.root / "suites/bad/_cheap.py"
    cheap.write_text(cheap.read_text().replace("st.integers(0, 2)", "st.integers(0, 300)"))
    run = project.pytest("--kernel-suite=bad", *HUNT[1:], "--kernel-seed=1", "--kernel-json=summary.json")
    summary = json.loads((project.root / "summary.json").read_text())
    kernels = {kernel["name"]: kernel for kernel in summary["kernels"]}
    failures = {failure["kernel"]: failure for failure in summary["failures"]}
    return run.out, kernels, failures


@pytest.mark.parametrize(
    ("kernel", "kind", "what"),
    [
        ("bad.silent", "BadNumerics", "the kernel declares no numerics"),
        ("bad.narrow", "BadNumerics", "p is bfloat16, narrower than the output's float32"),
        ("bad.base", "BadNumerics", "lse_base must be 'e', '2' or None, got '10'"),
        ("bad.loose", "VacuousBudget", "no case used more than"),
    ],
)
def test_it_is_red_and_says_why(hunted: Any, kernel: str, kind: str, what: str) -> None:
    out, _, failures = hunted
    assert failures[kernel]["kind"] == kind
    assert what in failures[kernel]["what"]
    assert f"{kind} in {kernel}" in out


def test_the_others_are_green(hunted: Any) -> None:
    _, kernels, _ = hunted
    assert {name for name, kernel in kernels.items() if kernel["verdict"] == "green"} == {"bad.healthy", "bad.slack"}


def test_slack_is_told(hunted: Any) -> None:
    out, kernels, _ = hunted
    assert (kernels["bad.slack"]["slack"], kernels["bad.healthy"]["slack"]) == (1.5, 1.0)
    assert "of a budget widened by slack 1.5" in out
