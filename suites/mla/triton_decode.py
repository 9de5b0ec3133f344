"""Our own absorbed MLA in Triton: compiled on a GPU, interpreted on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kerneltest.model import (
    BF16,
    FORMATS,
    FP32,
    IEEE_FP32,
    WGMMA_16BIT,
    Call,
    Case,
    Device,
    Kernel,
    LaunchContract,
    Numerics,
)

from ._axes import Mla
from ._checks import check_parameters
from .mla_paged_attention import mla_paged_attention

if TYPE_CHECKING:
    import torch


def launch(call: Call) -> dict[str, torch.Tensor]:
    """Two launches for the whole batch, into the caller's buffers."""
    from . import _triton_decode

    axes = call.case.axes
    check_parameters(call)
    _triton_decode.mla_decode(
        **call.inputs,
        **call.outputs,
        workspace=call.workspace(_triton_decode.workspace_bytes(axes.total_qo, axes.heads, axes.rank)),
        causal=axes.causal,
        sm_scale=axes.scale,
        max_qo_len=max(request.qo_len for request in axes.requests),
    )
    return dict(call.outputs)


def numerics(case: Case[Mla], device: Device) -> Numerics:
    """fp32 but for P, which is in the input's format; where bf16 is interpreted, that is in fp32 too.

    A key passes a rescale for each tile behind its own, and one for the merge: no more than there are tiles.
    """
    fmt = FORMATS[case.axes.dtype]
    interpreted = device.kind == "cpu"
    acc = IEEE_FP32 if interpreted or fmt is FP32 else WGMMA_16BIT
    return Numerics(
        qk=acc,
        pv=acc,
        p=FP32 if interpreted and fmt is BF16 else fmt,
        out=fmt,
        tile=16,
        lse_base="e",
        # A request's tiles are its own, and of one size for all; but in the interpreter they fit the longest request.
        batch_invariant=not interpreted,
    )


def unsupported(case: Case[Mla], device: Device) -> str | None:
    """The merge of split keys always has a log-sum-exp."""
    return None if case.axes.return_lse else "the kernel always writes its log-sum-exp"


def specialisation(case: Case[Mla]) -> str:
    """What Triton compiles anew."""
    axes = case.axes
    return f"{axes.dtype}-{axes.rank}-{axes.dims.rope_dim}-{'causal' if axes.causal else 'full'}"


def refuses(step: str, case: Case[Mla], device: Device) -> str | None:
    """The interpreter's bf16 is a copy of the whole cache in fp32."""
    if step == "far_pages" and device.kind == "cpu" and case.axes.dtype == "bfloat16":
        return "the interpreted kernel copies the whole cache"
    return None


ON_THE_DEVICE = "it is read by the device alone; to look at it first would wait for the device"
triton_decode = Kernel(
    name="triton.mla_paged_attention[split]",
    operator=mla_paged_attention,
    launch=launch,
    numerics=numerics,
    # Each row of a tile is summed by itself on a GPU; but the promise is the kernel's, wherever it runs.
    inexact={"head_permutation": "where it is interpreted, BLAS may add up each row of a tile differently"},
    unsupported=unsupported,
    specialisation=specialisation,
    contract=LaunchContract(
        captured="lengths",
        refuses=refuses,
        trusts=dict.fromkeys(("index out of range", "indptr", "value out of range"), ON_THE_DEVICE),
    ),
    library="triton",
)
