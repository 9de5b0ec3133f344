"""FlashInfer's ``merge_state``, ``merge_state_in_place`` and ``merge_states`` (module ``cascade``).

Lines are those of release 0.6.18.post1, ``data/include/flashinfer/attention/cascade.cuh`` where no file is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kerneltest.model import FORMATS, Call, Case, Device, Kernel, LaunchContract, Operator

from ._merge_axes import MergeNumerics, MergeStates
from .flashinfer import NO_KEY_LSE
from .merge_state import merge_state, merge_state_in_place, merge_states

if TYPE_CHECKING:
    import torch

Launch = Callable[[Call], Mapping[str, "torch.Tensor"]]
# The two of merge_state are a row of threads for each head (:579), a thread for as many channels as 16 bytes hold, or a
# 32nd of a head: no block has more than 1024.
MAX_THREADS = 1024


def two(call: Call) -> Mapping[str, torch.Tensor]:
    """Allocates what it returns."""
    import flashinfer

    x = call.inputs
    out, lse = flashinfer.merge_state(x["v_a"], x["s_a"], x["v_b"], x["s_b"])
    return {"out": out, "lse": lse}


def in_place(call: Call) -> Mapping[str, torch.Tensor]:
    """On a copy of the first state in the output buffers."""
    import flashinfer

    x = call.inputs
    out, lse = call.outputs["out"].copy_(x["v"]), call.outputs["lse"].copy_(x["s"])
    flashinfer.merge_state_in_place(out, lse, x["v_other"], x["s_other"], x.get("mask"))
    return {"out": out, "lse": lse}


def several(call: Call) -> Mapping[str, torch.Tensor]:
    """Allocates what it returns."""
    import flashinfer

    out, lse = flashinfer.merge_states(call.inputs["v"], call.inputs["s"])
    return {"out": out, "lse": lse}


def numerics(case: Case[MergeStates], device: Device) -> MergeNumerics:
    """fp32, ex2.approx (math.cuh:41), lg2.approx, log-sum-exps in base 2.

    With at least as many states as rows, ``merge_states`` takes the kernel of MergeStates:644: each row of threads
    merges some states, and what they have is rounded to the type of ``v`` in shared memory and merged once more
    (threadblock_sync_state, :123). Empty states are told from others by -5e4 up to 0.6.18, see NO_KEY_LSE.
    """
    axes, fmt = case.axes, FORMATS[case.axes.dtype]
    again = case.operator == "merge_states" and axes.states >= axes.rows
    return MergeNumerics(
        out=fmt,
        lse_base="2",
        rounds=1 if again else 0,
        partial=fmt,
        lse_no_key=NO_KEY_LSE,
        batch_invariant=True,  # a block has one row, and all of them do the same (:579, :647, :660)
    )


def unsupported(case: Case[MergeStates], device: Device) -> str | None:
    axes = case.axes
    threads = axes.head_dim // max(8, axes.head_dim // 32) * axes.heads
    if threads > MAX_THREADS:
        return f"{axes.heads} heads of {axes.head_dim} channels are more threads than a block can have"
    return None


def specialisation(case: Case[Any]) -> str:
    """One module has them all."""
    return "cascade"


def _kernel(operator: Operator, launch: Launch, overwrites: tuple[str, ...] = ()) -> Kernel:
    return Kernel(
        name=f"flashinfer.{operator.name}",
        operator=operator,
        launch=launch,
        numerics=numerics,
        unsupported=unsupported,
        specialisation=specialisation,
        contract=LaunchContract(captured="values", overwrites=overwrites),
        devices=("cuda",),
        library="flashinfer",
        min_sm=(8, 0),
    )


merge_two = _kernel(merge_state, two)
merge_in_place = _kernel(merge_state_in_place, in_place, overwrites=("v", "s"))
merge_several = _kernel(merge_states, several)
