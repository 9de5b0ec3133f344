"""Planted bugs in the options of paged prefill: each is one mistake in the suite's own kernel, right but for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call, Case, Device, Kernel, Numerics, Size

from ..attention._axes import PagedPrefill, without_options
from ..attention.paged_prefill import paged_prefill
from . import _attention as a
from .relations import walked_backwards

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st

Outputs = Mapping[str, "torch.Tensor"]
Launch = Callable[[Call], Outputs]
Change = Callable[[Call], Call]


def planted(name: str, launch: Launch, **more: Any) -> Kernel:
    settings = {"numerics": a.numerics, "operator": replace(paged_prefill), **more}
    return Kernel(name=f"zoo.{name}", launch=launch, devices=("cpu",), **settings)


def misread(change: Change) -> Launch:
    """The healthy kernel, on a call that it has got wrong."""

    def launch(call: Call) -> Outputs:
        wrong = change(call)
        for part in a.parts(wrong):
            a.write(call, part, a.attend(part, wrong.case.axes.scale))
        return call.outputs

    return launch


def with_axes(call: Call, **axes: Any) -> Call:
    return replace(call, case=replace(call.case, axes=replace(call.case.axes, **axes)))


def with_inputs(call: Call, **inputs: torch.Tensor) -> Call:
    return replace(call, inputs={**call.inputs, **inputs})


def window_edge(call: Call) -> Call:
    """The window is one key too long."""
    window = call.case.axes.window_left
    return with_axes(call, window_left=window + 1) if window >= 0 else call


def window_top_left(call: Call) -> Outputs:
    """The window follows the queries from the first key on, as if there were no cache before the prompt."""
    import torch

    axes = call.case.axes
    for part in a.parts(with_axes(call, window_left=-1)):
        seen = part.seen
        if axes.window_left >= 0:
            row, key = (torch.arange(n) for n in seen.shape)
            seen = seen & (key >= row.unsqueeze(-1) - axes.window_left)
        a.write(call, part, a.attend(replace(part, seen=seen), axes.scale))
    return call.outputs


def softcap_dropped(call: Call) -> Call:
    return with_axes(call, softcap=0.0)


def lse_forgotten(call: Call) -> Call:
    """Where no log-sum-exp is asked for, the weights are those of another scale."""
    axes = call.case.axes
    return call if axes.return_lse else with_axes(call, sm_scale=2 * axes.scale)


def alibi_dropped(call: Call) -> Call:
    return with_axes(call, alibi=False)


def alibi_scaled(call: Call) -> Outputs:
    """The bias is added to the scores before they are scaled."""
    axes = call.case.axes
    for part in a.parts(call):
        scaled = None if part.bias is None else part.bias * axes.scale
        a.write(call, part, a.attend(replace(part, bias=scaled), axes.scale))
    return call.outputs


def mask_bit_order(call: Call) -> Call:
    """The highest bit of a byte comes first."""
    import torch

    if not call.case.axes.packed_mask:
        return call
    bits = call.inputs["packed_mask"].unsqueeze(-1) >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1
    return with_inputs(call, packed_mask=(bits * 2 ** torch.arange(8)).sum(-1).to(torch.uint8))


def mask_of_the_first(call: Call) -> Call:
    """Where a request's bits begin is not looked at: every request has the mask of the first."""
    if not call.case.axes.packed_mask:
        return call
    return with_inputs(call, mask_indptr=call.inputs["mask_indptr"] * 0)


def mask_last_byte(call: Call) -> Call:
    """Of a mask that ends within a byte the last bits are lost."""
    axes = call.case.axes
    if not axes.packed_mask:
        return call
    packed, begins = call.inputs["packed_mask"].clone(), call.inputs["mask_indptr"].tolist()
    for number, request in enumerate(axes.requests):
        if request.qo_len * request.kv_len % 8:
            packed[begins[number + 1] - 1] = 0
    return with_inputs(call, packed_mask=packed)


def mask_and_causal(call: Call) -> Outputs:
    """A mask does not take the place of the causal one, but comes on top of it."""
    for part in a.parts(call):
        rows, keys = part.seen.shape
        seen = part.seen.tril(keys - rows) if call.case.axes.mask != "none" else part.seen
        a.write(call, part, a.attend(replace(part, seen=seen), call.case.axes.scale))
    return call.outputs


