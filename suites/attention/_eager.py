"""Paged attention in torch's float32, one request after the other, with every option of ``paged_prefill``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from . import _masks
from ._alibi import slopes
from ._axes import PagedPrefill
from ._tensors import by_slot, queries


@dataclass(frozen=True)
class Part:
    """One request: its rows of the output, its tensors in fp32 with the heads in front, and which keys a row sees."""

    rows: slice
    q: torch.Tensor  # [q_heads, qo_len, d]
    k: torch.Tensor  # [q_heads, kv_len, d]
    v: torch.Tensor  # [q_heads, kv_len, d_v]
    seen: torch.Tensor  # [qo_len, kv_len]
    softcap: float = 0.0
    bias: torch.Tensor | None = None  # [q_heads, qo_len, kv_len], added to the scaled scores


def parts(axes: PagedPrefill, inputs: Mapping[str, torch.Tensor]) -> Iterator[Part]:
    """The requests of a case, their keys gathered, cut at kv_len and multiplied by their scales."""
    q = queries(axes, inputs)
    caches = [(by_slot(axes, inputs["k_pages"]), axes.k_scale), (by_slot(axes, inputs["v_pages"]), axes.v_scale)]
    row = page = 0
    for number, request in enumerate(axes.requests):
        pages = inputs["kv_indices"][page : page + axes.pages(request)].long()
        k, v = (
            cache[pages].float().flatten(0, 1)[: request.kv_len].repeat_interleave(axes.group, 1).transpose(0, 1)
            * scale
            for cache, scale in caches
        )
        rows = slice(row, row + request.qo_len)
        shown, bias = seen(axes, inputs, number), alibi(axes, number, q.device) if axes.alibi else None
        yield Part(rows, q[rows].float().transpose(0, 1), k, v, shown, axes.softcap, bias)
        row, page = rows.stop, page + len(pages)


def seen(axes: PagedPrefill, inputs: Mapping[str, torch.Tensor], number: int) -> torch.Tensor:
    """Which keys each query of a request sees, bool [qo_len, kv_len]."""
    request = axes.requests[number]
    keys = torch.arange(request.kv_len, device=inputs["q"].device)
    place = torch.arange(request.qo_len, device=keys.device).unsqueeze(-1) + request.kv_len - request.qo_len
    shown = mask_of(axes, inputs, number)
    if shown is None:
        shown = torch.ones(request.qo_len, request.kv_len, dtype=torch.bool, device=keys.device)
    if axes.causal:
        shown = shown & (keys <= place)
    return shown & (keys + axes.window_left >= place) if axes.window_left >= 0 else shown


def alibi(axes: PagedPrefill, number: int, device: torch.device) -> torch.Tensor:
    """What is added to the scores of a request, fp32 [q_heads, qo_len, kv_len]."""
    request = axes.requests[number]
    i = torch.arange(request.qo_len, device=device).unsqueeze(-1)
    distance = (torch.arange(request.kv_len, device=device) - i).float()
    return torch.tensor(slopes(axes.q_heads), device=device)[:, None, None] * distance


def mask_of(axes: PagedPrefill, inputs: Mapping[str, torch.Tensor], number: int) -> torch.Tensor | None:
    """The mask of a request, from the bits where they are packed."""
    if not axes.packed_mask:
        return _masks.masks(axes, inputs)[number]
    return _masks.unpack(inputs["packed_mask"], inputs["mask_indptr"][number], axes.requests[number])


def attend(part: Part, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [rows, heads, d_v] and the log-sum-exp [rows, heads] in fp32; rows without a key give 0 and -Inf."""
    s = part.q @ part.k.mT * scale
    if part.bias is not None:
        s = s + part.bias
    if part.softcap:
        s = part.softcap * torch.tanh(s / part.softcap)
    s = s.masked_fill(~part.seen, float("-inf"))
    if s.shape[-1] == 0:
        heads, rows, _ = part.q.shape
        return part.q.new_zeros(rows, heads, part.v.shape[-1]), part.q.new_full((rows, heads), float("-inf"))
    # Of a row without a key the maximum is -Inf, and -Inf minus that is NaN.
    p = torch.exp(s - s.amax(-1, keepdim=True).nan_to_num(neginf=0.0))
    total = p.sum(-1, keepdim=True)
    out = p @ part.v / total.clamp(min=torch.finfo(torch.float32).tiny)
    return out.transpose(0, 1), torch.logsumexp(s, -1).transpose(0, 1)
