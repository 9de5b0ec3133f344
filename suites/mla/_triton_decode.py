"""An absorbed MLA kernel in Triton, written to be read: decode, and chunks of a few queries.

One program owns one row tile of one request and one part of its keys. All heads of all queries of the request are rows:
row r is query token r // heads, head r % heads. A tile of latents is loaded once, and is K and V for all of its rows.

The keys of a request are cut into PARTS of equal length, which depends on nothing but the request. Each program leaves
an unnormalised output, its maximum and its denominator in the workspace; a second kernel adds the parts up.

Three rules keep bytes that nobody owns out of the result:

* A key slot at or past kv_len is never loaded (mask, other=0). Masking its score alone would not do: its weight is 0,
  but 0 * NaN is NaN.
* The same mask guards the page table, so an entry past the request's own pages is never followed.
* A row that has seen no key keeps m = -inf. It is never subtracted from itself, (-inf) - (-inf) is NaN.
"""

# Triton gives its language no types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..attention._checks import require, require_number, require_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _part(kv_len, part, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of a part and the one behind its last: whole tiles, as many for each part."""
    length = tl.cdiv(tl.cdiv(kv_len, PARTS), BLOCK_N) * BLOCK_N
    return part * length, tl.minimum((part + 1) * length, kv_len)


# Heads and page size are run-time values: every pair of them compiled anew would cost far more than a division saves.
@triton.jit(do_not_specialize=["heads", "page_size", "total_rows"])
def _attend_kernel(
    q_nope_ptr,
    q_pe_ptr,
    ckv_ptr,
    kpe_ptr,
    qo_indptr_ptr,
    kv_indptr_ptr,
    kv_indices_ptr,
    kv_len_ptr,
    acc_ptr,  # [PARTS, total_rows, RANK]
    m_ptr,  # [PARTS, total_rows]
    l_ptr,
    qk_scale,  # sm_scale * log2(e): scores, m and l live in base 2
    q_nope_stride_tok,
    q_nope_stride_head,
    q_pe_stride_tok,
    q_pe_stride_head,
    ckv_stride_page,
    ckv_stride_slot,
    kpe_stride_page,
    kpe_stride_slot,
    heads,
    page_size,
    total_rows,
    CAUSAL: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    part = tl.program_id(1)
    request = tl.program_id(2)

    qo_start = tl.load(qo_indptr_ptr + request)
    qo_len = tl.load(qo_indptr_ptr + request + 1) - qo_start
    first_row = tl.program_id(0) * BLOCK_M
    if first_row >= qo_len * heads:  # the grid is sized for the longest request
        return
    kv_len = tl.load(kv_len_ptr + request)
    page_table_ptr = kv_indices_ptr + tl.load(kv_indptr_ptr + request)

    # Rows of the tile. Offsets are int64: tokens * stride and pages * stride both outgrow 2**31 elements.
    row = first_row + tl.arange(0, BLOCK_M)
    query = row // heads
    row_ok = query < qo_len
    token = qo_start + query.to(tl.int64)
    head = (row % heads).to(tl.int64)
    latent_dim = tl.arange(0, RANK)[None, :]
    rope_dim = tl.arange(0, ROPE)[None, :]
    q_nope_offset = token * q_nope_stride_tok + head * q_nope_stride_head
    q_nope = tl.load(q_nope_ptr + q_nope_offset[:, None] + latent_dim, mask=row_ok[:, None], other=0.0)
    q_pe_offset = token * q_pe_stride_tok + head * q_pe_stride_head
    q_pe = tl.load(q_pe_ptr + q_pe_offset[:, None] + rope_dim, mask=row_ok[:, None], other=0.0)

    # A row sees keys [0, row_end), and no row of the tile sees past tile_end. Causal is aligned bottom-right.
    first_key, end = _part(kv_len, part, PARTS, BLOCK_N)
    if CAUSAL:
        row_end = query + (kv_len - qo_len + 1)
        last_query = tl.minimum((first_row + BLOCK_M - 1) // heads, qo_len - 1)
        tile_end = tl.minimum(last_query + (kv_len - qo_len + 1), end)
    else:
        row_end = tl.full([BLOCK_M], 0, tl.int32) + kv_len
        tile_end = end

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.full([BLOCK_M], 0.0, tl.float32)  # noqa: E741
    acc = tl.full([BLOCK_M, RANK], 0.0, tl.float32)
    for start in range(first_key, tile_end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_ok = key < kv_len
        page = tl.load(page_table_ptr + key // page_size, mask=key_ok, other=0).to(tl.int64)
        slot = (key % page_size).to(tl.int64)
        ckv_offset = page * ckv_stride_page + slot * ckv_stride_slot
        ckv = tl.load(ckv_ptr + ckv_offset[:, None] + latent_dim, mask=key_ok[:, None], other=0.0)
        kpe_offset = page * kpe_stride_page + slot * kpe_stride_slot
        kpe = tl.load(kpe_ptr + kpe_offset[:, None] + rope_dim, mask=key_ok[:, None], other=0.0)

        # input_precision matters to fp32 only, where the default would round to TF32.
        s = tl.dot(q_pe, tl.trans(kpe), input_precision="ieee")
        s = tl.dot(q_nope, tl.trans(ckv), s, input_precision="ieee") * qk_scale
        # row_end of a stored row never passes kv_len: one comparison masks the causal triangle and the tail.
        s = tl.where(key[None, :] < row_end[:, None], s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, 1))
        # A row without a key so far subtracts 0 instead of -inf: its weights become exp2(-inf) = 0, not NaN.
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_finite[:, None])
        rescale = tl.exp2(m - m_finite)
        l = l * rescale + tl.sum(p, 1)  # noqa: E741  # the fp32 weights, before they are rounded for the dot
        acc = tl.dot(p.to(ckv.dtype), ckv, acc * rescale[:, None], input_precision="ieee")
        m = m_new

    place = part.to(tl.int64) * total_rows + token * heads + head
    tl.store(acc_ptr + place[:, None] * RANK + latent_dim, acc, mask=row_ok[:, None])
    tl.store(m_ptr + place, m, mask=row_ok)
    tl.store(l_ptr + place, l, mask=row_ok)


@triton.jit(do_not_specialize=["heads", "total_rows"])
def _merge_kernel(
    acc_ptr,
    m_ptr,
    l_ptr,
    out_ptr,
    lse_ptr,
    out_stride_tok,
    out_stride_head,
    lse_stride_tok,
    lse_stride_head,
    heads,
    total_rows,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = row < total_rows
    dim = tl.arange(0, RANK)[None, :]
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for part in range(PARTS):
        m = tl.maximum(m, tl.load(m_ptr + part * total_rows + row, mask=row_ok, other=float("-inf")))
    m_finite = tl.where(m == float("-inf"), 0.0, m)
    l = tl.full([BLOCK_R], 0.0, tl.float32)  # noqa: E741
    acc = tl.full([BLOCK_R, RANK], 0.0, tl.float32)
    for part in range(PARTS):
        place = part * total_rows + row
        rescale = tl.exp2(tl.load(m_ptr + place, mask=row_ok, other=float("-inf")) - m_finite)
        l += tl.load(l_ptr + place, mask=row_ok, other=0.0) * rescale  # noqa: E741
        acc += tl.load(acc_ptr + place[:, None] * RANK + dim, mask=row_ok[:, None], other=0.0) * rescale[:, None]
    # A row with a key has l >= 1 (its maximum weighs 1), so l == 0 means that the row has seen none.
    no_key = l == 0.0
    l_safe = tl.where(no_key, 1.0, l)
    out = acc / l_safe[:, None]  # 0 / 1 where there is no key
    lse = tl.where(no_key, float("-inf"), (m + tl.log2(l_safe)) * 0.6931471805599453)  # * ln(2): natural log
    token, head = row // heads, row % heads
    out_offset = token * out_stride_tok + head * out_stride_head
    tl.store(out_ptr + out_offset[:, None] + dim, out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None])
    tl.store(lse_ptr + token * lse_stride_tok + head * lse_stride_head, lse, mask=row_ok)


# False when TRITON_INTERPRET=1 made triton.jit return an interpreted function.
_COMPILED = isinstance(_attend_kernel, triton.runtime.JITFunction)
# Into how many parts the keys of each request are cut. Where a program is interpreted, each costs much.
PARTS = 4 if _COMPILED else 2


def _config(dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Tile sizes, num_warps and num_stages of the first kernel."""
    if not _COMPILED:
        # Every operation is a NumPy call however large the tile, so few and large tiles win.
        return {"BLOCK_M": min(256, max(16, triton.next_power_of_2(rows))), "BLOCK_N": 64}
    if dtype == torch.float32:
        # An IEEE fp32 dot runs on FMA units, not on tensor cores: small tiles keep it in registers.
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}


def workspace_bytes(total_qo: int, heads: int, rank: int) -> int:
    """Scratch memory that :func:`mla_decode` needs: fp32 outputs, maxima and denominators of each part."""
    return 4 * PARTS * total_qo * heads * (rank + 2)


def mla_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_pages: torch.Tensor,
    kpe_pages: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_len: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: torch.Tensor,
    *,
    causal: bool,
    sm_scale: float,
    max_qo_len: int,
) -> None:
    """Absorbed MLA of a batch over a paged cache of latents; fills ``out`` and ``lse``.

    q_nope       [total_qo, heads, rank]     bf16, fp16 or fp32; multiplied by W_UK already
    q_pe         [total_qo, heads, rope]     as q_nope
    ckv_pages    [pages, page_size, rank]    as q_nope
    kpe_pages    [pages, page_size, rope]    as q_nope
    qo_indptr    [batch + 1]       int32     first query of each request
    kv_indptr    [batch + 1]       int32     first entry of each request in kv_indices; counts pages
    kv_indices   [page entries]    int32     physical pages, in any order
    kv_len       [batch]           int32     keys of each request
    out          [total_qo, heads, rank]     as q_nope, every element written
    lse          [total_qo, heads]           fp32, natural log, every element written
    workspace    uint8, :func:`workspace_bytes` of them at least, 16-byte aligned; contents do not matter

    rank and rope are powers of two, 16 or more. Causal: query i of a request sees keys j <= i + kv_len - qo_len. A row
    that sees no key gets out = 0 and lse = -inf. The last dimension must be contiguous, all other strides are free; the
    integers must be contiguous. ``sm_scale`` is that of the head before absorption. ``max_qo_len``: of the longest
    request, or more. Lengths, offsets and page indices are read by the device alone and cannot be checked.

    Raises ValueError or TypeError for anything about a tensor that the host can see.
    """
    tensors = {
        "q_nope": q_nope,
        "q_pe": q_pe,
        "ckv_pages": ckv_pages,
        "kpe_pages": kpe_pages,
        "out": out,
        "lse": lse,
        "qo_indptr": qo_indptr,
        "kv_indptr": kv_indptr,
        "kv_indices": kv_indices,
        "kv_len": kv_len,
        "workspace": workspace,
    }
    _check(tensors, sm_scale)
    total_qo, heads, rank = q_nope.shape
    rope, page_size, batch = q_pe.shape[-1], ckv_pages.shape[1], kv_len.numel()
    if max_qo_len <= 0 or total_qo == 0:
        return
    rows = total_qo * heads
    scratch = workspace.view(torch.float32)[: PARTS * rows * (rank + 2)]
    acc, m, denominator = torch.split(scratch, [PARTS * rows * rank, PARTS * rows, PARTS * rows])

    if not _COMPILED and q_nope.dtype == torch.bfloat16:
        # The interpreter holds bf16 as uint16, and its dot multiplies the bit patterns. fp32 holds every bf16 value, so
        # here the kernel runs on widened copies; only P keeps more bits than on a device.
        q_nope, q_pe, ckv_pages, kpe_pages = (t.float() for t in (q_nope, q_pe, ckv_pages, kpe_pages))
        target, out = out, out.float()  # not empty: an element the kernel forgets keeps its old value
    else:
        target = out

    config = _config(q_nope.dtype, max_qo_len * heads)
    _attend_kernel[(triton.cdiv(max_qo_len * heads, config["BLOCK_M"]), PARTS, batch)](
        q_nope,
        q_pe,
        ckv_pages,
        kpe_pages,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_len,
        acc,
        m,
        denominator,
        sm_scale * math.log2(math.e),
        *q_nope.stride()[:2],
        *q_pe.stride()[:2],
        *ckv_pages.stride()[:2],
        *kpe_pages.stride()[:2],
        heads,
        page_size,
        rows,
        CAUSAL=causal,
        RANK=rank,
        ROPE=rope,
        PARTS=PARTS,
        **config,
    )
    block_r = 256 if not _COMPILED else 4
    _merge_kernel[(triton.cdiv(rows, block_r),)](
        acc,
        m,
        denominator,
        out,
        lse,
        *out.stride()[:2],
        *lse.stride(),
        heads,
        rows,
        RANK=rank,
        PARTS=PARTS,
        BLOCK_R=block_r,
    )
    if target is not out:
        target.copy_(out)


def _check(tensors: dict[str, torch.Tensor], sm_scale: float) -> None:
    """Raise ValueError or TypeError for a call that cannot be meant."""
    q_nope, ckv = tensors["q_nope"], tensors["ckv_pages"]
    if q_nope.dim() != 3 or ckv.dim() != 3:
        raise ValueError(
            f"q_nope and ckv_pages must have three dimensions, got {list(q_nope.shape)} and {list(ckv.shape)}"
        )
    if q_nope.dtype not in DTYPES:
        raise TypeError(f"q_nope must be one of {', '.join(map(str, DTYPES))}, got {q_nope.dtype}")
    total_qo, heads, rank = q_nope.shape
    pages, page_size, _ = ckv.shape
    rope, batch = tensors["q_pe"].shape[-1], tensors["kv_len"].shape[0] if tensors["kv_len"].dim() else 0
    for name, size in (("rank", rank), ("rope", rope)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} must be a power of two, 16 or more, got {size}")
    if heads < 1 or page_size < 1:
        raise ValueError(f"heads and page_size must be at least 1, got {heads} and {page_size}")
    floating, whole = q_nope.dtype, torch.int32
    shapes = {
        "q_nope": (total_qo, heads, rank),
        "q_pe": (total_qo, heads, rope),
        "ckv_pages": (pages, page_size, rank),
        "kpe_pages": (pages, page_size, rope),
        "out": (total_qo, heads, rank),
        "lse": (total_qo, heads),
        "qo_indptr": (batch + 1,),
        "kv_indptr": (batch + 1,),
        "kv_indices": (-1,),
        "kv_len": (batch,),
        "workspace": (-1,),
    }
    dtypes = dict.fromkeys(shapes, floating) | {
        "lse": torch.float32,
        "workspace": torch.uint8,
        **dict.fromkeys(("qo_indptr", "kv_indptr", "kv_indices", "kv_len"), whole),
    }
    require(tensors, shapes, dtypes)
    for name in ("q_nope", "q_pe", "ckv_pages", "kpe_pages", "out", *(n for n, t in dtypes.items() if t == whole)):
        require_rows(name, tensors[name])
    workspace, needed = tensors["workspace"], workspace_bytes(total_qo, heads, rank)
    if workspace.numel() < needed:
        raise ValueError(f"workspace must have {needed} bytes, got {workspace.numel()}")
    if workspace.data_ptr() % 16 or not workspace.is_contiguous():
        raise ValueError("workspace must be contiguous, and begin at a multiple of 16 bytes")
    require_number("sm_scale", sm_scale)
