"""The values of q, K and V for each input strategy of attention over a paged KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kerneltest.model import FORMATS, FP32, Case, Fmt

from ._axes import LN_2, PagedPrefill, Request
from ._cases import EXACT, TILES
from ._masks import limits

Values = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# With so few nonzeros in q, |s| <= 7 and s - m >= -14: no weight 2^(s - m) is subnormal in fp16.
DYADIC_NONZEROS = 7
# P(|N(0, 1)| > 0.43) = 2/3
DYADIC_THRESHOLD = 0.43
# 2^21 keys of this size can be added exactly in fp32.
LARGEST_INTEGER = 8
# A needle's query is this multiple of its key: its score is 4 √d with the usual scale, those of the others 4 N(0, 1).
NEEDLE = 4
LARGEST_EXPONENT = 10
# The same for V in 8 bits: with exponents like these it keeps its digits, and does not overflow.
LARGEST_EXPONENT_8BIT = 3
# In both q and k, so that their product's channel weighs 64 times as much as another; and in V.
OUTLIER_QK, OUTLIER_V = 8, 64
LARGE_SPREAD, LARGE_OFFSET = 128, 300
# Share of ``special`` elements that is -0, the smallest subnormal and the largest one each.
SPECIAL_SHARE = 1 / 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What a strategy draws from: the physical pages of each request in order, how many there are, and chance."""

    axes: PagedPrefill
    pages: Sequence[torch.Tensor]
    total: int
    random: torch.Generator

    def queries(self) -> torch.Tensor:
        """Normal, [total_qo, q_heads, d] in fp32."""
        return torch.randn(self.axes.total_qo, self.axes.q_heads, self.axes.head_dim, generator=self.random)

    def cache(self) -> torch.Tensor:
        """Normal, [pages, page_size, kv_heads, d] in fp32."""
        return self._normal(self.axes.head_dim)

    def values(self) -> torch.Tensor:
        """Normal, [pages, page_size, kv_heads, d_v] in fp32."""
        return self._normal(self.axes.v_dim)

    def _normal(self, dim: int) -> torch.Tensor:
        return torch.randn(self.total, self.axes.page_size, self.axes.kv_heads, dim, generator=self.random)

    @property
    def kv(self) -> Fmt:
        """The format of K and V."""
        return FORMATS[self.axes.kv_format]

    def whole(self, low: int, high: int, count: int = 1) -> torch.Tensor:
        """``count`` integers from ``low`` to ``high``, both included."""
        return torch.randint(low, high + 1, (count,), generator=self.random)


def values(case: Case[PagedPrefill], pages: Sequence[torch.Tensor], total: int, random: torch.Generator) -> Values:
    """``q`` [total_qo, q_heads, d], ``k`` [total, page_size, kv_heads, d] and ``v`` [.., d_v] of the case's dtypes.

    ``pages``: the physical pages of each request. Raises ValueError for ``dyadic`` with a scale other than ln 2, with
    one of K, or with a soft-cap: its weights would be no powers of two; and with ALiBi for all whose weights are exact.
    """
    if case.axes.alibi and case.inputs in EXACT:
        raise ValueError(f"inputs {case.inputs!r} need scores to which no ALiBi is added")
    dtype, kv_dtype = getattr(torch, case.axes.dtype), getattr(torch, case.axes.kv_format)
    q, k, v = FILLS[case.inputs](Draw(axes=case.axes, pages=pages, total=total, random=random))
    if kv_dtype is not dtype:
        # What 8 bits cannot hold must not become NaN or Inf.
        k, v = (x.clamp(-FORMATS[case.axes.kv_format].max, FORMATS[case.axes.kv_format].max) for x in (k, v))
    return q.to(dtype), k.to(kv_dtype), v.to(kv_dtype)


def generic(draw: Draw) -> Values:
    """Everything normal and independent."""
    return draw.queries(), draw.cache(), draw.values()


def count(draw: Draw) -> Values:
    """Weights of 1, and V that says which token it belongs to: out · n counts how often each was seen.

    The first block of channels is one-hot in the token's number modulo its size, the second likewise. The sizes are
    coprime, so that both residues together name one token among their product (Chinese remainder theorem).
    """
    axes = draw.axes
    number = torch.zeros(draw.total, axes.page_size, dtype=torch.long)
    for first, pages in zip(first_tokens(axes), draw.pages, strict=True):
        number[pages] = first + torch.arange(pages.numel() * axes.page_size).view(-1, axes.page_size)
    number = number.unsqueeze(-1) + torch.arange(axes.kv_heads) * total_tokens(axes)
    v = torch.zeros(*number.shape, axes.v_dim, dtype=getattr(torch, axes.dtype))
    block = 0
    for modulus in moduli(axes.v_dim):
        v.scatter_(-1, (block + number % modulus).unsqueeze(-1), 1)
        block += modulus
    # K must not matter.
    return torch.zeros(axes.total_qo, axes.q_heads, axes.head_dim), draw.cache(), v


