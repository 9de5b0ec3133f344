"""A matrix product in Triton as plain as it gets: what is left is the tensor core's accumulator."""
# Triton gives its language no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot_kernel(
    a_ptr, b_ptr, c_ptr, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IMPRECISE: tl.constexpr
):
    """c = a @ b.T for a [M, k] and b [N, k]; M, N and k are multiples of the blocks.

    ``IMPRECISE`` is ``max_num_imprecise_acc``: after how many products an fp8 accumulator is added to one in fp32.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.num_programs(1) * BLOCK_N
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        a = tl.load(a_ptr + row[:, None] * k + (start + inner)[None, :])
        b = tl.load(b_ptr + column[None, :] * k + (start + inner)[:, None])
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=IMPRECISE)
    tl.store(c_ptr + row[:, None] * columns + column[None, :], acc)
