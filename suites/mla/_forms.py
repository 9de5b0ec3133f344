"""Three ways to compute a layer of multi-head latent attention for one request, in whatever precision it is given in.

``standard``: all keys and values are made of the latents, then attention as with any heads. ``compressed``: the cache
holds latents, and each block of it is decompressed when its turn comes. ``absorbed``: W_UK is absorbed into the query
and W_UV into the output, so that heads attend to latents (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Shapes: ``q_nope`` [rows, heads, nope], ``q_pe`` [rows, heads, rope], ``latent`` [keys, rank], ``rope`` [keys, rope],
``w_uk`` [heads, nope, rank], ``w_uv`` [heads, v_dim, rank]; ``seen`` [rows, keys]. ``rounded`` rounds what would be
stored: keys, values and absorbed queries, weights, attended latents. Each returns the output [rows, heads, v_dim] and
the log-sum-exp [rows, heads] in nats, unrounded; a row that sees nothing has 0 and -Inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch

Rounded = Callable[[torch.Tensor], torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
# Keys that ``compressed`` makes of the cache at a time.
BLOCK = 64


class Form(Protocol):
    def __call__(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        latent: torch.Tensor,
        rope: torch.Tensor,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
        *,
        seen: torch.Tensor,
        scale: float,
        rounded: Rounded,
    ) -> Pair: ...


def standard(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    *,
    seen: torch.Tensor,
    scale: float,
    rounded: Rounded,
) -> Pair:
    """Keys of nope + rope channels, values of v_dim."""
    k, v = _decompressed(latent, w_uk, rounded), _decompressed(latent, w_uv, rounded)
    scores = _scores(q_nope, q_pe, k, rope, scale).masked_fill(~seen, -math.inf)
    peak = _finite(scores.amax(-1))
    weights = (scores - peak.unsqueeze(-1)).exp()
    return _divided(rounded(weights) @ v, weights.sum(-1), peak)


def compressed(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    *,
    seen: torch.Tensor,
    scale: float,
    rounded: Rounded,
) -> Pair:
    """The same, with an online softmax over blocks of keys that are decompressed one after another."""
    rows, heads, v_dim = *q_nope.shape[:2], w_uv.shape[1]
    peak = q_nope.new_full((heads, rows), -math.inf)
    total, acc = q_nope.new_zeros(heads, rows), q_nope.new_zeros(heads, rows, v_dim)
    for first in range(0, len(latent), BLOCK):
        block = slice(first, first + BLOCK)
        k, v = (_decompressed(latent[block], w, rounded) for w in (w_uk, w_uv))
        scores = _scores(q_nope, q_pe, k, rope[block], scale).masked_fill(~seen[:, block], -math.inf)
        higher = torch.maximum(peak, scores.amax(-1))
        weights = (scores - _finite(higher).unsqueeze(-1)).exp()
        rescale = (peak - _finite(higher)).exp()
        total = total * rescale + weights.sum(-1)
        acc = acc * rescale.unsqueeze(-1) + rounded(weights) @ v
        peak = higher
    return _divided(acc, total, peak)


def absorbed(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    rope: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    *,
    seen: torch.Tensor,
    scale: float,
    rounded: Rounded,
) -> Pair:
    """Keys of rank + rope channels; the latent itself is the value of all heads."""
    q = rounded(torch.einsum("qhd,hdc->qhc", q_nope, w_uk))
    scores = _scores(q, q_pe, latent, rope, scale).masked_fill(~seen, -math.inf)
    peak = _finite(scores.amax(-1))
    weights = (scores - peak.unsqueeze(-1)).exp()
    attended, lse = _divided(rounded(weights) @ latent, weights.sum(-1), peak)
    return torch.einsum("qhc,hdc->qhd", rounded(attended), w_uv), lse


FORMS: dict[str, Form] = {"standard": standard, "compressed": compressed, "absorbed": absorbed}


def _decompressed(latent: torch.Tensor, w: torch.Tensor, rounded: Rounded) -> torch.Tensor:
    """[heads, keys, channels]"""
    return rounded(latent @ w.mT)


def _scores(
    q_nope: torch.Tensor, q_pe: torch.Tensor, k: torch.Tensor, rope: torch.Tensor, scale: float
) -> torch.Tensor:
    """[heads, rows, keys]; ``k`` [heads, keys, channels], or [keys, channels] if all heads share it."""
    both = torch.cat([k, rope.expand(*k.shape[:-1], -1)], -1)
    return torch.cat([q_nope, q_pe], -1).transpose(0, 1) @ both.mT * scale


def _finite(peak: torch.Tensor) -> torch.Tensor:
    """-Inf less itself is NaN: a row without a key subtracts 0."""
    return torch.where(peak == -math.inf, 0.0, peak)


def _divided(acc: torch.Tensor, total: torch.Tensor, peak: torch.Tensor) -> Pair:
    """From [heads, rows, channels] to [rows, heads, channels]."""
    alive = total > 0
    out = acc / torch.where(alive, total, 1.0).unsqueeze(-1)
    lse = torch.where(alive, peak + total.log(), -math.inf)
    return out.transpose(0, 1), lse.transpose(0, 1)
