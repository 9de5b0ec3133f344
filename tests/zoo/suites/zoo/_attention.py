"""The suite's own paged prefill in float32 torch, right in every case, for the planted bugs to break."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kerneltest.model import FORMATS, FP32, IEEE_FP32, Call, Case, Device, Numerics

if TYPE_CHECKING:
    import torch

    from ..attention._eager import Part


def numerics(case: Case[Any], device: Device) -> Numerics:
    """Everything in fp32, rounded once."""
    axes = case.axes
    dequant = None if axes.k_scale == axes.v_scale == 1.0 else FP32
    return Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=FP32, out=FORMATS[axes.dtype], dequant=dequant, lse_base="e")


def parts(call: Call) -> Iterator[Part]:
    """The requests of a call, their keys gathered and cut at kv_len."""
    from ..attention import _eager

    return _eager.parts(call.case.axes, call.inputs)


def attend(part: Part, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [rows, heads, d] and the log-sum-exp [rows, heads]; rows without a key give 0 and -Inf."""
    from ..attention import _eager

    return _eager.attend(part, scale)


def write(call: Call, part: Part, result: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Round the result into the caller's buffers."""
    call.outputs["out"][part.rows] = result[0].to(call.outputs["out"].dtype)
    if "lse" in call.outputs:
        call.outputs["lse"][part.rows] = result[1]


def healthy(call: Call) -> Mapping[str, torch.Tensor]:
    """The launch without any defect."""
    for part in parts(call):
        write(call, part, attend(part, call.case.axes.scale))
    return call.outputs
