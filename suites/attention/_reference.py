"""The float64 reference of attention over a paged KV cache: its own gather by plain indexing, then dense attention.

Memory is bounded: requests of similar length are padded to one dense batch, long ones are cut into rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from kerneltest.oracle.attention_terms import (
    TENSORS,
    Attended,
    AttentionTerms,
    attention_terms,
    from_tensors,
    weight_spread,
)

# Live float64 arrays of [heads, rows, keys] at the widest point of a chunk, and the bytes they may take together.
LIVE_ARRAYS = 4
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 8 << 30}


@dataclass(frozen=True, slots=True)
class _Span:
    """Some rows of one request: rows ``first`` to ``end`` of the batch, their keys, the last of which row i sees."""

    first: int
    end: int
    pages: slice
    keys: int
    diagonal: int | None  # row first + i sees keys 0 to diagonal + i; None: all

    @property
    def rows(self) -> int:
        return self.end - self.first


def paged_attention_terms(
    inputs: Mapping[str, torch.Tensor], *, causal: bool, sm_scale: float, device: str = "cpu", chunk_bytes: int = 0
) -> AttentionTerms:
    """Terms for every row of ``q`` [total_qo, q_heads, d] over pages [pages, page_size, kv_heads, d] (layout NHD).

    ``inputs`` are the host tensors of the operator ``paged_prefill``. The result lies on ``device``, shaped
    [total_qo, q_heads] and [total_qo, q_heads, d_v]. ``chunk_bytes`` bounds the memory at work, but for a single row.
    """
    q, k_pages, v_pages = (inputs[name].to(device) for name in ("q", "k_pages", "v_pages"))
    indices = inputs["kv_indices"].to(device, torch.long)
    rows, heads, _ = q.shape
    wide = (rows, heads, v_pages.shape[-1])
    empty = {
        name: q.new_zeros(wide if name.endswith("_out") or name == "out" else wide[:2], dtype=torch.float64)
        for name in TENSORS
    }
    empty["lse"].fill_(float("-inf"))
    limit = chunk_bytes or CHUNK_BYTES[q.device.type]
    batches = list(_batches(list(_spans(inputs, k_pages.shape[1], causal, heads, limit)), heads, limit))

    def attended(spans: list[_Span]) -> Attended:
        return _pad(spans, q, k_pages, v_pages, indices, sm_scale)

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


def _spans(inputs: Mapping[str, torch.Tensor], page_size: int, causal: bool, heads: int, limit: int) -> Iterator[_Span]:
    """The requests that have rows and keys, those too large for the limit cut into pieces of rows."""
    qo_indptr, kv_indptr = inputs["qo_indptr"].tolist(), inputs["kv_indptr"].tolist()
    for request, last in enumerate(inputs["kv_last_page_len"].tolist()):
        first, end = qo_indptr[request : request + 2]
        pages = slice(*kv_indptr[request : request + 2])
        keys = (pages.stop - pages.start - 1) * page_size + last if pages.stop > pages.start else 0
        if keys == 0:
            continue
        step = max(1, limit // (LIVE_ARRAYS * 8 * heads * keys))
        for start in range(first, end, step):
            diagonal = start - first + keys - (end - first) if causal else None
            yield _Span(start, min(start + step, end), pages, keys, diagonal)


def _batches(spans: list[_Span], heads: int, limit: int) -> Iterator[list[_Span]]:
    """Spans that are padded together: similar in size, so that at most about half of a batch is padding."""
    batch: list[_Span] = []
    for span in sorted(spans, key=lambda s: (s.keys, s.rows)):
        together = [*batch, span]
        rows, keys = max(s.rows for s in together), span.keys
        padded = len(together) * (rows * heads + 2 * keys) * max(keys, 64)
        useful = sum((s.rows * heads + 2 * s.keys) * max(s.keys, 64) for s in together)
        if batch and (padded * LIVE_ARRAYS * 8 > limit or padded > 2 * useful + (1 << 20)):
            yield batch
            together = [span]
        batch = together
    if batch:
        yield batch


def _pad(
    spans: list[_Span],
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
) -> Attended:
    """One dense batch. Slots past a request's length are cut off, and zero, before any arithmetic can see them."""
    device, keys = q.device, max(s.keys for s in spans)
    page_size = k_pages.shape[1]
    slot = torch.arange(keys, device=device)
    lengths, first_page = (
        torch.tensor(x, device=device) for x in zip(*((s.keys, s.pages.start) for s in spans), strict=True)
    )
    live = slot < lengths[:, None]  # [batch, keys]
    entry = torch.where(live, first_page[:, None] + slot // page_size, first_page[:, None])
    page = indices[entry]
    k, v = (
        torch.where(live[..., None, None], cache[page, slot % page_size], 0).transpose(1, 2)
        for cache in (k_pages, v_pages)
    )
    rows = max(s.rows for s in spans)
    last = torch.tensor([s.keys if s.diagonal is None else s.diagonal for s in spans], device=device)
    moving = torch.tensor([s.diagonal is not None for s in spans], device=device)
    last = last[:, None] + torch.arange(rows, device=device) * moving[:, None]  # [batch, rows]
    seen = (slot <= last[..., None]) & live[:, None]
    return Attended(q=_gather(q, spans), k=k, v=v, seen=seen, scale=sm_scale)


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
