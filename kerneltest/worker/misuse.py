"""Give a kernel a call in which one thing is wrong, and say what it made of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from kerneltest.model import (
    Case,
    Finding,
    Kernel,
    Materials,
    Misuse,
    Outcome,
    OutputSpec,
    Pattern,
    Place,
    Status,
    Unsupported,
)
from kerneltest.worker import device as devices
from kerneltest.worker.acceptance import fitted, right_for_what_it_is, wrongly_judged
from kerneltest.worker.differences import finding, out_of_bounds, unequal
from kerneltest.worker.execute import raised_by, refused
from kerneltest.worker.execution import Execution
from kerneltest.worker.memory import Arena, Damage
from kerneltest.worker.poison import fill_dead
from kerneltest.worker.rig import Rig
from kerneltest.worker.staging import KernelRaised, Staged, Workspaces, expected_outputs, wrong_form
from kerneltest.worker.tampering import LATE, Layout, Tampering, Tamperings, catalogue, placed

# What is wrong, where NaN may be handed on.
NAN = ("nan", "nan of a row")
# What is wrong, where the call may all the same be answered by what the tensor says now.
READ_AS_IT_IS = ("dtype", "shape", "value out of range")
# What Python, or torch, says when something went wrong that nobody had thought of. It names no argument.
HELPLESS = (
    "index out of range",
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "'NoneType' object",
    "CUDA error",
    "device-side assert",
    "pop from an empty",
    "() arg is an empty sequence",
    "math domain error",
    "No available kernel",
)
HELPLESS_TYPES = (KeyError, AttributeError, NameError, ZeroDivisionError, OverflowError, MemoryError, RecursionError)


def unclear(error: Exception) -> bool:
    """Whether an error says nothing that would help a caller to find what is wrong with the call."""
    text = str(error).strip()
    return (
        not any(character.isalpha() for character in text)
        or isinstance(error, HELPLESS_TYPES)
        or any(words in text for words in HELPLESS)
    )


class Lender(Workspaces):
    """Scratch memory that may be less than what was asked for."""

    def __init__(self, arena: Arena, pattern: Pattern, change: str = "") -> None:
        super().__init__(arena, pattern)
        self._change = change

    def __call__(self, nbytes: int, *, zeroed: bool = False) -> torch.Tensor:
        if self._change == "half":
            return super().__call__(nbytes // 2, zeroed=zeroed)
        if self._change == "late":
            return super().__call__(nbytes + LATE, zeroed=zeroed)[LATE:]
        return super().__call__(nbytes, zeroed=zeroed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a launch that raised nothing. ``outputs`` are on the host in the form of the case, and none if
    there is a ``problem`` with that; ``returned`` the same in the form that they had, where something was wrong: those
    that lay on the kernel's device.

    ``lent``: the outputs that the kernel returned in its caller's buffers. ``asked``: how often for workspace.
    """

    outputs: Mapping[str, torch.Tensor]
    returned: Mapping[str, torch.Tensor]
    problem: str | None
    mutated: tuple[str, ...]
    damage: tuple[Damage, ...]
    lent: tuple[str, ...]
    asked: int


