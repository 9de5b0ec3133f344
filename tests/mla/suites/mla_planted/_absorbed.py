"""Absorbed MLA in float32 torch, with a switch for each planted bug."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from kerneltest.model import Call

# Rows of a tile, at whose edge a causal mask can be off by one.
TILE = 8
# Heads of queries, and keys, in a tile of a kernel that packs heads and queries into rows.
PACKED = 16


def answer(call: Call, bug: str) -> Mapping[str, torch.Tensor]:
    """``bug`` is empty for the healthy twin."""
    axes, x = call.case.axes, call.inputs
    row = page = 0
    for request in axes.requests:
        rows = slice(row, row + request.qo_len)
        table = x["kv_indices"][page : page + axes.pages(request)].long()
        row, page = rows.stop, page + len(table)
        if request.qo_len:
            out, lse = _attend(axes, x, rows, table, request.kv_len, bug)
            call.outputs["out"][rows] = out.to(call.outputs["out"].dtype)
            if "lse" in call.outputs:
                call.outputs["lse"][rows] = lse
    return call.outputs


def _attend(
    axes: Any, x: Mapping[str, torch.Tensor], rows: slice, table: torch.Tensor, kv_len: int, bug: str
) -> tuple[torch.Tensor, torch.Tensor]:
    of_rope = (table + 1) % len(x["kpe_pages"]) if bug == "next_page" else table
    latent, rope = x["ckv_pages"][table].flatten(0, 1).float(), x["kpe_pages"][of_rope].flatten(0, 1).float()
    if bug != "last_page":
        latent, rope = latent[:kv_len], rope[:kv_len]
    q_nope, q_pe = x["q_nope"][rows].float(), x["q_pe"][rows].float()
    if bug == "no_rope":
        q_pe = torch.zeros_like(q_pe)
    if bug == "latent_cut":
        latent = latent.clone()
        latent[:, -axes.rank // 16 :] = 0.0
    scale = axes.scale
    if bug == "latent_scale" and axes.sm_scale is None:
        scale = 1 / math.sqrt(axes.key_dim)
    key, count = torch.cat([latent, rope], -1), rows.stop - rows.start
    value = key[:, axes.dims.rope_dim :] if bug == "shifted_value" else latent
    scores = torch.einsum("qhd,jd->qhj", torch.cat([q_nope, q_pe], -1), key) * scale
    slot, query = torch.arange(len(key)), torch.arange(count)
    if axes.causal:
        last = query + kv_len - count
        if bug == "tile_edge":
            last = torch.where(query % TILE == TILE - 1, last + 1, last)
        if bug == "tile_floor":
            scores = _without_a_tile(scores, kv_len - count)
        scores = scores.masked_fill((slot > last.unsqueeze(-1)).unsqueeze(1), -math.inf)
    fmt = x["q_nope"].dtype
    if bug == "plain_mean" and len(key) > 1:
        halves = [_softmax(part, v, fmt, bug) for part, v in _halves(scores, value)]
        out = (halves[0][0] + halves[1][0]) / 2
        lse = torch.logaddexp(halves[0][1], halves[1][1])
    else:
        out, lse = _softmax(scores, value, fmt, bug)
    return out, lse / math.log(2.0) if bug == "base_2" else lse


def _without_a_tile(scores: torch.Tensor, before: int) -> torch.Tensor:
    """A tile visits the keys that its whole queries see, and forgets the query of which it has some heads."""
    heads = scores.shape[1]
    row = torch.arange(scores.shape[0] * heads).view(-1, heads)
    seen = before + (row // PACKED + 1) * PACKED // heads
    visited = -(-seen // PACKED) * PACKED
    return scores.masked_fill(torch.arange(scores.shape[2]) >= visited.unsqueeze(-1), -math.inf)


def _halves(scores: torch.Tensor, value: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    middle = len(value) // 2
    return [(scores[..., :middle], value[:middle]), (scores[..., middle:], value[middle:])]


def _softmax(
    scores: torch.Tensor, value: torch.Tensor, fmt: torch.dtype, bug: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if not scores.shape[-1]:
        return scores.new_zeros(*scores.shape[:2], value.shape[-1]), scores.new_full(scores.shape[:2], -math.inf)
    peak = scores.amax(-1)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    weights = (scores - peak.unsqueeze(-1)).exp()
    total = weights.sum(-1)
    alive = total > 0
    stored = _truncated(weights, fmt) if bug == "truncated" else weights.to(fmt).float()
    out = stored @ value / torch.where(alive, total, 1.0).unsqueeze(-1)
    return out, torch.where(alive, peak + total.log(), -math.inf)


def _truncated(weights: torch.Tensor, fmt: torch.dtype) -> torch.Tensor:
    """Cut to the format's digits, not rounded; in fp32 nothing is cut."""
    cut = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[fmt]
    return (weights.view(torch.int32) >> cut << cut).view(torch.float32)
