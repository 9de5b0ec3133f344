"""The float64 reference of attention over a paged KV cache: its own gather by plain indexing, then dense attention.

What a case's options mean is said here once: which keys are seen, and what K, V and the scores stand for.

Memory is bounded: requests of similar length are padded to one dense batch, long ones are cut into rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from kerneltest.oracle.attention_terms import (
    BIASED,
    TENSORS,
    Attended,
    AttentionTerms,
    attention_terms,
    from_tensors,
    weight_spread,
)

from ._alibi import slopes
from ._axes import PagedPrefill
from ._tensors import by_slot, queries

# Live float64 arrays of [heads, rows, keys] at the widest point of a chunk, and the bytes they may take together.
LIVE_ARRAYS = 4
# With a bias of the scores there are two more: the bias itself, and its share of the budget.
LIVE_ARRAYS_BIASED = 6
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 8 << 30}


@dataclass(frozen=True, slots=True)
class _Span:
    """Some rows of one request: rows ``first`` to ``end`` of the batch and their keys.

    ``place``: the key at the own place of the first of these rows; each row is one further. ``query``: which query of
    its request the first row is.
    """

    first: int
    end: int
    pages: slice
    keys: int
    place: int
    query: int
    mask: int = 0  # where the first row's bits begin in the mask

    @property
    def rows(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, slots=True)
class _Rule:
    """Which keys are seen: up to the own place, from so many before it, and where the mask [Σ rows · keys] is set."""

    causal: bool
    window_left: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Cache:
    """Pages [pages, page_size, kv_heads, d], and which of them belong to whom."""

    k: torch.Tensor
    v: torch.Tensor
    indices: torch.Tensor
    v_scale: float


def terms_of(axes: PagedPrefill, inputs: Mapping[str, torch.Tensor], device: str = "cpu") -> AttentionTerms:
    """Terms for every row of a case, from its host tensors; on ``device``."""
    plain = {name: by_slot(axes, inputs[name]) for name in ("k_pages", "v_pages")} | {"q": queries(axes, inputs)}
    return paged_attention_terms(
        {**inputs, **plain},
        causal=axes.causal,
        sm_scale=axes.scale,
        window_left=axes.window_left,
        softcap=axes.softcap,
        k_scale=axes.k_scale,
        v_scale=axes.v_scale,
        alibi=axes.alibi,
        device=device,
    )


def paged_attention_terms(
    inputs: Mapping[str, torch.Tensor],
    *,
    causal: bool,
    sm_scale: float,
    window_left: int = -1,
    softcap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    alibi: bool = False,
    device: str = "cpu",
    chunk_bytes: int = 0,
) -> AttentionTerms:
    """Terms for every row of ``q`` [total_qo, q_heads, d] over pages [pages, page_size, kv_heads, d] (layout NHD).

    ``inputs`` are the host tensors of the operator ``paged_prefill``, the options those of its axes. The result lies on
    ``device``, shaped [total_qo, q_heads] and [total_qo, q_heads, d_v]. ``chunk_bytes`` bounds the memory at work, but
    for a single row.
    """
    q, k_pages, v_pages = (_widened(inputs[name].to(device)) for name in ("q", "k_pages", "v_pages"))
    cache = _Cache(k_pages, v_pages, inputs["kv_indices"].to(device, torch.long), v_scale)
    mask = inputs["custom_mask"].to(device) if "custom_mask" in inputs else None
    rule = _Rule(causal, window_left, mask)
    rows, heads, _ = q.shape
    wide = (rows, heads, v_pages.shape[-1])
    slope = torch.tensor(slopes(heads), dtype=torch.float64, device=device) if alibi else None
    live_arrays = LIVE_ARRAYS_BIASED if alibi else LIVE_ARRAYS
    empty = {
        name: q.new_zeros(wide if name.endswith("_out") or name == "out" else wide[:2], dtype=torch.float64)
        for name in (*TENSORS, *(BIASED if alibi else ()))
    }
    empty["lse"].fill_(float("-inf"))
    limit = chunk_bytes or CHUNK_BYTES[q.device.type]
    row_bytes = live_arrays * 8 * heads
    batches = list(_batches(list(_spans(inputs, k_pages.shape[1], row_bytes, limit)), heads, limit // live_arrays))

    def attended(spans: list[_Span]) -> Attended:
        k, v, live = _pad(spans, cache)
        seen = _seen(spans, rule, live)
        bias = None if slope is None else _bias(spans, slope, live.shape[-1])
        # A scale of all of K is one of the scores.
        scale = sm_scale * k_scale
        return Attended(q=_gather(q, spans), k=k, v=v, seen=seen, scale=scale, softcap=softcap, bias=bias)

    def spread(filters: torch.Tensor, centred: bool) -> torch.Tensor:
        result = torch.zeros_like(empty["lse"])
        for spans in batches:
            out = _gather(empty["out"], spans)
            found = weight_spread(attended(spans), out, _gather(filters, spans), centred=centred)
            _scatter(result, found, spans)
        return result

    for spans in batches:
        terms = attention_terms(attended(spans))
        for name, into in empty.items():
            _scatter(into, getattr(terms, name), spans)
    return from_tensors(empty, spread)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """Eight bits as fp32, which holds their values: few operations know them."""
    return tensor.float() if tensor.element_size() == 1 else tensor


def _spans(inputs: Mapping[str, torch.Tensor], page_size: int, row_bytes: int, limit: int) -> Iterator[_Span]:
    """The requests that have rows and keys, those too large for the limit cut into pieces of rows.

    ``row_bytes``: for each key that there is.
    """
    qo_indptr, kv_indptr = inputs["qo_indptr"].tolist(), inputs["kv_indptr"].tolist()
    mask = 0
    for request, last in enumerate(inputs["kv_last_page_len"].tolist()):
        first, end = qo_indptr[request : request + 2]
        pages = slice(*kv_indptr[request : request + 2])
        keys = (pages.stop - pages.start - 1) * page_size + last if pages.stop > pages.start else 0
        if keys == 0:
            continue
        step = max(1, limit // (row_bytes * keys))
        for start in range(first, end, step):
            place = start - first + keys - (end - first)
            query = start - first
            yield _Span(start, min(start + step, end), pages, keys, place, query, mask + query * keys)
        mask += (end - first) * keys


def _batches(spans: list[_Span], heads: int, limit: int) -> Iterator[list[_Span]]:
    """Spans that are padded together: similar in size, so that at most about half of a batch is padding.

    ``limit``: of the bytes of one array.
    """
    batch: list[_Span] = []
    for span in sorted(spans, key=lambda s: (s.keys, s.rows)):
        together = [*batch, span]
        rows, keys = max(s.rows for s in together), span.keys
        padded = len(together) * (rows * heads + 2 * keys) * max(keys, 64)
        useful = sum((s.rows * heads + 2 * s.keys) * max(s.keys, 64) for s in together)
        if batch and (padded * 8 > limit or padded > 2 * useful + (1 << 20)):
            yield batch
            together = [span]
        batch = together
    if batch:
        yield batch


def _pad(spans: list[_Span], cache: _Cache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V of one dense batch, and which keys are not padding, [batch, keys].

    Slots past a request's length are cut off, and zero, before any arithmetic can see them.
    """
    device, keys = cache.k.device, max(s.keys for s in spans)
    page_size = cache.k.shape[1]
    slot = torch.arange(keys, device=device)
    lengths, first_page = (
        torch.tensor(x, device=device) for x in zip(*((s.keys, s.pages.start) for s in spans), strict=True)
    )
    live = slot < lengths[:, None]
    entry = torch.where(live, first_page[:, None] + slot // page_size, first_page[:, None])
    page = cache.indices[entry]
    k, v = (
        torch.where(live[..., None, None], pages[page, slot % page_size], 0).transpose(1, 2)
        for pages in (cache.k, cache.v)
    )
    return k, v if cache.v_scale == 1.0 else v.double() * cache.v_scale, live


def _seen(spans: list[_Span], rule: _Rule, live: torch.Tensor) -> torch.Tensor:
    """Which keys each row sees, [batch, rows, keys]."""
    device = live.device
    row = torch.arange(max(s.rows for s in spans), device=device)
    slot = torch.arange(live.shape[-1], device=device)
    first_place, first_bit, lengths, rows = (
        torch.tensor(x, device=device)[:, None]
        for x in zip(*((s.place, s.mask, s.keys, s.rows) for s in spans), strict=True)
    )
    place = (first_place + row).unsqueeze(-1)
    seen = live[:, None].expand(-1, len(row), -1)
    if rule.causal:
        seen = seen & (slot <= place)
    if rule.window_left >= 0:
        seen = seen & (slot >= place - rule.window_left)
    if rule.mask is not None:
        inside = seen & (row < rows).unsqueeze(-1)
        bit = (first_bit + row * lengths).unsqueeze(-1) + slot
        seen = inside & rule.mask[torch.where(inside, bit, 0)]
    return seen


def _bias(spans: list[_Span], slope: torch.Tensor, keys: int) -> torch.Tensor:
    """What ALiBi adds to the score of each row and key, [batch, heads, rows, keys]."""
    row = torch.arange(max(s.rows for s in spans), device=slope.device)
    query = torch.tensor([s.query for s in spans], device=slope.device)[:, None] + row
    distance = torch.arange(keys, device=slope.device) - query.unsqueeze(-1)
    return slope[:, None, None] * distance[:, None]


def _index(spans: list[_Span], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the batch in the padded order [batch, rows], and which of them are not padding."""
    first, count = (torch.tensor(x, device=device) for x in zip(*((s.first, s.rows) for s in spans), strict=True))
    offset = torch.arange(int(count.max()), device=device)
    real = offset < count[:, None]
    return torch.where(real, first[:, None] + offset, first[:, None]), real


def _gather(value: torch.Tensor, spans: list[_Span]) -> torch.Tensor:
    """[total rows, heads, ...] to [batch, heads, rows, ...]; padding repeats a row."""
    return value[_index(spans, value.device)[0]].transpose(1, 2)


def _scatter(into: torch.Tensor, value: torch.Tensor, spans: list[_Span]) -> None:
    """[batch, heads, rows, ...] to [total rows, heads, ...]."""
    index, real = _index(spans, value.device)
    into[index[real]] = value.transpose(1, 2)[real]
