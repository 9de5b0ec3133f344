"""Torch's kernels for attention beside paged prefill: float32 step by step, and ``scaled_dot_product_attention``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import FORMATS, FP32, IEEE_FP32, Call, Case, Device, Kernel, Numerics, Operator

from . import torch_sdpa
from ._dense import paged_case, pages
from .paged_decode import paged_decode
from .ragged_prefill import ragged_prefill
from .single_decode import single_decode
from .single_prefill import single_prefill

if TYPE_CHECKING:
    import torch

    from ._torch_attention import Part

Launch = Callable[[Call], Mapping[str, "torch.Tensor"]]
# More keys than any request has: there is one softmax over all of them, and no rescale.
ALL_KEYS = 1 << 24


def stepwise(parts: str) -> Launch:
    """A launch of the float32 steps; ``parts`` names the function that takes the inputs apart."""

    def launch(call: Call) -> Mapping[str, torch.Tensor]:
        from . import _torch_attention

        take_apart: Callable[..., Iterable[Part]] = getattr(_torch_attention, parts)
        out, lse = call.outputs["out"], call.outputs["lse"]
        if out.dim() == 2:  # of a single query
            out, lse = out.unsqueeze(0), lse.unsqueeze(0)
        for part in take_apart(call.case.axes, call.inputs):
            result, sums = _torch_attention.attend(part, call.case.axes.scale)
            out[part.rows], lse[part.rows] = result.to(out.dtype), sums
        return call.outputs

    return launch


def numerics(case: Case[Any], device: Device) -> Numerics:
    """Everything in fp32, rounded once; cuBLAS does so too, unless it is told that it may use TF32."""
    return Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=FP32, out=FORMATS[case.axes.dtype], tile=ALL_KEYS, lse_base="e")


def sdpa(call: Call) -> Mapping[str, torch.Tensor]:
    """What torch_sdpa does with pages, of one token each."""
    inner = replace(call, case=paged_case(call.case), inputs=pages(call.case, call.inputs))
    out = torch_sdpa.launch(inner)["out"]
    return {"out": out if call.outputs["out"].dim() == 3 else out.squeeze(0)}


def sdpa_numerics(case: Case[Any], device: Device) -> Numerics:
    return torch_sdpa.numerics(paged_case(case), device)


def sdpa_unsupported(case: Case[Any], device: Device) -> str | None:
    if case.axes.v_dim != case.axes.head_dim and device.kind == "cpu":
        return "on a CPU the flash kernel of scaled_dot_product_attention has one head dimension for K and V"
    return torch_sdpa.unsupported(paged_case(case), device)


def _stepwise(operator: Operator, parts: str) -> Kernel:
    return Kernel(
        name=f"torch.{operator.name}[stepwise]",
        operator=operator,
        launch=stepwise(parts),
        numerics=numerics,
        # torch's matrix products choose their blocks by shape and alignment.
        inexact={
            name: "the sums of a matrix product depend on the shapes and the alignment of its operands"
            for name in ("head_permutation", "page_permutation")
            if any(relation.name == name for relation in operator.relations)
        },
    )


def _sdpa(operator: Operator) -> Kernel:
    return Kernel(
        name=f"torch.{operator.name}[sdpa]",
        operator=operator,
        launch=sdpa,
        numerics=sdpa_numerics,
        unsupported=sdpa_unsupported,
        inexact=torch_sdpa.sdpa.inexact,
        returns=("out",),
    )


ragged_stepwise = _stepwise(ragged_prefill, "dense_parts")
single_prefill_stepwise = _stepwise(single_prefill, "dense_parts")
single_decode_stepwise = _stepwise(single_decode, "dense_parts")
paged_decode_stepwise = _stepwise(paged_decode, "paged_parts")
ragged_sdpa = _sdpa(ragged_prefill)
single_prefill_sdpa = _sdpa(single_prefill)
