"""torch's ``scaled_dot_product_attention`` on pages gathered into one dense tensor for each request.

K and V of another dtype, or with scales, are brought into the dtype of the queries first. Keys are never split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kerneltest.model import Call, Case, Device, Kernel, LaunchContract, Numerics
from kerneltest.model.numerics import EX2_APPROX, FORMATS, FP32, IEEE_FP32, WGMMA_16BIT

from ._axes import OPTIONS, lacking
from ._checks import check_paged, require_bits, require_rows, require_within
from .paged_prefill import PagedPrefill, paged_prefill

if TYPE_CHECKING:
    import torch

# torch's CPU kernel evaluates exp for 16-bit inputs with a cubic in the exponent's fraction (PyTorch pull request
# 151441, after Malossi et al. 2015), good to about one ulp of fp16. Already at exp(0) it was seen to be off by 5.1e-5:
# rows of equal weights came out as 1/n times 1.00005. 2^-13 bounds the cubic over the whole interval.
CPU_EXP_16BIT = 2.0**-13
# Keys between two rescales: the block of the CPU kernel, and the smallest of the CUDA kernels.
TILE = {"cpu": 512, "cuda": 32}


def launch(call: Call) -> dict[str, torch.Tensor]:
    """One dense call for each request; its backend is forced, so that the numerics declared are those that run."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from . import _eager
    from ._tensors import by_slot, queries

    axes, x = call.case.axes, call.inputs
    check_paged(call, "q", "k_pages", "v_pages", "kv_indices", "custom_mask", "packed_mask", "mask_indptr")
    require_rows("q", x["q"])
    require_within("kv_indices", x["kv_indices"], x["k_pages"].shape[0])
    require_bits(call)
    caches = {"k": (by_slot(axes, x["k_pages"]), axes.k_scale), "v": (by_slot(axes, x["v_pages"]), axes.v_scale)}
    backend = SDPBackend.FLASH_ATTENTION if call.device.kind == "cpu" else SDPBackend.EFFICIENT_ATTENTION
    first_row = first_page = 0
    parts = [x["q"].new_empty(0, axes.q_heads, axes.v_dim)]
    for number, request in enumerate(axes.requests):
        rows = slice(first_row, first_row + request.qo_len)
        pages = x["kv_indices"][first_page : first_page + axes.pages(request)].long()
        first_row, first_page = rows.stop, first_page + len(pages)
        if request.qo_len == 0:
            continue
        # [1, heads, tokens, d]
        q = queries(axes, x)[rows].transpose(0, 1).unsqueeze(0)
        k, v = (
            dequantised(cache[pages].flatten(0, 1)[: request.kv_len], scale, q.dtype)
            .repeat_interleave(axes.group, 1)
            .transpose(0, 1)
            .unsqueeze(0)
            for cache, scale in caches.values()
        )
        # is_causal aligns at the top left; a prefill over a cache is aligned at the bottom right.
        every = not axes.causal and axes.window_left < 0 and axes.mask == "none"
        mask = None if every else _eager.seen(axes, x, number)
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=axes.scale)
        parts.append(out.squeeze(0).transpose(0, 1))
    return {"out": torch.cat(parts)}


def dequantised(cache: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """K or V in the dtype of the queries, after their scale."""
    return cache if cache.dtype == dtype and scale == 1.0 else (cache.float() * scale).to(dtype)


def numerics(case: Case[PagedPrefill], device: Device) -> Numerics:
    """fp32 accumulation, P rounded to the input's format before P·V."""
    fmt = FORMATS[case.axes.dtype]
    narrow = fmt is not FP32
    acc = WGMMA_16BIT if device.kind == "cuda" and narrow else IEEE_FP32
    exp_rel = CPU_EXP_16BIT if device.kind == "cpu" and narrow else EX2_APPROX
    return Numerics(
        qk=acc,
        pv=acc,
        p=fmt,
        out=fmt,
        dequant=None if case.axes.k_scale == case.axes.v_scale == 1.0 else fmt,
        tile=TILE[device.kind],
        exp_rel=exp_rel,
        lse_base=None,
        batch_invariant=True,  # each request is a call of its own
    )


def unsupported(case: Case[PagedPrefill], device: Device) -> str | None:
    """What scaled_dot_product_attention leaves undefined, or has no argument for."""
    axes = case.axes
    if reason := lacking(axes, *OPTIONS.keys() - {"softcap", "alibi"}):
        return reason
    if axes.v_dim != axes.head_dim and device.kind == "cpu":
        return "on a CPU the flash kernel of scaled_dot_product_attention has one head dimension for K and V"
    for request in case.axes.requests:
        needed = request.qo_len if axes.causal else min(request.qo_len, 1)
        if request.kv_len < needed:
            return "rows without any key are not defined by scaled_dot_product_attention"
    return None


sdpa = Kernel(
    name="torch.paged_prefill[sdpa]",
    operator=paged_prefill,
    launch=launch,
    numerics=numerics,
    unsupported=unsupported,
    # Four equal heads of 8 keys in fp32 came out with two different sets of bits on two threads, with one on one.
    inexact={"head_permutation": "on a CPU MKL's sums depend on the alignment of a thread's scratch memory"},
    contract=LaunchContract(captured="values"),  # lengths are read from the case, on the host
    returns=("out",),
)
