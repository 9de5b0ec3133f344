"""What crosses the process boundary: one JSON line each way, in these forms and no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from kerneltest.model.evidence import Evidence, Series
from kerneltest.model.failure import Finding
from kerneltest.model.misuse import Misuse
from kerneltest.model.poison import Coverage

# The exit status of a worker that was ended by an error of an operator's or of ours (EX_SOFTWARE of sysexits.h).
NOT_THE_KERNELS = 70


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device in words. ``sm`` is the compute capability, (0, 0) on a CPU; ``units`` SMs or hardware threads."""

    kind: str
    ordinal: int
    name: str
    sm: tuple[int, int]
    units: int

    @property
    def torch_name(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.ordinal}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """First message to a worker: the device (``auto``, ``cpu``, ``cuda``, ``cuda:N``), where suites lie, and the
    libraries to look for.
    """

    device: str
    suite_roots: tuple[str, ...]
    libraries: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The answer: where it runs, with which versions, and how much of each poison was proven. Or the error.

    ``missing``: the libraries that could not be imported, with the reason. ``no_steps``: the kinds of steps that cannot
    be taken on this device, and why. ``no_guards``: why there are no guard pages, None if there are. ``torch_ops``: the
    operations of torch that can be neighbours.
    """

    device: Device | None
    libraries: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    coverage: tuple[Coverage, ...] = ()
    no_steps: Mapping[str, str] = field(default_factory=dict)
    no_guards: str | None = None
    torch_ops: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Run one case: ``kernel`` lives in ``source`` (a suite file), ``case`` is its JSON form.

    ``peer``: another kernel of the operator, as source and name, which must agree with this one. ``sequence``: what
    happens around the launch, as JSON; then ``neighbours`` says where the kernels that it names live, and ``fresh``
    what the case alone gave in a fresh worker. ``alone``: only that digest is wanted, nothing is judged. ``guarded``:
    the one buffer that lies at a guard page, None for all of them. ``suspect``: the place to try first as the culprit.
    ``misuse``: what is wrong with the call. ``misuses``: only what can be is wanted, of a case that is right without.
    ``series``: launch again and again, and judge the draws together instead of the answer.
    """

    source: str
    kernel: str
    case: Any
    peer: tuple[str, str] | None = None
    sequence: Any = None
    neighbours: Mapping[str, str] = field(default_factory=dict)
    fresh: str | None = None
    alone: bool = False
    guarded: str | None = None
    suspect: str | None = None
    misuse: Misuse | None = None
    misuses: bool = False
    series: Series | None = None


class Status(Enum):
    """How a case ended."""

    PASSED = "passed"
    FAILED = "failed"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one case ended in the worker.

    ``used``: the largest share of the error budget that each output used. ``energy``: the mean of error² / expected
    error² of each output that was judged by noise. ``slack``: what the kernel's numerics multiply the budget by.
    ``wide``: outputs whose budget is much wider than plain fp32 arithmetic needs. ``unjudged``: those without one.
    ``unchecked_relation``: why the relation that the case names says nothing of this kernel. ``compared_with``: the
    peer whose outputs were held against these. ``digest``: of the bits of a launch alone, where one was asked for.
    ``repeated``: how many launches were compared with the first, and how many of them differed from it. ``buffers``:
    the names of those that lay at guard pages, or could have.
    ``misuses``: what can be wrong with the call, where that was asked. ``reaction``: how a call in which something was
    wrong ended if it did not fail: with an error, whose text is then the ``reason``, or with the right answer.
    ``evidence``: of a series of draws, with all that was counted before; ``reason`` then says why it goes no further.
    ``fatal``: this worker is of no further use: it is gone, its device context is lost, or what it says means nothing.
    """

    status: Status
    seconds: float = 0.0
    launches: int = 0
    finding: Finding | None = None
    reason: str | None = None
    used: Mapping[str, float] = field(default_factory=dict)
    energy: Mapping[str, float] = field(default_factory=dict)
    slack: float = 1.0
    wide: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()
    unchecked_relation: str | None = None
    compared_with: str | None = None
    digest: str | None = None
    repeated: tuple[int, int] | None = None
    buffers: tuple[str, ...] = ()
    misuses: tuple[Misuse, ...] = ()
    reaction: Literal["", "raised", "raised without a clear message", "right"] = ""
    evidence: Evidence | None = None
    fatal: bool = False

    @property
    def died(self) -> bool:
        """Whether the launch has ended the worker or its device context, and not merely spoilt it."""
        return self.fatal and (self.finding is None or self.finding.kind in ("Crashed", "Hung"))
