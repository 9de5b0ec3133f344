"""Torch's float32, step by step: a kernel that knows every option of ``paged_prefill``, on a CPU too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kerneltest.model import FORMATS, FP32, IEEE_FP32, Call, Case, Device, Kernel, Numerics

from ._checks import check_paged, require_bits, require_within
from .paged_prefill import PagedPrefill, paged_prefill

if TYPE_CHECKING:
    import torch

# More keys than any request has: there is one softmax over all of them, and no rescale.
ALL_KEYS = 1 << 24
# Lengths are those of the axes.
READ = ("q", "k_pages", "v_pages", "kv_indices", "custom_mask", "packed_mask", "mask_indptr")
# Relative error of torch's tanh in fp32: two units in the last place of a result, by CUDA's table of accuracy; torch's
# CPU kernel is SLEEF's, of one.
TANH = 2.0**-22


def launch(call: Call) -> dict[str, torch.Tensor]:
    """One request after the other, into the caller's buffers."""
    from . import _eager

    axes, outputs = call.case.axes, call.outputs
    check_paged(call, *READ, *outputs)
    require_within("kv_indices", call.inputs["kv_indices"], call.inputs["k_pages"].shape[0])
    require_bits(call)
    for part in _eager.parts(axes, call.inputs):
        out, lse = _eager.attend(part, axes.scale)
        outputs["out"][part.rows] = out.to(outputs["out"].dtype)
        if "lse" in outputs:
            outputs["lse"][part.rows] = lse
    return dict(outputs)


def numerics(case: Case[PagedPrefill], device: Device) -> Numerics:
    """Everything in fp32, rounded once; cuBLAS does so too, unless it is told that it may use TF32."""
    axes = case.axes
    return Numerics(
        qk=IEEE_FP32,
        pv=IEEE_FP32,
        p=FP32,
        out=FORMATS[axes.dtype],
        dequant=None if axes.k_scale == axes.v_scale == 1.0 else FP32,
        tile=ALL_KEYS,
        tanh_rel=TANH,
        lse_base="e",
    )


eager = Kernel(
    name="torch.paged_prefill[eager]",
    operator=paged_prefill,
    launch=launch,
    numerics=numerics,
    inexact=dict.fromkeys(
        ("head_permutation", "page_permutation"),
        "the order of a matrix product's sums depends on the shapes and the alignment of its operands",
    ),
)
