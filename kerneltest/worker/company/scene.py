"""One performance of a launch sequence: the steps in their order, then the launch under test, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import singledispatchmethod
from typing import Any

import torch

from kerneltest.model import (
    Again,
    Beside,
    Case,
    Data,
    EmptyCache,
    FarPages,
    FewSMs,
    Graph,
    Guard,
    Keeps,
    Kernel,
    LateInputs,
    LaunchSequence,
    Load,
    Materials,
    Neighbour,
    OtherStream,
    PageTable,
    Pattern,
    Place,
    Poison,
    Repeat,
    Reuse,
    Step,
    TorchOp,
    Unsupported,
)
from kerneltest.worker import device as devices
from kerneltest.worker.company import torch_ops
from kerneltest.worker.execute import first_line
from kerneltest.worker.execution import Execution
from kerneltest.worker.memory import Arena
from kerneltest.worker.poison import as_bits
from kerneltest.worker.staging import KernelRaised, Observation, Staged, Workspaces, blamed_on_the_kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Performance:
    """What a sequence led to: the launch under test, the same once more, and further ones if there is a repeat.

    ``bystanders``: buffers of other launches that changed although no launch had any business with them.
    """

    launches: tuple[Observation, ...]
    bystanders: tuple[str, ...]


@dataclass
class Scene:
    """The state of one performance. Steps act on it through :meth:`take`."""

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
    before: list[Callable[[], None]] = field(default_factory=list)  # what happens immediately before it
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
                act()
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

    # --- the steps

    @singledispatchmethod
    def take(self, step: Step) -> None:
        """Do what one step says, before the launch under test."""
        raise TypeError(f"no step: {step!r}")

    @take.register
    def _(self, step: Poison) -> None:
        place, pattern = step.place, step.pattern
        if pattern is Pattern.PREVIOUS:
            if place is not Place.OUTPUTS:
                raise Unsupported(f"only outputs can hold a previous answer, not the {place.value}")
            self._previous_answer()
        elif place is Place.OUTPUTS:
            self.stage.fill_outputs(pattern)
        elif place is Place.WORKSPACE:
            self.stage.workspaces.fill(pattern)
        elif place is Place.ALLOCATOR_POOL:
            self.held.enter_context(self.execution.rig.poisoner.pool(pattern))
        elif place.in_inputs:
            self.stage.fill_dead(place, pattern)
        else:
            self.execution.rig.poisoner.fill_chip(place, pattern)

    def _previous_answer(self) -> None:
        """The outputs hold what the kernel answers to other data: plausible, and wrong."""
        other = self._other_data()
        with self.execution.rig.memory.arena(Guard.NONE) as arena:
            returned = self._run(self.staged(self.execution.case, other, arena))
            for name, value in returned.items():
                if name in self.stage.outputs:
                    self.stage.outputs[name].copy_(value)
            self.wait()

    @take.register
    def _(self, step: Neighbour) -> None:
        kernel, case = self.kernels[step.kernel], step.case
        if reason := kernel.unsupported(case, self.execution.device):
            raise Unsupported(f"{kernel.name} does not support its case: {reason}")
        materials = kernel.operator.materialize(case)
        inputs = {name: value.clone() for name, value in materials.inputs.items()}
        for value in inputs.values():
            torch_ops.soil(value, step.data)
        arena = self.held.enter_context(self.execution.rig.memory.arena(Guard.NONE))
        zero = self.execution.uniform(Pattern.ZERO)
        staged = Staged(kernel, case, replace(materials, inputs=inputs), self.execution.device, arena, zero)
        self.wait()  # or what an earlier step broke would be taken for the neighbour's doing
        try:
            returned = self._run(staged)
            self._watch(kernel.name, staged, returned)
        except KernelRaised as raised:
            error = raised.error
            says = f"{type(error).__name__}: {first_line(error)}"
            raise Unsupported(f"the neighbour {kernel.name} raised {says}") from raised
        except RuntimeError as error:
            if step.data is Data.FINITE:
                raise
            # Such as the assertion in torch.multinomial, which ends the whole device context.
            why = first_line(error)
            raise Unsupported(f"the neighbour {kernel.name} does not survive {step.data.value}: {why}") from error

    @take.register
    def _(self, step: TorchOp) -> None:
        if step.op not in torch_ops.OPS:
            raise Unsupported(f"unknown operation of torch {step.op!r}; known: {', '.join(torch_ops.OPS)}")
        x = torch_ops.numbers(step.elements, step.data, self.execution.device.torch_name)
        self.kept.append((x, torch_ops.OPS[step.op](x)))

    @take.register
    def _(self, step: Again) -> None:
        kernel, case, keeps = self.execution.kernel, step.case, step.keeps
        if reason := kernel.unsupported(case, self.execution.device):
            raise Unsupported(f"the kernel does not support the other case: {reason}")
        arena = self.held.enter_context(self.execution.rig.memory.arena(Guard.NONE))
        workspaces = None if keeps is Keeps.NOTHING else self.stage.workspaces
        if workspaces is not None:
            workspaces.restart()
        other = self.staged(case, kernel.operator.materialize(case), arena, workspaces=workspaces)
        earlier = None
        if keeps in (Keeps.PLAN, Keeps.RESIZED):
            earlier = self.stage.plan_made if self.planned else None
        returned = self._run(other, earlier)
        if keeps in (Keeps.PLAN, Keeps.RESIZED):
            self.earlier_plan = other.plan_made
        if keeps is Keeps.RESIZED:
            self.stage.workspaces = Workspaces(self.arena, Pattern.ZERO, roomy=True)
        if keeps is not Keeps.NOTHING and not (keeps is Keeps.WORKSPACE and kernel.contract.shares_workspace):
            self.planned = False
        if keeps is Keeps.NOTHING:
            self._watch(f"{kernel.name} before", other, returned)
        else:
            self.kept.append((other, returned))

    @take.register
    def _(self, step: Reuse) -> None:
        if step.buffers == "same":
            self._rehearse(self._other_data())
            return
        # The arena gives its memory back at once: what the kernel remembers of these addresses is wrong now.
        with self.execution.rig.memory.arena(self.execution.case.guard) as arena:
            self._run(self.staged(self.execution.case, self.execution.materials, arena))
            self.wait()

    @take.register
    def _(self, _step: PageTable) -> None:
        paging = self.execution.kernel.operator.paging
        assert paging is not None, "refused before"
        inputs = dict(self.execution.materials.inputs)
        pages = inputs[paging.pages[0]].shape[0]
        moved = torch.randperm(pages, generator=torch.Generator().manual_seed(self.execution.case.seed))
        for name in paging.pages:
            inputs[name] = torch.empty_like(inputs[name]).index_copy_(0, moved, inputs[name])
        inputs[paging.table] = moved[inputs[paging.table].long()].to(inputs[paging.table].dtype)
        self._rehearse(replace(self.execution.materials, inputs=inputs, dead=()))

    @take.register
    def _(self, _step: EmptyCache) -> None:
        self.wait()
        devices.empty_cache(self.execution.device)

    @take.register
    def _(self, _step: FarPages) -> None:
        """Was done when the buffers were made."""

    @take.register
    def _(self, step: Graph) -> None:
        """Was captured when the buffers were made; all that is left is to replay more than once."""
        replay = self.replay
        assert replay is not None

        def several() -> Any:
            returned = None
            for _ in range(step.replays):
                returned = replay()
            return returned

        self.replay = several

    @take.register
    def _(self, step: Repeat) -> None:
        self.repeats += step.times

    @take.register
    def _(self, _step: OtherStream) -> None:
        self._on_a_stream(devices.new_stream(self.execution.device))

    @take.register
    def _(self, step: FewSMs) -> None:
        handle = self.execution.rig.companions.green_stream(step.sms)
        self._on_a_stream(devices.stream_at(handle, self.execution.device))

    def _on_a_stream(self, stream: torch.cuda.Stream) -> None:
        self.manner.append(lambda: devices.on_stream(self.execution.device, stream))

    @take.register
    def _(self, step: Beside) -> None:
        kernel, device = self.execution.kernel, self.execution.device
        if reason := kernel.unsupported(step.case, device):
            raise Unsupported(f"the kernel does not support the case beside it: {reason}")
        arena = self.held.enter_context(self.execution.rig.memory.arena(Guard.NONE))
        other = self.staged(step.case, kernel.operator.materialize(step.case), arena)
        other.plan()
        stream = devices.new_stream(device)
        self.wait()
        self.kept.append((other, stream))

        def launch() -> None:
            with devices.beside_on(stream):
                self.kept.append(other.launch())
            self.launches += 1

        self.before.append(launch)

    @take.register
    def _(self, step: Load) -> None:
        companions, stream = self.execution.rig.companions, devices.new_stream(self.execution.device)
        start = companions.occupy if step.what == "sms" else companions.use_bandwidth
        self.kept.append(stream)
        self.before.append(lambda: start(stream.cuda_stream))

    @take.register
    def _(self, _step: LateInputs) -> None:
        companions, stage = self.execution.rig.companions, self.stage

        def arrive() -> None:
            # What a planner has read is settled by now; the rest is what the kernel in front may still be writing.
            late = [
                name
                for name, live in stage.live.items()
                if live.numel() and (live.is_floating_point() or self.execution.kernel.plan is None)
            ]
            jobs = companions.jobs([(stage.pristine[name], stage.live[name]) for name in late])
            self.kept.append(jobs)
            stage.scramble(late)
            companions.late_copy(jobs, devices.stream(self.execution.device))

        self.before.append(arrive)

    # --- what steps share

    def _other_data(self) -> Materials:
        """The same lengths and layout with other values."""
        case = self.execution.case
        return self.execution.kernel.operator.materialize(replace(case, seed=(case.seed + 1) % 2**32))

    def _run(self, staged: Staged, earlier: Any = None) -> Any:
        staged.plan(earlier)
        self.launches += 1
        return staged.launch()

    def _rehearse(self, materials: Materials) -> None:
        """Launch with other tensors of the same shapes in the buffers under test, then put the right ones back."""
        self.stage.become(self.execution.case, materials)
        self.stage.workspaces.restart()
        self.kept.append(self._run(self.stage))
        self.wait()
        self.stage.become(self.execution.case, self.execution.materials)
        self.planned = False

    def _watch(self, name: str, staged: Staged, returned: Any) -> None:
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
        self._run(stage)  # what is compiled at first use cannot be captured
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


def perform(
    execution: Execution,
    sequence: LaunchSequence,
    kernels: Mapping[str, Kernel],
    clean: tuple[Place, int] | None = None,
) -> Performance:
    """Play a sequence from the beginning.

    ``clean``: a place to make harmless just before the launch of that number, 0 for the launch under test, 1 for the
    one after it. Raises :class:`Unsupported` for a step that cannot be taken, and :class:`KernelRaised`.
    """
    poisoner = execution.rig.poisoner
    with execution.rig.memory.arena(execution.case.guard) as arena, ExitStack() as held:
        held.enter_context(poisoner.pool(Pattern.ZERO))
        scene = Scene(execution, sequence, kernels, held, arena)
        try:
            if sequence.plan_first and not scene.planned:
                scene.plan()
            poisoner.chip(execution.uniform(Pattern.ZERO))
            for step in sequence.steps:
                scene.take(step)
            if not scene.planned:
                scene.plan()
            seen: list[Observation] = []
            for number in range(2 + scene.repeats):
                if number:
                    scene.stage.fill_outputs(scene.stage.fills[Place.OUTPUTS])
                if clean is not None and clean[1] == number:
                    scene.clean(clean[0])
                seen.append(scene.observe())
            return Performance(launches=tuple(seen), bystanders=scene.changed_bystanders())
        finally:
            execution.launches += scene.launches
