"""The values of a whole MLA layer for each input strategy: queries, latent cache, and the two projections.

What a strategy promises holds for keys W_UK c and values W_UV c as well: ``exact`` ones make them numbers that need no
rounding in the inputs' format, and the queries W_UKᵀ q too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from kerneltest.model import FORMATS, Case

from ..attention import _inputs as attention
from ..attention.paged_prefill import LN_2
from . import _inputs
from ._axes import Mla

# q_nope [total_qo, heads, nope] and q_pe [.., rope]; latents [pages, page_size, rank] and keys [.., rope]; W_UK [heads,
# nope, rank] and W_UV [heads, v_dim, rank].
Values = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Latents that one value of ``integer`` inputs adds up: no more than 4 * 8 = 32, which every format holds.
SUMMED = 4


class Draw(_inputs.Draw):
    """What a strategy draws from."""

    def layer(self) -> Values:
        """Everything normal and independent, in fp32, the projections such that keys and values are of order 1."""
        axes = self.axes
        whole = self.as_attention(axes.dims.nope_dim + axes.dims.rope_dim)
        q, cache = whole.queries(), self.as_attention(axes.key_dim).cache()
        _, _, latent, rope = self.parts(torch.zeros(0, axes.heads, axes.key_dim), cache)
        shape = (axes.heads, axes.dims.nope_dim + axes.dims.v_dim, axes.rank)
        w = torch.randn(shape, generator=self.random) * axes.rank**-0.5
        nope = axes.dims.nope_dim
        return q[..., :nope], q[..., nope:], latent, rope, w[:, :nope], w[:, nope:]


def values(case: Case[Mla], pages: Sequence[torch.Tensor], total: int, random: torch.Generator) -> Values:
    """All of them of the case's dtype, contiguous. Raises ValueError for ``dyadic`` with a scale other than ln 2."""
    dtype = getattr(torch, case.axes.dtype)
    drawn = FILLS[case.inputs](Draw(axes=case.axes, pages=pages, total=total, random=random))
    q_nope, q_pe, latent, rope, w_uk, w_uv = (value.to(dtype).contiguous() for value in drawn)
    return q_nope, q_pe, latent, rope, w_uk, w_uv


def generic(draw: Draw) -> Values:
    """Everything normal and independent."""
    return draw.layer()


def count(draw: Draw) -> Values:
    """Weights of 1, and values that say which token they belong to: each is one of the first v_dim latent channels.

    Head h has them shifted by h places, so that it shows whose projection was used.
    """
    dims = draw.axes.dims
    q_nope, q_pe, latent, rope, w_uk, _ = draw.layer()
    _, _, v = attention.count(draw.as_attention(dims.v_dim))
    latent[..., : dims.v_dim] = v.squeeze(2)
    shifted = (torch.arange(dims.v_dim) + torch.arange(draw.axes.heads).unsqueeze(-1)) % dims.v_dim
    w_uv = torch.nn.functional.one_hot(shifted, dims.kv_lora_rank).float()
    return torch.zeros_like(q_nope), torch.zeros_like(q_pe), latent, rope, w_uk, w_uv


def dyadic(draw: Draw) -> Values:
    """Integer scores times ln 2: weights and rescales are powers of two, and V is generic.

    Each channel of a head's key is a latent that holds -1, 0 or 1, each of its value another latent.
    """
    axes, dims = draw.axes, draw.axes.dims
    if axes.sm_scale != LN_2:
        raise ValueError(f"inputs 'dyadic' need sm_scale = ln 2 = {LN_2!r}, got {axes.sm_scale!r}")
    q_nope, q_pe, latent, rope, _, _ = draw.layer()
    columns = torch.randperm(axes.rank, generator=draw.random)
    keys, others = columns[: dims.nope_dim], columns[dims.nope_dim :]
    latent[..., keys] = _inputs.whole_numbers(latent[..., keys])
    w_uk, w_uv = _chosen(draw, keys, dims.nope_dim), _chosen(draw, others, dims.v_dim)
    q_nope = _inputs.largest(q_nope, _inputs.DYADIC_LATENT)
    return q_nope, _inputs.largest(q_pe, _inputs.DYADIC_ROPE), latent, _inputs.whole_numbers(rope), w_uk, w_uv


def _chosen(draw: Draw, columns: torch.Tensor, rows: int) -> torch.Tensor:
    """A projection [heads, rows, rank] whose rows each pick one of the latent ``columns``, another one for each row."""
    orders = [torch.randperm(len(columns), generator=draw.random)[:rows] for _ in range(draw.axes.heads)]
    return torch.nn.functional.one_hot(columns[torch.stack(orders)], draw.axes.rank).float()


