"""Appending to a paged cache with torch's indexed copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call, Case, Device, Kernel, LaunchContract, Operator

from .page_append import Exact, mla_page_append, page_append, streams

if TYPE_CHECKING:
    import torch


def launch(call: Call) -> Mapping[str, torch.Tensor]:
    """Copies the cache and writes the new tokens into the copy, all of them at once, from the tables alone."""
    import torch

    axes, x = call.case.axes, call.inputs
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


def numerics(case: Case[Any], device: Device) -> Exact:
    return Exact()


def _kernel(operator: Operator) -> Kernel:
    return Kernel(
        name=f"torch.{operator.name}[index]",
        operator=operator,
        launch=launch,
        numerics=numerics,
        contract=LaunchContract(),  # repeat_interleave waits for the device
    )


append = _kernel(page_append)
append_mla = _kernel(mla_page_append)
