"""One defect for each operator beside paged prefill, or more, each on top of a healthy kernel and beside its twin.

All of them run on a CPU, on small cases, so that a hunt takes a second or two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call, Kernel, Operator, Size

from ..attention import torch_append, torch_attention, torch_eager, torch_merge, torch_sparse
from ..attention.block_sparse import block_sparse
from ..attention.merge_state import merge_state, merge_state_in_place, merge_states
from ..attention.page_append import mla_page_append, page_append
from ..attention.paged_decode import paged_decode
from ..attention.ragged_prefill import ragged_prefill
from ..attention.single_decode import single_decode
from ..attention.single_prefill import single_prefill

if TYPE_CHECKING:
    import torch

Outputs = Mapping[str, "torch.Tensor"]
Launch = Callable[[bool, Call], Outputs]
SMALL = Size(batch=2, qo_len=5, kv_len=18, heads=4)


def small(operator: Operator) -> Operator:
    """The operator with small cases. One of its own for each kernel: beside each other they would compare notes."""
    return replace(operator, cases=lambda size: operator.cases(SMALL))


# Merging states


def merged(call: Call, weights: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Outputs:
    """Writes what weights [rows, states, heads] and log-sum-exps [rows, heads] make of the states."""
    from ..attention._merge import stacked

    x = stacked(call.case, call.inputs)
    share, lse = weights(x.s)
    out = (share.unsqueeze(-1) * x.v.float()).sum(1)
    call.outputs["out"].copy_(out.to(call.outputs["out"].dtype))
    call.outputs["lse"].copy_(lse)
    return call.outputs


def empty_states(bug: bool, call: Call) -> Outputs:
    """-Inf - (-Inf) is NaN."""
    import torch

    def weights(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        peak = s.amax(1, keepdim=True)
        weight = torch.exp(s - (peak if bug else torch.where(peak.isinf(), 0.0, peak)))
        total = weight.sum(1)
        return weight / torch.where(total == 0, 1.0, total).unsqueeze(1), peak.squeeze(1) + total.log()

    return merged(call, weights)


def plain_mean(bug: bool, call: Call) -> Outputs:
    """All states count the same."""
    if not bug:
        return torch_merge.launcher("2")(call)
    import torch

    unit = 0.6931471805599453
    return merged(call, lambda s: (torch.full_like(s, 1 / s.shape[1]), torch.logsumexp(s * unit, 1) / unit))


def wrong_base(bug: bool, call: Call) -> Outputs:
    """Log-sum-exps in base 2 are taken for natural ones."""
    return torch_merge.launcher("e" if bug else "2")(call)


def ignored_mask(bug: bool, call: Call) -> Outputs:
    """Rows that are not to be merged are merged."""
    inputs = {name: value for name, value in call.inputs.items() if name != "mask" or not bug}
    if bug and call.case.axes.masked:
        call = replace(call, case=replace(call.case, axes=replace(call.case.axes, masked=False)))
    return torch_merge.launcher("e")(replace(call, inputs=inputs))


# Appending to pages


def written(call: Call, place: Callable[[int, int, int], tuple[int, int]]) -> Outputs:
    """Copies each new token where ``place(request, before, position)`` says: an entry of its page table, a slot."""
    from ..attention._page_append_axes import streams

    axes, x, token = call.case.axes, call.inputs, 0
    for name in streams(call.case):
        call.outputs[f"{name}_cache"].copy_(x[f"{name}_pages"])
    for number, request in enumerate(axes.requests):
        for position in range(request.before, request.before + request.new):
            entry, slot = place(number, request.before, position)
            page = int(x["kv_indices"][int(x["kv_indptr"][number]) + entry])
            for name in streams(call.case):
                of_page = call.outputs[f"{name}_cache"][page]
                (of_page[:, slot] if axes.layout == "HND" else of_page[slot]).copy_(x[f"append_{name}"][token])
            token += 1
    return call.outputs


def one_too_far(bug: bool, call: Call) -> Outputs:
    """Each token goes to the slot behind its own, round the end of the page."""
    size = call.case.axes.page_size
    return written(call, lambda request, before, position: (position // size, (position + bug) % size))


def wrong_page(bug: bool, call: Call) -> Outputs:
    """Pages are counted from the first new token, also where that is in the middle of one."""
    size = call.case.axes.page_size

    def place(request: int, before: int, position: int) -> tuple[int, int]:
        entry = before // size + (position - before) // size if bug else position // size
        return entry, position % size

    return written(call, place)


def cleared_tail(bug: bool, call: Call) -> Outputs:
    """The slots behind the last token are set to zero, though they were the caller's."""
    from ..attention._page_append_axes import streams

    outputs, x, axes = torch_append.launch(call), call.inputs, call.case.axes
    for number, request in enumerate(axes.requests if bug else ()):
        used = (request.before + request.new) % axes.page_size
        if request.new and used:
            page = int(x["kv_indices"][int(x["kv_indptr"][number + 1]) - 1])
            for name in streams(call.case):
                of_page = outputs[f"{name}_cache"][page]
                (of_page[:, used:] if axes.layout == "HND" else of_page[used:]).zero_()
    return outputs


def swapped_tokens(bug: bool, call: Call) -> Outputs:
    """The rotated parts of the keys are those of the tokens in the other order."""
    if bug:
        call = replace(call, inputs={**call.inputs, "append_kpe": call.inputs["append_kpe"].flip(0)})
    return torch_append.launch(call)


