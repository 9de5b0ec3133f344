"""Appending to a paged cache with torch's indexed copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call, Case, Device, Kernel, LaunchContract, Operator

from ._checks import require, require_within
from ._page_append_axes import PageAppend, streams
from .page_append import Exact, mla_page_append, page_append

if TYPE_CHECKING:
    import torch


TRUST = "what tables on the device hold is the caller's, as with every kernel that does not wait for it"


def launch(call: Call) -> Mapping[str, torch.Tensor]:
    """Copies the cache and writes the new tokens into the copy, all of them at once, from the tables alone."""
    import torch

    check(call)
    axes, x = call.case.axes, call.inputs
    require_within("kv_indices", x["kv_indices"], x[f"{streams(call.case)[0]}_pages"].shape[0])
    new, table = x["append_indptr"].long(), x["kv_indptr"].long()
    count = new.diff()
    request = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    length = (table.diff() - 1).clamp(min=0) * axes.page_size + x["kv_last_page_len"]
    # The last new token of a request is its last one.
    position = length[request] - new[1:][request] + torch.arange(len(request), device=count.device)
    page = x["kv_indices"].long()[table[request] + position // axes.page_size]
    slot = position % axes.page_size
    for name in streams(call.case):
        cache = call.outputs[f"{name}_cache"].copy_(x[f"{name}_pages"])
        if axes.layout == "HND":
            cache = cache.transpose(1, 2)
        # As bits: not every backend indexes 8-bit floats.
        width = {1: torch.int8, 2: torch.int16}[cache.element_size()]
        cache.view(width)[page, slot] = x[f"append_{name}"].view(width)
    return call.outputs


def check(call: Call) -> None:
    """Raise ValueError or TypeError that names the first tensor of another shape, dtype or device than the rest."""
    import torch

    from ._page_append import inner_shapes

    axes: PageAppend = call.case.axes
    batch, new = len(axes.requests), sum(request.new for request in axes.requests)
    used, shapes = sum(map(axes.pages, axes.requests)), dict[str, tuple[int, ...]]()
    for name, inner in zip(streams(call.case), inner_shapes(call.case), strict=True):
        slots = (inner[0], axes.page_size, *inner[1:]) if axes.layout == "HND" else (axes.page_size, *inner)
        pages = used + axes.spare_pages
        shapes |= {f"append_{name}": (new, *inner), f"{name}_pages": (pages, *slots), f"{name}_cache": (pages, *slots)}
    dtypes = dict.fromkeys(shapes, getattr(torch, axes.dtype))
    table = {"append_indptr": batch + 1, "kv_indptr": batch + 1, "kv_indices": used, "kv_last_page_len": batch}
    shapes |= {name: (length,) for name, length in table.items()}
    require({**call.inputs, **call.outputs}, shapes, dtypes | dict.fromkeys(table, torch.int32))


def numerics(case: Case[Any], device: Device) -> Exact:
    return Exact()


def _kernel(operator: Operator) -> Kernel:
    return Kernel(
        name=f"torch.{operator.name}[index]",
        operator=operator,
        launch=launch,
        numerics=numerics,
        # Nothing can be captured: repeat_interleave waits for the device.
        contract=LaunchContract(trusts=dict.fromkeys(("indptr", "value out of range"), TRUST)),
    )


append = _kernel(page_append)
append_mla = _kernel(mla_page_append)
