"""What can be wrong with a call, derived from the tensors of one that is right, whatever the kernel."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, Literal

import torch

from kerneltest.model import Case, Device, Kernel, Misuse, OutputSpec, Pattern
from kerneltest.worker.acceptance import same_forms
from kerneltest.worker.memory import Arena
from kerneltest.worker.poison import fill_bytes

# Far enough behind the end of a small tensor to be in nobody's memory, and not enough to ask for a machine's memory.
FAR = 1 << 20
# Bytes: vectors of floats are loaded from multiples of it.
ALIGNED = 16
# A workspace that begins so many bytes late still holds floats, but no vectors of them.
LATE = 4
# Another format of the same width, and a wider one. Then the integers of the same width.
FLOATS = {
    torch.bfloat16: (torch.float16, torch.float32),
    torch.float16: (torch.bfloat16, torch.float32),
    torch.float32: (torch.float16, torch.float64),
    torch.float64: (torch.float32,),
    torch.float8_e4m3fn: (torch.float8_e5m2, torch.bfloat16),
    torch.float8_e5m2: (torch.float8_e4m3fn, torch.bfloat16),
}
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WHOLE = {
    torch.int32: (torch.int64, torch.float32),
    torch.int64: (torch.int32, torch.float64),
    torch.int16: (torch.int32, torch.float16),
    torch.int8: (torch.int32, torch.float32),
    torch.uint8: (torch.int32, torch.float32),
    torch.bool: (torch.uint8, torch.float32),
}


class Layout(Enum):
    """How a tensor lies in memory. STRIDED: every second element of the last dimension; GAPS: rows that are apart."""

    PLAIN = "plain"
    STRIDED = "strided"
    GAPS = "gaps"
    MISALIGNED = "misaligned"
    ELSEWHERE = "elsewhere"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tampering:
    """A misuse, and the call that it stands for.

    ``value``: what the argument is on the host, if it is a tensor; of an output shape and dtype alone. ``layout``: how
    it lies on the device. ``case``: what the kernel is told instead of the case, if the argument is a parameter.
    """

    misuse: Misuse
    value: torch.Tensor | None = None
    layout: Layout = Layout.PLAIN
    case: Case[Any] | None = None


Tamperings = Mapping[tuple[str, str, str, str], Tampering]


def catalogue(
    kernel: Kernel,
    case: Case[Any],
    inputs: Mapping[str, torch.Tensor],
    device: Device,
    *,
    outputs: Mapping[str, OutputSpec],
    workspace: bool,
) -> Tamperings:
    """Everything that can be wrong with a call, by the names of the misuses.

    ``inputs``: the host tensors; those that the launch copies into an output are left alone. ``outputs``: those that
    the kernel writes to buffers of its caller's. ``workspace``: whether it asks for any.
    """
    found = [
        *_of_inputs(kernel, inputs, device),
        *_of_values(kernel, case, inputs),
        *(one for name, spec in outputs.items() for one in _of_tensor("output", name, _empty(spec), device)),
        *_of_parameters(kernel, case, inputs, device),
        *(_of_workspace() if workspace else ()),
    ]
    copied = kernel.contract.overwrites
    return {one.misuse.name: one for one in found if one.misuse.role != "input" or one.misuse.argument not in copied}


def placed(arena: Arena, tampering: Tampering, device: Device, pattern: Pattern) -> torch.Tensor:
    """The tensor of a tampering in its layout, what lies between its elements filled with the pattern."""
    name, value = tampering.misuse.argument, tampering.value
    assert value is not None
    shape, dtype = tuple(value.shape), value.dtype
    if tampering.layout is Layout.ELSEWHERE:
        return value.to(_elsewhere(device), copy=True)
    if tampering.layout is Layout.MISALIGNED:
        step = ALIGNED // dtype.itemsize
        whole = arena.tensor(name, (value.numel() + step,), dtype)
        late = next(n for n in range(step + 1) if (whole.data_ptr() + (n - 1) * dtype.itemsize) % ALIGNED == 0)
        part = whole[late : late + value.numel()].view(shape)
    elif tampering.layout is Layout.PLAIN:
        whole = part = arena.tensor(name, shape, dtype)
    else:
        whole = arena.tensor(name, (*shape[:-1], 2 * shape[-1]), dtype)
        part = whole[..., ::2] if tampering.layout is Layout.STRIDED else whole[..., : shape[-1]]
    fill_bytes(whole, pattern)
    if tampering.misuse.role == "input":
        part.copy_(value)
    return part


def _empty(spec: OutputSpec) -> torch.Tensor:
    return torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))


def _elsewhere(device: Device) -> str:
    return "cpu" if device.kind == "cuda" else "meta"


def _of_inputs(kernel: Kernel, inputs: Mapping[str, torch.Tensor], device: Device) -> Iterator[Tampering]:
    """What can be wrong with each input. Fewer rows of what indices or offsets point into are a matter of those."""
    addressed = [target for name, targets in _addressed(kernel).items() if name in inputs for target in targets]
    pointed = {into: "index out of range" for into, dim in addressed if dim == 0}
    if kernel.operator.paging is not None:
        pointed[kernel.operator.paging.table] = "indptr"
    for name, value in inputs.items():
        for one in _of_tensor("input", name, value, device, sums_to_1=name in kernel.operator.distributions):
            kind, now = one.misuse.kind, one.value.shape if one.value is not None else value.shape
            if now[1:] == value.shape[1:] and now[0] < value.shape[0]:
                kind = pointed.get(name, kind)
            elif name in kernel.operator.distributions and now[:-1] == value.shape[:-1] and now[-1] < value.shape[-1]:
                kind = "domain"
            yield dataclasses.replace(one, misuse=dataclasses.replace(one.misuse, kind=kind))


def _of_tensor(
    role: Literal["input", "output"], name: str, value: torch.Tensor, device: Device, *, sums_to_1: bool = False
) -> Iterator[Tampering]:
    """What can be wrong with any tensor; one without elements has nothing that could be read wrongly.

    ``sums_to_1``: its rows are probability distributions.
    """
    if value.numel() == 0:
        return

    def tampered(kind: str, change: str, says: str, **more: Any) -> Tampering:
        benign = more.pop("benign", False)
        misuse = Misuse(role=role, argument=name, kind=kind, change=change, says=says, benign=benign)
        return Tampering(misuse=misuse, **{"value": value, **more})

    had = _dtype(value)
    for dtype in _other_dtypes(value.dtype):
        converted = _converted(value, dtype, sums_to_1=sums_to_1)
        same = dtype.is_floating_point == value.dtype.is_floating_point and _equal(converted.to(value.dtype), value)
        is_now = _dtype(converted)
        yield tampered(
            "dtype", is_now, f"is {is_now} instead of {had}", value=converted, benign=same and role == "input"
        )
    where = _elsewhere(device)
    yield tampered("device", where, f"lies on {where} instead of {device.kind}", layout=Layout.ELSEWHERE)
    for change, reshaped in _other_shapes(value):
        says = f"has shape {list(reshaped.shape)} instead of {list(value.shape)}"
        yield tampered("shape", change, says, value=reshaped)
    if value.shape[-1] > 1:
        yield tampered("strides", "strided", "has gaps between its elements", layout=Layout.STRIDED, benign=True)
    if value.shape[:-1].numel() > 1:
        yield tampered("strides", "gaps", "has gaps between its rows", layout=Layout.GAPS, benign=True)
    if value.element_size() < ALIGNED:
        says = f"begins {value.element_size()} bytes behind a multiple of {ALIGNED}"
        yield tampered("alignment", "late", says, layout=Layout.MISALIGNED, benign=True)


def _other_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    if dtype in FLOATS:
        return (*FLOATS[dtype], INTEGERS[dtype.itemsize])
    return WHOLE.get(dtype, ())


def _converted(value: torch.Tensor, dtype: torch.dtype, *, sums_to_1: bool) -> torch.Tensor:
    """The same numbers, as far as the dtype can hold them, and such that a call with them still has an answer.

    Of a distribution all that integers can hold is its most probable token; a number for each row, such as a p, is
    rounded up, since 0 would leave nothing.
    """
    if not value.dtype.is_floating_point or dtype.is_floating_point:
        return value.to(dtype)
    if sums_to_1:
        return torch.zeros_like(value, dtype=dtype).scatter_(-1, value.argmax(-1, keepdim=True), 1)
    whole = value.double().nan_to_num(0.0, 0.0, 0.0).clamp(-100, 100)
    return (whole.ceil() if value.dim() == 1 else whole.round()).to(dtype)


def _other_shapes(value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for dim, size in enumerate(value.shape):
        yield f"dimension {dim} is one less", value.narrow(dim, 0, size - 1).contiguous()
    if value.dtype.is_floating_point:
        row = torch.full((1, *value.shape[1:]), float("nan"), dtype=torch.float64).to(value.dtype)
    else:
        row = value[-1:]  # an index that is there already, and offsets that add nothing
    yield "one row more", torch.cat([value, row])
    if value.shape[0] > 1:
        yield "empty", value[:0]
    if value.dim() > 1:
        yield "one dimension less", value.flatten(-2)
    yield "one dimension more", value.unsqueeze(0)


def _of_values(kernel: Kernel, case: Case[Any], inputs: Mapping[str, torch.Tensor]) -> Iterator[Tampering]:
    """What can be wrong with the values of indices, offsets, other integers, and parameters that lie in a tensor."""
    ends = _ends(kernel, case, inputs)
    for name, value in inputs.items():
        if value.numel() == 0:
            continue

        def tampered(
            kind: str,
            says: str,
            change: Callable[[torch.Tensor], object],
            name: str = name,
            value: torch.Tensor = value,
        ) -> Tampering:
            changed = value.clone(memory_format=torch.contiguous_format)
            change(changed.view(-1))
            misuse = Misuse(role="input", argument=name, kind=kind, change=says, says=says)
            return Tampering(misuse=misuse, value=changed)

        if value.dtype.is_floating_point:
            if value.dim() == 1:  # one number for each row; what has more dimensions is data, where NaN has a meaning
                yield tampered("nan of a row", "begins with NaN", lambda flat: _set(flat, 0, float("nan")))
        elif value.dtype in (torch.int32, torch.int64):
            if name in ends:
                kind, end = "index out of range", ends[name]
                yield tampered(kind, "begins with -1", lambda flat: _set(flat, 0, -1))
                for far in (0, FAR):
                    says = f"begins with {end + far}, of {end}"
                    yield tampered(kind, says, lambda flat, index=end + far: _set(flat, 0, index))  # type: ignore[misc]
            elif _is_indptr(value, inputs, name):
                last = int(value[-1])
                if last > 0:
                    yield tampered("indptr", "falls", lambda flat: flat.copy_(flat.flip(0)))
                yield tampered("indptr", f"ends with {last + 1}, of {last}", lambda flat: _set(flat, -1, last + 1))  # noqa: B023
            else:
                for odd in (-1, FAR):
                    yield tampered(
                        "value out of range",
                        f"begins with {odd}",
                        lambda flat, odd=odd: _set(flat, 0, odd),  # type: ignore[misc]
                    )


def _set(flat: torch.Tensor, position: int, number: float) -> None:
    flat[position] = number


def _ends(kernel: Kernel, case: Case[Any], inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The inputs that hold indices, each with the first one that is too large."""
    counted = {
        name: many(case) for name, many in kernel.operator.addresses.items() if name in inputs and callable(many)
    }
    return counted | {
        name: min(inputs[into].shape[dim] for into, dim in targets if into in inputs)
        for name, targets in _addressed(kernel).items()
        if name in inputs and any(into in inputs for into, _ in targets)
    }