def integer(draw: Draw) -> Values:
    """Weights of 1, latents of small integers, and values that add up a few of them: exact in any order."""
    q_nope, q_pe, latent, rope, w_uk, w_uv = draw.layer()
    latent = (4 * latent).round_().clamp_(-attention.LARGEST_INTEGER, attention.LARGEST_INTEGER)
    return torch.zeros_like(q_nope), torch.zeros_like(q_pe), latent, rope, w_uk, _inputs.largest(w_uv, SUMMED)


def needle(draw: Draw) -> Values:
    """Every row and head asks for one key, or for the one right behind the mask; see attention's."""
    axes = draw.axes
    q_nope, q_pe, latent, rope, w_uk, w_uv = draw.layer()
    asking = axes.as_attention(axes.dims.nope_dim + axes.dims.rope_dim)
    row = 0
    for request, pages in zip(axes.requests, draw.pages, strict=True):
        rows = slice(row, row + request.qo_len)
        row = rows.stop
        if request.qo_len and request.kv_len:
            slot = attention.needles(asking, request, int(draw.whole(0, 2**16)))
            page, within = pages[slot // axes.page_size], slot % axes.page_size
            q_nope[rows] = attention.NEEDLE * torch.einsum("qhc,hdc->qhd", latent[page, within], w_uk)
            q_pe[rows] = attention.NEEDLE * rope[page, within]
    return q_nope, q_pe, latent, rope, w_uk, w_uv


def scaled(draw: Draw) -> Values:
    """Latents of any magnitude, with keys of the usual one; values are as large as the latents."""
    q_nope, q_pe, latent, rope, w_uk, w_uv = draw.layer()
    exponent = draw.whole(-attention.LARGEST_EXPONENT, attention.LARGEST_EXPONENT)
    of_heads, of_keys = draw.whole(-1, 1, draw.axes.heads).unsqueeze(-1), draw.whole(-1, 1)
    return (
        torch.ldexp(q_nope, of_heads),
        torch.ldexp(q_pe, of_heads),
        torch.ldexp(latent, exponent),
        torch.ldexp(rope, of_keys),
        torch.ldexp(w_uk, -exponent),
        w_uv,
    )


def outlier(draw: Draw) -> Values:
    """One rotated channel of queries and keys, and one of the latents, is far larger than the others.

    The latent one weighs no more in a key than another, and much in each value.
    """
    q_nope, q_pe, latent, rope, w_uk, w_uv = draw.layer()
    of_scores, of_values = int(draw.whole(0, draw.axes.dims.rope_dim - 1)), int(draw.whole(0, draw.axes.rank - 1))
    q_pe[..., of_scores] *= attention.OUTLIER_QK
    rope[..., of_scores] *= attention.OUTLIER_QK
    latent[..., of_values] *= attention.OUTLIER_V
    w_uk[..., of_values] /= attention.OUTLIER_V
    return q_nope, q_pe, latent, rope, w_uk, w_uv


def large_logits(draw: Draw) -> Values:
    """Scores of several hundred, far apart, all of them high, or all low, by a rotated channel: see attention's."""
    dims = draw.axes.dims
    _, _, latent, rope, w_uk, w_uv = draw.layer()
    q, k, _ = attention.large_logits(draw.as_attention(dims.nope_dim + dims.rope_dim))
    q = q.flip(-1)
    # Its channel 0 is the one of the keys that does not vary.
    rope[..., -1] = k[0, 0, 0, 0]
    return q[..., : dims.nope_dim], q[..., dims.nope_dim :], latent, rope, w_uk, w_uv


def special(draw: Draw) -> Values:
    """-0 and subnormal numbers among the others, and large finite keys that meet zeros of both signs in the query."""
    fmt = FORMATS[draw.axes.dtype]
    tiny = (2 * fmt.eta, 2.0**fmt.emin - 2 * fmt.eta)
    q_nope, q_pe, latent, rope, w_uk, w_uv = (attention._sprinkled(x, draw.random, *tiny) for x in draw.layer())
    channel = int(draw.whole(0, draw.axes.dims.rope_dim - 1))
    q_pe[..., channel] = torch.copysign(torch.zeros(()), q_pe[..., channel])
    rope[..., channel] = torch.copysign(torch.tensor(2.0 ** (fmt.emax - 2)), rope[..., channel])
    return q_nope, q_pe, latent, rope, w_uk, w_uv


FILLS: Mapping[str, Callable[[Draw], Values]] = {
    # What is poisoned around them is another matter: see the patterns of the strategy.
    "poison": generic,
    **{
        function.__name__: function
        for function in (generic, count, dyadic, needle, integer, scaled, outlier, large_logits, special)
    },
}
