"""Paged-prefill kernels with one planted defect each.

``bug`` reaches the kernel as the constexpr BUG, and one expression depends on it.  The healthy twin is the
same source with the switch off.  One program is one tile of queries of one head of one request; nothing is
tuned.

Arguments of both functions:

q                 [total_qo, q_heads, head_dim]              bf16, fp16 or fp32
k_pages, v_pages  [pages, page_size, kv_heads, head_dim]     as q (NHD layout)
qo_indptr         [batch + 1]     int32  first query of each request
kv_indptr         [batch + 1]     int32  first entry of each request in kv_indices; counts pages
kv_indices        [page entries]  int32  physical pages, in any order
kv_last_page_len  [batch]         int32  slots in use in the last page, 1..page_size
out               [total_qo, q_heads, head_dim]              as q
lse               [total_qo, q_heads]                        fp32, natural log

head_dim (16 or more) and page_size are powers of two.  Causal is aligned bottom-right.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl


@triton.jit
def _row_tile(
    q_ptr,
    qo_indptr_ptr,
    kv_indptr_ptr,
    last_page_len_ptr,
    q_stride_tok,
    q_stride_head,
    CAUSAL: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The tile's queries: values, tokens, which exist, where their keys end; kv_len; last page's end."""
    request = tl.program_id(2)
    qo_start = tl.load(qo_indptr_ptr + request)
    qo_len = tl.load(qo_indptr_ptr + request + 1) - qo_start
    num_pages = tl.load(kv_indptr_ptr + request + 1) - tl.load(kv_indptr_ptr + request)
    last_page_len = tl.load(last_page_len_ptr + request)
    kv_len = tl.where(num_pages > 0, (num_pages - 1) * PAGE_SIZE + last_page_len, 0)

    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = query < qo_len
    row_end = tl.full([BLOCK_M], 0, tl.int32) + kv_len
    if CAUSAL:
        row_end = query + 1 + (kv_len - qo_len)

    token = qo_start.to(tl.int64) + query
    dim = tl.arange(0, HEAD_DIM)
    q_offset = token * q_stride_tok + tl.program_id(1) * q_stride_head
    q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=row_ok[:, None], other=0.0)
    return q, token, row_ok, row_end, kv_len, num_pages * PAGE_SIZE


