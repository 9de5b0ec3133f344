"""Where a launch sequence plays: the buffers, plans and contexts of the launch under test, and what steps share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kerneltest.model import (
    Again,
    Case,
    FarPages,
    Graph,
    Keeps,
    Kernel,
    LateInputs,
    LaunchSequence,
    Materials,
    Pattern,
    Place,
    Unsupported,
)
from kerneltest.worker import device as devices
from kerneltest.worker.execution import Execution
from kerneltest.worker.memory import Arena
from kerneltest.worker.poison import as_bits
from kerneltest.worker.staging import Observation, Staged, Workspaces, blamed_on_the_kernel


@dataclass
class Scene:
    """The state of one performance. Steps act on it (steps.py)."""

    execution: Execution
    sequence: LaunchSequence
    kernels: Mapping[str, Kernel]
    held: ExitStack
    arena: Arena
    launches: int = 0
    stage: Staged = field(init=False)
    planned: bool = False
    earlier_plan: Any = None
    manner: list[Callable[[], Any]] = field(default_factory=list)  # contexts around the launch, outermost first
    # What happens immediately before it; what an act returns is done as soon as the launch is made.
    before: list[Callable[[], Callable[[], None] | None]] = field(default_factory=list)
    replay: Callable[[], Any] | None = None
    repeats: int = 0
    bystanders: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        steps, execution = self.sequence.steps, self.execution
        graph = next((step for step in steps if isinstance(step, Graph)), None)
        roomy = any(isinstance(step, Again) and step.keeps is not Keeps.NOTHING for step in steps)
        workspaces = Workspaces(self.arena, Pattern.ZERO, roomy=roomy)
        case, materials = execution.case, execution.materials
        if graph is not None:
            case, materials = graph.captured, execution.kernel.operator.materialize(graph.captured)
        far = any(isinstance(step, FarPages) for step in steps)
        self.stage = self.staged(case, materials, self.arena, workspaces=workspaces, far=far)
        self.stage.pdl = any(isinstance(step, LateInputs) for step in steps)
        if graph is not None:
            self._capture()

    def staged(self, case: Case[Any], materials: Materials, arena: Arena, **more: Any) -> Staged:
        """A case of the kernel under test, every place of it harmless."""
        zero = self.execution.uniform(Pattern.ZERO)
        return Staged(self.execution.kernel, case, materials, self.execution.device, arena, zero, **more)

    def plan(self) -> None:
        """Plan the launch under test, anew if a step left an earlier plan for it."""
        self.stage.workspaces.restart()
        self.stage.plan(self.earlier_plan)
        self.planned = True

    def launch(self) -> Any:
        """The launch under test, as the steps want it made."""
        self.launches += 1
        if self.execution.kernel.plan is None:  # it asks for its workspace at every launch, and gets the same again
            self.stage.workspaces.restart()
        with ExitStack() as around:
            for context in self.manner:
                around.enter_context(context())
            for act in self.before:
                if (then := act()) is not None:
                    around.callback(then)
            return self.replay() if self.replay else self.stage.launch()

    def observe(self) -> Observation:
        """Launch, wait, and copy away."""
        returned = self.launch()
        self.wait()
        return self.stage.observed(returned)

    def wait(self) -> None:
        with blamed_on_the_kernel():
            devices.synchronize(self.execution.device)

    def clean(self, place: Place) -> None:
        """Make one place harmless, whatever the steps left in it."""
        poisoner = self.execution.rig.poisoner
        if place is Place.WORKSPACE:
            self.stage.workspaces.clear()
        elif place is Place.OUTPUTS:
            self.stage.fill_outputs(Pattern.ZERO)
        elif place is Place.ALLOCATOR_POOL:
            self.held.enter_context(poisoner.pool(Pattern.ZERO))
        elif place.in_inputs:
            self.stage.fill_dead(place, Pattern.ZERO)
        else:
            poisoner.fill_chip(place, Pattern.ZERO)

    def changed_bystanders(self) -> tuple[str, ...]:
        return tuple(name for name, now, then in self.bystanders if not torch.equal(as_bits(now.cpu()), as_bits(then)))

    def other_data(self) -> Materials:
        """The same lengths and layout with other values."""
        case = self.execution.case
        return self.execution.kernel.operator.materialize(replace(case, seed=(case.seed + 1) % 2**32))

    def run(self, staged: Staged, earlier: Any = None) -> Any:
        staged.plan(earlier)
        self.launches += 1
        return staged.launch()

    def rehearse(self, materials: Materials) -> None:
        """Launch with other tensors in the buffers under test, then put the right ones back.

        Raises :class:`Unsupported` where they do not fit: how many elements there are may follow from a case's values.
        """
        if not self.stage.holds(materials):
            raise Unsupported("the other tensors do not fit into the buffers of the case under test")
        self.stage.become(self.execution.case, materials)
        self.stage.workspaces.restart()
        self.kept.append(self.run(self.stage))
        self.wait()
        self.stage.become(self.execution.case, self.execution.materials)
        self.planned = False

    def watch(self, name: str, staged: Staged, returned: Any) -> None:
        """Remember what another launch was given and gave. Copies to the host leave the chip as the launch left it."""
        for label, value in staged.live.items():
            self.bystanders.append((f"{name}: {label}", value, value.to("cpu", copy=True)))
        for label, value in returned.items() if isinstance(returned, Mapping) else ():
            self.bystanders.append((f"{name}: {label}", value, value.to("cpu", copy=True)))
        self.kept.append((staged, returned))

    def _capture(self) -> None:
        """Capture the launch with the case in the buffers, then write the case under test over it."""
        kernel, stage, device = self.execution.kernel, self.stage, self.execution.device
        if not stage.holds(self.execution.materials):
            raise Unsupported("the captured case has buffers that the case under test does not fit into")
        if reason := kernel.unsupported(stage.case, device):
            raise Unsupported(f"the kernel does not support the captured case: {reason}")
        stage.captured = True
        self.run(stage)  # what is compiled at first use cannot be captured
        stage.workspaces.restart()  # nor can memory be handed out
        with blamed_on_the_kernel():
            graph, returned = devices.capture(device, stage.launch)
        stage.become(self.execution.case, self.execution.materials)
        if kernel.plan and kernel.contract.captured == "lengths":
            self.earlier_plan, self.planned = stage.plan_made, False
        else:
            self.planned = True
        self.kept.append(graph)

        def replay() -> Any:
            graph.replay()
            return returned

        self.replay = replay
