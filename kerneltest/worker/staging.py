"""One case of one kernel on the device: its buffers, its workspace, its plan, its launch, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kerneltest.model import Call, Case, Device, Kernel, Materials, OutputSpec, Pattern, Place, Unsupported
from kerneltest.worker.memory import Arena, Damage
from kerneltest.worker.poison import Plan, as_bits, fill_bytes, fill_dead

# A workspace that launches of several cases share is as large as any of them is likely to ask for.
ROOMY = 4 << 20
# A cache of more than 2^32 elements needs page offsets of 64 bits, signed or not. By 2^30 more, so that an offset that
# lost its upper half points into the middle of what is not mapped, and not at the first page.
FAR_ELEMENTS = (1 << 32) + (1 << 30)


class KernelRaised(Exception):
    """``plan``, ``launch`` or the synchronisation after them raised ``error``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One launch: the poison it ran under, its outputs on the host, the inputs it changed, the red zones it hit."""

    plan: Plan
    outputs: Mapping[str, torch.Tensor]
    mutated: tuple[str, ...]
    damage: tuple[Damage, ...] = ()
    problem: str | None = None  # an output of the wrong form; ``outputs`` is empty then


class Workspaces:
    """Scratch memory, handed out in the order in which it is asked for; after :meth:`restart` the same as before."""

    def __init__(self, arena: Arena, pattern: Pattern, *, roomy: bool = False) -> None:
        self._arena, self._pattern, self._roomy = arena, pattern, roomy
        self._buffers: list[tuple[torch.Tensor, bool]] = []
        self._next = 0

    def __call__(self, nbytes: int, *, zeroed: bool = False) -> torch.Tensor:
        number, self._next = self._next, self._next + 1
        if number < len(self._buffers):
            buffer, was_zeroed = self._buffers[number]
            if was_zeroed == zeroed and buffer.numel() >= nbytes:
                return buffer[:nbytes]
        # A multiple of 256, so that it begins at one even where it ends at a guard page.
        size = max(-(-nbytes // 256) * 256, ROOMY if self._roomy else 0)
        buffer = self._arena.tensor(f"workspace {number}", (size,), torch.uint8)
        fill_bytes(buffer.view(torch.int32), Pattern.ZERO if zeroed else self._pattern)
        self._buffers[number : number + 1] = [(buffer, zeroed)]
        return buffer[:nbytes]

    @property
    def position(self) -> int:
        """How many requests there were since the last restart."""
        return self._next

    def restart(self, at: int = 0) -> None:
        """What is asked for next gets the memory of the first request (or of number ``at``), with what it holds."""
        self._next = at

    def clear(self) -> None:
        """Zero all that has been handed out or will be, also what the kernel should have left so."""
        self._pattern = Pattern.ZERO
        for buffer, _ in self._buffers:
            buffer.zero_()

    def fill(self, pattern: Pattern) -> None:
        """Fill what has been handed out, and what will be; not what the kernel has to leave zero."""
        self._pattern = pattern
        for buffer, zeroed in self._buffers:
            if not zeroed:
                fill_bytes(buffer.view(torch.int32), pattern)


class Staged:
    """A case in device buffers that a kernel can be launched on, again and again.

    ``fills`` says what outputs, dead inputs and workspace hold. ``far``: pages lie behind FAR_ELEMENTS others that are
    not mapped. ``workspaces``: those of another launch, to be shared. ``live`` is the part of each input buffer that
    can be touched, ``pristine`` what it should hold.
    """

    def __init__(
        self,
        kernel: Kernel,
        case: Case[Any],
        materials: Materials,
        device: Device,
        arena: Arena,
        fills: Plan,
        *,
        workspaces: Workspaces | None = None,
        far: bool = False,
    ) -> None:
        self.kernel, self.case, self.materials, self.device, self._arena = kernel, case, materials, device, arena
        self.fills = dict(fills)
        self.workspaces = workspaces or Workspaces(arena, fills[Place.WORKSPACE])
        self.plan_made: Any = None
        self.captured = self.pdl = False
        self.draw = self._planned = 0  # number of the launch in a series; requests for workspace that the plan made
        paging = kernel.operator.paging if far else None
        # The whole buffer, and the part of it that can be touched.
        self._buffers: dict[str, torch.Tensor] = {}
        self.live: dict[str, torch.Tensor] = {}
        self._first_page: dict[str, int] = {}
        if paging:
            # One table for all of them: the tensor of the smallest pages says how far off the first one is.
            sizes = [materials.inputs[name][0].numel() for name in paging.pages if materials.inputs[name].numel()]
            first = FAR_ELEMENTS // min(sizes) + 1 if sizes else 0
            if sizes:
                self._first_page[paging.table] = first
        for name, value in materials.inputs.items():
            if paging and name in paging.pages and value.numel():
                shape = (first + value.shape[0], *value.shape[1:])
                self._buffers[name] = arena.far(name, shape, value.dtype, first)
                self.live[name] = self._buffers[name][first:]
            else:
                self._buffers[name] = self.live[name] = arena.tensor(name, value.shape, value.dtype)
        self._outputs = {
            name: arena.tensor(name, spec.shape, getattr(torch, spec.dtype)) for name, spec in materials.outputs.items()
        }
        self.become(case, materials)

    def holds(self, materials: Materials) -> bool:
        """Whether another case fits into these buffers, all but their leading dimension being equal."""
        inputs = all(
            _fits(value.shape, self.live[name].shape) and value.dtype == self.live[name].dtype
            for name, value in materials.inputs.items()
        )
        return inputs and all(
            _fits(spec.shape, self._outputs[name].shape) and str(self._outputs[name].dtype) == f"torch.{spec.dtype}"
            for name, spec in materials.outputs.items()
        )

    def become(self, case: Case[Any], materials: Materials) -> None:
        """Write another case into the same buffers; what it leaves of them is padding, NaN where that exists."""
        self._padded = self.materials is not materials
        self.case, self.materials = case, materials
        host = {name: value.clone() for name, value in materials.inputs.items()}
        fill_dead(host, materials.dead, self.fills)
        for table, first in self._first_page.items():
            host[table] += first
        self.inputs: dict[str, torch.Tensor] = {}
        for name, value in host.items():
            live = self.live[name]
            used = live[: value.shape[0]]
            if used.shape[0] < live.shape[0]:
                live[used.shape[0] :].fill_(float("nan") if live.is_floating_point() else 0)
            used.copy_(value)
            behind = live.shape[0] - value.shape[0]
            self.inputs[name] = self._buffers[name][: self._buffers[name].shape[0] - behind]
        self.pristine = {name: self.live[name].clone() for name in host}
        self.outputs = {name: self._outputs[name][: spec.shape[0]] for name, spec in materials.outputs.items()}
        self.fill_outputs(self.fills[Place.OUTPUTS])

    def fill_outputs(self, pattern: Pattern) -> None:
        """Fill the output buffers, padding included."""
        self.fills[Place.OUTPUTS] = pattern
        for buffer in self._outputs.values():
            fill_bytes(buffer, pattern)

    def fill_dead(self, place: Place, pattern: Pattern) -> None:
        """Fill the dead elements of the inputs that count as that place, where they lie."""
        self.fills[place] = pattern
        for part in self.materials.dead:
            if part.place is place:
                # The case may be a smaller one than the buffers were made for.
                used = self.live[part.tensor][: part.mask.shape[0]]
                fill_dead({part.tensor: used}, (part,), self.fills)
                self.pristine[part.tensor].copy_(self.live[part.tensor])

    def scramble(self, names: Sequence[str]) -> None:
        """Put plausible garbage into these inputs: finite numbers, and indices of 0."""
        for live in map(self.live.__getitem__, names):
            if live.is_floating_point():
                fill_bytes(live, Pattern.FINITE)
            else:
                live.zero_()

    @property
    def call(self) -> Call:
        """What the kernel is given."""
        return Call(
            case=self.case,
            device=self.device,
            inputs=self.inputs,
            outputs=self.outputs,
            workspace=self.workspaces,
            plan=self.plan_made,
            captured=self.captured,
            pdl=self.pdl,
            draw=self.draw,
        )

    def plan(self, earlier: Any = None) -> None:
        """Let the kernel plan, anew if it is given an earlier plan."""
        self.plan_made = earlier
        if self.kernel.plan:
            with blamed_on_the_kernel():
                self.plan_made = self.kernel.plan(self.call)
        self._planned = self.workspaces.position

    def launch(self) -> Any:
        """Launch without waiting; returns what the kernel returned."""
        with blamed_on_the_kernel():
            return self.kernel.launch(self.call)

    def relaunch(self, draw: int) -> Any:
        """Launch in the same buffers and with the same plan as number ``draw`` of a series, outputs filled anew."""
        self.draw = draw
        self.workspaces.restart(self._planned)
        self.fill_outputs(self.fills[Place.OUTPUTS])
        return self.launch()

    @property
    def mutated(self) -> tuple[str, ...]:
        """The inputs that do not hold any more what they should."""
        return tuple(
            name for name, live in self.live.items() if not torch.equal(as_bits(live), as_bits(self.pristine[name]))
        )

    def observed(self, returned: Any) -> Observation:
        """What a launch that is over has done; ``returned`` is what it returned."""
        mutated = self.mutated
        expected = expected_outputs(self.kernel, self.materials)
        damage = self._arena.damage()
        returned = self.clipped(returned)
        if problem := wrong_form(returned, expected, self.device):
            return Observation(plan=dict(self.fills), outputs={}, mutated=mutated, damage=damage, problem=problem)
        copies = {output: value.detach().to("cpu", copy=True) for output, value in returned.items()}
        return Observation(plan=dict(self.fills), outputs=copies, mutated=mutated, damage=damage)

    def clipped(self, returned: Any) -> Any:
        """Outputs without the padding of buffers that are larger than the case."""
        if not self._padded or not isinstance(returned, Mapping):
            return returned
        rows = {name: spec.shape[0] for name, spec in self.materials.outputs.items()}
        return {name: value[: rows[name]] if name in rows else value for name, value in returned.items()}


def _fits(shape: Sequence[int], room: Sequence[int]) -> bool:
    return len(shape) == len(room) and tuple(shape[1:]) == tuple(room[1:]) and tuple(shape[:1]) <= tuple(room[:1])


def expected_outputs(kernel: Kernel, materials: Materials) -> dict[str, OutputSpec]:
    """The outputs that the kernel says it returns."""
    return {n: spec for n, spec in materials.outputs.items() if kernel.returns is None or n in kernel.returns}


@contextmanager
def blamed_on_the_kernel() -> Iterator[None]:
    """Tell what a kernel raises from mistakes of our own, which nobody catches."""
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:
        raise KernelRaised(error) from error


def wrong_form(returned: object, expected: Mapping[str, OutputSpec], device: Device) -> str | None:
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
