"""Our own paged prefill in Triton: compiled on a GPU, interpreted on a CPU."""

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

from .paged_prefill import PagedPrefill, paged_prefill

if TYPE_CHECKING:
    import torch


def launch(call: Call) -> dict[str, torch.Tensor]:
    """One launch for the whole batch, into the caller's buffers."""
    from . import _triton_prefill

    x, axes = call.inputs, call.case.axes
    _triton_prefill.paged_prefill(
        x["q"],
        x["k_pages"],
        x["v_pages"],
        x["qo_indptr"],
        x["kv_indptr"],
        x["kv_indices"],
        x["kv_last_page_len"],
        call.outputs["out"],
        call.outputs["lse"],
        causal=axes.causal,
        sm_scale=axes.scale,
        max_qo_len=max(request.qo_len for request in axes.requests),
    )
    return dict(call.outputs)


def numerics(case: Case[PagedPrefill], device: Device) -> Numerics:
    """fp32 accumulation and denominator; P in the input's format, but in fp32 where bf16 is interpreted."""
    fmt = FORMATS[case.axes.dtype]
    interpreted = device.kind == "cpu"
    acc = IEEE_FP32 if interpreted or fmt is FP32 else WGMMA_16BIT
    return Numerics(
        qk=acc,
        pv=acc,
        p=FP32 if interpreted and fmt is BF16 else fmt,
        out=fmt,
        tile=32,
        lse_base="e",
        # A request's tiles are its own, and of one size for all; but in the interpreter they fit the longest request.
        batch_invariant=not interpreted,
    )


def specialisation(case: Case[PagedPrefill]) -> str:
    """What Triton compiles anew."""
    axes = case.axes
    return f"{axes.dtype}-d{axes.head_dim}-{'causal' if axes.causal else 'full'}"


def refuses(step: str, case: Case[PagedPrefill], device: Device) -> str | None:
    """The interpreter's bf16 is a copy of the whole cache in fp32."""
    if step == "far_pages" and device.kind == "cpu" and case.axes.dtype == "bfloat16":
        return "the interpreted kernel copies the whole cache"
    return None


triton_prefill = Kernel(
    name="triton.paged_prefill[online]",
    operator=paged_prefill,
    launch=launch,
    numerics=numerics,
    specialisation=specialisation,
    contract=LaunchContract(captured="lengths", refuses=refuses),
    library="triton",
)
