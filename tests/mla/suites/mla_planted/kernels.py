"""Planted bugs of MLA, each one defect on top of a healthy kernel, beside its healthy twin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call, Case, Device, Kernel

from ..mla import torch_gather, torch_layer
from ..mla._axes import SMALL
from ..mla.mla_attention import mla_attention
from ..mla.mla_paged_attention import mla_paged_attention

if TYPE_CHECKING:
    import torch

Outputs = Mapping[str, "torch.Tensor"]


def small_only(case: Case[Any], device: Device) -> str | None:
    """A bug is a bug at any size, and these are quick."""
    return None if case.axes.dims == SMALL else "planted for small dimensions"


def no_fewer_keys(case: Case[Any], device: Device) -> str | None:
    """Where queries come before all keys, every tile has a part that is forgotten easily."""
    fewer = any(0 < request.kv_len < request.qo_len for request in case.axes.requests)
    return "no incremental prefill" if case.axes.causal and fewer else small_only(case, device)


def absorbed(bug: str, call: Call) -> Outputs:
    from . import _absorbed

    return _absorbed.answer(call, bug)


def planted(name: str) -> Kernel:
    return Kernel(
        name=f"mla.{name}[planted]" if name else "mla.absorbed[twin]",
        # An operator of its own: beside each other they would be each other's peers.
        operator=replace(mla_paged_attention),
        launch=partial(absorbed, name),
        numerics=torch_gather.numerics,
        unsupported=small_only,
        inexact=torch_gather.gather.inexact,
        devices=("cpu",),
    )


def other_heads(call: Call) -> Outputs:
    """Head h is absorbed with the W_UK of head h + 1."""
    wrong = {**call.inputs, "w_uk": call.inputs["w_uk"].roll(-1, 0)}
    return torch_layer.launch("absorbed", replace(call, inputs=wrong))


def other_values(call: Call) -> Outputs:
    """The value of the head's neighbour: W_UV of head h + 1."""
    wrong = {**call.inputs, "w_uv": call.inputs["w_uv"].roll(-1, 0)}
    return torch_layer.launch("standard", replace(call, inputs=wrong))


def layer(name: str, form: str, launch: Any) -> Kernel:
    return Kernel(
        name=f"mla.{name}",
        operator=replace(mla_attention),
        launch=launch,
        numerics=partial(torch_layer.numerics, form),
        unsupported=small_only,
        inexact=torch_layer.absorbed.inexact,
        devices=("cpu",),
    )


latent_scale = planted("latent_scale")
no_rope = planted("no_rope")
next_page = planted("next_page")
base_2 = planted("base_2")
latent_cut = planted("latent_cut")
tile_edge = planted("tile_edge")
tile_floor = replace(planted("tile_floor"), unsupported=no_fewer_keys)
truncated = planted("truncated")
shifted_value = planted("shifted_value")
last_page = planted("last_page")
plain_mean = planted("plain_mean")
twin = planted("")
w_uk_of_another_head = layer("w_uk_head[planted]", "absorbed", other_heads)
w_uv_of_another_head = layer("w_uv_head[planted]", "standard", other_values)
layer_twin = layer("layer[twin]", "absorbed", partial(torch_layer.launch, "absorbed"))
