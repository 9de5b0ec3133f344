"""A plain paged prefill in float32 torch, right in every case, for the planted bugs to break."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kerneltest.model import FORMATS, FP32, IEEE_FP32, Call, Case, Device, Numerics

if TYPE_CHECKING:
    import torch


def numerics(case: Case[Any], device: Device) -> Numerics:
    """Everything in fp32, rounded once."""
    return Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=FP32, out=FORMATS[case.axes.dtype], lse_base="e")


@dataclass(frozen=True)
class Part:
    """One request: its rows of the output, and its tensors in fp32 with the heads in front."""

    rows: slice
    q: torch.Tensor  # [q_heads, qo_len, d]
    k: torch.Tensor  # [q_heads, kv_len, d]
    v: torch.Tensor
    seen: torch.Tensor  # [qo_len, kv_len]


def parts(call: Call) -> Iterator[Part]:
    """The requests of a call, their keys gathered and cut at kv_len."""
    import torch

    axes, x = call.case.axes, call.inputs
    row = page = 0
    for request in axes.requests:
        pages = x["kv_indices"][page : page + axes.pages(request)].long()
        k, v = (
            x[name][pages].flatten(0, 1)[: request.kv_len].float().repeat_interleave(axes.group, 1).transpose(0, 1)
            for name in ("k_pages", "v_pages")
        )
        rows = slice(row, row + request.qo_len)
        seen = torch.ones(request.qo_len, request.kv_len, dtype=torch.bool, device=k.device)
        if axes.causal:
            seen = seen.tril(request.kv_len - request.qo_len)
        yield Part(rows, x["q"][rows].float().transpose(0, 1), k, v, seen)
        row, page = rows.stop, page + len(pages)


def attend(part: Part, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """out [rows, heads, d] and lse [rows, heads] in fp32; rows without a key give 0 and -Inf."""
    import torch

    s = (part.q @ part.k.transpose(1, 2) * scale).masked_fill(~part.seen, float("-inf"))
    if s.shape[-1] == 0:
        heads, rows, dim = part.q.shape
        return part.q.new_zeros(rows, heads, dim), part.q.new_full((rows, heads), float("-inf"))
    p = torch.exp(s - s.amax(-1, keepdim=True).nan_to_num(neginf=0.0))
    total = p.sum(-1, keepdim=True)
    out = p @ part.v / total.clamp(min=torch.finfo(torch.float32).tiny)
    return out.transpose(0, 1), torch.logsumexp(s, -1).transpose(0, 1)


def write(call: Call, part: Part, result: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Round the result into the caller's buffers."""
    call.outputs["out"][part.rows] = result[0].to(call.outputs["out"].dtype)
    call.outputs["lse"][part.rows] = result[1]


def healthy(call: Call) -> Mapping[str, torch.Tensor]:
    """The launch without any defect."""
    for part in parts(call):
        write(call, part, attend(part, call.case.axes.scale))
    return call.outputs
