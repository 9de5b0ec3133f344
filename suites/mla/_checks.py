"""What a kernel of this suite checks of its tensors before it reads or writes them."""

from __future__ import annotations

from collections.abc import Mapping

from kerneltest.model import Call

from ..attention._checks import require, require_number, require_within
from ._axes import Mla


def check_parameters(call: Call) -> None:
    """Raise ValueError if the tensors are not of the batch that the parameters speak of."""
    axes: Mla = call.case.axes
    found = (*call.inputs["q_nope"].shape[:2], call.inputs["q_pe"].shape[-1])
    if found != (axes.total_qo, axes.heads, axes.dims.rope_dim):
        raise ValueError(
            f"{axes.total_qo} queries of {axes.heads} heads with {axes.dims.rope_dim} rotated channels were announced, "
            f"got {found[0]}, {found[1]} and {found[2]}"
        )
    have = call.inputs["ckv_pages"].shape[1:]
    if have != (axes.page_size, axes.rank):
        raise ValueError(f"pages of {axes.page_size} latents of {axes.rank} channels were announced, got {list(have)}")
    referenced = sum(axes.pages(request) for request in axes.requests)
    if call.inputs["kv_indices"].numel() < referenced:
        raise ValueError(f"kv_indices must have {referenced} entries, got {call.inputs['kv_indices'].numel()}")


def check(call: Call, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check everything about a call that the host knows, and the page table's entries where the device may be asked.

    ``shapes``: of the floating-point tensors but for the cache, outputs included. Raises ValueError or TypeError.
    """
    import torch

    axes: Mla = call.case.axes
    tensors = {**call.inputs, **call.outputs}
    require_number("sm_scale", axes.scale)
    pages, batch = call.inputs["ckv_pages"].shape[0], len(axes.requests)
    referenced = sum(axes.pages(request) for request in axes.requests)
    every = {
        **shapes,
        "ckv_pages": (pages, axes.page_size, axes.rank),
        "kpe_pages": (pages, axes.page_size, axes.dims.rope_dim),
        "lse": (axes.total_qo, axes.heads),
        "qo_indptr": (batch + 1,),
        "kv_indptr": (batch + 1,),
        "kv_indices": (referenced,),
        "kv_len": (batch,),
    }
    floating, whole = getattr(torch, axes.dtype), ("qo_indptr", "kv_indptr", "kv_indices", "kv_len")
    dtypes = {name: torch.int32 if name in whole else floating for name in tensors}
    require(tensors, every, dtypes | {"lse": torch.float32})
    require_within("kv_indices", call.inputs["kv_indices"], pages)


def check_absorbed(call: Call) -> None:
    """:func:`check` for a call of ``mla_paged_attention``."""
    axes: Mla = call.case.axes
    rows = (axes.total_qo, axes.heads)
    check(call, {"q_nope": (*rows, axes.rank), "q_pe": (*rows, axes.dims.rope_dim), "out": (*rows, axes.rank)})
