"""Kernels that check all of their input but for one hole, beside a twin without one, and one that trusts its caller."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call, Kernel, LaunchContract

from ._gather import gather_sum, numerics, summed

if TYPE_CHECKING:
    import torch

# Half of it is a whole block, and what lies behind that a red zone of the same size.
SCRATCH = 512
# What an error leaves behind, in a kernel that does not tidy up.
left_behind = 0.0


def check(call: Call, *holes: str) -> None:
    """Everything about the call that can be wrong, but for the holes."""
    import torch

    x, axes, out = call.inputs, call.case.axes, call.outputs["out"]
    expected = {"rows": torch.float32, "indices": torch.int32, "indptr": torch.int32, "out": torch.float32}
    shapes = {"indices": (sum(axes.lengths),), "indptr": (len(axes.lengths) + 1,)}
    shapes |= {"rows": (axes.rows, axes.width), "out": (len(axes.lengths), axes.width)}
    for name, tensor in {**x, "out": out}.items():
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} must lie on the CPU, not on {tensor.device}")
        if tensor.dtype != expected[name] and "dtype" not in holes:
            raise TypeError(f"{name} must be {expected[name]}, not {tensor.dtype}")
        if tuple(tensor.shape) != shapes[name] and "shape" not in holes:
            raise ValueError(f"{name} must have shape {shapes[name]}, not {tuple(tensor.shape)}")
    if "offsets" not in holes:
        offsets = x["indptr"]
        if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()) or int(offsets[-1]) != len(x["indices"]):
            raise ValueError(f"indptr must rise from 0 to {len(x['indices'])}, not as {offsets.tolist()}")
    if "indices" not in holes and bool(((x["indices"] < 0) | (x["indices"] >= axes.rows)).any()):
        raise ValueError(f"indices must be from 0 to {axes.rows - 1}, not {x['indices'].tolist()}")


def healthy(call: Call) -> Mapping[str, torch.Tensor]:
    """Checks everything, and heeds strides."""
    check(call)
    return answer(call)


def answer(call: Call, *, scale: float | None = None, plus: float = 0.0) -> Mapping[str, torch.Tensor]:
    x, out = call.inputs, call.outputs["out"]
    scale = call.case.axes.scale if scale is None else scale
    for into, row in zip(out, summed(x["rows"], x["indices"], x["indptr"], scale), strict=False):
        into.copy_(row + plus)
    return call.outputs


def reinterprets(call: Call) -> Mapping[str, torch.Tensor]:
    """Takes the bits of other numbers of the same width for floats."""
    import torch

    check(call, "dtype")
    rows = call.inputs["rows"]
    if rows.element_size() != 4 or any(call.inputs[name].dtype != torch.int32 for name in ("indices", "indptr")):
        raise TypeError(f"rows must be float32, not {rows.dtype}, and indices and indptr int32")
    if call.outputs["out"].dtype != torch.float32:
        raise TypeError(f"out must be float32, not {call.outputs['out'].dtype}")
    seen = rows.view(torch.float32)
    return answer(_with(call, rows=seen))


def overreads(call: Call) -> Mapping[str, torch.Tensor]:
    """Reads as many rows as the axes say, whatever the tensor holds."""
    axes, x = call.case.axes, call.inputs
    rows = x["rows"]
    if tuple(rows.shape[1:]) == (axes.width,) and 0 < len(rows) < axes.rows:
        check(call, "shape")
        ctypes.string_at(rows.data_ptr(), 4 * axes.rows * axes.width)
        return answer(_with(call, indices=x["indices"].clamp(max=len(rows) - 1)))
    check(call)
    return answer(call)


def loops(call: Call) -> Mapping[str, torch.Tensor]:
    """Counts from each offset to the next until it is there."""
    check(call, "offsets")
    offsets = call.inputs["indptr"].tolist()
    for begin, end in itertools.pairwise(offsets):
        position = begin
        while position != end:
            position += 1
            time.sleep(0.001)
    return healthy(call)


def aborts(call: Call) -> Mapping[str, torch.Tensor]:
    """Ends the process on a negative index."""
    check(call, "indices")
    if bool((call.inputs["indices"] < 0).any()):
        os.abort()
    return healthy(call)


def remembers(call: Call) -> Mapping[str, torch.Tensor]:
    """Leaves something behind when it raises."""
    import torch

    global left_behind  # noqa: PLW0603
    try:
        check(call)
    except TypeError:
        left_behind = float(call.inputs["rows"].dtype == torch.float16)
        raise
    return answer(call, plus=left_behind)


def forgives(call: Call) -> Mapping[str, torch.Tensor]:
    """Takes a scale that is NaN for zero."""
    check(call)
    scale = call.case.axes.scale
    return answer(call, scale=0.0 if math.isnan(scale) else scale)


def flattens(call: Call) -> Mapping[str, torch.Tensor]:
    """Writes the answer as if its buffer had no gaps."""
    import torch

    check(call)
    out = call.outputs["out"]
    whole = torch.as_strided(out, (out.numel(),), (1,))
    x = call.inputs
    whole.copy_(torch.cat(list(summed(x["rows"], x["indices"], x["indptr"], call.case.axes.scale))))
    return call.outputs


def overfills(call: Call) -> Mapping[str, torch.Tensor]:
    """Writes all of the workspace that it asked for, whatever it was given."""
    scratch = call.workspace(SCRATCH)
    check(call)
    ctypes.memset(scratch.data_ptr(), 0, SCRATCH)
    return answer(call)


def mumbles(call: Call) -> Mapping[str, torch.Tensor]:
    """Is right to raise, but says nothing."""
    try:
        check(call)
    except (TypeError, ValueError):
        raise ValueError from None
    return answer(call)


def trusts(call: Call) -> Mapping[str, torch.Tensor]:
    """Looks at no value."""
    check(call, "offsets", "indices")
    return answer(call)


def _with(call: Call, **inputs: torch.Tensor) -> Call:
    from dataclasses import replace

    return replace(call, inputs={**call.inputs, **inputs})


def kernel(launch: Callable[[Call], Mapping[str, torch.Tensor]], end: str = "planted", **more: Any) -> Kernel:
    return Kernel(name=f"{launch.__name__}[{end}]", operator=gather_sum, launch=launch, numerics=numerics, **more)


reinterprets_planted = kernel(reinterprets)
overreads_planted = kernel(overreads)
loops_planted = kernel(loops)
aborts_planted = kernel(aborts)
remembers_planted = kernel(remembers)
forgives_planted = kernel(forgives)
flattens_planted = kernel(flattens)
overfills_planted = kernel(overfills)
healthy_twin = kernel(healthy, "twin")
mumbles_twin = kernel(mumbles, "twin")
trusts_twin = kernel(
    trusts,
    "twin",
    contract=LaunchContract(
        trusts={"index out of range": "values are not looked at", "indptr": "values are not looked at"}
    ),
)