class Bench:
    """A case of a kernel on which one thing after the other is made wrong.

    ``right``: what the kernel answers when nothing is. Raises :class:`KernelRaised` and :class:`Unsupported` if it
    answers nothing; :attr:`broken` says what is wrong with the answer.
    """

    def __init__(self, kernel: Kernel, case: Case[Any], rig: Rig) -> None:
        self.kernel, self.case, self.rig, self.device = kernel, case, rig, rig.device
        self.execution = Execution(kernel, case, rig)
        self.fills = self.execution.uniform(Pattern.NAN)
        materials = self.execution.materials
        self.inputs = {name: value.clone() for name, value in materials.inputs.items()}
        fill_dead(self.inputs, materials.dead, self.fills)
        self.right = self.answer(None)
        self.broken = self.right.problem or wrongly_judged(self.execution, self.right.outputs, self.fills)

    @cached_property
    def tamperings(self) -> Tamperings:
        """All that can be wrong here."""
        return self._catalogue(self.inputs)

    def _catalogue(self, inputs: Mapping[str, torch.Tensor]) -> Tamperings:
        outputs = self.execution.materials.outputs
        return catalogue(
            self.kernel,
            self.case,
            inputs,
            self.device,
            outputs={name: outputs[name] for name in self.right.lent},
            workspace=self.right.asked > 0,
        )

    def answer(self, tampering: Tampering | None) -> Answer:
        """Launch once. Raises what the kernel raises, as :class:`KernelRaised` or :class:`Unsupported`."""
        materials, misuse = self._materials(tampering), tampering.misuse if tampering else None
        change = misuse.change if misuse and misuse.role == "workspace" else ""
        with self.rig.memory.arena(self.case.guard) as arena:
            staged = Staged(
                self.kernel,
                tampering.case if tampering and tampering.case else self.case,
                materials,
                self.device,
                arena,
                self.fills,
                workspaces=Lender(arena, self.fills[Place.WORKSPACE], change),
            )
            if misuse and tampering and tampering.layout is not Layout.PLAIN:
                tensors = staged.inputs if misuse.role == "input" else staged.outputs
                tensors[misuse.argument] = placed(arena, tampering, self.device, Pattern.NAN)
            returned = self.execution.launched(staged, self.fills)
            return Answer(
                **self._read(returned, misuse),
                mutated=staged.mutated,
                damage=arena.damage(),
                lent=tuple(name for name, lent in staged.outputs.items() if _same_memory(returned, name, lent)),
                asked=staged.workspaces.position,
            )

    def _materials(self, tampering: Tampering | None) -> Materials:
        """What is staged. What a tampered tensor holds is written there, unless it has to lie in some other way."""
        inputs, outputs = dict(self.inputs), dict(self.execution.materials.outputs)
        if tampering and tampering.value is not None and tampering.layout is Layout.PLAIN:
            name, value = tampering.misuse.argument, tampering.value
            if tampering.misuse.role == "input":
                inputs[name] = value
            else:
                dtype = str(value.dtype).removeprefix("torch.")
                outputs[name] = OutputSpec(shape=tuple(value.shape), dtype=dtype)
        return Materials(inputs=inputs, dead=(), outputs=outputs)

    def _read(self, returned: Any, misuse: Misuse | None) -> dict[str, Any]:
        """The outputs on the host in the form of the case, and why they have another; and what they were before."""
        expected = expected_outputs(self.kernel, self.execution.materials)
        raw = {}
        if misuse and isinstance(returned, Mapping):
            tensors = {name: value for name, value in returned.items() if isinstance(value, torch.Tensor)}
            raw = {
                name: _on_the_host(value) for name, value in tensors.items() if value.device.type == self.device.kind
            }
            returned = dict(returned) | {
                name: fitted(value, expected[name], self.right.outputs[name], misuse, self.device)
                for name, value in tensors.items()
                if name in expected
            }
        problem = wrong_form(returned, expected, self.device)
        outputs = {} if problem else {name: _on_the_host(value) for name, value in returned.items()}
        return {"outputs": outputs, "problem": problem, "returned": raw}

    def _not_right(self, outputs: Mapping[str, torch.Tensor], *, nan: bool = False) -> str | None:
        """Why these outputs are not those of the case, in a sentence. With ``nan`` they may be NaN instead."""
        if nan:
            outputs = {
                name: torch.where(value.isnan(), self.right.outputs[name], value) for name, value in outputs.items()
            }
        differ = any(bool(unequal(value, self.right.outputs[name]).any()) for name, value in outputs.items())
        return wrongly_judged(self.execution, outputs, self.fills) if differ else None

    def _right_for_what_it_is(self, answer: Answer, misuse: Misuse) -> bool:
        # Without the poison in elements that mean nothing, which the reference is never given.
        materials = self.execution.materials
        value = self._catalogue(materials.inputs)[misuse.name].value
        assert value is not None
        inputs = {**materials.inputs, misuse.argument: value}
        return right_for_what_it_is(
            self.kernel,
            self.case,
            self.rig,
            replace(materials, inputs=inputs),
            answer.outputs,
            answer.returned,
            self.fills,
        )

    def finding(self, answer: Answer, tampering: Tampering) -> Finding | None:
        """What is wrong with an answer to a call in which something was wrong."""
        misuse = tampering.misuse
        if answer.damage:
            found = out_of_bounds(self.execution, answer.damage)
            return _about(replace(found, details=(*found.details, f"bytes of {misuse.argument}")), misuse)
        if answer.mutated:
            what = f"the launch changed its input {', '.join(answer.mutated)}"
            return _about(finding(self.execution, "InputMutated", key="", what=what), misuse)
        wrong = answer.problem or self._not_right(answer.outputs, nan=misuse.kind in NAN)
        if wrong is None:
            return None
        if misuse.role == "input" and misuse.kind in READ_AS_IT_IS and self._right_for_what_it_is(answer, misuse):
            return None
        return _about(
            finding(self.execution, "BadInputAccepted", key="", what=f"there was no error, but this: {wrong}"), misuse
        )

    def afterwards(self, misuse: Misuse) -> Finding | None:
        """What is wrong with the case itself, after a call in which something was wrong."""
        try:
            answer = self.answer(None)
            wrong = answer.problem or self._not_right(answer.outputs)
        except (KernelRaised, Unsupported) as error:
            wrong = f"it raised {error}"
        if wrong is None:
            return None
        return _about(
            finding(self.execution, "StaleState", key="", what=f"the same call without it was right before: {wrong}"),
            misuse,
            "after a call in which ",
        )


