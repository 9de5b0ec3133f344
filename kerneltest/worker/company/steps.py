"""What each step of a launch sequence does to the scene."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch

from kerneltest.model import (
    Again,
    Beside,
    Data,
    EmptyCache,
    FarPages,
    FewSMs,
    Graph,
    Guard,
    Keeps,
    LateInputs,
    Load,
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
from kerneltest.worker.company.scene import Scene
from kerneltest.worker.execute import first_line
from kerneltest.worker.poison import as_bits
from kerneltest.worker.staging import KernelRaised, Staged, Workspaces


@singledispatch
def take(step: Step, scene: Scene) -> None:
    """Do what one step says, or see to it that the launch is made as it says. Raises :class:`Unsupported`."""
    raise TypeError(f"no step for {type(scene).__name__}: {step!r}")


# --- what happens before it


@take.register
def _(step: Poison, scene: Scene) -> None:
    place, pattern = step.place, step.pattern
    if pattern is Pattern.PREVIOUS:
        if place is not Place.OUTPUTS:
            raise Unsupported(f"only outputs can hold a previous answer, not the {place.value}")
        _previous_answer(scene)
    elif place is Place.OUTPUTS:
        scene.stage.fill_outputs(pattern)
    elif place is Place.WORKSPACE:
        scene.stage.workspaces.fill(pattern)
    elif place is Place.ALLOCATOR_POOL:
        scene.held.enter_context(scene.execution.rig.poisoner.pool(pattern))
    elif place.in_inputs:
        scene.stage.fill_dead(place, pattern)
    else:
        scene.execution.rig.poisoner.fill_chip(place, pattern)


@take.register
def _(step: Neighbour, scene: Scene) -> None:
    kernel, case = scene.kernels[step.kernel], step.case
    if reason := kernel.unsupported(case, scene.execution.device):
        raise Unsupported(f"{kernel.name} does not support its case: {reason}")
    materials = kernel.operator.materialize(case)
    inputs = {name: value.clone() for name, value in materials.inputs.items()}
    for value in inputs.values():
        torch_ops.soil(value, step.data)
    arena = scene.held.enter_context(scene.execution.rig.memory.arena(Guard.NONE))
    zero = scene.execution.uniform(Pattern.ZERO)
    staged = Staged(kernel, case, replace(materials, inputs=inputs), scene.execution.device, arena, zero)
    scene.wait()  # or what an earlier step broke would be taken for the neighbour's doing
    try:
        returned = scene.run(staged)
        scene.watch(kernel.name, staged, returned)
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
def _(step: TorchOp, scene: Scene) -> None:
    if step.op not in torch_ops.OPS:
        raise Unsupported(f"unknown operation of torch {step.op!r}; known: {', '.join(torch_ops.OPS)}")
    x = torch_ops.numbers(step.elements, step.data, scene.execution.device.torch_name)
    scene.kept.append((x, torch_ops.OPS[step.op](x)))


@take.register
def _(step: Again, scene: Scene) -> None:
    kernel, case, keeps = scene.execution.kernel, step.case, step.keeps
    if reason := kernel.unsupported(case, scene.execution.device):
        raise Unsupported(f"the kernel does not support the other case: {reason}")
    arena = scene.held.enter_context(scene.execution.rig.memory.arena(Guard.NONE))
    workspaces = None if keeps is Keeps.NOTHING else scene.stage.workspaces
    if workspaces is not None:
        workspaces.restart()
    other = scene.staged(case, kernel.operator.materialize(case), arena, workspaces=workspaces)
    earlier = None
    if keeps in (Keeps.PLAN, Keeps.RESIZED):
        earlier = scene.stage.plan_made if scene.planned else None
    returned = scene.run(other, earlier)
    if keeps in (Keeps.PLAN, Keeps.RESIZED):
        scene.earlier_plan = other.plan_made
    if keeps is Keeps.RESIZED:
        scene.stage.workspaces = Workspaces(scene.arena, Pattern.ZERO, roomy=True)
    if keeps is not Keeps.NOTHING and not (keeps is Keeps.WORKSPACE and kernel.contract.shares_workspace):
        scene.planned = False
    if keeps is Keeps.NOTHING:
        scene.watch(f"{kernel.name} before", other, returned)
    else:
        scene.kept.append((other, returned))


@take.register
def _(step: Reuse, scene: Scene) -> None:
    if step.buffers == "same":
        scene.rehearse(scene.other_data())
        return
    # The arena gives its memory back at once: what the kernel remembers of these addresses is wrong now.
    with scene.execution.rig.memory.arena(scene.execution.case.guard) as arena:
        scene.run(scene.staged(scene.execution.case, scene.execution.materials, arena))
        scene.wait()


@take.register
def _(_step: PageTable, scene: Scene) -> None:
    paging = scene.execution.kernel.operator.paging
    assert paging is not None, "refused before"
    inputs = dict(scene.execution.materials.inputs)
    pages = inputs[paging.pages[0]].shape[0]
    moved = torch.randperm(pages, generator=torch.Generator().manual_seed(scene.execution.case.seed))
    for name in paging.pages:
        there = torch.empty_like(inputs[name])
        as_bits(there).index_copy_(0, moved, as_bits(inputs[name]))  # a copy that knows every format
        inputs[name] = there
    inputs[paging.table] = moved[inputs[paging.table].long()].to(inputs[paging.table].dtype)
    scene.rehearse(replace(scene.execution.materials, inputs=inputs, dead=()))


@take.register
def _(_step: EmptyCache, scene: Scene) -> None:
    scene.wait()
    devices.empty_cache(scene.execution.device)


# --- how the launch under test is made


@take.register
def _(_step: FarPages, scene: Scene) -> None:
    """Was done when the buffers were made."""


@take.register
def _(step: Graph, scene: Scene) -> None:
    """Was captured when the buffers were made; all that is left is to replay more than once."""
    replay = scene.replay
    assert replay is not None

    def several() -> Any:
        returned = None
        for _ in range(step.replays):
            returned = replay()
        return returned

    scene.replay = several


@take.register
def _(step: Repeat, scene: Scene) -> None:
    scene.repeats += step.times


@take.register
def _(_step: OtherStream, scene: Scene) -> None:
    _on_a_stream(scene, devices.new_stream(scene.execution.device))


@take.register
def _(step: FewSMs, scene: Scene) -> None:
    handle = scene.execution.rig.companions.green_stream(step.sms)
    _on_a_stream(scene, devices.stream_at(handle, scene.execution.device))


@take.register
def _(step: Beside, scene: Scene) -> None:
    kernel, device = scene.execution.kernel, scene.execution.device
    if reason := kernel.unsupported(step.case, device):
        raise Unsupported(f"the kernel does not support the case beside it: {reason}")
    arena = scene.held.enter_context(scene.execution.rig.memory.arena(Guard.NONE))
    other = scene.staged(step.case, kernel.operator.materialize(step.case), arena)
    other.plan()
    stream = devices.new_stream(device)
    scene.wait()
    scene.kept.append((other, stream))

    def launch() -> Callable[[], None]:
        # A kernel may be through before the host has made another launch: both wait behind a gate until both are made.
        open_gate = scene.execution.rig.companions.hold(stream.cuda_stream)
        gate = stream.record_event()
        with devices.beside_on(stream):
            scene.kept.append((open_gate, other.launch()))
        devices.wait_for(device, gate)
        scene.launches += 1
        return open_gate

    # Ahead of a step that has to be the last before the launch.
    scene.before.insert(0, launch)


@take.register
def _(step: Load, scene: Scene) -> None:
    companions, stream = scene.execution.rig.companions, devices.new_stream(scene.execution.device)
    start = companions.occupy if step.what == "sms" else companions.use_bandwidth
    scene.kept.append(stream)
    scene.before.append(lambda: start(stream.cuda_stream))


@take.register
def _(_step: LateInputs, scene: Scene) -> None:
    companions, stage = scene.execution.rig.companions, scene.stage

    def arrive() -> None:
        # What a planner has read is settled by now; the rest is what the kernel in front may still be writing.
        late = [
            name
            for name, live in stage.live.items()
            if live.numel() and (live.is_floating_point() or scene.execution.kernel.plan is None)
        ]
        jobs = companions.jobs([(stage.pristine[name], stage.live[name]) for name in late])
        scene.kept.append(jobs)
        stage.scramble(late)
        companions.late_copy(jobs, devices.stream(scene.execution.device))

    scene.before.append(arrive)


def _previous_answer(scene: Scene) -> None:
    """The outputs hold what the kernel answers to other data: plausible, and wrong."""
    other = scene.other_data()
    with scene.execution.rig.memory.arena(Guard.NONE) as arena:
        returned = scene.run(scene.staged(scene.execution.case, other, arena))
        for name, value in returned.items():
            if name in scene.stage.outputs:
                scene.stage.outputs[name].copy_(value)
        scene.wait()


def _on_a_stream(scene: Scene, stream: torch.cuda.Stream) -> None:
    scene.manner.append(lambda: devices.on_stream(scene.execution.device, stream))
