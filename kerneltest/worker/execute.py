"""Run one case and say how it ended."""

from __future__ import annotations

import time
import traceback
from typing import Any

from kerneltest.model import Case, Device, Finding, Kernel, Outcome, Status, Unsupported
from kerneltest.worker import device as devices
from kerneltest.worker.checks import first_finding
from kerneltest.worker.execution import Execution
from kerneltest.worker.rig import Rig
from kerneltest.worker.staging import KernelRaised

# The last lines of a traceback that a report shows: enough to see the call into the library.
TRACEBACK_FRAMES = 4


def execute(kernel: Kernel, case: Case[Any], rig: Rig, peer: Kernel | None = None) -> Outcome:
    """Run and judge one case, beside ``peer`` if there is one.

    Whatever the kernel does wrong is a finding; this raises only for our own mistakes.
    """
    start, device = time.perf_counter(), rig.device
    if (outcome := refused(kernel, case, device)) is not None:
        return outcome
    execution = Execution(kernel, case, rig, peer=peer)
    try:
        for pattern in execution.strategy.patterns:
            execution.observations.append(execution.observe(execution.uniform(pattern)))
        finding = first_finding(execution)  # which launches again to find a culprit
    except Unsupported as error:
        return Outcome(status=Status.UNSUPPORTED, reason=str(error))
    except KernelRaised as raised:
        return raised_by(kernel, raised.error, device, execution.launches, time.perf_counter() - start)
    verdicts = {} if finding else execution.verdicts
    return Outcome(
        status=Status.FAILED if finding else Status.PASSED,
        seconds=time.perf_counter() - start,
        launches=execution.launches,
        finding=finding,
        used={name: verdict.used for name, verdict in verdicts.items()},
        energy={name: verdict.energy for name, verdict in verdicts.items() if verdict.energy is not None},
        slack=kernel.numerics(case, device).slack,
        wide=() if finding else execution.wide,
        unjudged=_unjudged(execution) if finding is None else (),
        unchecked_relation=execution.unchecked_relation,
        compared_with=execution.compared_with,
    )


def _unjudged(execution: Execution) -> tuple[str, ...]:
    """The outputs that neither a budget nor a certificate says anything of."""
    certified = set(execution.kernel.operator.certified) & set(execution.expected)
    return tuple(sorted(set(execution.materials.outputs) - set(execution.verdicts) - certified))


def refused(kernel: Kernel, case: Case[Any], device: Device) -> Outcome | None:
    """The outcome of a case that the kernel does not take, or declares no sensible arithmetic for; None for others."""
    try:
        if reason := kernel.unsupported(case, device):
            return Outcome(status=Status.UNSUPPORTED, reason=reason)
    except Exception as error:
        return raised_by(kernel, error, device, 0, 0.0)
    try:
        kernel.numerics(case, device)  # wanted much later, but without it nothing can be judged
    except Exception as error:
        what = str(error).strip() or type(error).__name__
        bad = Finding(kind="BadNumerics", kernel=kernel.name, key="", what=what, details=tuple(_frames(error)))
        return Outcome(status=Status.FAILED, finding=bad)
    return None


def first_line(error: BaseException) -> str:
    """What an error says, without the advice that CUDA's errors add in further lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def raised_by(kernel: Kernel, error: Exception, device: Device, launches: int, seconds: float) -> Outcome:
    """The outcome of a case whose kernel raised, or lost the device."""
    lost, says = devices.context_is_lost(device), first_line(error)
    finding = Finding(
        kind="Crashed" if lost else "LaunchRaised",
        kernel=kernel.name,
        key=type(error).__name__,
        what=f"the device context was lost: {says}" if lost else f"{type(error).__name__}: {says}",
        details=tuple(_frames(error)),
    )
    return Outcome(status=Status.FAILED, seconds=seconds, launches=launches, finding=finding, fatal=lost)


def _frames(error: Exception) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)[-TRACEBACK_FRAMES:]
    return [f"at {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames]
