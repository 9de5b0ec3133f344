"""The values of the queries and of the latent cache for each input strategy of MLA.

V is a part of K here: what a strategy of attention says of both must fit into one latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kerneltest.model import FORMATS, Case

from ..attention import _inputs as attention
from ..attention.paged_prefill import LN_2
from ._axes import Mla

# q_nope [total_qo, heads, rank] and q_pe [.., rope]; the latents [pages, page_size, rank] and the keys [.., rope].
Values = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Nonzero channels of a dyadic query, in the latent and in the rotated part: 7 together, as in attention.
DYADIC_LATENT, DYADIC_ROPE = 3, 4
# Latent channels that hold integers then; the others are generic, since V must be.
DYADIC_COLUMNS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What a strategy draws from: the physical pages of each request in order, how many there are, and chance."""

    axes: Mla
    pages: Sequence[torch.Tensor]
    total: int
    random: torch.Generator

    def as_attention(self, head_dim: int) -> attention.Draw:
        """What a strategy of attention draws from, for one KV head of that size."""
        return attention.Draw(
            axes=self.axes.as_attention(head_dim), pages=self.pages, total=self.total, random=self.random
        )

    def normal(self) -> Values:
        """Everything normal and independent, in fp32."""
        whole = self.as_attention(self.axes.key_dim)
        return self.parts(whole.queries(), whole.cache())

    def parts(self, q: torch.Tensor, k: torch.Tensor) -> Values:
        """From queries [total_qo, heads, rank + rope] and keys [pages, page_size, 1, rank + rope]."""
        rank, k = self.axes.rank, k.squeeze(2)
        return q[..., :rank], q[..., rank:], k[..., :rank], k[..., rank:]

    def whole(self, low: int, high: int, count: int = 1) -> torch.Tensor:
        """``count`` integers from ``low`` to ``high``, both included."""
        return torch.randint(low, high + 1, (count,), generator=self.random)


def values(case: Case[Mla], pages: Sequence[torch.Tensor], total: int, random: torch.Generator) -> Values:
    """``q_nope``, ``q_pe``, ``ckv_pages`` and ``kpe_pages`` of the case's dtype, contiguous.

    ``pages``: the physical pages of each request. Raises ValueError for ``dyadic`` with a scale other than ln 2: its
    weights would be no powers of two.
    """
    dtype = getattr(torch, case.axes.dtype)
    drawn = FILLS[case.inputs](Draw(axes=case.axes, pages=pages, total=total, random=random))
    q_nope, q_pe, ckv, kpe = (value.to(dtype).contiguous() for value in drawn)
    return q_nope, q_pe, ckv, kpe


def generic(draw: Draw) -> Values:
    """Everything normal and independent."""
    return draw.normal()


def count(draw: Draw) -> Values:
    """Weights of 1, and latents that say which token they belong to, see :func:`suites.attention._inputs.count`."""
    q_nope, q_pe, _, kpe = draw.normal()
    _, _, v = attention.count(draw.as_attention(draw.axes.rank))
    return torch.zeros_like(q_nope), torch.zeros_like(q_pe), v.squeeze(2), kpe


def dyadic(draw: Draw) -> Values:
    """Integer scores times ln 2: weights and rescales are powers of two, and most of V is generic.

    The integers are in the rotated channels and in a few latent ones, so that both parts of a score are needed.
    """
    if draw.axes.sm_scale != LN_2:
        raise ValueError(f"inputs 'dyadic' need sm_scale = ln 2 = {LN_2!r}, got {draw.axes.sm_scale!r}")
    q_nope, q_pe, ckv, kpe = draw.normal()
    columns = torch.randperm(draw.axes.rank, generator=draw.random)[:DYADIC_COLUMNS]
    some = torch.zeros_like(q_nope)
    some[..., columns] = largest(q_nope[..., columns], DYADIC_LATENT)
    ckv[..., columns] = whole_numbers(ckv[..., columns])
    return some, largest(q_pe, DYADIC_ROPE), ckv, whole_numbers(kpe)


def largest(x: torch.Tensor, count: int) -> torch.Tensor:
    """The signs of the ``count`` largest channels of each row, which are random ones, and 0 elsewhere."""
    kept = x.abs().topk(min(count, x.shape[-1]), -1).indices
    return torch.zeros_like(x).scatter_(-1, kept, x.gather(-1, kept).sign())


