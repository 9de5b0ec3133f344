"""Merging attention states in torch's float32: two of them in base e, several in base 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from kerneltest.model import FORMATS, Call, Case, Device, Kernel, LaunchContract, Operator

from ._checks import require
from ._merge_axes import MergeNumerics, MergeStates
from .merge_state import merge_state, merge_state_in_place, merge_states

if TYPE_CHECKING:
    import torch

Base = Literal["e", "2"]


def launcher(base: Base) -> Callable[[Call], Mapping[str, torch.Tensor]]:
    """A launch that merges in log-sum-exps of that base."""

    def launch(call: Call) -> Mapping[str, torch.Tensor]:
        import torch

        from ._merge import stacked

        check(call)
        x = stacked(call.case, call.inputs)
        exp, log = (torch.exp2, torch.log2) if base == "2" else (torch.exp, torch.log)
        peak = x.s.amax(1, keepdim=True)
        # Where no state has keys the maximum is -Inf, and -Inf minus that is NaN.
        weight = exp(x.s - torch.where(peak == -torch.inf, 0.0, peak))
        total = weight.sum(1)
        share = weight / torch.where(total > 0, total, 1.0).unsqueeze(1)
        out = (share.unsqueeze(-1) * x.v.float()).sum(1).to(x.v.dtype)
        lse = peak.squeeze(1) + log(total)
        if x.mask is not None:
            out = torch.where(x.mask[:, None, None], out, x.v[:, 0])
            lse = torch.where(x.mask[:, None], lse, x.s[:, 0])
        call.outputs["out"].copy_(out)
        call.outputs["lse"].copy_(lse)
        return call.outputs

    return launch


def check(call: Call) -> None:
    """Raise ValueError or TypeError that names the first tensor of another shape, dtype or device than the rest."""
    import torch

    axes: MergeStates = call.case.axes
    of_states = (
        (axes.rows, axes.states, axes.heads) if call.case.operator == "merge_states" else (axes.rows, axes.heads)
    )
    tensors = {**call.inputs, **call.outputs}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in tensors:
        of = (axes.rows, axes.heads) if name in ("out", "lse") else of_states
        shapes[name] = (axes.rows,) if name == "mask" else of if name[0] in "sl" else (*of, axes.head_dim)
    floating = getattr(torch, axes.dtype)
    dtypes = {name: torch.float32 if name[0] in "sl" else floating for name in tensors}
    require(tensors, shapes, dtypes | {"mask": torch.bool})


def numerics(base: Base) -> Callable[[Case[Any], Device], MergeNumerics]:
    """All states at once, in fp32.

    Not batch-invariant: on a CPU what is left of a tensor behind the last whole vector is given to another exp2, so
    that the last rows can have other bits. In one case 2 of 357 weights changed when the last row came first.
    """

    def declared(case: Case[Any], device: Device) -> MergeNumerics:
        return MergeNumerics(out=FORMATS[case.axes.dtype], lse_base=base)

    return declared


def _kernel(operator: Operator, base: Base) -> Kernel:
    return Kernel(
        name=f"torch.{operator.name}[base {base}]",
        operator=operator,
        launch=launcher(base),
        numerics=numerics(base),
        contract=LaunchContract(captured="values"),
    )


merge_two = _kernel(merge_state, "e")
merge_in_place = _kernel(merge_state_in_place, "e")
merge_several = _kernel(merge_states, "2")
