"""Which cases play in sequences: those of few specialisations, and of one that has some."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from attention_cases import paged
from hypothesis import strategies as st

from kerneltest.engine.casting import Cast, Neighbours, assemble
from kerneltest.engine.hunt import Target
from kerneltest.engine.profile import PROFILES, Chosen
from kerneltest.model import Case, Device, Kernel, Outcome, Started, Status

CPU = Device(kind="cpu", ordinal=0, name="", sm=(0, 0), units=1)
PROFILE = replace(PROFILES["quick"], victims=12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One axis to draw, and one that is compiled for."""

    rows: int
    dtype: str


class Nobody:
    """A runner that is asked for nothing but what it is."""

    started = Started(device=CPU)


def cast(weights: dict[str, int], refused: str = "", **profile: Any) -> Cast:
    """The cast of a kernel whose dtypes are drawn that often, and which refuses one of them; it has one neighbour."""

    def cases(size: Any) -> st.SearchStrategy[Case[Any]]:
        dtypes = st.sampled_from([dtype for dtype, weight in weights.items() for _ in range(weight)])
        drawn = st.builds(Rows, rows=st.integers(1, 999), dtype=dtypes)
        return drawn.map(lambda axes: Case(operator="norm", axes=axes, inputs="generic", seed=0))

    def kernel(name: str) -> Target:
        operator = replace(paged.paged_prefill, name="norm", axes=Rows, cases=cases)
        launch = Kernel(
            name=name, operator=operator, launch=lambda call: {}, specialisation=lambda case: case.axes.dtype
        )
        return Target(kernel=launch, source=Path(f"{name}.py"))

    def alone(runner: Any, target: Target, case: Case[Any]) -> Outcome:
        if case.axes.dtype == refused:
            return Outcome(status=Status.UNSUPPORTED, reason="refused")
        return Outcome(status=Status.PASSED, launches=1, digest=str(case.axes))

    neighbours = Neighbours(targets={"other": kernel("other")}, seed=1)
    kinds, runner = ("neighbour",), Nobody()
    return assemble(
        alone,
        kernel("own"),
        neighbours,
        runner,
        None,
        replace(PROFILE, **profile),
        kinds,
        1,  # type: ignore[arg-type]
    )


def dtypes(cases: tuple[Case[Any], ...]) -> list[str]:
    return [case.axes.dtype for case in cases]


def test_the_first_specialisation_plays_where_it_has_enough_cases() -> None:
    found = cast({"plain": 2, "commoner": 3})
    assert dtypes(found.cases) == ["plain"] * PROFILE.victims
    assert set(dtypes(found.neighbours["other"])) == {"plain"}


def test_one_with_a_case_or_two_leaves_the_stage_to_another() -> None:
    found = cast({"plain": 1, "common": 40})
    assert dtypes(found.cases) == ["common"] * PROFILE.victims
    assert set(dtypes(found.neighbours["other"])) == {"plain"}  # for which another module would be compiled


@pytest.mark.parametrize("refused", ["plain", "commoner"])
def test_one_that_is_refused_leaves_the_stage_to_the_next(refused: str) -> None:
    found = cast({"plain": 2, "commoner": 3}, refused)
    assert set(dtypes(found.cases)) == {"plain", "commoner"} - {refused}


def test_several_share_the_places() -> None:
    found = cast({"plain": 1, "second": 1, "third": 1}, modules=2)
    assert sorted(map(dtypes(found.cases).count, set(dtypes(found.cases)))) == [6, 6]


def test_what_is_asked_for_alone_holds_for_the_kernel_and_not_for_its_neighbours() -> None:
    found = cast({"plain": 2, "commoner": 3}, only=(Chosen(axis="dtype", value="commoner"),))
    assert set(dtypes(found.cases)) == {"commoner"}
    assert set(dtypes(found.neighbours["other"])) == {"plain"}
