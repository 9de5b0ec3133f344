"""One performance of a launch sequence: the steps in their order, then the launch under test, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from kerneltest.model import Kernel, LaunchSequence, Pattern, Place
from kerneltest.worker.company.scene import Scene
from kerneltest.worker.company.steps import take
from kerneltest.worker.execution import Execution
from kerneltest.worker.staging import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Performance:
    """What a sequence led to: the launch under test, the same once more, and further ones if there is a repeat.

    ``bystanders``: buffers of other launches that changed although no launch had any business with them.
    """

    launches: tuple[Observation, ...]
    bystanders: tuple[str, ...]


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
                take(step, scene)
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