def _addressed(kernel: Kernel) -> dict[str, list[tuple[str, int]]]:
    """The inputs that hold indices into others, each with the inputs that they count along, and the dimension."""
    operator = kernel.operator
    addressed = {
        name: [(into, 0) if isinstance(into, str) else into]
        for name, into in operator.addresses.items()
        if not callable(into)
    }
    if operator.paging is not None:
        addressed[operator.paging.table] = [(pages, 0) for pages in operator.paging.pages]
    return addressed


def _is_indptr(value: torch.Tensor, inputs: Mapping[str, torch.Tensor], name: str) -> bool:
    """Whether it looks like offsets: from 0 to the number of rows of another input, never falling."""
    if value.dim() != 1 or len(value) < 2 or int(value[0]) != 0 or bool((value.diff() < 0).any()):
        return False
    return any(int(value[-1]) == other.shape[0] for key, other in inputs.items() if key != name)


def _of_parameters(
    kernel: Kernel, case: Case[Any], inputs: Mapping[str, torch.Tensor], device: Device
) -> Iterator[Tampering]:
    """Axes that are NaN, or that contradict the shapes of the tensors.

    Left out: axes that make no case, cases that the kernel says it does not support, and those for which something else
    would have to be compiled.
    """
    hints = typing.get_type_hints(type(case.axes))
    for field in dataclasses.fields(case.axes):
        had = getattr(case.axes, field.name)
        is_float = float in (hints[field.name], *typing.get_args(hints[field.name]))
        if not is_float and (isinstance(had, bool) or not isinstance(had, int)):
            continue
        value = float("nan") if is_float else had + 1
        try:
            other = dataclasses.replace(case, axes=dataclasses.replace(case.axes, **{field.name: value}))
            if kernel.unsupported(other, device) or kernel.specialisation(other) != kernel.specialisation(case):
                continue
            if not is_float and same_forms(kernel.operator.materialize(other).inputs, inputs):
                continue  # another call that makes sense
        except Exception:  # noqa: S112  (an operator may say in any way that there is no such case)
            continue
        misuse = Misuse(
            role="parameter",
            argument=field.name,
            kind="nan" if is_float else "parameter",
            change=str(value),
            says="is NaN" if is_float else f"is {value} where the tensors have {had}",
        )
        yield Tampering(misuse=misuse, case=other)


def _of_workspace() -> Iterator[Tampering]:
    for change, says in (
        ("half", "has half of the bytes that were asked for"),
        ("late", f"begins {LATE} bytes behind an aligned address"),
    ):
        yield Tampering(
            misuse=Misuse(role="workspace", argument="workspace", kind="workspace", change=change, says=says)
        )


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    wide = [value.double() for value in (a, b)]
    return torch.equal(*(value.nan_to_num(0.0) for value in wide)) and torch.equal(*(value.isnan() for value in wide))
