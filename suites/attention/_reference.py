"""The float64 reference of attention over a paged KV cache, with the terms of its error budget.

Independent on purpose: its own gather by plain indexing, an exact two-pass softmax, no online rescaling, no
library attention. Memory is bounded by working on a few query rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kerneltest.oracle.attention import AttentionTerms

# Live float64 arrays of [heads, rows, keys] at the widest point of a chunk, and the bytes they may take together.
LIVE_ARRAYS = 6
CHUNK_BYTES = 384 << 20


def paged_attention_terms(
    inputs: Mapping[str, torch.Tensor], *, causal: bool, sm_scale: float, device: str = "cpu"
) -> AttentionTerms:
    """Terms for every row of ``q`` [total_qo, q_heads, d] over pages [pages, page_size, kv_heads, d] (layout NHD).

    ``inputs`` are the host tensors of the operator ``paged_prefill``. The result lies on ``device``.
    """
    q, k_pages, v_pages = (inputs[name].to(device) for name in ("q", "k_pages", "v_pages"))
    qo_indptr, kv_indptr = inputs["qo_indptr"].tolist(), inputs["kv_indptr"].tolist()
    last_page_len = inputs["kv_last_page_len"].tolist()
    page_size = k_pages.shape[1]
    rows, heads, _ = q.shape

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=q.device)

    out_shape = (rows, heads, v_pages.shape[-1])
    terms = AttentionTerms(
        out=zeros(*out_shape),
        lse=torch.full((rows, heads), float("-inf"), dtype=torch.float64, device=q.device),
        abs_out=zeros(*out_shape),
        dot_out=zeros(*out_shape),
        dot_row=zeros(rows, heads),
        score_out=zeros(*out_shape),
        score_row=zeros(rows, heads),
        peak_out=zeros(*out_shape),
        keys=zeros(rows, heads),
    )
    for request, last in enumerate(last_page_len):
        first_row, end_row = qo_indptr[request : request + 2]
        first_page, end_page = kv_indptr[request : request + 2]
        keys = (end_page - first_page - 1) * page_size + last if end_page > first_page else 0
        if keys == 0 or first_row == end_row:
            continue
        pages = inputs["kv_indices"][first_page:end_page].to(q.device, torch.long)
        # [kv_heads, keys, d]: slots past the length are cut off before any arithmetic can see them
        k = k_pages[pages].flatten(0, 1)[:keys].double().transpose(0, 1)
        v = v_pages[pages].flatten(0, 1)[:keys].double().transpose(0, 1)
        count = end_row - first_row
        visible = torch.full((count,), keys, device=q.device)
        if causal:
            visible = (torch.arange(count, device=q.device) + 1 + keys - count).clamp(min=0)
        step = max(1, CHUNK_BYTES // (LIVE_ARRAYS * 8 * heads * keys))
        for start in range(0, count, step):
            chunk = slice(start, min(start + step, count))
            _attend(terms, slice(first_row + chunk.start, first_row + chunk.stop), q, k, v, visible[chunk], sm_scale)
    return terms


def _attend(
    terms: AttentionTerms,
    rows: slice,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
) -> None:
    """Fill ``terms`` for some rows of one request.

    ``q`` [all rows, q_heads, d], ``k`` and ``v`` [kv_heads, keys, d], ``visible`` [rows]: keys that each row sees.
    """
    kv_heads, keys, dim = k.shape
    count = rows.stop - rows.start
    # [kv_heads, group * rows, d]: the query heads that share a KV head become rows of one matrix product
    x = q[rows].double().view(count, kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    group = x.shape[1] // count
    seen = (torch.arange(keys, device=q.device) < visible[:, None]).repeat(group, 1)
    n = visible.repeat(group)

    s = torch.bmm(x, k.transpose(1, 2)).mul_(scale).masked_fill_(~seen, float("-inf"))
    peak = s.amax(-1, keepdim=True)
    peak = torch.where(peak.isfinite(), peak, 0.0)  # rows that see nothing
    p = torch.exp(s - peak)
    total = p.sum(-1, keepdim=True)
    alive = total > 0
    p.div_(torch.where(alive, total, 1.0))
    dot = torch.bmm(x.abs(), k.abs().transpose(1, 2)).mul_(scale).mul_(p)
    score = s.abs_().add_(peak.abs()).mul_(p).masked_fill_(~seen, 0.0)
    v_abs = v.abs()
    # Σ|v| over the first n keys, for every n that occurs
    prefix = torch.nn.functional.pad(v_abs.cumsum(1), (0, 0, 1, 0))[:, n]

    def put(into: torch.Tensor, value: torch.Tensor) -> None:
        shaped = value.reshape(kv_heads, group, count, *value.shape[2:])
        into[rows] = shaped.movedim(2, 0).flatten(1, 2)

    put(terms.out, torch.bmm(p, v))
    put(terms.abs_out, torch.bmm(p, v_abs))
    put(terms.dot_out, torch.bmm(dot, v_abs))
    put(terms.score_out, torch.bmm(score, v_abs))
    put(terms.dot_row, dot.sum(-1))
    put(terms.score_row, score.sum(-1))
    put(terms.peak_out, prefix / torch.where(alive, total, 1.0))
    put(terms.lse, torch.where(alive, peak + total.log(), float("-inf")).squeeze(-1))
    put(terms.keys, n.double().expand(kv_heads, -1))
