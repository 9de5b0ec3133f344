"""What the float64 reference of attention does with rows of scores, on a GPU: each row is read and written once.

A program has a row. It walks over the scores for their maxima, and again, while they are in the cache, for the weights
and all sums. As separate operations, each an array in and an array out, this took longer than the matrix products.

A row is summed in a fixed order and there are no atomics: the same scores give the same bits.
"""

# Triton gives its language no types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Keys that a program of so many warps takes at a time: four float64 a thread, which leaves the registers for several
# programs on a multiprocessor, so that one computes exponentials while others wait for the memory.
# A product and a sum are rounded one by one, as on the host.
CONSTANTS = {"KEYS": 512, "num_warps": 4, "enable_fp_fusion": False}
# How a row of the mask is found. A compiler that knew these as multiples of 16 would lay out all data for wide loads of
# the mask, and send each store of float64 through shared memory.
MASK = ["rows", "rows_of_batch", "batch_stride", "row_stride"]
# What the kernel writes for each row, in this order.
FIELDS = ("share", "lse", "dot_row", "dot_max", "score_max", "keys", "square_row", "fourth_row")


@triton.jit
def _seen_row(seen_ptr, row, rows, rows_of_batch, batch_stride, row_stride):
    # Heads of a batch lie one after another, and see the same.
    return seen_ptr + (row // rows_of_batch) * batch_stride + (row % rows) * row_stride


@triton.jit
def _maxima(s_ptr, seen_ptr, keys, key_stride, KEYS: tl.constexpr):
    """The largest score that is seen, -Inf if there is none; the largest |s| of all keys; how many are seen."""
    key = tl.arange(0, KEYS)
    peak = tl.full([KEYS], float("-inf"), tl.float64)
    largest = tl.zeros([KEYS], tl.float64)
    count = tl.zeros([KEYS], tl.int32)
    for start in range(0, keys, KEYS):
        at = start + key
        s = tl.load(s_ptr + at, mask=at < keys, other=0.0)
        seen = tl.load(seen_ptr + at * key_stride, mask=at < keys, other=0)
        peak = tl.maximum(peak, tl.where(seen != 0, s, float("-inf")))
        largest = tl.maximum(largest, tl.abs(s))
        count += seen
    return tl.max(peak), tl.max(largest), tl.sum(count)


@triton.jit(do_not_specialize=["count", *MASK])
def _terms_kernel(
    s_ptr,
    dot_ptr,
    square_ptr,
    seen_ptr,
    fields_ptr,
    count,  # of rows, of all heads and batches
    rows,  # of a head
    rows_of_batch,
    keys,
    batch_stride,
    row_stride,
    key_stride,
    KEYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = row * keys
    key = tl.arange(0, KEYS)
    seen_ptr = _seen_row(seen_ptr, row, rows, rows_of_batch, batch_stride, row_stride)
    # No thread writes a weight before all have read their scores: the maximum needs them.
    peak, score_max, visible = _maxima(s_ptr + first, seen_ptr, keys, key_stride, KEYS)
    totals = tl.zeros([KEYS], tl.float64)
    squares = tl.zeros([KEYS], tl.float64)
    fourths = tl.zeros([KEYS], tl.float64)
    dots = tl.zeros([KEYS], tl.float64)
    largest = tl.zeros([KEYS], tl.float64)
    for start in range(0, keys, KEYS):
        at = start + key
        inside = at < keys
        s = tl.load(s_ptr + first + at, mask=inside, other=0.0)
        dot = tl.load(dot_ptr + first + at, mask=inside, other=0.0)
        seen = tl.load(seen_ptr + at * key_stride, mask=inside, other=0)
        p = tl.where(seen != 0, tl.exp(s - peak), 0.0)
        square = p * p
        weighted = dot * p
        tl.store(s_ptr + first + at, p, mask=inside)
        tl.store(dot_ptr + first + at, weighted, mask=inside)
        tl.store(square_ptr + first + at, square, mask=inside)
        totals += p
        squares += square
        fourths += square * square
        dots += weighted
        largest = tl.maximum(largest, dot)
    total = tl.sum(totals)
    alive = total > 0
    share = tl.where(alive, 1 / total, 0.0)
    square_share = share * share
    field = fields_ptr + row
    tl.store(field, share)
    tl.store(field + count, tl.where(alive, peak + tl.log(total), float("-inf")))
    tl.store(field + 2 * count, tl.sum(dots) * share)
    tl.store(field + 3 * count, tl.where(alive, tl.max(largest), 0.0))
    tl.store(field + 4 * count, tl.where(alive, score_max, 0.0))
    tl.store(field + 5 * count, visible.to(tl.float64))
    tl.store(field + 6 * count, tl.sum(squares) * square_share)
    tl.store(field + 7 * count, tl.sum(fourths) * square_share * square_share)


@triton.jit(do_not_specialize=MASK)
def _spread_kernel(
    s_ptr,
    along_ptr,
    centre_ptr,
    seen_ptr,
    spread_ptr,
    rows,
    rows_of_batch,
    keys,
    batch_stride,
    row_stride,
    key_stride,
    KEYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = row * keys
    key = tl.arange(0, KEYS)
    seen_ptr = _seen_row(seen_ptr, row, rows, rows_of_batch, batch_stride, row_stride)
    peak, _, _ = _maxima(s_ptr + first, seen_ptr, keys, key_stride, KEYS)
    centre = tl.load(centre_ptr + row)
    totals = tl.zeros([KEYS], tl.float64)
    squares = tl.zeros([KEYS], tl.float64)
    for start in range(0, keys, KEYS):
        at = start + key
        inside = at < keys
        s = tl.load(s_ptr + first + at, mask=inside, other=0.0)
        along = tl.load(along_ptr + first + at, mask=inside, other=0.0)
        seen = tl.load(seen_ptr + at * key_stride, mask=inside, other=0)
        p = tl.where(seen != 0, tl.exp(s - peak), 0.0)
        moved = p * (along - centre)
        totals += p
        squares += moved * moved
    total = tl.sum(totals)
    tl.store(spread_ptr + row, tl.where(total > 0, tl.sqrt(tl.sum(squares)) / total, 0.0))


def row_terms(s: torch.Tensor, dot: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """:func:`kerneltest.oracle.attention_terms.row_terms_step_by_step` on the device, where it only starts the work.

    ``s`` and ``dot`` are contiguous and have at least one element.
    """
    square = torch.empty_like(s)
    fields = s.new_empty(len(FIELDS), *s.shape[:-1])
    count = fields[0].numel()
    seen, places = _found(s, seen)
    with torch.accelerator.device_index(s.device.index):
        _terms_kernel[(count,)](s, dot, square, seen, fields, count, *places, **CONSTANTS)
    return square, dict(zip(FIELDS, fields, strict=True))


def row_spread(s: torch.Tensor, along: torch.Tensor, centre: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """:func:`kerneltest.oracle.attention_terms.row_spread_step_by_step`, in the same way; nothing is overwritten."""
    spread = torch.empty_like(centre)
    seen, places = _found(s, seen)
    with torch.accelerator.device_index(s.device.index):
        _spread_kernel[(spread.numel(),)](s, along, centre, seen, spread, *places, **CONSTANTS)
    return spread


def _found(s: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The mask as bytes, and how the kernels find a row in it: rows of a head and of a batch, keys, three strides."""
    batch, kv_heads, grouped_rows, keys = s.shape
    seen = seen.view(torch.int8).expand(batch, -1, -1)
    return seen, (seen.shape[1], kv_heads * grouped_rows, keys, *seen.stride())
