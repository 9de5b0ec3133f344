"""Dense attention in float64, with the terms of its error budget: what every attention operator's reference rests on.

Independent on purpose: an exact two-pass softmax, no online rescaling, no library attention. Masked and padded keys
must be finite (zero is best): they meet a weight of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

import torch

from kerneltest.oracle.optional import has_triton as _has_triton


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTerms:
    """Float64 values of the reference, with p = softmax(s), s = scale * q·k + b, A = |scale| Σ|q||k|, b a bias.

    Shapes: [..., d_v] for those with ``_out``, [...] for the others, where ... are rows and heads. All of them
    are sums over the visible keys of a row; a row that sees none has out = 0, lse = -Inf, the rest 0.
    ``spread(filters, centred)`` walks over the weights again; see :func:`weight_spread`.
    """

    out: torch.Tensor
    lse: torch.Tensor  # nats
    abs_out: torch.Tensor  # Σ p |v|
    dot_out: torch.Tensor  # Σ p A |v|
    dot_row: torch.Tensor  # Σ p A
    dot_max: torch.Tensor  # max A, over all keys of the request
    norm_max: torch.Tensor  # max |scale| (Σ q⁴ Σ k⁴)^¼, over the same: no less than |scale| (Σ q²k²)^½
    score_max: torch.Tensor  # max |s|, over the same; with a bias max |scale q·k|, without any soft-cap
    peak_out: torch.Tensor  # exp(m - lse) Σ |v|, over all keys of the request
    keys: torch.Tensor  # visible keys of a row
    square_out: torch.Tensor  # Σ p² v²
    square_row: torch.Tensor  # Σ p²
    fourth_row: torch.Tensor  # Σ p⁴
    bias_out: torch.Tensor | None = None  # Σ p |b| |v|; both None where no bias is added
    bias_row: torch.Tensor | None = None  # Σ p |b|
    spread: Callable[[torch.Tensor, bool], torch.Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """One dense batch: ``q`` [batch, q_heads, rows, d], ``k`` [batch, kv_heads, keys, d], ``v`` [.., keys, d_v], in any
    dtype; ``seen`` [batch, rows, keys], broadcastable in the batch. Query head h reads KV head h // group. ``bias``, if
    any, is added to the scaled scores before the soft-cap: float64 [batch, q_heads, rows, keys].
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seen: torch.Tensor
    scale: float
    softcap: float = 0.0
    bias: torch.Tensor | None = None


# Those that a bias alone has, and all other fields but the function.
BIASED = ("bias_out", "bias_row")
TENSORS = tuple(field.name for field in fields(AttentionTerms) if field.name not in ("spread", *BIASED))


def from_tensors(
    tensors: Mapping[str, torch.Tensor], spread: Callable[[torch.Tensor, bool], torch.Tensor] | None = None
) -> AttentionTerms:
    """Terms from tensors by name, one for each of :data:`TENSORS` and, with a bias, of :data:`BIASED`."""
    return AttentionTerms(**dict(tensors), spread=spread)


def attention_terms(x: Attended) -> AttentionTerms:
    """The terms, shaped [batch, q_heads, rows] and [batch, q_heads, rows, d_v].

    Six matrix products; three arrays of [batch, q_heads, rows, keys] live at the widest point. On a GPU that has Triton
    what lies between the products is one pass over them. A bias is a product and two arrays more.
    """
    q, k, v = _grouped(x)
    scaled = q * x.scale
    p, product_max = _scores(x, scaled, k)
    dot = scaled.abs() @ k.abs().mT
    square, row = _row_terms(p, dot, x.seen)
    if product_max is not None:
        row["score_max"] = torch.where(row["keys"] > 0, product_max, 0.0)
    # Sums are divided at the end, not the weights at the beginning: rows are many fewer than weights.
    share = row.pop("share").unsqueeze(-1)
    v_abs = v.abs()
    # Two products as one read the weights once.
    out, abs_out = (half * share for half in (p @ torch.cat([v, v_abs], -1)).chunk(2, -1))
    q4, k4 = (torch.linalg.vector_norm(t, 4, dim=-1) for t in (q, k))
    norm_max = abs(x.scale) * q4 * k4.amax(-1, keepdim=True) if k.shape[-2] else torch.zeros_like(q4)
    terms = row | {
        "out": out,
        "abs_out": abs_out,
        "dot_out": dot @ v_abs * share,
        "norm_max": torch.where(row["keys"] > 0, norm_max, 0.0),
        "peak_out": share * v_abs.sum(-2, keepdim=True),
        "square_out": square @ v.square() * share.square(),
    }
    if x.bias is not None:
        weighted = _per_group(x.bias, x).abs().mul_(p)
        terms |= {"bias_out": weighted @ v_abs * share, "bias_row": weighted.sum(-1) * share.squeeze(-1)}
    return from_tensors({name: _ungrouped(value, x) for name, value in terms.items()})


def weight_spread(x: Attended, out: torch.Tensor, filters: torch.Tensor, *, centred: bool) -> torch.Tensor:
    """(Σ_j p_j² (v_j · w)²)^½ for a filter w of each row: the noise in Σ_d w_d o_d when every p_j has some of its own.

    ``out`` and ``filters`` [batch, q_heads, rows, d_v]; the result has no d_v. ``centred``: v_j - o in place of v_j,
    because the denominator sums the same noise.
    """
    q, k, v = _grouped(x)
    w, o = (value.reshape(*q.shape[:-1], value.shape[-1]) for value in (filters, out))
    centre = (w * o).sum(-1) if centred else w.new_zeros(w.shape[:-1])
    s, _ = _scores(x, q * x.scale, k)
    return _ungrouped(_row_spread(s, w @ v.mT, centre, x.seen), x)


