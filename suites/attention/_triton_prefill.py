"""A paged-prefill attention kernel in Triton, written to be read.

One program owns one row tile of one request and one KV head.  The query heads that share the KV head
(GQA group) are packed into the rows: row r of a request is query token r // group, head r % group of the
group.  Every K/V tile is therefore loaded once for the whole group, and any group size fits.

Three rules keep bytes that nobody owns out of the result:

* A key slot at or past kv_len is never loaded (mask, other=0).  Masking its score alone would not do: its
  weight is 0, but 0 * NaN is NaN.
* The same mask guards the page table, so an entry past the request's own pages is never followed.
* A row that has seen no key keeps m = -inf.  It is never subtracted from itself, (-inf) - (-inf) is NaN.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl


# Group and page size are run-time values: every pair of them compiled anew would cost far more than a division saves.
@triton.jit(do_not_specialize=["group", "page_size", "window_left"])
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    qo_indptr_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    last_page_len_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    qk_scale,  # sm_scale * log2(e): scores, m and l live in base 2
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
    group,
    page_size,
    window_left,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kv_head = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2)

    qo_start = tl.load(qo_indptr_ptr + request)
    qo_len = tl.load(qo_indptr_ptr + request + 1) - qo_start
    first_row = tl.program_id(0) * BLOCK_M
    if first_row >= qo_len * group:  # the grid is sized for the longest request
        return

    page_start = tl.load(kv_indptr_ptr + request)
    num_pages = tl.load(kv_indptr_ptr + request + 1) - page_start
    last_page_len = tl.load(last_page_len_ptr + request)
    kv_len = tl.where(num_pages > 0, (num_pages - 1) * page_size + last_page_len, 0)

    # Rows of the tile.  Offsets are int64: tokens * stride and pages * stride both outgrow 2**31 elements.
    row = first_row + tl.arange(0, BLOCK_M)
    query = row // group
    row_ok = query < qo_len
    token = qo_start + query.to(tl.int64)
    head = kv_head * group + row % group
    dim = tl.arange(0, HEAD_DIM)[None, :]
    q_offset = token * q_stride_tok + head * q_stride_head
    q = tl.load(q_ptr + q_offset[:, None] + dim, mask=row_ok[:, None], other=0.0)

    # A row sees keys [0, row_end), and no row of the tile sees past tile_end.  Causal is aligned bottom-right
    # (the last query sees the last key), so the first queries of a request with more queries than keys have
    # row_end <= 0 and see nothing.
    if CAUSAL:
        row_end = query + (kv_len - qo_len + 1)
        last_query = tl.minimum((first_row + BLOCK_M - 1) // group, qo_len - 1)
        tile_end = last_query + (kv_len - qo_len + 1)
    else:
        row_end = tl.full([BLOCK_M], 0, tl.int32) + kv_len
        tile_end = kv_len

    tile_start = 0
    if WINDOW:
        row_start = query + (kv_len - qo_len - window_left)
        tile_start = tl.maximum(first_row // group + (kv_len - qo_len - window_left), 0) // BLOCK_N * BLOCK_N
    if MASKED:
        # Masks lie one after another, [qo_len, kv_len] each: those of the requests before come first.
        first_bit = tl.full([], 0, tl.int64)
        for other in range(request):
            rows = tl.load(qo_indptr_ptr + other + 1) - tl.load(qo_indptr_ptr + other)
            pages = tl.load(kv_indptr_ptr + other + 1) - tl.load(kv_indptr_ptr + other)
            keys = tl.where(pages > 0, (pages - 1) * page_size + tl.load(last_page_len_ptr + other), 0)
            first_bit += rows.to(tl.int64) * keys
        mask_row_ptr = mask_ptr + first_bit + query.to(tl.int64)[:, None] * kv_len

    page_table_ptr = kv_indices_ptr + page_start
    k_head_ptr = k_ptr + kv_head * k_stride_head + dim
    v_head_ptr = v_ptr + kv_head * v_stride_head + dim
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.full([BLOCK_M], 0.0, tl.float32)  # noqa: E741
    acc = tl.full([BLOCK_M, HEAD_DIM], 0.0, tl.float32)
    for start in range(tile_start, tile_end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_ok = key < kv_len
        page = tl.load(page_table_ptr + key // page_size, mask=key_ok, other=0).to(tl.int64)
        slot = (key % page_size).to(tl.int64)

        k_offset = page * k_stride_page + slot * k_stride_slot
        k = tl.load(k_head_ptr + k_offset[:, None], mask=key_ok[:, None], other=0.0)
        # input_precision matters to fp32 only, where the default would round q and k to TF32.
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        # row_end of a stored row never passes kv_len: one comparison masks the causal triangle and the tail.
        seen = key[None, :] < row_end[:, None]
        if WINDOW:
            seen = seen & (key[None, :] >= row_start[:, None])
        if MASKED:
            inside = row_ok[:, None] & key_ok[None, :]
            seen = seen & (tl.load(mask_row_ptr + key[None, :], mask=inside, other=0) != 0)
        s = tl.where(seen, s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, 1))
        # A row without a key so far subtracts 0 instead of -inf: its weights become exp2(-inf) = 0, not NaN.
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_finite[:, None])
        rescale = tl.exp2(m - m_finite)
        l = l * rescale + tl.sum(p, 1)  # noqa: E741  # the fp32 weights, before they are rounded for the dot

        v_offset = page * v_stride_page + slot * v_stride_slot
        v = tl.load(v_head_ptr + v_offset[:, None], mask=key_ok[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        m = m_new

    # A row with a key has l >= 1 (its maximum weighs 1), so l == 0 means that the row has seen none.
    no_key = l == 0.0
    l_safe = tl.where(no_key, 1.0, l)
    out = acc / l_safe[:, None]  # 0 / 1 where there is no key
    lse = tl.where(no_key, float("-inf"), (m + tl.log2(l_safe)) * 0.6931471805599453)  # * ln(2): natural log
    out_offset = token * out_stride_tok + head * out_stride_head
    tl.store(out_ptr + out_offset[:, None] + dim, out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None])
    tl.store(lse_ptr + token * lse_stride_tok + head * lse_stride_head, lse, mask=row_ok)


# False when TRITON_INTERPRET=1 made triton.jit return an interpreted function.
_COMPILED = isinstance(_prefill_kernel, triton.runtime.JITFunction)


def _default_config(dtype: torch.dtype, head_dim: int, rows: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages."""
    if not _COMPILED:
        # Every operation is a NumPy call however large the tile, so few and large tiles win, up to the matrix
        # product (2**18 multiply-adds) for which BLAS wakes its threads: that costs more than a tile.
        block_m = min(64, max(16, triton.next_power_of_2(rows)))
        return block_m, max(16, min(64, 2**18 // (block_m * head_dim))), 4, 1
    if dtype == torch.float32:
        # An IEEE fp32 dot runs on FMA units, not on tensor cores: small tiles keep it in registers.
        return 16, 32, 4, 1
    return 64, 64, 8 if head_dim >= 256 else 4, 2


def paged_prefill(
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
    block_m: int | None = None,
    block_n: int | None = None,
    max_qo_len: int | None = None,
    window_left: int = -1,
    mask: torch.Tensor | None = None,
) -> None:
    """Attention of a batch of ragged queries over a paged KV cache; fills ``out`` and ``lse``.

    q                 [total_qo, q_heads, head_dim]              bf16, fp16 or fp32
    k_pages, v_pages  [pages, page_size, kv_heads, head_dim]     as q (NHD layout)
    qo_indptr         [batch + 1]       int32  first query of each request
    kv_indptr         [batch + 1]       int32  first entry of each request in kv_indices; counts pages
    kv_indices        [page entries]    int32  physical pages, in any order
    kv_last_page_len  [batch]           int32  slots in use in the last page, 1..page_size
    out               [total_qo, q_heads, head_dim]              as q, every element written
    lse               [total_qo, q_heads]                        fp32, natural log, every element written

    head_dim (16 or more) and page_size are powers of two; q_heads is any multiple of kv_heads.  Causal: query
    i of a request sees keys j <= i + kv_len - qo_len.  A row that sees no key gets out = 0 and lse = -inf.
    The last dimension must be contiguous, all other strides are free.  block_m and block_n, the tile sizes,
    are powers of two, 16 or more. max_qo_len: of the longest request, or more; read from qo_indptr, which waits
    for the device, if it is not given. window_left, if not negative: query i does not see keys
    j < i + kv_len - qo_len - window_left. mask: bool [sum of qo_len * kv_len], what each query of each request sees.
    """
    head_dim = q.shape[-1]
    page_size, kv_heads = k_pages.shape[1], k_pages.shape[2]
    group = q.shape[1] // kv_heads
    if any(t.stride(-1) != 1 for t in (q, k_pages, v_pages, out)):
        raise ValueError("the last dimension of q, k_pages, v_pages and out must be contiguous")
    batch = qo_indptr.numel() - 1
    if max_qo_len is None:
        max_qo_len = int(qo_indptr.diff().max()) if batch else 0
    if max_qo_len == 0:
        return

    if not _COMPILED and q.dtype == torch.bfloat16:
        # The interpreter holds bf16 as uint16, and its dot multiplies the bit patterns.  fp32 holds every
        # bf16 value, so here the kernel runs on widened copies; only P keeps more bits than on a device.
        q, k_pages, v_pages = q.float(), k_pages.float(), v_pages.float()
        target, out = out, out.float()  # not empty: an element the kernel forgets keeps its old value
    else:
        target = out

    default_m, default_n, num_warps, num_stages = _default_config(q.dtype, head_dim, max_qo_len * group)
    block_m, block_n = block_m or default_m, block_n or default_n
    _prefill_kernel[(triton.cdiv(max_qo_len * group, block_m), kv_heads, batch)](
        q,
        k_pages,
        v_pages,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_last_page_len,
        kv_last_page_len if mask is None else mask.view(torch.uint8),
        out,
        lse,
        sm_scale * math.log2(math.e),
        *q.stride()[:2],
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        *out.stride()[:2],
        *lse.stride(),
        group,
        page_size,
        window_left,
        CAUSAL=causal,
        WINDOW=window_left >= 0,
        MASKED=mask is not None,
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if target is not out:
        target.copy_(out)
