"""Absorbed MLA in plain torch, in fp32: pages gathered, every step written out. The control among the kernels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kerneltest.model import FORMATS, Call, Case, Device, Kernel, LaunchContract, Numerics
from kerneltest.model.numerics import IEEE_FP32

from ._axes import Mla
from ._checks import check_absorbed
from .mla_paged_attention import mla_paged_attention

if TYPE_CHECKING:
    import torch


def launch(call: Call) -> dict[str, torch.Tensor]:
    """Request by request: scores, softmax with its maximum taken off, weights rounded to the inputs' format, P · V."""
    import torch

    check_absorbed(call)
    axes, x = call.case.axes, call.inputs
    out = call.outputs["out"]
    lse = call.outputs["lse"] if axes.return_lse else out.new_empty(out.shape[:-1], dtype=torch.float32)
    first_row = first_page = 0
    for request in axes.requests:
        rows = slice(first_row, first_row + request.qo_len)
        pages = x["kv_indices"][first_page : first_page + axes.pages(request)].long()
        first_row, first_page = rows.stop, first_page + len(pages)
        if request.qo_len == 0:
            continue
        if request.kv_len == 0:
            out[rows], lse[rows] = 0.0, -math.inf
            continue
        latent, rope = (x[name][pages].flatten(0, 1)[: request.kv_len].float() for name in ("ckv_pages", "kpe_pages"))
        q_nope, q_pe = (x[name][rows].flatten(0, 1).float() for name in ("q_nope", "q_pe"))
        # Heads of a query are rows of one product: [qo_len * heads, keys]
        scores = (torch.cat([q_nope, q_pe], -1) @ torch.cat([latent, rope], -1).T) * axes.scale
        if axes.causal:
            query = torch.arange(request.qo_len, device=out.device).repeat_interleave(axes.heads).unsqueeze(-1)
            key = torch.arange(request.kv_len, device=out.device)
            scores = scores.masked_fill(key > query + request.kv_len - request.qo_len, -math.inf)
        peak = scores.amax(-1, keepdim=True)
        peak = torch.where(peak == -math.inf, 0.0, peak)
        weights = (scores - peak).exp()
        total = weights.sum(-1, keepdim=True)
        alive = total > 0
        value = weights.to(out.dtype).float() @ latent / torch.where(alive, total, 1.0)
        out[rows] = value.view(request.qo_len, axes.heads, -1).to(out.dtype)
        lse[rows] = torch.where(alive, peak + total.log(), -math.inf).view(request.qo_len, axes.heads)
    return dict(call.outputs)


def numerics(case: Case[Mla], device: Device) -> Numerics:
    """fp32 throughout, but for P, which is rounded to the inputs' format before P · V; its fp32 weights are summed."""
    fmt = FORMATS[case.axes.dtype]
    return Numerics(
        qk=IEEE_FP32,
        pv=IEEE_FP32,
        p=fmt,
        out=fmt,
        tile=max(1, *(request.kv_len for request in case.axes.requests)),  # all keys at once
        batch_invariant=True,  # each request is a call of its own
    )


gather = Kernel(
    name="torch.mla_paged_attention[gather]",
    operator=mla_paged_attention,
    launch=launch,
    numerics=numerics,
    inexact={"head_permutation": "heads are rows of a BLAS product, which may add up each row of a block differently"},
    contract=LaunchContract(captured="values"),  # lengths are read from the case, on the host
)
