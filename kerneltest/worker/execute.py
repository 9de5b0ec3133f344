"""Run one case: the same inputs under several poisons, outputs copied away, and only then the reference."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from kerneltest.model import (
    Call,
    Case,
    Device,
    Finding,
    InputStrategy,
    Kernel,
    Materials,
    Outcome,
    OutputSpec,
    Pattern,
    Place,
    Status,
    Unsupported,
)
from kerneltest.oracle.budget import ErrorBudget
from kerneltest.worker import device as devices
from kerneltest.worker.poison import Plan, Poisoner, as_bits, fill_bytes, fill_dead

# The last lines of a traceback that a report shows: enough to see the call into the library.
TRACEBACK_FRAMES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One launch: the poison it ran under, its outputs on the host, and the inputs it changed."""

    plan: Plan
    outputs: Mapping[str, torch.Tensor]
    mutated: tuple[str, ...]
    problem: str | None = None  # an output of the wrong form; ``outputs`` is empty then


class Execution:
    """One case of one kernel in progress: what has been observed, and the means to observe more."""

    def __init__(self, kernel: Kernel, case: Case[Any], device: Device, poisoner: Poisoner) -> None:
        self.kernel, self.case, self.device = kernel, case, device
        self.strategy: InputStrategy = kernel.operator.strategy(case.inputs)
        self.materials: Materials = kernel.operator.materialize(case)
        self.expected: Mapping[str, OutputSpec] = {
            name: spec
            for name, spec in self.materials.outputs.items()
            if kernel.returns is None or name in kernel.returns
        }
        self.launches = 0
        self._poisoner = poisoner
        dead = dict.fromkeys(part.place for part in self.materials.dead)
        self.places: tuple[Place, ...] = (Place.OUTPUTS, *dead, *poisoner.hidden_places)
        self.observations: list[Observation] = []

    def uniform(self, pattern: Pattern) -> Plan:
        """The plan that fills every place with the same pattern."""
        return dict.fromkeys(Place, pattern)

    def observe(self, plan: Plan) -> Observation:
        """Launch once under ``plan``. Nothing of an earlier launch is left for this one to profit from."""
        kernel, name = self.kernel, self.device.torch_name
        host = {tensor: value.clone() for tensor, value in self.materials.inputs.items()}
        fill_dead(host, self.materials.dead, plan)
        inputs = {tensor: value.to(name) for tensor, value in host.items()}
        pristine = {tensor: value.clone() for tensor, value in inputs.items()}
        outputs = {
            output: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=name)
            for output, spec in self.materials.outputs.items()
        }
        for buffer in outputs.values():
            fill_bytes(buffer, plan[Place.OUTPUTS])

        def workspace(nbytes: int) -> torch.Tensor:
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=name)
            fill_bytes(buffer[: nbytes // 4 * 4].view(torch.int32), plan[Place.WORKSPACE])
            return buffer

        call = Call(case=self.case, device=self.device, inputs=inputs, outputs=outputs, workspace=workspace)
        with self._poisoner.pool(plan[Place.ALLOCATOR_POOL]):
            state = kernel.plan(call) if kernel.plan else None
            call = Call(
                case=self.case, device=self.device, inputs=inputs, outputs=outputs, workspace=workspace, plan=state
            )
            self._poisoner.chip(plan)
            returned = kernel.launch(call)
            self.launches += 1
        devices.synchronize(self.device)
        mutated = tuple(n for n in inputs if not torch.equal(as_bits(inputs[n]), as_bits(pristine[n])))
        if problem := _wrong_form(returned, self.expected, self.device):
            return Observation(plan=plan, outputs={}, mutated=mutated, problem=problem)
        copies = {output: value.detach().to("cpu", copy=True) for output, value in returned.items()}
        return Observation(plan=plan, outputs=copies, mutated=mutated)

    @cached_property
    def budgets(self) -> Mapping[str, ErrorBudget]:
        """The reference, computed from the host tensors after the first launch is over and its outputs are away."""
        operator = self.kernel.operator
        terms = operator.reference(self.case, self.materials.inputs, self.device.torch_name)
        return operator.budget(self.case, terms, self.kernel.numerics(self.case, self.device), self.strategy)


def execute(kernel: Kernel, case: Case[Any], device: Device, poisoner: Poisoner) -> Outcome:
    """Run and judge one case. Whatever the kernel does wrong is a finding; this raises only for our own mistakes."""
    from kerneltest.worker.checks import judge

    start = time.perf_counter()
    try:
        if reason := kernel.unsupported(case, device):
            return Outcome(status=Status.UNSUPPORTED, reason=reason)
        kernel.numerics(case, device)  # wanted much later, but what it raises belongs to the kernel as well
    except Exception as error:
        return _raised(kernel, error, device, 0, time.perf_counter() - start)
    execution = Execution(kernel, case, device, poisoner)
    try:
        for pattern in execution.strategy.patterns:
            execution.observations.append(execution.observe(execution.uniform(pattern)))
    except Unsupported as error:
        return Outcome(status=Status.UNSUPPORTED, reason=str(error))
    except Exception as error:
        return _raised(kernel, error, device, execution.launches, time.perf_counter() - start)
    try:
        finding, used = judge(execution)
    except torch.AcceleratorError as error:  # the launches that look for a culprit can lose the context as well
        return _raised(kernel, error, device, execution.launches, time.perf_counter() - start)
    return Outcome(
        status=Status.FAILED if finding else Status.PASSED,
        seconds=time.perf_counter() - start,
        launches=execution.launches,
        finding=finding,
        used=used,
        unjudged=tuple(sorted(set(execution.materials.outputs) - set(used))) if finding is None else (),
    )


def _raised(kernel: Kernel, error: Exception, device: Device, launches: int, seconds: float) -> Outcome:
    lost = devices.context_is_lost(device)
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    finding = Finding(
        kind="Crashed" if lost else "LaunchRaised",
        kernel=kernel.name,
        key=type(error).__name__,
        what=(f"the device context was lost: {first_line}" if lost else f"{type(error).__name__}: {first_line}"),
        details=tuple(_frames(error)),
    )
    return Outcome(status=Status.FAILED, seconds=seconds, launches=launches, finding=finding, fatal=lost)


def _frames(error: Exception) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)[-TRACEBACK_FRAMES:]
    return [f"at {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames]


def _wrong_form(returned: object, expected: Mapping[str, OutputSpec], device: Device) -> str | None:
    """Why what ``launch`` returned is not the set of outputs that was expected, or None."""
    if not isinstance(returned, Mapping):
        return f"launch returned {type(returned).__name__}; expected a mapping of {', '.join(expected)} to tensors"
    for name in expected.keys() - returned.keys():
        return f"launch did not return {name!r}; it returned {', '.join(map(repr, returned)) or 'nothing'}"
    for name, value in returned.items():
        if name not in expected:
            return f"launch returned {name!r}, which is no output; expected {', '.join(expected)}"
        if not isinstance(value, torch.Tensor):
            return f"{name} is a {type(value).__name__}; expected a torch.Tensor"
        spec = expected[name]
        for what, have, want in (
            ("shape", tuple(value.shape), spec.shape),
            ("dtype", str(value.dtype).removeprefix("torch."), spec.dtype),
            ("device", value.device.type, device.kind),
        ):
            if have != want:
                return f"{name} has {what} {have}; expected {want}"
    return None
