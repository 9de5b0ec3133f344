"""One case of one kernel: the same inputs under one poison after another, outputs copied away, then the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from kerneltest.model import Case, ErrorBudget, InputStrategy, Kernel, Materials, Pattern, Place, Rejection, Variant
from kerneltest.oracle.verdict import Verdict, judge
from kerneltest.worker import device as devices
from kerneltest.worker.poison import Plan
from kerneltest.worker.rig import Rig
from kerneltest.worker.staging import Observation, Staged, blamed_on_the_kernel, expected_outputs


class Execution:
    """One case of one kernel in progress: what has been observed, and the means to observe more."""

    def __init__(
        self,
        kernel: Kernel,
        case: Case[Any],
        rig: Rig,
        materials: Materials | None = None,
        peer: Kernel | None = None,
    ) -> None:
        self.kernel, self.case, self.rig, self.device, self.peer = kernel, case, rig, rig.device, peer
        self.strategy: InputStrategy = kernel.operator.strategy(case.inputs)
        self.materials: Materials = materials or kernel.operator.materialize(case)
        self.expected = expected_outputs(kernel, self.materials)
        self.launches = 0
        dead = dict.fromkeys(part.place for part in self.materials.dead)
        self.places: tuple[Place, ...] = (Place.OUTPUTS, *dead, *rig.poisoner.hidden_places)
        self.observations: list[Observation] = []
        self.unchecked_relation: str | None = None  # why the case's relation says nothing of this kernel
        self.compared_with: str | None = None  # the peer, once an output was held against its own

    def related(self, variant: Variant) -> Execution:
        """The same kernel on a transformed case."""
        other = Execution(self.kernel, variant.case, self.rig, variant.materials)
        if self.strategy.tier == "generic":
            # Keys that were repeated or picked are not independent any more: only the worst case bounds them.
            other.strategy = replace(self.strategy, tier="hard")
        return other

    def uniform(self, pattern: Pattern) -> Plan:
        """The plan that fills every place with the same pattern."""
        return dict.fromkeys(Place, pattern)

    def observe(self, plan: Plan) -> Observation:
        """Launch once under ``plan``. Nothing of an earlier launch is left for this one to profit from."""
        with self.rig.memory.arena(self.case.guard) as arena:
            staged = Staged(self.kernel, self.case, self.materials, self.device, arena, plan)
            return staged.observed(self.launched(staged, plan))

    def launched(self, staged: Staged, plan: Plan) -> Any:
        """Plan, poison what is hidden, launch and wait; returns what the kernel returned."""
        poisoner = self.rig.poisoner
        self.launches += 1
        with poisoner.pool(plan[Place.ALLOCATOR_POOL]):
            staged.plan()
            poisoner.chip(plan)
            returned = staged.launch()
            with blamed_on_the_kernel():
                devices.synchronize(self.device)
        return returned

    def beside(self, peer: Kernel) -> Execution:
        """The same case run by another kernel, judged by the same reference."""
        other = Execution(peer, self.case, self.rig, self.materials)
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

    def rejections(self, seen: Observation) -> Iterator[Rejection]:
        """What the operator's certificate says against a launch: nothing, of one whose outputs have not their form."""
        operator = self.kernel.operator
        if set(operator.certified) & set(seen.outputs):
            numerics = self.kernel.numerics(self.case, self.device)
            yield from operator.certify(self.case, self.terms, numerics, seen.outputs)
