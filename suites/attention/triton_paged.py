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

from ._axes import lacking
from ._checks import check_paged, require_dense
from .paged_prefill import PagedPrefill, paged_prefill

if TYPE_CHECKING:
    import torch


def launch(call: Call) -> dict[str, torch.Tensor]:
    """One launch for the whole batch, into the caller's buffers."""
    from . import _triton_prefill
    from ._tensors import by_slot, queries

    x, axes = call.inputs, call.case.axes
    check_paged(call, *x, *call.outputs)
    require_dense({name: value for name, value in x.items() if not value.is_floating_point()})
    _triton_prefill.paged_prefill(
        queries(axes, x),
        by_slot(axes, x["k_pages"]),
        by_slot(axes, x["v_pages"]),
        x["qo_indptr"],
        x["kv_indptr"],
        x["kv_indices"],
        x["kv_last_page_len"],
        call.outputs["out"],
        call.outputs["lse"],
        causal=axes.causal,
        sm_scale=axes.scale,
        max_qo_len=max(request.qo_len for request in axes.requests),
        window_left=axes.window_left,
        mask=x.get("custom_mask"),
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
    seen = "masked" if axes.mask != "none" else "causal" if axes.causal else "full"
    return f"{axes.dtype}-d{axes.head_dim}-{seen}{'-window' if axes.window_left >= 0 else ''}"


def unsupported(case: Case[PagedPrefill], device: Device) -> str | None:
    """Options that the kernel has no code for. It never splits keys."""
    known = ("window_left", "mask", "layout", "strided_q", "fixed_split_size", "disable_split_kv")
    return lacking(case.axes, *known)


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
    unsupported=unsupported,
    specialisation=specialisation,
    contract=LaunchContract(
        captured="lengths",
        refuses=refuses,
        trusts=dict.fromkeys(
            ("index out of range", "indptr", "value out of range"),
            "values in the device's memory are not read back, which would mean to wait for it",
        ),
    ),
    library="triton",
)
