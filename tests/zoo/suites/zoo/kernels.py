"""The zoo: each planted bug is one defect on top of a healthy kernel, beside its healthy twin.

Names follow the list of planted bugs (Z2, Z8 ...); the letters after it are kinds of failure that no Z stands for.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call, Case, Device, Kernel

from ..attention import triton_paged
from ..attention._axes import needs_lse, plain
from ..attention.paged_prefill import paged_prefill
from . import _attention as a

if TYPE_CHECKING:
    import torch

Outputs = Mapping[str, "torch.Tensor"]
TRITON = {"library": "triton", "numerics": triton_paged.numerics, "devices": ("cpu", "cuda"), "unsupported": plain}

# The n-th launch of a worker differs from the one before, whatever the case.
LAUNCHES = itertools.count()


def kernel(name: str, launch: Any, **more: Any) -> Kernel:
    settings = {"numerics": a.numerics, "devices": ("cpu",), "unsupported": needs_lse, **more}
    # An operator of its own: beside each other, they would crash each other's hunts.
    return Kernel(name=f"zoo.{name}", operator=replace(paged_prefill), launch=launch, **settings)


def triton(function: str, *, bug: bool) -> Any:
    def launch(call: Call) -> Outputs:
        from . import _triton_prefill_bugs

        axes = call.case.axes
        getattr(_triton_prefill_bugs, function)(
            **call.inputs, **call.outputs, causal=axes.causal, sm_scale=axes.scale, bug=bug
        )
        return call.outputs

    return launch


def unwritten(call: Call) -> Outputs:
    """Z12: rows that see no key are left as they were."""
    for part in a.parts(call):
        out, lse = a.attend(part, call.case.axes.scale)
        some = part.seen.any(-1)
        target = call.outputs["out"][part.rows]
        target[some] = out[some].to(target.dtype)
        call.outputs["lse"][part.rows] = lse
    return call.outputs


def aborts(call: Call) -> Outputs:
    """Z13: host code aborts on a request of more than 64 keys."""
    if any(request.kv_len > 64 for request in call.case.axes.requests):
        os.abort()
    return a.healthy(call)


def mutates(call: Call) -> Outputs:
    """Z14: the scale is multiplied into q in place."""
    for part in a.parts(call):
        scaled = replace(part, q=part.q * call.case.axes.scale)
        a.write(call, part, a.attend(scaled, 1.0))
    call.inputs["q"].mul_(call.case.axes.scale)
    return call.outputs


def accumulates(call: Call) -> Outputs:
    """Z11: the accumulator in the workspace is added to, not set, when a request has more than one page of keys."""
    import torch

    for part in a.parts(call):
        out, lse = a.attend(part, call.case.axes.scale)
        accumulator = call.workspace(4 * out.numel()).view(torch.float32)[: out.numel()].view(out.shape)
        if part.k.shape[1] > call.case.axes.page_size:
            accumulator.add_(out)
        else:
            accumulator.copy_(out)
        a.write(call, part, (accumulator, lse))
    return call.outputs


def stale_pool(call: Call) -> Outputs:
    """Scratch memory of the library's own, from the allocator, is used without being set."""
    import torch

    a.healthy(call)
    call.outputs["lse"].add_(torch.empty(1, 16)[:, :1].reshape(1).to(call.outputs["lse"]))
    return call.outputs


def jitters_and_leaks(call: Call) -> Outputs:
    """A kernel that promises no equal bits, and multiplies stale memory by a weight of 0."""
    import torch

    nondeterministic(call)
    call.outputs["lse"].add_(torch.empty(1, 16)[:, :1].reshape(1).to(call.outputs["lse"]) * 0)
    return call.outputs


def off_by_one(call: Call) -> Outputs:
    """Z15: the causal mask lets one key too many through, in rows at the edge of a tile of 16."""
    for part in a.parts(call):
        seen = part.seen
        if call.case.axes.causal:
            seen = seen.clone()
            diagonal = part.k.shape[1] - part.q.shape[1]
            for row in range(15, part.q.shape[1], 16):
                if 0 <= row + diagonal + 1 < part.k.shape[1]:
                    seen[row, row + diagonal + 1] = True
        a.write(call, part, a.attend(replace(part, seen=seen), call.case.axes.scale))
    return call.outputs


def lse_in_base_2(call: Call) -> Outputs:
    """Z15: the log-sum-exp is in base 2 and called base e."""
    a.healthy(call)
    call.outputs["lse"].div_(0.6931471805599453)
    return call.outputs


def nondeterministic(call: Call) -> Outputs:
    """The answer moves by a few units in the last place from launch to launch, within every tolerance."""
    a.healthy(call)
    call.outputs["lse"].mul_(1 + (next(LAUNCHES) % 8) * 2.0**-23)
    return call.outputs


def wrong_dtype(call: Call) -> Outputs:
    a.healthy(call)
    return {"out": call.outputs["out"].double(), "lse": call.outputs["lse"]}


def wrong_shape(call: Call) -> Outputs:
    a.healthy(call)
    return {"out": call.outputs["out"], "lse": call.outputs["lse"].unsqueeze(0)}


def forgets_lse(call: Call) -> Outputs:
    a.healthy(call)
    return {"out": call.outputs["out"]}


def returns_none(call: Call) -> Any:
    a.healthy(call)


def raises(call: Call) -> Outputs:
    """Refuses what it says it supports."""
    if call.case.axes.page_size > 16:
        raise ValueError(f"page size {call.case.axes.page_size} is too large")
    return a.healthy(call)


def refuses(case: Case[Any], device: Device) -> str:
    return "this kernel supports nothing"


z2 = kernel("z2[planted]", triton("prefill_split", bug=True), **TRITON)
z2_twin = kernel("z2[twin]", triton("prefill_split", bug=False), **TRITON)
z8 = kernel("z8[planted]", triton("prefill_tail", bug=True), **TRITON)
z8_twin = kernel("z8[twin]", triton("prefill_tail", bug=False), **TRITON)
z11 = kernel("z11[planted]", accumulates)
z12 = kernel("z12[planted]", unwritten)
z13 = kernel("z13[planted]", aborts)
z14 = kernel("z14[planted]", mutates)
z15_mask = kernel("z15_mask[planted]", off_by_one)
z15_lse = kernel("z15_lse[planted]", lse_in_base_2)
torch_twin = kernel("torch[twin]", a.healthy)
pool = kernel("pool[planted]", stale_pool)
random = kernel("nondeterministic[planted]", nondeterministic)
random_twin = kernel("jitter[twin]", nondeterministic, deterministic=False)
random_leak = kernel("jitter[planted]", jitters_and_leaks, deterministic=False)
dtype = kernel("dtype[planted]", wrong_dtype)
shape = kernel("shape[planted]", wrong_shape)
missing = kernel("missing[planted]", forgets_lse)
nothing = kernel("nothing[planted]", returns_none)
raising = kernel("raising[planted]", raises)
refusing = kernel("refusing[planted]", a.healthy, unsupported=refuses)
