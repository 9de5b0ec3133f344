"""What is kept of a run: frozen, JSON-able, read by every report and written by none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from statistics import fmean
from typing import Any, Literal

from kerneltest.model.messages import Device, Status
from kerneltest.model.misuse import MisuseTally
from kerneltest.model.poison import Coverage

# What a hunt is of, and what that adds to the kernel's name.
Hunted = Literal["cases", "sequences", "misuse", "distribution"]
TITLES: dict[Hunted, str] = {
    "cases": "",
    "sequences": " in company",
    "misuse": " on bad input",
    "distribution": " distribution",
}


class Conclusion(Enum):
    """GREEN: every case passed. RED: a failure. UNCHECKED: it could not run here, and says why."""

    GREEN = "green"
    RED = "red"
    UNCHECKED = "unchecked"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseRecord:
    """One executed case. ``text`` is its one-line form, ``inputs`` its input strategy.

    ``used``: the share of the error budget per output; ``energy``: of its errors, see :class:`Outcome`.
    """

    id: str
    text: str
    inputs: str
    status: Status
    seconds: float
    used: Mapping[str, float] = field(default_factory=dict)
    energy: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A step that a failure needs: its kind and its words, and what comes of the sequence without it."""

    kind: str
    text: str
    without: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureRecord:
    """A failure after shrinking. ``case`` is the minimal case as JSON, ``text`` the full failure text.

    ``steps``: what has to happen around the case, in a failure of a launch sequence. ``misuse``: what is wrong with the
    call, as JSON, in a failure on bad input.

    ``seconds_to_find`` runs from the kernel's first case to its first failing one, ``seconds_to_shrink`` from there.
    """

    kernel: str
    kind: str
    culprit: str | None
    what: str
    text: str
    case: Any
    case_text: str
    fixture: str | None
    seconds_to_find: float
    seconds_to_shrink: float
    replay: str
    steps: tuple[StepRecord, ...] = ()
    misuse: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributionRecord:
    """What one configuration of a sampler has drawn. ``config``: the case's id, ``text`` its one-line form.

    ``drawn`` in this run and ``draws`` in all runs together. ``log10_e``: the highest that E of the e-process ever was,
    as a power of ten, None after a draw of probability 0; from ``limit`` on the distribution is rejected.
    ``detectable``: the smallest total variation distance that all the draws would have shown.
    """

    config: str
    text: str
    drawn: int
    draws: int
    log10_e: float | None
    limit: float
    detectable: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Unchecked:
    """Something that was not checked, and why."""

    what: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRecord:
    """All of one kernel's hunt. ``unsupported`` counts the refused cases by reason.

    ``slack``: what the kernel's declared numerics multiply its error budget by. ``hunt``: of single cases, or of launch
    sequences, which are then what ``cases`` holds. For those, ``before`` counts how often each other launch (a kernel's
    name, or ``torch.`` and an operation) was the last one before the kernel, ``kinds`` the pairs of step kinds side by
    side ("poison > launch"), ``repeated`` the launches compared with the first of their kind, and those that differed.
    In a hunt of bad input ``cases`` holds the calls with something wrong, and ``misuses`` says what became of them.
    In one of distributions they are the configurations drawn from, and ``distributions`` has their figures.
    ``kept``: when it ended, in UTC in ISO 8601, if that was in an earlier part of a run that was continued; else "".
    """

    name: str
    suite: str
    verdict: Conclusion
    seconds: float
    hunt: Hunted = "cases"
    cases: tuple[CaseRecord, ...] = ()
    unsupported: Mapping[str, int] = field(default_factory=dict)
    launches: int = 0
    slack: float = 1.0
    failures: tuple[FailureRecord, ...] = ()
    unchecked: tuple[Unchecked, ...] = ()
    device: Device | None = None
    libraries: Mapping[str, str] = field(default_factory=dict)
    coverage: tuple[Coverage, ...] = ()
    before: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    repeated: tuple[int, int] = (0, 0)
    misuses: MisuseTally | None = None
    distributions: tuple[DistributionRecord, ...] = ()
    kept: str = ""

    @property
    def title(self) -> str:
        """The kernel's name, and what was hunted if that is not single cases."""
        return self.name + TITLES[self.hunt]

    @property
    def log10_e(self) -> float:
        """The highest E over all configurations drawn from, as a power of ten; infinite after an impossible draw."""
        return max((math.inf if one.log10_e is None else one.log10_e for one in self.distributions), default=0.0)

    @property
    def detectable(self) -> float | None:
        """The smallest total variation distance that would have shown in every configuration drawn from."""
        return max((one.detectable for one in self.distributions), default=None)

    @property
    def used(self) -> dict[str, float]:
        """The largest share of the error budget that any passed case used, per output."""
        most: dict[str, float] = {}
        for case in self.cases:
            for output, share in case.used.items():
                most[output] = max(share, most.get(output, 0.0))
        return most

    @property
    def inputs(self) -> dict[str, int]:
        """How many cases ran with each input strategy."""
        return dict(Counter(case.inputs for case in self.cases))

    @property
    def energy(self) -> dict[str, dict[str, float]]:
        """The mean energy of the errors per output and input strategy: the fingerprint of the kernel's arithmetic."""
        found: dict[str, dict[str, list[float]]] = {}
        for case in self.cases:
            for output, energy in case.energy.items():
                found.setdefault(output, {}).setdefault(case.inputs, []).append(energy)
        return {
            output: {inputs: fmean(values) for inputs, values in sorted(by_inputs.items())}
            for output, by_inputs in found.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A whole run, as the reports get it. ``began`` is UTC in ISO 8601, ``command`` the command line of the run."""

    began: str
    seconds: float
    command: str
    version: str
    profile: str
    seed: int | None
    kernels: tuple[KernelRecord, ...]
    unchecked: tuple[Unchecked, ...]

    @property
    def everything_unchecked(self) -> tuple[Unchecked, ...]:
        """What was not checked: of the run, of its kernels, and the places whose poison could not be proven."""
        found = [*self.unchecked, *(item for kernel in self.kernels for item in kernel.unchecked)]
        for place in self.coverage:
            if place.share is None:
                found.append(Unchecked(what=f"poison in {place.place.value}", why=place.note))
            elif place.share < 1:
                why = f"read-back found {place.percent} of it"
                found.append(Unchecked(what=f"poison in {place.place.value}", why=why))
        return tuple(dict.fromkeys(found))

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """Poison coverage over all workers; two workers that differ are both listed."""
        return tuple(dict.fromkeys(place for kernel in self.kernels for place in kernel.coverage))

    @property
    def device(self) -> Device | None:
        return next((kernel.device for kernel in self.kernels if kernel.device), None)

    @property
    def libraries(self) -> dict[str, str]:
        return {name: version for kernel in self.kernels for name, version in kernel.libraries.items()}