def whole_numbers(x: torch.Tensor) -> torch.Tensor:
    """-1, 0 and 1, a third each."""
    return x.sign() * (x.abs() > attention.DYADIC_THRESHOLD)


def integer(draw: Draw) -> Values:
    """Weights of 1, and latents of small integers: every partial sum is exact in fp32, in any order."""
    q_nope, q_pe, ckv, kpe = draw.normal()
    ckv = (4 * ckv).round_().clamp_(-attention.LARGEST_INTEGER, attention.LARGEST_INTEGER)
    return torch.zeros_like(q_nope), torch.zeros_like(q_pe), ckv, kpe


def needle(draw: Draw) -> Values:
    """Every row and head asks for one key, or for the one right behind the mask; see attention's."""
    q, k, _ = attention.needle(draw.as_attention(draw.axes.key_dim))
    return draw.parts(q, k)


def scaled(draw: Draw) -> Values:
    """Latents of any magnitude, with queries of the inverse one; the parts of a score half, once or twice as large."""
    q_nope, q_pe, ckv, kpe = draw.normal()
    exponent = draw.whole(-attention.LARGEST_EXPONENT, attention.LARGEST_EXPONENT)
    of_heads, of_keys = draw.whole(-1, 1, draw.axes.heads).unsqueeze(-1), draw.whole(-1, 1)
    return (
        torch.ldexp(q_nope, of_heads - exponent),
        torch.ldexp(q_pe, of_heads),
        torch.ldexp(ckv, exponent),
        torch.ldexp(kpe, of_keys),
    )


def outlier(draw: Draw) -> Values:
    """One rotated channel of queries and keys, and one of the latents, is far larger than the others.

    The latent one weighs no more in a score than another: weights must have nothing to do with V for errors to be
    noise.
    """
    q_nope, q_pe, ckv, kpe = draw.normal()
    of_scores, of_values = int(draw.whole(0, draw.axes.dims.rope_dim - 1)), int(draw.whole(0, draw.axes.rank - 1))
    q_pe[..., of_scores] *= attention.OUTLIER_QK
    kpe[..., of_scores] *= attention.OUTLIER_QK
    ckv[..., of_values] *= attention.OUTLIER_V
    q_nope[..., of_values] /= attention.OUTLIER_V
    return q_nope, q_pe, ckv, kpe


def large_logits(draw: Draw) -> Values:
    """Scores of several hundred, far apart, all of them high, or all low: see attention's.

    Its channel 0, which makes them so, is a rotated one here: V has no such channel.
    """
    q, k, _ = attention.large_logits(draw.as_attention(draw.axes.key_dim))
    return draw.parts(q.flip(-1), k.flip(-1))


def special(draw: Draw) -> Values:
    """-0 and subnormal numbers among the others, and large finite ones in a rotated channel and in a latent one.

    They meet zeros of both signs in the query. Those of the latent are limited by what sums of V can hold.
    """
    q, k, v = attention.special(draw.as_attention(draw.axes.key_dim))
    q_nope, q_pe, ckv, kpe = draw.parts(q, k)
    usual = 2.0 ** (FORMATS[draw.axes.dtype].emax - 3)
    # Where attention put its large keys, and how large its large values are.
    summed = v.abs().max()
    of_keys, of_values = int(draw.whole(0, draw.axes.dims.rope_dim - 1)), int(draw.whole(0, draw.axes.rank - 1))
    ckv = torch.where(ckv.abs() >= usual, torch.copysign(torch.ones(()), ckv), ckv)
    kpe[..., of_keys] = torch.copysign(k.abs().max(), kpe[..., of_keys])
    q_pe[..., of_keys] = torch.copysign(torch.zeros(()), q_pe[..., of_keys])
    ckv[..., of_values] = torch.copysign(summed, ckv[..., of_values])
    q_nope[..., of_values] = torch.copysign(torch.zeros(()), q_nope[..., of_values])
    return q_nope, q_pe, ckv, kpe


FILLS: Mapping[str, Callable[[Draw], Values]] = {
    # What is poisoned around them is another matter: see the patterns of the strategy.
    "poison": generic,
    **{
        function.__name__: function
        for function in (generic, count, dyadic, needle, integer, scaled, outlier, large_logits, special)
    },
}
