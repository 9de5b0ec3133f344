"""What kernels of ours check of a call before they read or write anything: the example for those of others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kerneltest.model import Call

from ._axes import PagedPrefill

if TYPE_CHECKING:
    import torch

INDICES = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len", "mask_indptr")


def check_paged(call: Call, *names: str) -> None:
    """Check the inputs and outputs of paged attention that a kernel is going to touch, against the axes of the case.

    Raises ValueError or TypeError that names the first that is wrong. What integers hold is not looked at.
    """
    import torch

    axes: PagedPrefill = call.case.axes
    batch, pages, floating = len(axes.requests), call.inputs["k_pages"].shape[0], getattr(torch, axes.dtype)
    slots = (axes.kv_heads, axes.page_size) if axes.layout == "HND" else (axes.page_size, axes.kv_heads)
    shapes: dict[str, tuple[int, ...]] = {
        "q": (axes.total_qo, axes.q_width, axes.head_dim),
        "k_pages": (pages, *slots, axes.head_dim),
        "v_pages": (pages, *slots, axes.v_dim),
        "qo_indptr": (batch + 1,),
        "kv_indptr": (batch + 1,),
        "kv_indices": (sum(map(axes.pages, axes.requests)),),
        "kv_last_page_len": (batch,),
        "custom_mask": (axes.mask_bits,),
        "packed_mask": (-1,),
        "mask_indptr": (batch + 1,),
        "out": (axes.total_qo, axes.q_heads, axes.v_dim),
        "lse": (axes.total_qo, axes.q_heads),
    }
    dtypes: dict[str, torch.dtype | Sequence[torch.dtype]] = dict.fromkeys(shapes, floating)
    dtypes |= dict.fromkeys(INDICES, (torch.int32, torch.int64))
    dtypes |= dict.fromkeys(("k_pages", "v_pages"), getattr(torch, axes.kv_format))
    dtypes |= {"lse": torch.float32, "custom_mask": torch.bool, "packed_mask": torch.uint8}
    tensors = {**call.inputs, **call.outputs}
    require({name: tensors[name] for name in names if name in tensors}, shapes, dtypes)
    require_number("sm_scale", axes.scale)


def require_dense(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError for the first tensor that has gaps between its elements or rows."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")


def require(
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, torch.dtype | Sequence[torch.dtype]],
) -> None:
    """Raise ValueError or TypeError that names the first tensor of another shape, dtype or device than the rest needs.

    All lie on the device of the first. A dimension of -1 may have any size. ``dtypes``: one for each, or several.
    """
    first = next(iter(tensors))
    device = tensors[first].device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} lies on {tensor.device}, and {first} on {device}")
        wanted = dtypes[name]
        valid = wanted if isinstance(wanted, Sequence) else (wanted,)
        if tensor.dtype not in valid:
            raise TypeError(f"{name} must be {' or '.join(map(str, valid))}, got {tensor.dtype}")
        shape = shapes[name]
        if tensor.dim() != len(shape) or any(
            want not in (-1, have) for want, have in zip(shape, tensor.shape, strict=True)
        ):
            raise ValueError(f"{name} must have shape {_worded(shape)}, got {list(tensor.shape)}")


def require_rows(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError for gaps between the elements of the last dimension; other strides are free."""
    if tensor.stride(-1) != 1:
        raise ValueError(f"the last dimension of {name} must be contiguous, its stride is {tensor.stride(-1)}")


def require_number(name: str, value: float) -> None:
    """Raise ValueError for NaN and ±Inf."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def require_within(name: str, indices: torch.Tensor, end: int) -> None:
    """Raise ValueError for an index that is not from 0 to ``end`` - 1. Waits for the device, which cannot be done while
    a CUDA graph is captured: then nothing is checked.
    """
    if _is_captured(indices):
        return
    if indices.numel() and bool(((indices < 0) | (indices >= end)).any()):
        raise ValueError(f"{name} must be from 0 to {end - 1}, got {int(indices.min())} to {int(indices.max())}")


def require_bits(call: Call) -> None:
    """Raise ValueError for a packed mask that begins before the first byte, or ends behind the last. Waits for the
    device, as :func:`require_within` does.
    """
    axes, inputs = call.case.axes, call.inputs
    if axes.packed_mask and not _is_captured(inputs["mask_indptr"]):
        end = len(inputs["packed_mask"])
        for begin, request in zip(inputs["mask_indptr"].tolist(), axes.requests, strict=False):
            if begin < 0 or begin + -(-request.qo_len * request.kv_len // 8) > end:
                raise ValueError(
                    f"mask_indptr: a mask of {request.qo_len} x {request.kv_len} bits begins at byte {begin} of {end}"
                )


def _is_captured(tensor: torch.Tensor) -> bool:
    import torch

    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _worded(shape: Sequence[int]) -> str:
    return f"[{', '.join('any' if size < 0 else str(size) for size in shape)}]"
