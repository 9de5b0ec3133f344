"""What the torch kernels of this suite check of a call before they compute anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING

from kerneltest.model import Call

from ..attention._checks import require, require_within
from ._axes import Rows

if TYPE_CHECKING:
    import torch

Launch = Callable[[Call], Mapping[str, "torch.Tensor"]]


def checked(launch: Launch) -> Launch:
    """The launch behind a check of its inputs on rows of a vocabulary: ValueError or TypeError, with the name.

    Of parameters in a tensor, NaN and what lies outside of their range is refused, and indices of rows there are none
    of; both wait for the device.
    """

    @wraps(launch)
    def run(call: Call) -> Mapping[str, torch.Tensor]:
        _check_rows(call)
        return launch(call)

    return run


def _check_rows(call: Call) -> None:
    import torch

    axes: Rows = call.case.axes
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("probs", "logits"), (axes.rows, axes.vocabulary))
    shapes |= dict.fromkeys(("top_k", "top_p", "min_p", "temperature"), (axes.rows,))
    shapes |= {"indices": (axes.outputs,), "seed": (1,), "offset": (1,)}
    dtypes: dict[str, torch.dtype] = dict.fromkeys(shapes, torch.float32)
    dtypes |= dict.fromkeys(("probs", "logits"), getattr(torch, axes.dtype))
    dtypes |= {"top_k": torch.int32, "seed": torch.int64, "offset": torch.int64}
    dtypes |= {"indices": getattr(torch, axes.indices or "int32")}
    require(call.inputs, shapes, dtypes)
    for name, low, high in (("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0), ("temperature", 0.0, float("inf"))):
        if name in call.inputs:
            require_between(name, call.inputs[name], low, high)
    if "top_k" in call.inputs:
        require_within("top_k", call.inputs["top_k"] - 1, axes.vocabulary)
    if "indices" in call.inputs:
        require_within("indices", call.inputs["indices"], axes.rows)


def require_between(name: str, values: torch.Tensor, low: float, high: float) -> None:
    """Raise ValueError for NaN, or a value outside of [low, high]; not while a CUDA graph is captured."""
    import torch

    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if not bool(((values >= low) & (values <= high)).all()):
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {float(values.min())} to {float(values.max())}")


def check_chain(call: Call) -> None:
    """Check the inputs of chain speculative sampling; what raises is as in :func:`checked`."""
    import torch

    axes = call.case.axes
    shapes: dict[str, tuple[int, ...]] = {
        "draft_probs": (axes.rows, axes.tokens, axes.vocabulary),
        "draft_token_ids": (axes.rows, axes.tokens),
        "target_probs": (axes.rows, axes.tokens + 1, axes.vocabulary),
        "seed": (1,),
        "offset": (1,),
    }
    dtypes: dict[str, torch.dtype] = dict.fromkeys(shapes, torch.float32)
    dtypes |= {"draft_token_ids": torch.int32, "seed": torch.int64, "offset": torch.int64}
    require(call.inputs, shapes, dtypes)
    require_within("draft_token_ids", call.inputs["draft_token_ids"], axes.vocabulary)