def scale_swapped(call: Call) -> Call:
    """V is multiplied by the scale of K."""
    return with_axes(call, v_scale=call.case.axes.k_scale)


def scale_forgotten(call: Call) -> Call:
    """K is not multiplied by its scale."""
    return with_axes(call, k_scale=1.0)


def hnd_as_nhd(call: Call) -> Call:
    """The pages of one layout are read as if they had the other."""
    axes = call.case.axes
    if axes.layout == "NHD":
        return call
    shape = (-1, axes.page_size, axes.kv_heads)
    pages = {name: call.inputs[name].view(*shape, call.inputs[name].shape[-1]) for name in ("k_pages", "v_pages")}
    return with_inputs(with_axes(call, layout="NHD"), **pages)


def dense_q(call: Call) -> Call:
    """The queries are taken for contiguous."""
    axes, q = call.case.axes, call.inputs["q"]
    dense = q.flatten()[: axes.total_qo * axes.q_heads * axes.head_dim].view(axes.total_qo, axes.q_heads, -1)
    return with_inputs(with_axes(call, strided_q=False), q=dense)


def short_values(call: Call) -> Outputs:
    """As many channels of V are read as K has: fewer than there are, or none of the next key's."""
    a.healthy(call)
    axes = call.case.axes
    if axes.v_dim < axes.head_dim:
        call.outputs["out"][..., -1].zero_()
    return call.outputs


def promised(case: Case[PagedPrefill], device: Device) -> Numerics:
    """Pieces of a fixed size are said to keep the bits of a request whatever comes with it."""
    return replace(a.numerics(case, device), batch_invariant=case.axes.fixed_split_size > 0)


def in_pieces(size: Size) -> st.SearchStrategy[Case[PagedPrefill]]:
    """Cases of pieces of a fixed size, each asked in company and alone."""
    from hypothesis import strategies as st

    def asked(case: Case[PagedPrefill], pages: int) -> Case[PagedPrefill]:
        return replace(case, relation="batch_size", axes=replace(without_options(case.axes), fixed_split_size=pages))

    cases = st.builds(asked, paged_prefill.cases(size), st.integers(1, 4))
    return cases.filter(paged_prefill.relation("batch_size").applies)


def simpler_in_pieces(case: Case[PagedPrefill]) -> Iterator[Case[PagedPrefill]]:
    return (other for other in paged_prefill.simpler(case) if other.axes.fixed_split_size and other.relation)


def split_by_company(call: Call) -> Outputs:
    """How keys are split is said by the case, but the pieces are joined in an order that depends on the batch."""
    axes = call.case.axes
    joined = walked_backwards if axes.fixed_split_size and len(axes.requests) > 1 else lambda part: part
    for part in a.parts(call):
        a.write(call, part, a.attend(joined(part), axes.scale))
    return call.outputs


PIECES = {
    "numerics": promised,
    "operator": replace(paged_prefill, cases=in_pieces, simpler=simpler_in_pieces),
}
window = planted("window_edge[planted]", misread(window_edge))
window_place = planted("window_top_left[planted]", window_top_left)
softcap = planted("softcap_dropped[planted]", misread(softcap_dropped))
lse = planted("lse_forgotten[planted]", misread(lse_forgotten))
alibi = planted("alibi_dropped[planted]", misread(alibi_dropped))
alibi_scale = planted("alibi_scaled[planted]", alibi_scaled)
bit_order = planted("mask_bit_order[planted]", misread(mask_bit_order))
neighbour = planted("mask_of_the_first[planted]", misread(mask_of_the_first))
last_byte = planted("mask_last_byte[planted]", misread(mask_last_byte))
both_masks = planted("mask_and_causal[planted]", mask_and_causal)
swapped = planted("scale_swapped[planted]", misread(scale_swapped))
forgotten = planted("scale_forgotten[planted]", misread(scale_forgotten))
layout = planted("hnd_as_nhd[planted]", misread(hnd_as_nhd))
dense = planted("dense_q[planted]", misread(dense_q))
values = planted("short_values[planted]", short_values)
pieces = planted("split_by_company[planted]", split_by_company, **PIECES)
pieces_twin = planted("split_by_company[twin]", a.healthy, **PIECES)
