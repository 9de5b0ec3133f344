"""Block-sparse attention in torch's float32: the blocks written out as a mask of everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kerneltest.model import FORMATS, FP32, IEEE_FP32, Call, Case, Device, Kernel, LaunchContract, Numerics

from . import torch_eager
from ._block_sparse_axes import BlockSparse
from ._checks import require, require_number, require_within
from .block_sparse import block_sparse

if TYPE_CHECKING:
    import torch


def launch(call: Call) -> Mapping[str, torch.Tensor]:
    """All rows at once."""
    import torch

    from . import _eager

    check(call)
    axes, x, outputs = call.case.axes, call.inputs, call.outputs
    q, k, v = (x[name].float().transpose(0, 1) for name in ("q", "k", "v"))
    mask = visible(axes, x)
    # What nobody sees may be NaN, and 0 times NaN is NaN.
    k, v = (torch.where(mask.any(0)[:, None], t, 0).repeat_interleave(axes.group, 0) for t in (k, v))
    out, lse = _eager.attend(_eager.Part(slice(0, axes.rows), q, k, v, mask), axes.scale)
    outputs["out"].copy_(out.to(outputs["out"].dtype))
    outputs["lse"].copy_(lse)
    return outputs


def visible(axes: BlockSparse, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The keys that each query sees, [rows, columns], from the tables on the device."""
    import torch

    count = x["indptr"].long().diff()
    down = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    shape = (axes.blocks_down, axes.blocks_across, axes.block_rows, axes.block_columns)
    blocks = torch.zeros(shape, dtype=torch.bool, device=count.device)
    blocks[down, x["indices"].long()] = x.get("mask", torch.tensor(True, device=count.device))
    return blocks.transpose(1, 2).reshape(-1, axes.columns)[: axes.rows]


def check(call: Call) -> None:
    """Raise ValueError or TypeError that names the first tensor of another shape, dtype or device than the rest."""
    import torch

    axes: BlockSparse = call.case.axes
    blocks = call.inputs["indices"].numel()
    shapes: dict[str, tuple[int, ...]] = {
        "q": (axes.rows, axes.q_heads, axes.head_dim),
        "k": (axes.columns, axes.kv_heads, axes.head_dim),
        "v": (axes.columns, axes.kv_heads, axes.head_dim),
        "indptr": (axes.blocks_down + 1,),
        "indices": (-1,),
        "mask": (blocks, axes.block_rows, axes.block_columns),
        "out": (axes.rows, axes.q_heads, axes.head_dim),
        "lse": (axes.rows, axes.q_heads),
    }
    dtypes = dict.fromkeys(shapes, getattr(torch, axes.dtype))
    dtypes |= {"lse": torch.float32, "mask": torch.bool, "indptr": torch.int32, "indices": torch.int32}
    require({**call.inputs, **call.outputs}, shapes, dtypes)
    require_number("sm_scale", axes.scale)
    indptr = call.inputs["indptr"]
    if int(indptr[0]) != 0 or int(indptr[-1]) != blocks or bool((indptr.diff() < 0).any()):
        raise ValueError(f"indptr must rise from 0 to the {blocks} entries of indices, got {indptr.tolist()[:8]}")
    require_within("indices", call.inputs["indices"], axes.blocks_across)


def numerics(case: Case[Any], device: Device) -> Numerics:
    """Everything in fp32, rounded once."""
    fmt = FORMATS[case.axes.dtype]
    return Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=FP32, out=fmt, tile=torch_eager.ALL_KEYS, lse_base="e")


masked = Kernel(
    name="torch.block_sparse[eager]",
    operator=block_sparse,
    launch=launch,
    numerics=numerics,
    inexact={name: why for name, why in torch_eager.eager.inexact.items() if name == "head_permutation"},
    contract=LaunchContract(),  # tables are read on the host
)