def moduli(head_dim: int) -> tuple[int, ...]:
    """The sizes of the blocks of channels in which ``count`` numbers the tokens, such as 65 and 63 for 128.

    Coprime, of much the same size, and together all channels. Both are odd for the usual head dimensions: pages and
    tiles, which are powers of two, never fill a block evenly, so that it shows where one starts.
    """
    for smaller in range((head_dim - 1) // 2, 0, -1):
        if math.gcd(smaller, head_dim) == 1:
            return head_dim - smaller, smaller
    return (head_dim,)


def total_tokens(axes: PagedPrefill) -> int:
    """Keys in the cache, of all requests; KV head h numbers its own from h times as many."""
    return sum(request.kv_len for request in axes.requests)


def first_tokens(axes: PagedPrefill) -> list[int]:
    """The number of each request's first token in KV head 0."""
    return [sum(request.kv_len for request in axes.requests[:number]) for number in range(len(axes.requests))]


def dyadic(draw: Draw) -> Values:
    """Integer scores times ln 2: weights and rescales are powers of two, and V is generic."""
    if draw.axes.sm_scale != LN_2:
        raise ValueError(f"inputs 'dyadic' need sm_scale = ln 2 = {LN_2!r}, got {draw.axes.sm_scale!r}")
    if draw.axes.k_scale != 1.0 or draw.axes.softcap:
        raise ValueError("inputs 'dyadic' need scores that no other scale and no soft-cap changes")
    q, k = draw.queries(), draw.cache()
    # The channels where a row is largest, which is by chance, are those that are not 0.
    kept = q.abs().topk(min(DYADIC_NONZEROS, draw.axes.head_dim), -1).indices
    q = torch.zeros_like(q).scatter_(-1, kept, q.gather(-1, kept).sign())
    return q, k.sign() * (k.abs() > DYADIC_THRESHOLD), draw.values()


def integer(draw: Draw) -> Values:
    """Weights of 1, and V of small integers: every partial sum is exact in fp32, in any order."""
    v = (4 * draw.values()).round_().clamp_(-LARGEST_INTEGER, LARGEST_INTEGER)
    return torch.zeros_like(draw.queries()), draw.cache(), v


def needle(draw: Draw) -> Values:
    """Every row and head asks for one key, which outweighs all others together: the output is that key's value.

    The key right behind the causal mask is asked for as well, and the one right before the window; who lets it through
    shows it, and nothing else.
    """
    axes, q, row = draw.axes, draw.queries(), 0
    k = draw.cache().to(getattr(torch, axes.kv_format)).float()
    heads = torch.arange(axes.q_heads) // axes.group
    for request, pages in zip(axes.requests, draw.pages, strict=True):
        rows = slice(row, row + request.qo_len)
        row = rows.stop
        if request.qo_len and request.kv_len:
            slot = needles(axes, request, int(draw.whole(0, 2**16)))
            q[rows] = NEEDLE * k[pages[slot // axes.page_size], slot % axes.page_size, heads]
    return q, k, draw.values()


def needles(axes: PagedPrefill, request: Request, start: int) -> torch.Tensor:
    """The slot that each row and head of a request asks for, [qo_len, q_heads].

    They take turns from ``start`` on: every other one goes to a page, one page after another, the rest to first and
    last visible slot, first masked one, and the edges of pages and tiles. A mask of bits is not looked at: it hides
    some needles.
    """
    page, qo_len, kv_len = axes.page_size, request.qo_len, request.kv_len
    turn = start + torch.arange(qo_len * axes.q_heads).view(qo_len, axes.q_heads)
    first, end = (edge.unsqueeze(-1).expand_as(turn) for edge in limits(axes, request))
    # From the last key before the window to the first one behind the causal mask.
    lowest, highest = (first - 1).clamp(min=0), end.clamp(max=kv_len - 1)
    last = (end - 1).clamp(min=0)
    edges = [torch.full_like(last, edge) for tile in (page, *TILES) for edge in (tile - 1, tile)]
    special = torch.stack([end, last, torch.zeros_like(last), last // page * page, *edges], -1)
    if axes.window_left >= 0:
        special = torch.cat([special, torch.stack([lowest, first], -1)], -1)
    half, pages = turn // 2, -(-kv_len // page)
    edge = special.gather(-1, (half % special.shape[-1]).unsqueeze(-1)).squeeze(-1)
    swept = half % pages * page + half // pages % page
    # A turn that points past the first masked key goes elsewhere.
    slot = torch.where(turn % 2 == 1, swept, edge)
    inside = (slot >= lowest) & (slot <= highest)
    return torch.where(inside, slot, lowest + slot % (highest - lowest + 1))


def scaled(draw: Draw) -> Values:
    """V of any magnitude, its heads apart by a factor of 4; q and k of half, once or twice the usual one."""
    axes = draw.axes
    largest = LARGEST_EXPONENT if axes.kv_dtype == "same" else LARGEST_EXPONENT_8BIT
    v_exponent = draw.whole(-largest, largest) + 2 * (torch.arange(axes.kv_heads) % 2)
    q_exponent, k_exponent = draw.whole(-1, 1, axes.q_heads), draw.whole(-1, 1, axes.kv_heads)
    return (
        torch.ldexp(draw.queries(), q_exponent.unsqueeze(-1)),
        torch.ldexp(draw.cache(), k_exponent.unsqueeze(-1)),
        torch.ldexp(draw.values(), v_exponent.unsqueeze(-1)),
    )


def outlier(draw: Draw) -> Values:
    """One channel of q and k, and one of V, is far larger than the others, as in trained models."""
    q, k, v = generic(draw)
    of_scores, of_values = _channels(draw)
    q[..., of_scores] *= OUTLIER_QK
    k[..., of_scores] *= OUTLIER_QK
    v[..., of_values] *= OUTLIER_V
    return q, k, v


def large_logits(draw: Draw) -> Values:
    """Scores of several hundred, in one of three ways for each head: far apart, or all of them high, or all low.

    The first makes one weight 1 and the others 0. The others leave ordinary weights, which are out of the reach of an
    exponential that does not subtract the maximum.
    """
    axes, (q, k, v) = draw.axes, generic(draw)
    way = (torch.arange(axes.q_heads) + draw.whole(0, 2)) % 3
    # A scale of next to nothing, which only a case written by hand can have, must not make Inf of them.
    root = math.sqrt(LARGE_OFFSET / max(abs(axes.scale), 2.0**-10))
    k[..., 0] = root
    q[..., 0] = torch.tensor([0.0, root, -root])[way]
    q[:, way == 0] *= LARGE_SPREAD
    return q, k, v


def special(draw: Draw) -> Values:
    """-0 and subnormal numbers among the others, and large finite ones in a channel of K and in one of V.

    The large ones of K meet zeros of both signs in q. Those of V are limited by what kernels do: they add up
    unnormalised weights of up to 1 times V in fp32, and a relation may double the keys.
    """
    axes, formats = draw.axes, (FORMATS[draw.axes.dtype], draw.kv, draw.kv)
    q, k, v = (
        _sprinkled(x, draw.random, 2 * fmt.eta, 2.0**fmt.emin - 2 * fmt.eta)
        for x, fmt in zip(generic(draw), formats, strict=True)
    )
    of_keys, of_values = _channels(draw)
    largest = 2.0 ** (draw.kv.emax - 2)
    keys = max(1, *(request.kv_len for request in axes.requests))
    summed = min(largest, 2.0 ** (FP32.emax - 3 - math.ceil(math.log2(keys))))
    q[..., of_keys] = torch.copysign(torch.zeros(()), q[..., of_keys])
    k[..., of_keys] = torch.copysign(torch.tensor(largest), k[..., of_keys])
    v[..., of_values] = torch.copysign(torch.tensor(summed), v[..., of_values])
    return q, k, v


def _channels(draw: Draw) -> list[int]:
    """A channel of q and K, and one of V."""
    one, other = draw.whole(0, draw.axes.head_dim - 1, 2).tolist()
    return [one, other % draw.axes.v_dim]


def _sprinkled(x: torch.Tensor, random: torch.Generator, *tiny: float) -> torch.Tensor:
    dice = torch.rand(x.shape, generator=random)
    for number, size in enumerate(tiny, 1):
        here = (dice >= number * SPECIAL_SHARE) & (dice < (number + 1) * SPECIAL_SHARE)
        x = torch.where(here, torch.copysign(torch.tensor(size), x), x)
    return x.masked_fill_(dice < SPECIAL_SHARE, -0.0)


FILLS: Mapping[str, Callable[[Draw], Values]] = {
    # What is poisoned around them is another matter: see the patterns of the strategy.
    "poison": generic,
    **{
        function.__name__: function
        for function in (generic, count, dyadic, needle, integer, scaled, outlier, large_logits, special)
    },
}
