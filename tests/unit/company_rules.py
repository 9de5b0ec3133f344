"""Hunts in company without a worker: a runner that answers from a rule, a kernel, and two neighbours."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attention_cases import case, paged
from hypothesis import strategies as st

from kerneltest.engine.casting import Neighbours
from kerneltest.engine.company import hunt_sequences
from kerneltest.engine.hunt import Caught, Target, Trail
from kerneltest.engine.job import Company, Job
from kerneltest.engine.profile import PROFILES
from kerneltest.model import (
    Case,
    Device,
    Finding,
    Kernel,
    LaunchContract,
    LaunchSequence,
    Outcome,
    Started,
    Status,
)
from kerneltest.model.sequence import STEPS

CPU = Device(kind="cpu", ordinal=0, name="", sm=(0, 0), units=1)
PROFILE = replace(PROFILES["quick"], cpu_sequences=60)
OPERATIONS = ("cos", "sort")
# What a rule says of a sequence: nothing, a kind of failure, "dead", "spoilt", or "unsupported: " and a reason.
Rule = Callable[[LaunchSequence], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The axes of the neighbours' operator."""

    rows: int


def rows(number: int) -> Case[Any]:
    return Case(operator="norm", axes=Rows(rows=number), inputs="generic", seed=0)


def kernel(name: str, operator: Any, **more: Any) -> Kernel:
    return Kernel(name=name, operator=operator, launch=lambda call: {}, **more)


def neighbour(name: str) -> Target:
    operator = replace(
        paged.paged_prefill,
        name="norm",
        axes=Rows,
        cases=lambda size: st.integers(4, 9).map(rows),
        simpler=lambda case: [rows(case.axes.rows - 1)] if case.axes.rows > 1 else [],
    )
    return Target(kernel=kernel(name, operator), source=Path(f"{name}.py"))


def cases(size: Any) -> st.SearchStrategy[Case[Any]]:
    """As many as it takes, drawn faster than the operator's own."""
    lengths = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=2)
    return st.builds(lambda lengths, seed: case(*lengths, seed=seed), lengths, st.integers(0, 3))


TARGET = Target(
    kernel=kernel(
        "rule", replace(paged.paged_prefill, cases=cases), contract=LaunchContract(replans=True, captured="lengths")
    ),
    source=Path("rule.py"),
)
NEIGHBOURS = {name: neighbour(name) for name in ("one", "two")}


class Runner:
    """Answers launches alone with a digest of its own, and sequences by a rule. A death costs nothing here."""

    def __init__(
        self, rule: Rule = lambda sequence: None, *, name: str = "", guards: bool = False, guilty: str = ""
    ) -> None:
        self.rule, self.name, self.guilty = rule, name, guilty
        self.alone: list[tuple[str, Case[Any]]] = []
        self.played: list[Company] = []
        self.guarded: list[str] = []
        self.lethal: Callable[[str], bool] = lambda name: False
        self.by_itself: list[LaunchSequence] = []
        self.ends_with: Callable[[LaunchSequence], bool] = lambda sequence: False
        self.spoils: Callable[[LaunchSequence], bool] = lambda sequence: False
        self.started = Started(
            device=CPU, torch_ops=OPERATIONS, no_guards=None if guards else "by rule", no_steps={"load": "by rule"}
        )

    def run(self, job: Job, *, deadline: float, cold: float) -> Outcome:
        kernel, case, company, guarded = job.kernel, job.case, job.company, job.guarded
        assert company is not None
        assert company.sequence.case == case
        if company.alone:
            self.alone.append((kernel.name, case))
            if self.lethal(kernel.name):
                return dead(kernel)
            return Outcome(status=Status.PASSED, launches=1, digest=f"{self.name} {case.id}")
        if kernel.name != TARGET.kernel.name:  # what its data do to a neighbour, after itself
            assert [(step.kernel, step.case) for step in company.sequence.neighbours] == [(kernel.name, case)]
            self.by_itself.append(company.sequence)
            if self.ends_with(company.sequence):
                return dead(kernel)
            return spoilt(kernel) if self.spoils(company.sequence) else Outcome(status=Status.PASSED, launches=3)
        assert {step.kernel for step in company.sequence.neighbours} == set(company.neighbours)
        self.played.append(company)
        self.guarded += [guarded] if guarded else []
        said = self.rule(company.sequence)
        if said == "dead" and guarded not in (None, self.guilty):
            said = None
        if said == "dead":
            return dead(kernel)
        if said == "spoilt":
            return spoilt(kernel)
        if said and said.startswith("unsupported: "):
            reason, fatal, _ = said.removeprefix("unsupported: ").partition(", fatal")
            return Outcome(status=Status.UNSUPPORTED, reason=reason, fatal=bool(fatal))
        if said:
            finding = Finding(kind=said, kernel=kernel.name, key="", what="by rule")
            return Outcome(status=Status.FAILED, launches=3, finding=finding)
        return Outcome(status=Status.PASSED, launches=3, buffers=("k_pages", "q", "out"))

    def close(self) -> None: ...

    @property
    def sequences(self) -> list[LaunchSequence]:
        return [company.sequence for company in self.played]


def dead(kernel: Kernel) -> Outcome:
    finding = Finding(kind="Crashed", kernel=kernel.name, key="signal SIGSEGV", what="the worker process died")
    return Outcome(status=Status.FAILED, finding=finding, fatal=True)


def spoilt(kernel: Kernel) -> Outcome:
    finding = Finding(kind="StaleState", kernel=kernel.name, key="process, afterwards", what="not what it was before")
    return Outcome(status=Status.FAILED, launches=3, finding=finding, fatal=True)


def has(sequence: LaunchSequence, step: type[Any], **fields: Any) -> bool:
    return any(
        isinstance(one, step) and all(getattr(one, name) == value for name, value in fields.items())
        for one in sequence.steps
    )


def hunted(
    runner: Runner,
    seed: int = 1,
    profile: Any = PROFILE,
    kinds: Collection[str] = tuple(STEPS),
    quiet: Rule | None = None,
) -> Trail:
    """``quiet``: what is said of launches alone where no sequence ever ran; the same if it is not given."""
    other = Runner(quiet or runner.rule, name="quiet", guards=runner.started.no_guards is None)
    return hunt_sequences(TARGET, Neighbours(targets=NEIGHBOURS, seed=1), runner, other, profile, seed, kinds)


def caught(runner: Runner, seed: int = 1, kinds: Collection[str] = tuple(STEPS)) -> tuple[Caught, LaunchSequence]:
    found = hunted(runner, seed, kinds=kinds).caught
    assert found is not None
    assert found.sequence is not None
    assert found.sequence.case == found.case
    assert found.complete
    return found, found.sequence


def unchecked(trail: Trail) -> dict[str, str]:
    # That one kind cannot be taken on the device is part of the runner, and not what is tested.
    told = {item.what: item.why for item in trail.unchecked}
    assert told.pop("step load") == "by rule"
    return told