@triton.jit
def _attend(
    q,
    row_end,  # [BLOCK_M]: a row sees the keys before row_end
    start_key,
    end_key,  # keys [start_key, end_key) are loaded; a masked one weighs 0
    k_ptr,
    v_ptr,
    page_table_ptr,  # the request's own part of kv_indices
    kv_head,
    qk_scale,
    k_stride_page,
    k_stride_slot,
    k_stride_head,
    v_stride_page,
    v_stride_slot,
    v_stride_head,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Partial softmax state of a range of keys: m (base 2), l, acc; (-inf, 0, 0) for a row without a key."""
    dim = tl.arange(0, HEAD_DIM)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.full([BLOCK_M], 0.0, tl.float32)  # noqa: E741
    acc = tl.full([BLOCK_M, HEAD_DIM], 0.0, tl.float32)
    for start in range(start_key, end_key, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        loaded = key < end_key
        page = tl.load(page_table_ptr + key // PAGE_SIZE, mask=loaded, other=0).to(tl.int64)
        slot = key % PAGE_SIZE
        k_offset = page * k_stride_page + slot * k_stride_slot + kv_head * k_stride_head
        v_offset = page * v_stride_page + slot * v_stride_slot + kv_head * v_stride_head
        k = tl.load(k_ptr + k_offset[:, None] + dim[None, :], mask=loaded[:, None], other=0.0)
        v = tl.load(v_ptr + v_offset[:, None] + dim[None, :], mask=loaded[:, None], other=0.0)

        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        visible = loaded[None, :] & (key[None, :] < row_end[:, None])
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_finite[:, None])
        rescale = tl.exp2(m - m_finite)
        l = l * rescale + tl.sum(p, 1)  # noqa: E741
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        m = m_new
    return m, l, acc


@triton.jit
def _finish(m, l, acc, row_ok, out_ptrs, lse_ptrs):  # noqa: E741
    """Normalise and store: out = 0 and lse = -inf where l == 0, that is, for a row without a key."""
    no_key = l == 0.0
    l_safe = tl.where(no_key, 1.0, l)
    out = tl.where(no_key[:, None], 0.0, acc / l_safe[:, None])
    lse = tl.where(no_key, float("-inf"), (m + tl.log2(l_safe)) * 0.6931471805599453)
    tl.store(out_ptrs, out.to(out_ptrs.dtype.element_ty), mask=row_ok[:, None])
    tl.store(lse_ptrs, lse, mask=row_ok)


@triton.jit
def _tail_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    qo_indptr_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    last_page_len_ptr,
    out_ptr,
    lse_ptr,
    qk_scale,
    q_stride_tok,
    q_stride_head,
    k_stride_page,
    k_stride_slot,
    k_stride_head,
    v_stride_page,
    v_stride_slot,
    v_stride_head,
    out_stride_tok,
    out_stride_head,
    lse_stride_tok,
    lse_stride_head,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BUG: tl.constexpr,
):
    q, token, row_ok, row_end, kv_len, page_end = _row_tile(
        q_ptr,
        qo_indptr_ptr,
        kv_indptr_ptr,
        last_page_len_ptr,
        q_stride_tok,
        q_stride_head,
        CAUSAL,
        PAGE_SIZE,
        HEAD_DIM,
        BLOCK_M,
    )
    kv_head = tl.program_id(1) // GROUP
    page_table_ptr = kv_indices_ptr + tl.load(kv_indptr_ptr + tl.program_id(2))
    # The defect: the last page is read to its end.  Scores at or past kv_len are masked all the same (row_end
    # stops there), so an unused slot weighs 0, but 0 * NaN reaches acc.
    read_end = page_end if BUG else kv_len
    m, l, acc = _attend(  # noqa: E741
        q,
        row_end,
        0,
        read_end,
        k_ptr,
        v_ptr,
        page_table_ptr,
        kv_head,
        qk_scale,
        k_stride_page,
        k_stride_slot,
        k_stride_head,
        v_stride_page,
        v_stride_slot,
        v_stride_head,
        PAGE_SIZE,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_N,
    )
    out_offset = token * out_stride_tok + tl.program_id(1) * out_stride_head
    out_ptrs = out_ptr + out_offset[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    lse_ptrs = lse_ptr + token * lse_stride_tok + tl.program_id(1) * lse_stride_head
    _finish(m, l, acc, row_ok, out_ptrs, lse_ptrs)


@triton.jit
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    qo_indptr_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    last_page_len_ptr,
    out_ptr,
    lse_ptr,
    qk_scale,
    q_stride_tok,
    q_stride_head,
    k_stride_page,
    k_stride_slot,
    k_stride_head,
    v_stride_page,
    v_stride_slot,
    v_stride_head,
    out_stride_tok,
    out_stride_head,
    lse_stride_tok,
    lse_stride_head,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BUG: tl.constexpr,
):
    q, token, row_ok, row_end, kv_len, _ = _row_tile(
        q_ptr,
        qo_indptr_ptr,
        kv_indptr_ptr,
        last_page_len_ptr,
        q_stride_tok,
        q_stride_head,
        CAUSAL,
        PAGE_SIZE,
        HEAD_DIM,
        BLOCK_M,
    )
    kv_head = tl.program_id(1) // GROUP
    page_table_ptr = kv_indices_ptr + tl.load(kv_indptr_ptr + tl.program_id(2))
    # Whole tiles, rounded down: the first half is empty when all keys fit in less than two tiles, the second
    # half is empty for the causal rows that end before it.
    middle = kv_len // BLOCK_N // 2 * BLOCK_N
    m1, l1, acc1 = _attend(
        q,
        row_end,
        0,
        middle,
        k_ptr,
        v_ptr,
        page_table_ptr,
        kv_head,
        qk_scale,
        k_stride_page,
        k_stride_slot,
        k_stride_head,
        v_stride_page,
        v_stride_slot,
        v_stride_head,
        PAGE_SIZE,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_N,
    )
    m2, l2, acc2 = _attend(
        q,
        row_end,
        middle,
        kv_len,
        k_ptr,
        v_ptr,
        page_table_ptr,
        kv_head,
        qk_scale,
        k_stride_page,
        k_stride_slot,
        k_stride_head,
        v_stride_page,
        v_stride_slot,
        v_stride_head,
        PAGE_SIZE,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_N,
    )
    m = tl.maximum(m1, m2)
    # The defect: for a row that saw no key in either half m1 = m2 = m = -inf, and m1 - m is NaN.
    m_base = m if BUG else tl.where(m == float("-inf"), 0.0, m)
    w1 = tl.exp2(m1 - m_base)
    w2 = tl.exp2(m2 - m_base)
    l = w1 * l1 + w2 * l2  # noqa: E741
    acc = w1[:, None] * acc1 + w2[:, None] * acc2
    out_offset = token * out_stride_tok + tl.program_id(1) * out_stride_head
    out_ptrs = out_ptr + out_offset[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    lse_ptrs = lse_ptr + token * lse_stride_tok + tl.program_id(1) * lse_stride_head
    _finish(m, l, acc, row_ok, out_ptrs, lse_ptrs)


def _launch(kernel, q, k_pages, v_pages, pages, out, lse, causal, sm_scale, bug):
    qo_indptr, kv_indptr, kv_indices, kv_last_page_len = pages
    if any(t.stride(-1) != 1 for t in (q, k_pages, v_pages, out)):
        raise ValueError("the last dimension of q, k_pages, v_pages and out must be contiguous")
    batch = qo_indptr.numel() - 1
    max_qo_len = int(qo_indptr.diff().max()) if batch else 0
    if max_qo_len == 0:
        return
    target = out
    if q.dtype == torch.bfloat16 and not isinstance(kernel, triton.runtime.JITFunction):
        # The interpreter's dot multiplies the bit patterns of bf16; fp32 copies hold the same values.
        q, k_pages, v_pages, out = q.float(), k_pages.float(), v_pages.float(), out.float()
    block_m, block_n = 32, 32
    kernel[(triton.cdiv(max_qo_len, block_m), q.shape[1], batch)](
        q,
        k_pages,
        v_pages,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_last_page_len,
        out,
        lse,
        sm_scale * math.log2(math.e),
        *q.stride()[:2],
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        *out.stride()[:2],
        *lse.stride(),
        CAUSAL=causal,
        GROUP=q.shape[1] // k_pages.shape[2],
        PAGE_SIZE=k_pages.shape[1],
        HEAD_DIM=q.shape[2],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BUG=bug,
        num_stages=1,
    )
    if target is not out:
        target.copy_(out)


def prefill_tail(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    sm_scale: float,
    bug: bool,
) -> None:
    """Z8: with ``bug``, unused slots of the last page are loaded.

    out is NaN in every row that sees a key, in a request whose last page has a NaN (or Inf) V in an unused
    slot.  Finite bytes there are harmless, as is anything in K; lse is right in any case.
    """
    pages = (qo_indptr, kv_indptr, kv_indices, kv_last_page_len)
    _launch(_tail_kernel, q, k_pages, v_pages, pages, out, lse, causal, sm_scale, bug)


def prefill_split(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    sm_scale: float,
    bug: bool,
) -> None:
    """Z2: split-KV in two halves; with ``bug``, merging two empty halves gives NaN.

    out and lse are NaN in the rows that see no key: kv_len is 0, or causal with kv_len < qo_len.
    """
    pages = (qo_indptr, kv_indptr, kv_indices, kv_last_page_len)
    _launch(_split_kernel, q, k_pages, v_pages, pages, out, lse, causal, sm_scale, bug)
