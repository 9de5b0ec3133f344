"""The tensors of paged attention: how they lie in memory, and what of them is dead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kerneltest.model import DeadBytes, OutputSpec, Place

from ._axes import PagedPrefill


def queries(axes: PagedPrefill, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Q [total_qo, q_heads, d], a view that is contiguous only where nothing lies behind the heads."""
    return inputs["q"][:, : axes.q_heads]


def as_laid_out(axes: PagedPrefill, cache: torch.Tensor) -> torch.Tensor:
    """[pages, page_size, kv_heads, d] in the layout of the case, contiguous."""
    return cache.transpose(1, 2).contiguous() if axes.layout == "HND" else cache


def by_slot(axes: PagedPrefill, cache: torch.Tensor) -> torch.Tensor:
    """A cache of the case as a view [pages, page_size, kv_heads, d]."""
    return cache.transpose(1, 2) if axes.layout == "HND" else cache


def indptr(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def outputs(axes: PagedPrefill) -> dict[str, OutputSpec]:
    """``out`` [total_qo, q_heads, d_v] and, where it is asked for, ``lse`` [total_qo, q_heads]."""
    return specs(axes, (axes.total_qo, axes.q_heads))


def specs(axes: PagedPrefill, rows: tuple[int, ...]) -> dict[str, OutputSpec]:
    """``out`` [*rows, d_v] and, where it is asked for, ``lse`` [*rows]."""
    out = OutputSpec(shape=(*rows, axes.v_dim), dtype=axes.dtype)
    return {"out": out} | ({"lse": OutputSpec(shape=rows, dtype="float32")} if axes.return_lse else {})


def dead_bytes(
    axes: PagedPrefill, total: int, pages: Sequence[torch.Tensor], keys: Sequence[int]
) -> tuple[DeadBytes, ...]:
    """What no key lies in of a cache of ``total`` pages, and the heads behind those of q.

    ``pages`` and ``keys``: of each request the pages in order, and how many keys lie in them. Requests may share pages.
    """
    live = torch.zeros(total, axes.page_size, dtype=torch.bool)
    in_use = torch.zeros(total, 1, dtype=torch.bool)
    for own, count in zip(pages, keys, strict=True):
        live[own.long()] |= torch.arange(own.numel() * axes.page_size).view(-1, axes.page_size) < count
        in_use[own.long()] = True
    dead = [(Place.UNUSED_SLOTS, in_use & ~live), (Place.UNREFERENCED_PAGES, ~in_use & ~live)]
    found = [
        DeadBytes(place=place, tensor=tensor, mask=_laid_out(axes, mask))
        for place, mask in dead
        for tensor in ("k_pages", "v_pages")
        if bool(mask.any())
    ]
    if axes.q_width > axes.q_heads and axes.total_qo:
        behind = (torch.arange(axes.q_width) >= axes.q_heads).expand(axes.total_qo, -1)
        found.append(DeadBytes(place=Place.UNUSED_SLOTS, tensor="q", mask=behind))
    return tuple(found)


def _laid_out(axes: PagedPrefill, slots: torch.Tensor) -> torch.Tensor:
    """A mask of [pages, page_size] over the leading dimensions of a cache."""
    return slots.unsqueeze(1).expand(-1, axes.kv_heads, -1) if axes.layout == "HND" else slots
