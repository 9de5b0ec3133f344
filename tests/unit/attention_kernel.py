"""A paged-attention kernel in torch's float32, right unless told otherwise: tiles, an online softmax, P rounded.

How often a row counts a key is a number that a test can change: 0 for one that is lost, 2 for one that is doubled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from attention_cases import alibi, gathered, paged, shown

from kerneltest.model import FORMATS, FP32, IEEE_FP32, Case, Numerics
from kerneltest.oracle.verdict import Verdict, judge

Outputs = dict[str, torch.Tensor]


def biased_and_capped(s: torch.Tensor, bias: torch.Tensor | None, axes: Any) -> torch.Tensor:
    if bias is not None:
        s = s + bias
    return axes.softcap * torch.tanh(s / axes.softcap) if axes.softcap else s


@dataclass(frozen=True, slots=True, kw_only=True)
class Flaw:
    """``times(request, times)`` changes how often each row counts each key, [qo_len, kv_len], in place.

    ``v`` changes the values [q_heads, kv_len, d], ``out`` the output before it is rounded; ``scale`` replaces that of
    the case; ``no_max``: the maximum is not subtracted. ``scores`` makes those of scaled products and what ALiBi adds.
    """

    times: Callable[[int, torch.Tensor], object] = lambda request, times: None
    v: Callable[[torch.Tensor], torch.Tensor] = lambda v: v
    out: Callable[[torch.Tensor], torch.Tensor] = lambda out: out
    scale: float | None = None
    no_max: bool = False
    scores: Callable[[torch.Tensor, torch.Tensor | None, Any], torch.Tensor] = biased_and_capped


RIGHT = Flaw()


def kernel(
    case: Case[Any], inputs: Mapping[str, torch.Tensor], flaw: Flaw = RIGHT, *, tile: int = 16, l_from: str = "fp32"
) -> Outputs:
    """``out`` and ``lse`` (base e) of the whole batch."""
    axes, outs, lses = case.axes, [], []
    for number, ((_, q, k, v), seen) in enumerate(zip(gathered(case, inputs), shown(case, inputs), strict=True)):
        times = seen.float()
        flaw.times(number, times)
        bias = alibi(case, axes.requests[number], torch.float32) if axes.alibi else None
        out, lse = _attend(axes, q, k, flaw.v(v), times, bias, flaw, tile, l_from)
        outs.append(out.transpose(0, 1))
        lses.append(lse.transpose(0, 1))
    return {"out": flaw.out(torch.cat(outs)).to(getattr(torch, axes.dtype)), "lse": torch.cat(lses)}


def _attend(
    axes: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    times: torch.Tensor,
    bias: torch.Tensor | None,
    flaw: Flaw,
    tile: int,
    l_from: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    (heads, count, _), dim = q.shape, v.shape[-1]
    scale = torch.tensor(axes.scale if flaw.scale is None else flaw.scale)
    m = torch.full((heads, count), -torch.inf)
    denominator, acc = torch.zeros(heads, count), torch.zeros(heads, count, dim)
    for start in range(0, k.shape[1], tile):
        j = slice(start, start + tile)
        s = flaw.scores(q @ k[:, j].mT * scale, None if bias is None else bias[..., j], axes)
        s = s.masked_fill(times[:, j] == 0, -torch.inf)
        new = torch.maximum(m, s.amax(-1))
        safe = torch.where(new.isinf() | flaw.no_max, 0.0, new)
        p = torch.exp(s - safe.unsqueeze(-1))
        correction = torch.ones_like(m) if flaw.no_max else torch.exp(m - safe)
        rounded = p.to(getattr(torch, axes.dtype)).float() * times[:, j]
        denominator = denominator * correction + (rounded if l_from == "rounded_p" else p * times[:, j]).sum(-1)
        acc = acc * correction.unsqueeze(-1) + rounded @ v[:, j]
        m = new
    alive = denominator > 0
    out = acc / torch.where(alive, denominator, 1.0).unsqueeze(-1)
    peak = torch.zeros_like(m) if flaw.no_max else m
    return out, torch.where(alive, peak + denominator.log(), -torch.inf)


def judged(
    case: Case[Any],
    flaw: Flaw = RIGHT,
    *,
    table: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    tile: int = 16,
    l_from: str = "fp32",
) -> tuple[Outputs, dict[str, Verdict]]:
    """What the kernel answers, and what the oracle says of it. ``table`` changes the kernel's own page table."""
    inputs = paged.materialize(case).inputs
    fmt = FORMATS[case.axes.dtype]
    dequant = None if case.axes.k_scale == case.axes.v_scale == 1.0 else FP32
    numerics = Numerics(
        qk=IEEE_FP32, pv=IEEE_FP32, p=fmt, out=fmt, dequant=dequant, tile=tile, l_from=l_from, lse_base="e"
    )
    terms = paged.reference(case, inputs, "cpu")
    budgets = paged.budget(case, terms, numerics, paged.paged_prefill.strategy(case.inputs))
    outputs = kernel(case, {**inputs, "kv_indices": table(inputs["kv_indices"])}, flaw, tile=tile, l_from=l_from)
    return outputs, {name: judge(outputs[name], budget) for name, budget in budgets.items()}


def with_inputs(case: Case[Any], inputs: str) -> Case[Any]:
    """The case with another strategy, and the scales that it needs."""
    axes = replace(case.axes, sm_scale=None)
    if inputs == "dyadic":
        axes = replace(axes, sm_scale=paged.LN_2, k_scale=1.0, softcap=0.0)
    if paged.paged_prefill.strategy(inputs).tier == "exact":
        axes = replace(axes, alibi=False)
    return replace(case, inputs=inputs, axes=axes, relation="")
