"""Which answers to a call in which something is wrong are right all the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from kerneltest.model import Case, Device, Kernel, Materials, Misuse, OutputSpec
from kerneltest.worker.checks import wrong
from kerneltest.worker.execution import Execution
from kerneltest.worker.poison import Plan
from kerneltest.worker.rig import Rig
from kerneltest.worker.staging import Observation, expected_outputs, wrong_form

Tensors = Mapping[str, torch.Tensor]
HOST = Device(kind="cpu", ordinal=0, name="", sm=(0, 0), units=1)
# The dtypes that an operator may have among its axes.
DTYPES = ("bfloat16", "float16", "float32", "float64")


def fitted(value: torch.Tensor, spec: OutputSpec, right: torch.Tensor, misuse: Misuse, device: Device) -> torch.Tensor:
    """An output in the form that the case has, where it differs only by what the wrong thing means if it is obeyed.

    ``right``: the output if nothing is wrong.
    """
    dtype = getattr(torch, spec.dtype)
    if misuse.kind == "dtype":
        return value.to(dtype)
    if misuse.role != "input":
        return value[: spec.shape[0]] if misuse.kind == "shape" and value.shape[1:] == right.shape[1:] else value
    if misuse.kind == "device" and value.device.type != device.kind:
        # An answer without numbers, to numbers that are not there.
        value = right if value.is_meta and value.shape == right.shape and value.dtype == right.dtype else value
        return value if value.is_meta else value.to(device.torch_name)
    if misuse.kind != "shape" or value.dtype != dtype:
        return value
    if value.numel() == right.numel():
        return value.reshape(right.shape)  # with one dimension more or less
    if not value.shape:
        return value
    if value.shape[1:] == right.shape[1:] and value.shape[0] < right.shape[0]:
        # Fewer rows are answered by fewer rows; the others are nobody's concern.
        return torch.cat([value, right[value.shape[0] :].to(value.device)])
    return value[: right.shape[0]] if value.shape[1:] == right.shape[1:] else value


def wrongly_judged(execution: Execution, outputs: Tensors, fills: Plan) -> str | None:
    """Why these are not the outputs of a case, in a sentence; None if they are."""
    found = wrong(execution, Observation(plan=fills, outputs=outputs, mutated=()))
    return ", ".join([found.what, *found.details]) if found else None


def right_for_what_it_is(
    kernel: Kernel, case: Case[Any], rig: Rig, materials: Materials, outputs: Tensors, returned: Tensors, fills: Plan
) -> bool:
    """Whether an answer is that of the tensors as they are now, as the operator's reference reads them.

    ``materials`` hold those tensors. ``outputs``: the answer in the form of the case, if it has that; ``returned`` as
    it was given, on the host. Where the tensors are those of another case, its form counts as well.
    """
    found = [(case, outputs)] if outputs else []
    for other in other_cases(case):
        try:
            theirs = kernel.operator.materialize(other)
            if not same_forms(theirs.inputs, materials.inputs):
                continue
            if wrong_form(returned, expected_outputs(kernel, theirs), HOST):
                continue
        except Exception:  # noqa: S112  (an operator may say in any way that there is no such case)
            continue
        found.append((other, returned))
    return any(_is_right(kernel, candidate, rig, materials, seen, fills) for candidate, seen in found)


def _is_right(kernel: Kernel, case: Case[Any], rig: Rig, materials: Materials, outputs: Tensors, fills: Plan) -> bool:
    try:
        return wrongly_judged(Execution(kernel, case, rig, materials), outputs, fills) is None
    except Exception:  # the reference may not be able to read such tensors at all
        return False


def other_cases(case: Case[Any]) -> Iterator[Case[Any]]:
    """Cases that differ by one in a number, or in a dtype. Not all of them may make sense."""
    for field in dataclasses.fields(case.axes):
        had = getattr(case.axes, field.name)
        others: tuple[object, ...] = ()
        if had in DTYPES:
            others = tuple(name for name in DTYPES if name != had)
        elif isinstance(had, int) and not isinstance(had, bool):
            others = (had - 1, had + 1)
        for value in others:
            try:
                axes = dataclasses.replace(case.axes, **{field.name: value})
            except ValueError:
                continue
            yield dataclasses.replace(case, axes=axes)


def same_forms(one: Tensors, other: Tensors) -> bool:
    """Whether tensors have the same names, shapes and dtypes."""
    return one.keys() == other.keys() and all(
        (value.shape, value.dtype) == (other[name].shape, other[name].dtype) for name, value in one.items()
    )
