"""How much a run may cost."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kerneltest.model import Case, Device, Operator, Size

# Why a case is not run that would be smaller, but not one of those that were asked for.
NOT_WANTED = "--kernel-only leaves it out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The value that an axis has in the cases under test, or (not ``equal``) has not."""

    axis: str
    value: Any
    equal: bool = True

    def holds(self, case: Case[Any]) -> bool:
        return (getattr(case.axes, self.axis) == self.value) is self.equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Cases for each kernel, limits of a case on each kind of device, and deadlines in seconds.

    ``deadline`` is for one case; ``cold_deadline`` for the first of each specialisation, which may have to be compiled.
    ``shrink_seconds``: how long a failing case may be shrunk. ``cpu_sequences``, ``cuda_sequences``: launch sequences
    for each kernel, around ``victims`` cases of it; ``modules``: of how many specialisations its cases are there,
    since what runs before a launch matters, and each module has to be compiled; ``every_pair``: whether every launch
    has to run before every kernel, and every kind of step behind every other. ``compiles``: how many specialisations of
    a kernel may be compiled in all, the first that are drawn (None: any number). ``misused``: how many small cases of a
    kernel are called wrongly in every way there is; ``cpu_misuse_seconds``, ``cuda_misuse_seconds``: the time after
    which no other way is begun.
    ``cpu_draws``, ``cuda_draws``: of each distribution that a sampler is tried with, in ``draw_seconds`` at most.
    ``only``: what all cases under test have in common, the ones that a failure is shrunk to included.
    """

    name: str
    cases: int
    cpu: Size
    cuda: Size
    deadline: float = 20.0
    cold_deadline: float = 900.0
    shrink_seconds: float = 120.0
    cpu_sequences: int = 40
    cuda_sequences: int = 150
    victims: int = 12
    modules: int = 1
    every_pair: bool = False
    compiles: int | None = None
    misused: int = 2
    cpu_misuse_seconds: float = 15.0
    cuda_misuse_seconds: float = 60.0
    cpu_draws: int = 200_000
    cuda_draws: int = 4_000_000
    draw_seconds: float = 20.0
    only: tuple[Chosen, ...] = ()

    def concerns(self, operator: Operator) -> bool:
        """Whether the operator has the axes that ``only`` names."""
        return {chosen.axis for chosen in self.only} <= {axis.name for axis in fields(operator.axes)}

    def wants(self, case: Case[Any]) -> bool:
        """Whether a case of an operator that it concerns has the values that ``only`` names."""
        return all(chosen.holds(case) for chosen in self.only)

    def size(self, device: Device) -> Size:
        return self.cuda if device.kind == "cuda" else self.cpu

    def draws(self, device: Device) -> int:
        return self.cuda_draws if device.kind == "cuda" else self.cpu_draws

    def sequences(self, device: Device) -> int:
        return self.cuda_sequences if device.kind == "cuda" else self.cpu_sequences

    def misuse_seconds(self, device: Device) -> float:
        return self.cuda_misuse_seconds if device.kind == "cuda" else self.cpu_misuse_seconds


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="quick",
            cases=25,
            cpu=Size(batch=2, qo_len=18, kv_len=70, heads=8, rows=4, vocabulary=2100),
            cuda=Size(batch=4, qo_len=130, kv_len=300, heads=8, rows=140, vocabulary=33_000),
            shrink_seconds=30.0,
            cpu_sequences=10,
            cuda_sequences=40,
            victims=6,
            misused=1,
            cpu_misuse_seconds=10.0,
            cuda_misuse_seconds=30.0,
            cpu_draws=20_000,
            cuda_draws=1_000_000,
            draw_seconds=5.0,
        ),
        Profile(
            name="default",
            cases=200,
            cpu=Size(batch=2, qo_len=34, kv_len=140, heads=8, rows=6, vocabulary=5000),
            cuda=Size(batch=6, qo_len=300, kv_len=1100, heads=16, rows=400, vocabulary=262_144),
        ),
        Profile(
            name="nightly",
            cases=2000,
            cpu=Size(batch=4, qo_len=140, kv_len=520, heads=16, rows=20, vocabulary=140_000),
            cuda=Size(batch=16, qo_len=1100, kv_len=8300, heads=32, rows=2200, vocabulary=262_144),
            deadline=60.0,
            shrink_seconds=300.0,
            cpu_sequences=600,
            cuda_sequences=2000,
            victims=100,
            misused=8,
            cpu_misuse_seconds=300.0,
            cuda_misuse_seconds=300.0,
            cpu_draws=8_000_000,
            cuda_draws=20_000_000,
            draw_seconds=120.0,
            modules=4,
            every_pair=True,
        ),
    )
}