class Misuser:
    """Runs misuses in a worker; keeps the last case, since many follow each other on one."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._bench: tuple[str, Case[Any], Bench] | None = None

    def misuses(self, kernel: Kernel, case: Case[Any]) -> Outcome:
        """Run the case as it is, and say what can be wrong with it."""
        begun = time.perf_counter()
        bench = self._prepared(kernel, case)
        if isinstance(bench, Outcome):
            return bench
        found = [one.misuse for one in bench.tamperings.values()]
        seconds = time.perf_counter() - begun
        return Outcome(status=Status.PASSED, seconds=seconds, launches=bench.execution.launches, misuses=tuple(found))

    def run(self, kernel: Kernel, case: Case[Any], misuse: Misuse) -> Outcome:
        """Run the case with something wrong, and then as it is."""
        begun = time.perf_counter()
        bench = self._prepared(kernel, case)
        if isinstance(bench, Outcome):
            return bench
        tampering = bench.tamperings.get(misuse.name)
        if tampering is None:
            return Outcome(status=Status.UNSUPPORTED, reason=f"this call has no {misuse}")
        launches, outcome = bench.execution.launches, Outcome(status=Status.PASSED, reaction="right")
        try:
            if found := bench.finding(bench.answer(tampering), tampering):
                outcome = Outcome(status=Status.FAILED, finding=found)
        except Unsupported as error:
            outcome = _raised(error)
        except KernelRaised as raised:
            outcome = _raised(raised.error)
            if devices.context_is_lost(self._rig.device):
                lost = raised_by(kernel, raised.error, self._rig.device, 0, 0.0)
                assert lost.finding is not None
                return replace(lost, finding=_about(lost.finding, misuse), launches=1)
        if spoilt := bench.afterwards(misuse):
            # The answers of this worker are of no further use.
            outcome = Outcome(status=Status.FAILED, finding=outcome.finding or spoilt, fatal=True)
        launches = bench.execution.launches - launches
        return replace(outcome, seconds=time.perf_counter() - begun, launches=launches)

    def _prepared(self, kernel: Kernel, case: Case[Any]) -> Bench | Outcome:
        """The bench for a case, or how the case ended without anything being wrong."""
        if self._bench is not None and self._bench[:2] == (kernel.name, case):
            return self._bench[2]
        if (outcome := refused(kernel, case, self._rig.device)) is not None:
            return outcome
        try:
            bench = Bench(kernel, case, self._rig)
        except Unsupported as error:
            return Outcome(status=Status.UNSUPPORTED, reason=str(error))
        except KernelRaised as raised:
            return raised_by(kernel, raised.error, self._rig.device, 1, 0.0)
        if bench.broken:
            wrong = Finding(kind="Mismatch", kernel=kernel.name, key="", what=bench.broken)
            return Outcome(status=Status.FAILED, finding=wrong, launches=1)
        self._bench = (kernel.name, case, bench)
        return bench


def _raised(error: Exception) -> Outcome:
    text = " ".join(str(error).split()) or "no message"
    reaction = "raised without a clear message" if unclear(error) else "raised"
    return Outcome(status=Status.PASSED, reaction=reaction, reason=f"{type(error).__name__}: {text}")  # type: ignore[arg-type]


def _about(found: Finding, misuse: Misuse, before: str = "") -> Finding:
    """A finding as one of a misuse."""
    return replace(found, key=misuse.key, culprit=f"{before}{misuse}")


def _on_the_host(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True)


def _same_memory(returned: Any, name: str, lent: torch.Tensor) -> bool:
    if not isinstance(returned, Mapping) or not isinstance(returned.get(name), torch.Tensor):
        return False
    value: torch.Tensor = returned[name]
    return bool(value.numel()) and value.device == lent.device and value.data_ptr() == lent.data_ptr()
