"""One case of one kernel: the same inputs under one poison after another, outputs copied away, then the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from kerneltest.model import (
    Call,
    Case,
    Device,
    ErrorBudget,
    InputStrategy,
    Kernel,
    Materials,
    OutputSpec,
    Pattern,
    Place,
    Unsupported,
    Variant,
)
from kerneltest.oracle.verdict import Verdict, judge
from kerneltest.worker import device as devices
from kerneltest.worker.poison import Plan, Poisoner, as_bits, fill_bytes, fill_dead


class KernelRaised(Exception):
    """``plan``, ``launch`` or the synchronisation after them raised ``error``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One launch: the poison it ran under, its outputs on the host, and the inputs it changed."""

    plan: Plan
    outputs: Mapping[str, torch.Tensor]
    mutated: tuple[str, ...]
    problem: str | None = None  # an output of the wrong form; ``outputs`` is empty then


class Execution:
    """One case of one kernel in progress: what has been observed, and the means to observe more."""

    def __init__(
        self,
        kernel: Kernel,
        case: Case[Any],
        device: Device,
        poisoner: Poisoner,
        materials: Materials | None = None,
        peer: Kernel | None = None,
    ) -> None:
        self.kernel, self.case, self.device, self.peer = kernel, case, device, peer
        self.strategy: InputStrategy = kernel.operator.strategy(case.inputs)
        self.materials: Materials = materials or kernel.operator.materialize(case)
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
        self.unchecked_relation: str | None = None  # why the case's relation says nothing of this kernel
        self.compared_with: str | None = None  # the peer, once an output was held against its own

    def related(self, variant: Variant) -> Execution:
        """The same kernel on a transformed case."""
        other = Execution(self.kernel, variant.case, self.device, self._poisoner, variant.materials)
        if self.strategy.tier == "generic":
            # Keys that were repeated or picked are not independent any more: only the worst case bounds them.
            other.strategy = replace(self.strategy, tier="hard")
        return other

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
        self.launches += 1
        with self._poisoner.pool(plan[Place.ALLOCATOR_POOL]), _blamed_on_the_kernel():
            if kernel.plan:
                call = replace(call, plan=kernel.plan(call))
            self._poisoner.chip(plan)
            returned = kernel.launch(call)
            devices.synchronize(self.device)
        mutated = tuple(n for n in inputs if not torch.equal(as_bits(inputs[n]), as_bits(pristine[n])))
        if problem := _wrong_form(returned, self.expected, self.device):
            return Observation(plan=plan, outputs={}, mutated=mutated, problem=problem)
        copies = {output: value.detach().to("cpu", copy=True) for output, value in returned.items()}
        return Observation(plan=plan, outputs=copies, mutated=mutated)

    def beside(self, peer: Kernel) -> Execution:
        """The same case run by another kernel, judged by the same reference."""
        other = Execution(peer, self.case, self.device, self._poisoner, self.materials)
        other.terms = self.terms
        return other

    @cached_property
    def terms(self) -> Any:
        """The reference, computed from the host tensors after the first launch is over and its outputs are away."""
        return self.kernel.operator.reference(self.case, self.materials.inputs, self.device.torch_name)

    @cached_property
    def budgets(self) -> Mapping[str, ErrorBudget]:
        """How far the kernel's arithmetic may take each output from the reference."""
        numerics = self.kernel.numerics(self.case, self.device)
        return self.kernel.operator.budget(self.case, self.terms, numerics, self.strategy)

    @property
    def wide(self) -> tuple[str, ...]:
        """The outputs whose budget is anywhere more than twice as wide as plain fp32 arithmetic would need."""
        plain = self.kernel.numerics(self.case, self.device).plain
        needed = self.kernel.operator.budget(self.case, self.terms, plain, self.strategy)
        return tuple(name for name, own in self.budgets.items() if bool((own.hard > 2 * needed[name].hard).any()))

    @cached_property
    def verdicts(self) -> Mapping[str, Verdict]:
        """The oracle's word on each output of the first launch that has a budget."""
        return self.judged(self.observations[0])

    def judged(self, seen: Observation) -> Mapping[str, Verdict]:
        """The oracle's word on each output of a launch that has a budget."""
        return {name: judge(value, self.budgets[name]) for name, value in seen.outputs.items() if name in self.budgets}


@contextmanager
def _blamed_on_the_kernel() -> Iterator[None]:
    """Tell what a kernel raises from mistakes of our own, which nobody catches."""
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:
        raise KernelRaised(error) from error


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
