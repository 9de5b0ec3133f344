"""A whole MLA layer in plain torch, in the three forms of :mod:`._forms`: fp32 sums, stored in the inputs' format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from kerneltest.model import FORMATS, IEEE_FP32, Call, Case, Device, Kernel, LaunchContract, Numerics

from ._axes import Mla
from ._checks import check
from ._numerics import MlaNumerics
from .mla_attention import mla_attention

if TYPE_CHECKING:
    import torch

# Keys of a block of the form that decompresses one after another; tests hold it against _forms.BLOCK.
COMPRESSED_TILE = 64


def launch(form: str, call: Call) -> Mapping[str, torch.Tensor]:
    """Request by request, the pages gathered first."""
    import torch

    from . import _forms

    axes, x, dims = call.case.axes, call.inputs, call.case.axes.dims
    rows = (axes.total_qo, axes.heads)
    check(
        call,
        {
            "q_nope": (*rows, dims.nope_dim),
            "q_pe": (*rows, dims.rope_dim),
            "w_uk": (axes.heads, dims.nope_dim, axes.rank),
            "w_uv": (axes.heads, dims.v_dim, axes.rank),
            "out": (*rows, dims.v_dim),
        },
    )
    w_uk, w_uv = x["w_uk"].float(), x["w_uv"].float()
    out = call.outputs["out"]
    lse = call.outputs["lse"] if axes.return_lse else out.new_empty(out.shape[:-1], dtype=torch.float32)

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.to(out.dtype).float()

    first_row = first_page = 0
    for request in axes.requests:
        own = slice(first_row, first_row + request.qo_len)
        pages = x["kv_indices"][first_page : first_page + axes.pages(request)].long()
        first_row, first_page = own.stop, first_page + len(pages)
        if request.qo_len == 0:
            continue
        if request.kv_len == 0:
            out[own], lse[own] = 0.0, -torch.inf
            continue
        latent, rope = (x[name][pages].flatten(0, 1)[: request.kv_len].float() for name in ("ckv_pages", "kpe_pages"))
        key = torch.arange(request.kv_len, device=out.device)
        last = torch.arange(request.qo_len, device=out.device) + request.kv_len - request.qo_len
        seen = key <= (last if axes.causal else torch.full_like(last, request.kv_len)).unsqueeze(-1)
        value, sums = _forms.FORMS[form](
            x["q_nope"][own].float(),
            x["q_pe"][own].float(),
            latent,
            rope,
            w_uk,
            w_uv,
            seen=seen,
            scale=axes.scale,
            rounded=rounded,
        )
        out[own], lse[own] = value.to(out.dtype), sums
    return dict(call.outputs)


def numerics(form: str, case: Case[Mla], device: Device) -> MlaNumerics:
    """fp32 sums; what a form stores, and P, in the inputs' format; the denominator sums fp32 weights."""
    fmt = FORMATS[case.axes.dtype]
    keys = max(1, *(request.kv_len for request in case.axes.requests))
    attention = Numerics(
        qk=IEEE_FP32,
        pv=IEEE_FP32,
        p=fmt,
        out=fmt,
        tile=COMPRESSED_TILE if form == "compressed" else keys,
        batch_invariant=True,  # each request is a call of its own
    )
    if form == "absorbed":
        return MlaNumerics(form="absorbed", attention=attention, query=fmt, latent=fmt)
    return MlaNumerics(form="decompressed", attention=attention, key=fmt, value=fmt)


def _kernel(form: str) -> Kernel:
    launched: Callable[[Call], Mapping[str, torch.Tensor]] = partial(launch, form)
    return Kernel(
        name=f"torch.mla_attention[{form}]",
        operator=mla_attention,
        launch=launched,
        numerics=partial(numerics, form),
        inexact={
            "latent_scale": "values or latents in fp16 may be subnormal, and then have fewer digits",
            "head_permutation": "heads share BLAS products, which may add up each row of a block differently",
        },
        contract=LaunchContract(captured="values"),  # lengths are read from the case, on the host
    )


standard, compressed, absorbed = map(_kernel, ("standard", "compressed", "absorbed"))
