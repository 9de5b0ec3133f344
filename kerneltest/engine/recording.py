"""What is kept of a hunt: from its trail, and what it caught, to records."""

from __future__ import annotations

from kerneltest.engine.distribution import DistributionTrail
from kerneltest.engine.hunt import Caught, Trail
from kerneltest.engine.misuse import MisuseTrail
from kerneltest.engine.text import steps
from kerneltest.model import (
    Conclusion,
    Failure,
    FailureRecord,
    Kernel,
    KernelRecord,
    Started,
    StepRecord,
    Unchecked,
    encode,
)
from kerneltest.model.record import Hunted


def kernel_record(
    suite: str,
    kernel: Kernel,
    started: Started,
    hunt: Hunted,
    trail: Trail | None,
    failures: tuple[FailureRecord, ...],
    unchecked: tuple[Unchecked, ...],
) -> KernelRecord:
    """All of one hunt; ``trail``: None if there was none, as ``unchecked`` then says."""
    return KernelRecord(
        name=kernel.name,
        suite=suite,
        verdict=Conclusion.RED if failures else Conclusion.GREEN if trail and trail.cases else Conclusion.UNCHECKED,
        seconds=trail.seconds if trail else 0.0,
        cases=trail.cases if trail else (),
        unsupported=trail.unsupported if trail else {},
        launches=trail.launches if trail else 0,
        slack=trail.slack if trail else 1.0,
        failures=failures,
        unchecked=(*(trail.unchecked if trail else ()), *unchecked),
        device=started.device,
        libraries=started.libraries,
        coverage=started.coverage,
        hunt=hunt,
        before=trail.before if trail else {},
        kinds=trail.kinds if trail else {},
        repeated=trail.repeated if trail else (0, 0),
        misuses=trail.tally if isinstance(trail, MisuseTrail) else None,
        distributions=trail.distributions if isinstance(trail, DistributionTrail) else (),
    )


def failure_record(
    failure: Failure, caught: Caught | None = None, fixture: str | None = None, command: str = ""
) -> FailureRecord:
    """A failure for the reports, with the case that shows it, if there is one."""
    return FailureRecord(
        kernel=failure.finding.kernel,
        kind=failure.finding.kind,
        culprit=failure.finding.culprit,
        what=failure.finding.what,
        text=str(failure),
        case=encode(caught.case) if caught else None,
        case_text=str(caught.case) if caught else "",
        fixture=fixture,
        seconds_to_find=caught.seconds_to_find if caught else 0.0,
        seconds_to_shrink=caught.seconds_to_shrink if caught else 0.0,
        replay=command,
        steps=_steps(caught) if caught else (),
        misuse=encode(caught.misuse) if caught and caught.misuse else None,
    )


def _steps(caught: Caught) -> tuple[StepRecord, ...]:
    """The steps of a failing sequence, each with what comes of it without that step, where that was asked."""
    if caught.sequence is None:
        return ()
    kinds = [step.kind for step in caught.sequence.steps]
    without = caught.without or [""] * len(kinds)
    return tuple(
        StepRecord(kind=kind, text=text, without=less)
        for kind, text, less in zip(kinds, steps(caught), without, strict=True)
    )
