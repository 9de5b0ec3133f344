"""Planted bugs that only a metamorphic relation can see: each keeps to its error budget, or is in the reference too.

Each kernel is hunted with its own relation in every case, and so is the sound one beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call, Case, Device, Kernel, Numerics, Size

from ..attention._axes import without_options
from ..attention.paged_prefill import PagedPrefill, paged_prefill
from . import _attention as a

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st

Outputs = Mapping[str, "torch.Tensor"]
Launch = Callable[[Call], Outputs]

# One unit in the last place of fp32, which no budget forbids.
ULP = 2.0**-23


def numerics(case: Case[Any], device: Device) -> Numerics:
    """A promise that the healthy kernel keeps: it attends to one request after the other."""
    return replace(a.numerics(case, device), batch_invariant=True)


def pair(relation: str, launch: Launch, **misread: Any) -> tuple[Kernel, Kernel]:
    """A kernel with a bug and one without, hunted with one relation; ``misread``: what the operator shares of it."""

    def cases(size: Size) -> st.SearchStrategy[Case[PagedPrefill]]:
        named = paged_prefill.cases(size).map(
            lambda case: replace(case, relation=relation, axes=without_options(case.axes))
        )
        return named.filter(paged_prefill.relation(relation).applies)

    # Kernels of one operator are run beside each other, which is not what this is about: each has its own.
    right, wrong = (replace(paged_prefill, name=f"{relation}_{kind}", cases=cases) for kind in ("right", "wrong"))
    healthy = Kernel(
        name=f"zoo.{relation}[sound]",
        operator=right,
        launch=a.healthy,
        numerics=numerics,
        devices=("cpu",),
        unsupported=fewer_keys_than_queries,
    )
    broken = replace(healthy, name=f"zoo.{relation}[broken]", operator=replace(wrong, **misread), launch=launch)
    return broken, healthy


def fewer_keys_than_queries(case: Case[PagedPrefill], device: Device) -> str | None:
    few = any(request.kv_len < request.qo_len for request in case.axes.requests)
    return "causal with fewer keys than queries" if case.axes.causal and few else None


def changed(change: Callable[[Call, int, a.Part], a.Part]) -> Launch:
    """The healthy kernel on requests that ``change(call, number, part)`` has had in its hands."""

    def launch(call: Call) -> Outputs:
        for number, part in enumerate(a.parts(call)):
            a.write(call, part, a.attend(change(call, number, part), call.case.axes.scale))
        return call.outputs

    return launch


def walked_backwards(part: a.Part, heads: slice = slice(None)) -> a.Part:
    """The keys of some heads in the other order, as by another split or schedule; a mask would have to follow."""
    k, v = part.k.clone(), part.v.clone()
    k[heads], v[heads] = part.k[heads].flip(1), part.v[heads].flip(1)
    return replace(part, k=k, v=v) if bool(part.seen.all()) else part


def page_number(call: Call) -> Outputs:
    """The address of the first page gets into the answer."""
    a.healthy(call)
    call.outputs["lse"].mul_(1 + int(call.inputs["kv_indices"][0]) % 2 * ULP)
    return call.outputs


def rounds_up(call: Call) -> Outputs:
    """The last rounding prefers the larger neighbour, of either sign."""
    for part in a.parts(call):
        out, lse = a.attend(part, call.case.axes.scale)
        a.write(call, part, (out + out.abs() * ULP, lse))
    return call.outputs


def favours_large(call: Call) -> Outputs:
    """Outputs above 1 take another path, which rounds once more."""
    for part in a.parts(call):
        out, lse = a.attend(part, call.case.axes.scale)
        a.write(call, part, (out + out * ULP * (out.abs() > 1), lse))
    return call.outputs


def special_scale(call: Call) -> Outputs:
    """Another code path for small scales."""
    a.healthy(call)
    if call.case.axes.scale < 0.05:
        call.outputs["lse"].mul_(1 + ULP)
    return call.outputs


def order_by_head(call: Call, number: int, part: a.Part) -> a.Part:
    """Every second KV head walks its keys backwards."""
    group = call.case.axes.group
    for head in range(1, call.case.axes.kv_heads, 2):
        part = walked_backwards(part, slice(head * group, (head + 1) * group))
    return part


def order_by_place(call: Call, number: int, part: a.Part) -> a.Part:
    """The first request of a batch walks its keys backwards."""
    return walked_backwards(part) if number == 0 else part


def order_by_batch(call: Call, number: int, part: a.Part) -> a.Part:
    """So does every request that has company."""
    return walked_backwards(part) if len(call.case.axes.requests) > 1 else part


SEEN: Counter[Case[Any]] = Counter()


def tunes_itself(call: Call) -> Outputs:
    """After three launches of a shape another configuration is chosen, whose sums have another order."""
    a.healthy(call)
    SEEN[call.case] += 1
    if SEEN[call.case] > 3:
        call.outputs["lse"].mul_(1 + ULP)
    return call.outputs


def mean_lse(call: Call) -> Outputs:
    """The log-sum-exp is taken for a log-mean-exp."""
    for part in a.parts(call):
        out, lse = a.attend(part, call.case.axes.scale)
        a.write(call, part, (out, lse - part.seen.sum(-1, keepdim=True).clamp(min=1).log()))
    return call.outputs


def mean_lse_reference(case: Case[PagedPrefill], inputs: Mapping[str, torch.Tensor], device: str) -> Any:
    terms = paged_prefill.reference(case, inputs, device)
    return replace(terms, lse=terms.lse - terms.keys.clamp(min=1).log())


def top_left(call: Call, number: int, part: a.Part) -> a.Part:
    """The causal mask is aligned at the top left, as if there were no cache before the prompt."""
    return replace(part, seen=part.seen & part.seen.new_ones(part.seen.shape).tril()) if call.case.axes.causal else part


def top_left_reference(case: Case[PagedPrefill], inputs: Mapping[str, torch.Tensor], device: str) -> Any:
    from ..attention import _transformations as t

    if case.axes.causal:
        page_size = case.axes.page_size
        square = [
            replace(part, keys=len(part.rows), pages=part.pages[: -(-len(part.rows) // page_size)])
            for part in t.parts(case, inputs)
        ]
        inputs = t.view(case, inputs, square).materials.inputs
    return paged_prefill.reference(case, inputs, device)


def first_key_twice(call: Call, number: int, part: a.Part) -> a.Part:
    """The first key is walked over twice, as by an overlap of two tiles."""
    import torch

    def again(keys: torch.Tensor) -> torch.Tensor:
        return torch.cat([keys[:, :1], keys], 1)

    return replace(part, k=again(part.k), v=again(part.v), seen=again(part.seen))


def first_key_twice_reference(case: Case[PagedPrefill], inputs: Mapping[str, torch.Tensor], device: str) -> Any:
    import torch

    from ..attention import _transformations as t

    lengths = (request.kv_len for request in case.axes.requests)
    orders = [torch.arange(-1 if keys else 0, keys).clamp(min=0) for keys in lengths]
    return paged_prefill.reference(case, t.rewritten(case, inputs, orders).materials.inputs, device)


page_permutation, page_permutation_sound = pair("page_permutation", page_number)
value_sign, value_sign_sound = pair("value_sign", rounds_up)
value_scale, value_scale_sound = pair("value_scale", favours_large)
score_scale, score_scale_sound = pair("score_scale", special_scale)
head_permutation, head_permutation_sound = pair("head_permutation", changed(order_by_head))
batch_order, batch_order_sound = pair("batch_order", changed(order_by_place))
batch_size, batch_size_sound = pair("batch_size", changed(order_by_batch))
repeat, repeat_sound = pair("repeat", tunes_itself)
split, split_sound = pair("split", mean_lse, reference=mean_lse_reference)
decode, decode_sound = pair("decode", changed(top_left), reference=top_left_reference)
as_mask, as_mask_sound = pair("as_mask", changed(top_left), reference=top_left_reference)
key_permutation, key_permutation_sound = pair(
    "key_permutation", changed(first_key_twice), reference=first_key_twice_reference
)
duplicate_keys, duplicate_keys_sound = pair("duplicate_keys", mean_lse, reference=mean_lse_reference)