def row_terms_step_by_step(
    s: torch.Tensor, dot: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What is computed from rows of scores, in place: ``s`` becomes exp(s - m), ``dot`` = A becomes exp(s - m) A.

    Both are [batch, kv_heads, group * rows, keys]; ``seen`` [batch or 1, rows, keys]. Returns exp(s - m)², and by name
    the terms that have no d_v (but norm_max), and ``share``: 1 / Σ exp(s - m), 0 for rows that see nothing.
    """
    some_keys = s.shape[-1] > 0  # of no elements there is no largest
    score_max = torch.stack(s.aminmax(dim=-1)).abs().amax(0) if some_keys else s.sum(-1)
    dot_max = dot.amax(-1) if some_keys else dot.sum(-1)
    visible = _tiled(s, seen)
    p, peak = _weights(s, visible)
    total = p.sum(-1)
    alive = total > 0
    share = torch.where(alive, 1 / total, 0.0)
    dot.mul_(p)
    square = p.square()
    return square, {
        "share": share,
        "lse": torch.where(alive, peak + total.log(), -torch.inf),
        "dot_row": dot.sum(-1) * share,
        "dot_max": torch.where(alive, dot_max, 0.0),
        "score_max": torch.where(alive, score_max, 0.0),
        "keys": visible.sum(-1, dtype=torch.float64).expand(total.shape),
        "square_row": square.sum(-1) * share**2,
        "fourth_row": torch.linalg.vector_norm(square, dim=-1).square() * share**4,
    }


def row_spread_step_by_step(
    s: torch.Tensor, along: torch.Tensor, centre: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """(Σ_j p_j² (a_j - c)²)^½ of each row, where p = softmax(s). May overwrite ``s`` and ``along``.

    ``s`` and ``along`` = a are [batch, kv_heads, group * rows, keys], ``centre`` = c and the result lack the last.
    """
    p, _ = _weights(s, _tiled(s, seen))
    total = p.sum(-1)
    norm = torch.linalg.vector_norm(along.sub_(centre.unsqueeze(-1)).mul_(p), dim=-1)
    return torch.where(total > 0, norm / total, 0.0)


def _row_terms(s: torch.Tensor, dot: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    if _in_one_pass(s):
        from kerneltest.oracle.attention_rows import row_terms

        return row_terms(s, dot, seen)
    return row_terms_step_by_step(s, dot, seen)


def _row_spread(s: torch.Tensor, along: torch.Tensor, centre: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    if _in_one_pass(s):
        from kerneltest.oracle.attention_rows import row_spread

        return row_spread(s, along, centre, seen)
    return row_spread_step_by_step(s, along, centre, seen)


def _in_one_pass(s: torch.Tensor) -> bool:
    return s.is_cuda and s.numel() > 0 and _has_triton()


def _grouped(x: Attended) -> Iterator[torch.Tensor]:
    # The query heads that share a KV head become rows of one matrix product: [batch, kv_heads, group * rows, d]
    batch, kv_heads, _, dim = x.k.shape
    return (t.double() for t in (x.q.reshape(batch, kv_heads, -1, dim), x.k, x.v))


def _tiled(s: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return seen.repeat(1, s.shape[-2] // max(seen.shape[-2], 1), 1).unsqueeze(1)


def _per_group(value: torch.Tensor, x: Attended) -> torch.Tensor:
    """[batch, q_heads, rows, keys] as [batch, kv_heads, group * rows, keys]."""
    return value.reshape(*x.k.shape[:2], -1, value.shape[-1])


def _scores(x: Attended, scaled: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scores [batch, kv_heads, group * rows, keys] in nats, of masked keys as well; ``scaled`` = q · scale.

    With a bias also the largest |scale q·k| of each row, which the scores do not tell any more.
    """
    if x.bias is not None:
        s = scaled @ k.mT
        largest = torch.stack(s.aminmax(dim=-1)).abs().amax(0) if s.shape[-1] else s.sum(-1)
        s.add_(_per_group(x.bias, x))
        return (s.div_(x.softcap).tanh_().mul_(x.softcap) if x.softcap else s), largest
    if not x.softcap:
        return scaled @ k.mT, None
    # The division before the product: queries are fewer than scores.
    return ((scaled / x.softcap) @ k.mT).tanh_().mul_(x.softcap), None


def _weights(s: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(s - m) in place of s, 0 where not seen, and m without the last dimension, 0 for rows that see nothing."""
    s.masked_fill_(~seen, -torch.inf)
    peak = s.amax(-1) if s.shape[-1] else s.new_zeros(s.shape[:-1])
    peak = torch.where(peak.isfinite(), peak, 0.0)
    return s.sub_(peak.unsqueeze(-1)).exp_(), peak


def _ungrouped(value: torch.Tensor, x: Attended) -> torch.Tensor:
    batch, heads, rows, _ = x.q.shape
    return value.reshape(batch, heads, rows, *value.shape[3:])
