"""Attention of one request in torch's float32, step by step: what the torch kernels of this suite are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Part:
    """One request: its rows of the output, its queries, the keys that it has, and which of them each query sees."""

    rows: slice
    q: torch.Tensor  # [rows, q_heads, d]
    k: torch.Tensor  # [keys, kv_heads, d]
    v: torch.Tensor  # [keys, kv_heads, d_v]
    seen: torch.Tensor  # [rows, keys]


def dense_parts(axes: Any, inputs: Mapping[str, torch.Tensor]) -> Iterator[Part]:
    """The requests of a ragged batch, or the single one of a case without ``qo_indptr``."""
    q = inputs["q"] if inputs["q"].dim() == 3 else inputs["q"].unsqueeze(0)
    k, v = inputs["k"], inputs["v"]
    qo, kv = [0, len(q)], [0, len(k)]
    if "qo_indptr" in inputs:
        qo, kv = inputs["qo_indptr"].tolist(), inputs["kv_indptr"].tolist()
    for number in range(len(qo) - 1):
        rows, keys = slice(qo[number], qo[number + 1]), slice(kv[number], kv[number + 1])
        yield part(axes, rows, q[rows], k[keys], v[keys])


def paged_parts(axes: Any, inputs: Mapping[str, torch.Tensor]) -> Iterator[Part]:
    """The requests of a paged decode, one query each, their keys gathered and cut at their length."""
    table, lengths = inputs["kv_indptr"].tolist(), inputs["kv_last_page_len"].tolist()
    for number, last in enumerate(lengths):
        own = inputs["kv_indices"][table[number] : table[number + 1]].long()
        keys = (len(own) - 1) * axes.page_size + last if len(own) else 0
        k, v = (inputs[name][own].flatten(0, 1)[:keys] for name in ("k_pages", "v_pages"))
        rows = slice(number, number + 1)
        yield part(axes, rows, inputs["q"][rows], k, v)


def part(axes: Any, rows: slice, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Part:
    """A request whose causal mask, if it has one, is aligned at the bottom right."""
    seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
    return Part(rows, q, k, v, seen.tril(len(k) - len(q)) if axes.causal else seen)


def attend(part: Part, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [rows, q_heads, d_v] and lse [rows, q_heads] (base e) in float32; a row without a key gives 0 and -Inf."""
    group = part.q.shape[1] // part.k.shape[1]
    q = part.q.float().transpose(0, 1)
    k, v = (x.float().repeat_interleave(group, 1).transpose(0, 1) for x in (part.k, part.v))
    s = (q @ k.mT * scale).masked_fill(~part.seen, float("-inf"))
    if not s.shape[-1]:
        return q.new_zeros(len(part.q), len(q), v.shape[-1]), q.new_full((len(part.q), len(q)), float("-inf"))
    peak = s.amax(-1, keepdim=True)
    # Of a row without a key the maximum is -Inf, and -Inf minus that is NaN.
    p = torch.exp(s - torch.where(peak.isfinite(), peak, 0.0))
    total = p.sum(-1, keepdim=True)
    out = p @ v / torch.where(total > 0, total, 1.0)
    return out.transpose(0, 1), (peak + total.log()).squeeze(-1).transpose(0, 1)
