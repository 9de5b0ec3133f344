"""Every filter in torch by "sort and add up": the top-p that tutorials teach, written afresh, and its relatives.

A token stays while the mass before it, its own subtracted from the running sum again, is no more than p; equal tokens
go by index, so that a group of them is cut where p or k says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kerneltest.model import FORMATS, AccModel, Call, Case, Device, Kernel, LaunchContract, Operator

from ._axes import Rows
from ._checks import checked
from ._semantics import Semantics
from .filtered import (
    min_p_sampling,
    top_k_sampling,
    top_k_top_p_sampling,
    top_k_top_p_sampling_from_logits,
    top_p_sampling,
)
from .renorm import top_k_mask_logits, top_k_renorm, top_p_renorm
from .top_k import top_k

if TYPE_CHECKING:
    import torch

# cumsum keeps its running sum in double on a CPU (at::acc_type<float, false> in cumsum_cpu_kernel of
# ReduceOpsKernel.cpp), so that each prefix is rounded once. On CUDA a block scans at least 32 elements at a time by a
# tree of up to 10 levels and carries the sum on (tensor_kernel_scan_innermost_dim of ScanUtils.cuh).
CUMSUM = {"cpu": AccModel(53, "rne", 1, extra=1 << 29), "cuda": AccModel(24, "rne", 32, extra=12)}
# Sums that are divided by are taken in float64.
IN_DOUBLE = AccModel(53, "rne", 1)
# A generator of torch's own cannot be captured without registering it with the graph.
CAPTURED = LaunchContract(captured="values")


def semantics(case: Case[Rows], device: Device) -> Semantics:
    """Inclusive, absolute, equals by index."""
    from kerneltest.oracle.softmax import SoftmaxNumerics

    return Semantics(
        mass=CUMSUM[device.kind],
        through_self=True,
        strict=False,
        nucleus_ties="index",
        top_k_ties="index",
        row_sum=IN_DOUBLE,
        softmax=SoftmaxNumerics(row_sum=AccModel(24, "rne", 1, extra=0)),
        out=FORMATS[case.axes.dtype],
    )


def sampling(left: Callable[[Call], torch.Tensor]) -> Callable[[Call], dict[str, torch.Tensor]]:
    """A launch that draws in proportion to what a filter leaves."""

    def launch(call: Call) -> dict[str, torch.Tensor]:
        from . import _torch_filters as f

        return f.tokens(call, f.draw(f.chosen(call, left(call)), f.generator(call)))

    return launch


def top_p_left(call: Call) -> torch.Tensor:
    """What top-p leaves of the probabilities."""
    import torch

    from . import _torch_filters as f

    return f.top_p(call.inputs["probs"], f.parameter(call, "top_p", torch.float32))


def top_k_left(call: Call) -> torch.Tensor:
    """What top-k leaves of the probabilities."""
    import torch

    from . import _torch_filters as f

    probs = call.inputs["probs"]
    return probs.masked_fill(~f.top_k(probs, f.parameter(call, "top_k", torch.int64)), 0.0)


def min_p_left(call: Call) -> torch.Tensor:
    """What min-p leaves of the probabilities."""
    import torch

    from . import _torch_filters as f

    return f.min_p(call.inputs["probs"], f.parameter(call, "min_p", torch.float32))


def both_left(call: Call) -> torch.Tensor:
    """What top-k and top-p leave of the probabilities or of the logits."""
    from . import _torch_filters as f

    return f.top_k_top_p(call, **{name: call.inputs[name] for name in ("probs", "logits") if name in call.inputs})


def renorm(left: Callable[[Call], torch.Tensor]) -> Callable[[Call], dict[str, torch.Tensor]]:
    """A launch that puts out what a filter leaves, over its sum."""

    def launch(call: Call) -> dict[str, torch.Tensor]:
        from . import _torch_filters as f

        return {"renorm_probs": f.renormalised(left(call))}

    return launch


def mask(call: Call) -> dict[str, torch.Tensor]:
    """-Inf for all logits but the k largest."""
    import torch

    from . import _torch_filters as f

    logits = call.inputs["logits"]
    return {"masked_logits": logits.masked_fill(~f.top_k(logits, f.parameter(call, "top_k", torch.int64)), -torch.inf)}


def select(call: Call) -> dict[str, torch.Tensor]:
    """The k largest of each row, in order, by a stable sort."""
    k, logits = call.case.axes.top_k, call.inputs["logits"]
    values, indices = (both[:, :k].contiguous() for both in logits.sort(dim=-1, descending=True, stable=True))
    return {"values": values, "indices": indices}


def select_by_topk(call: Call) -> dict[str, torch.Tensor]:
    """The k largest of each row, in order, by ``torch.topk``."""
    values, indices = call.inputs["logits"].topk(call.case.axes.top_k, -1)
    return {"values": values, "indices": indices}


def no_reverse(case: Case[Rows], device: Device) -> str | None:
    """A stable sort takes the lowest index."""
    return "a stable sort takes equals by the lowest index" if case.axes.tie == "reverse" else None


def no_tie(case: Case[Rows], device: Device) -> str | None:
    """torch.topk promises nothing of equals."""
    return "torch.topk does not say which of equal values it takes" if case.axes.tie != "any" else None


def any_tie(case: Case[Rows], device: Device) -> Semantics:
    """Any of equals, as the documentation of torch.topk leaves it."""
    return Semantics(top_k_ties="any")


def _kernel(operator: Operator, launch: Callable[[Call], Any], **more: Any) -> Kernel:
    return Kernel(
        name=f"torch.{operator.name}[sort]",
        operator=operator,
        launch=checked(launch),
        **{"numerics": semantics} | more,
    )


top_p_sampler = _kernel(top_p_sampling, sampling(top_p_left))
top_k_sampler = _kernel(top_k_sampling, sampling(top_k_left))
min_p_sampler = _kernel(min_p_sampling, sampling(min_p_left))
both_sampler = _kernel(top_k_top_p_sampling, sampling(both_left))
both_logits_sampler = _kernel(top_k_top_p_sampling_from_logits, sampling(both_left))
top_p_renormaliser = _kernel(top_p_renorm, renorm(top_p_left), contract=CAPTURED)
top_k_renormaliser = _kernel(top_k_renorm, renorm(top_k_left), contract=CAPTURED)
top_k_mask = _kernel(top_k_mask_logits, mask, contract=CAPTURED)
top_k_selection = _kernel(top_k, select, unsupported=no_reverse, contract=CAPTURED)
topk = Kernel(
    name="torch.top_k[topk]",
    operator=top_k,
    launch=checked(select_by_topk),
    numerics=any_tie,
    unsupported=no_tie,
    contract=CAPTURED,
)
