"""Planted bugs in CUDA C++, each beside its healthy twin: the same source without the defect's macro."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import FORMATS, FP32, IEEE_FP32, Call, Case, Device, Kernel, LaunchContract, Numerics

from ..attention._axes import plain
from ..attention.paged_prefill import paged_prefill
from . import _cuda

if TYPE_CHECKING:
    import torch

Outputs = Mapping[str, "torch.Tensor"]

# Grids are made of the buffers' shapes, and the kernels read all lengths on the device.
CONTRACT = LaunchContract(captured="lengths")


def prefill(bug: str | None, call: Call) -> Outputs:
    """A block for each row and head."""
    _cuda.launch(call, "prefill", bug, _cuda.problem(call))
    return call.outputs


def split_prefill(bug: str | None, call: Call) -> Outputs:
    """Two blocks for each row and head; the last one merges what they left in the workspace."""
    return _in_splits(bug, call, call.workspace)


def common_prefill(bug: str | None, call: Call) -> Outputs:
    """The same. The bug: the workspace is one for all launches of the process, whatever their stream."""
    return _in_splits(None, call, _cuda.common(call.device.ordinal) if bug else call.workspace)


def _in_splits(bug: str | None, call: Call, workspace: Callable[..., torch.Tensor]) -> Outputs:
    import torch

    rows, heads, head_dim = call.inputs["q"].shape
    partial = workspace(4 * rows * heads * _cuda.SPLITS * (head_dim + 2)).view(torch.float32)
    counters = workspace(4 * rows * heads, zeroed=True).view(torch.int32)
    _cuda.launch(call, "split_prefill", bug, _cuda.problem(call, partial, counters), splits=_cuda.SPLITS)
    return call.outputs


def numerics(case: Case[Any], device: Device) -> Numerics:
    """Everything in fp32, rounded once; accurate exponentials and logarithms."""
    return Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=FP32, out=FORMATS[case.axes.dtype], lse_base="e")


def unsupported(case: Case[Any], device: Device) -> str | None:
    """A block has a thread for each channel, in whole warps. It knows no option."""
    dim = case.axes.head_dim
    if reason := plain(case, device):
        return reason
    if dim % 32 or dim > _cuda.MAX_HEAD_DIM:
        return f"head_dim {dim}; supported: multiples of 32 up to {_cuda.MAX_HEAD_DIM}"
    return None


def specialisation(case: Case[Any]) -> str:
    """What NVRTC compiles anew."""
    return case.axes.dtype


def pair(
    name: str, function: Callable[[str | None, Call], Outputs], contract: LaunchContract = CONTRACT
) -> tuple[Kernel, Kernel]:
    """The planted bug ``name``, and its healthy twin."""

    def kernel(kind: str, bug: str | None) -> Kernel:
        return Kernel(
            name=f"{name}[{kind}]",
            # An operator of its own: beside each other, they would be compared with each other.
            operator=replace(paged_prefill),
            launch=functools.partial(function, bug),
            numerics=numerics,
            unsupported=unsupported,
            devices=("cuda",),
            # griddepcontrol.wait, where there is a switch for it.
            min_sm=(9, 0) if contract.pdl else (0, 0),
            specialisation=specialisation,
            contract=contract,
        )

    return kernel("planted", name), kernel("twin", None)


# A tile of V is staged without zeros behind its last key, whose weight of 0 does not help against NaN.
z1, z1_twin = pair("z1", prefill)
# Sums in shared memory are cleared by warp 0 and read by the other warps, with no barrier between.
z3, z3_twin = pair("z3", prefill)
# A dependent launch reads q before it waits for the kernel ahead of it.
z5, z5_twin = pair("z5", prefill, replace(CONTRACT, pdl=True))
# A row of at most one key needs no merge, and leaves early: its counter is not cleared for the next launch.
z7, z7_twin = pair("z7", split_prefill, replace(CONTRACT, shares_workspace=True))
# Page number times stride in 32 bits.
z9, z9_twin = pair("z9", prefill)
# The entry behind the last page of the table is prefetched, and never used.
z10, z10_twin = pair("z10", prefill)
# Partial outputs are added to what the workspace holds.
z11, z11_twin = pair("z11", split_prefill, replace(CONTRACT, shares_workspace=True))
# Launches on two streams share a workspace that is nobody's.
common, common_twin = pair("common", common_prefill)