# Attention


def last_key(bug: bool, call: Call) -> Outputs:
    """The last key of a request whose last page is full is not seen."""
    from ..attention import _eager

    axes = call.case.axes
    for part in _eager.parts(axes, call.inputs):
        keys, seen = part.k.shape[1], part.seen.clone()
        if bug and keys and keys % axes.page_size == 0:
            seen[:, -1] = False
        write(call, part, _eager.attend(replace(part, seen=seen), axes.scale))
    return call.outputs


def offsets_of_queries(bug: bool, call: Call) -> Outputs:
    """Keys are looked for where the queries begin."""
    from ..attention import _eager
    from ..attention._dense import paged_case, pages

    axes, x = call.case.axes, pages(call.case, call.inputs)
    first = call.inputs["qo_indptr" if bug else "kv_indptr"].tolist()
    tables, total = [], len(x["k_pages"])
    for number, request in enumerate(axes.requests):
        begin = min(first[number], total - request.kv_len)  # not behind the end
        tables += list(range(begin, begin + request.kv_len))
    x["kv_indices"] = x["kv_indices"].new_tensor(tables)
    for part in _eager.parts(paged_case(call.case).axes, x):
        write(call, part, _eager.attend(part, axes.scale))
    return call.outputs


def top_left(bug: bool, call: Call) -> Outputs:
    """The causal mask begins at the first key, not so that the last query sees the last one."""
    from ..attention import _eager
    from ..attention._dense import paged_case, pages

    axes = call.case.axes
    for part in _eager.parts(paged_case(call.case).axes, pages(call.case, call.inputs)):
        seen = part.seen.new_ones(part.seen.shape).tril() if bug and axes.causal else part.seen
        write(call, part, _eager.attend(replace(part, seen=seen), axes.scale))
    return call.outputs


def interleaved_heads(bug: bool, call: Call) -> Outputs:
    """Query head h reads KV head h modulo their number, not h divided by the size of a group."""
    import torch

    axes, x = call.case.axes, call.inputs
    if bug:
        order = torch.arange(axes.q_heads).view(axes.group, axes.kv_heads).T.flatten()
        found = torch_attention.single_decode_eager.launch(replace(call, inputs={**x, "q": x["q"][order]}))
        return {name: value[order.argsort()] for name, value in found.items()}
    return torch_attention.single_decode_eager.launch(call)


def next_block_row(bug: bool, call: Call) -> Outputs:
    """The last row of a block takes the blocks of the next one."""
    from ..attention import _eager

    axes, x = call.case.axes, call.inputs
    q, k, v = (x[name].float().transpose(0, 1) for name in ("q", "k", "v"))
    seen = torch_sparse.visible(axes, x)
    if bug:
        rows = list(range(axes.block_rows - 1, axes.rows - 1, axes.block_rows))
        seen[rows] = seen[[row + 1 for row in rows]]
    used = torch_sparse.visible(axes, x).any(0)[:, None]
    k, v = (t.where(used, t.new_zeros(())).repeat_interleave(axes.group, 0) for t in (k, v))
    part = _eager.Part(slice(0, axes.rows), q, k, v, seen)
    write(call, part, _eager.attend(part, axes.scale))
    return call.outputs


def write(call: Call, part: Any, result: tuple[torch.Tensor, torch.Tensor]) -> None:
    call.outputs["out"][part.rows] = result[0].to(call.outputs["out"].dtype)
    if "lse" in call.outputs:
        call.outputs["lse"][part.rows] = result[1]


PLANTED: dict[str, tuple[Operator, Launch, Any]] = {
    "empty_states": (merge_state, empty_states, torch_merge.numerics("e")),
    "plain_mean": (merge_states, plain_mean, torch_merge.numerics("2")),
    "wrong_base": (merge_states, wrong_base, torch_merge.numerics("2")),
    "ignored_mask": (merge_state_in_place, ignored_mask, torch_merge.numerics("e")),
    "one_too_far": (page_append, one_too_far, torch_append.numerics),
    "wrong_page": (page_append, wrong_page, torch_append.numerics),
    "cleared_tail": (page_append, cleared_tail, torch_append.numerics),
    "swapped_tokens": (mla_page_append, swapped_tokens, torch_append.numerics),
    "last_key": (paged_decode, last_key, torch_eager.numerics),
    "offsets_of_queries": (ragged_prefill, offsets_of_queries, torch_attention.ragged_eager.numerics),
    "top_left": (single_prefill, top_left, torch_attention.single_prefill_eager.numerics),
    "interleaved_heads": (single_decode, interleaved_heads, torch_attention.single_decode_eager.numerics),
    "next_block_row": (block_sparse, next_block_row, torch_sparse.numerics),
}
EAGER = "a matrix product's sums depend on the shapes and the alignment of its operands"
for _name, (_operator, _launch, _numerics) in PLANTED.items():
    for _bug in (True, False):
        _relations = {relation.name for relation in _operator.relations}
        globals()[f"{_name}_{'planted' if _bug else 'twin'}"] = Kernel(
            name=f"bugs.{_name}[{'planted' if _bug else 'twin'}]",
            operator=small(_operator),
            launch=partial(_launch, _bug),
            numerics=_numerics,
            inexact=dict.fromkeys(_relations & {"head_permutation", "page_permutation"}, EAGER),
            devices=("cpu",),
        )
