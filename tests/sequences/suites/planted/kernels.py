"""Planted bugs that only company shows, each on top of the zoo's healthy kernel and beside its healthy twin.

They run on a CPU, on cases of a request or two, so that a hunt takes a second.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import ref

from kerneltest.model import Call, Case, Kernel, LaunchContract, Size

from ..attention._axes import needs_lse
from ..attention.paged_prefill import PagedPrefill, Request, paged_prefill
from . import _attention as a

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st

Outputs = Mapping[str, "torch.Tensor"]
Launch = Callable[[bool, Call], Outputs]


def case(requests: tuple[Request, ...], causal: bool = False, seed: int = 0) -> Case[PagedPrefill]:
    axes = PagedPrefill(
        requests=requests,
        dtype="float32",
        head_dim=64,
        kv_heads=1,
        group=1,
        page_size=2,
        causal=causal,
        shuffled=False,
        spare_pages=2,
    )
    return Case(operator="paged_prefill", axes=axes, inputs="generic", seed=seed)


def cases(size: Size) -> st.SearchStrategy[Case[PagedPrefill]]:
    """One or two requests of few keys."""
    from hypothesis import strategies as st

    request = st.builds(Request, qo_len=st.integers(1, 2), kv_len=st.sampled_from((1, 3, 0, 6)))
    return st.builds(case, st.lists(request, min_size=1, max_size=2).map(tuple), st.booleans(), st.integers(0, 3))


def one_case(size: Size) -> st.SearchStrategy[Case[PagedPrefill]]:
    """The same every time: what is tried with it may cost a worker."""
    from hypothesis import strategies as st

    return st.just(case((Request(qo_len=2, kv_len=3),)))


def two_cases(size: Size) -> st.SearchStrategy[Case[PagedPrefill]]:
    """With the same tensors but for their values."""
    from hypothesis import strategies as st

    return st.builds(case, st.just((Request(qo_len=2, kv_len=3),)), st.just(False), st.integers(0, 1))


def simpler(case: Case[PagedPrefill]) -> Iterator[Case[PagedPrefill]]:
    """Those that are as small as the ones that are drawn."""
    for other in paged_prefill.simpler(case):
        if (other.axes.dtype, other.axes.head_dim) == (case.axes.dtype, case.axes.head_dim):
            yield other


def counted(bug: bool, call: Call) -> Outputs:
    """Z7: two splits of a row take tickets, and the second merges. A row of at most one key leaves early.

    The bug: it does so without the second ticket, and its counter stays dirty for the next launch.
    """
    import torch

    rows = call.inputs["q"].shape[0]
    counters = call.workspace(4 * rows, zeroed=True).view(torch.int32)
    a.healthy(call)
    for part in a.parts(call):
        for row in range(part.rows.start, part.rows.stop):
            if part.k.shape[1] > 1 and int(counters[row]) == 1:  # merged by the first split, without the second
                call.outputs["out"][row] *= 0.5
            counters[row] = 1 if bug and part.k.shape[1] <= 1 else 0
    return call.outputs


def accumulated(bug: bool, call: Call) -> Outputs:
    """Z11: the accumulator lies in the workspace. The bug: it is added to, not set."""
    import torch

    out = call.outputs["out"]
    accumulator = call.workspace(4 * out.numel()).view(torch.float32).view(out.shape)
    if not bug:
        accumulator.zero_()
    a.healthy(call)
    accumulator.add_(out)
    out.copy_(accumulator)
    return call.outputs


def keyless(bug: bool, call: Call) -> Outputs:
    """Z12. The bug: rows without a key are left as they were."""
    for part in a.parts(call):
        out, lse = a.attend(part, call.case.axes.scale)
        written = part.seen.any(-1) | (not bug)
        call.outputs["out"][part.rows][written] = out[written].to(call.outputs["out"].dtype)
        call.outputs["lse"][part.rows] = lse
    return call.outputs


def remembered(bug: bool, call: Call) -> Outputs:
    """An answer is kept in the workspace beside the address of its queries.

    The bug: it is given again for whatever lies at that address.
    """
    import torch

    out = call.outputs["out"]
    memory = call.workspace(8 + 4 * out.numel())
    key, kept = memory[:8].view(torch.int64), memory[8:].view(torch.float32).view(out.shape)
    a.healthy(call)
    if bug and int(key) == call.inputs["q"].data_ptr():
        out.copy_(kept)
    key[0] = call.inputs["q"].data_ptr()
    kept.copy_(out)
    return call.outputs


def translated(bug: bool, call: Call) -> Outputs:
    """The page table is kept in the workspace, converted to 64 bits.

    The bug: it is not converted again as long as it lies where it lay.
    """
    import torch

    table = call.inputs["kv_indices"]
    memory = call.workspace(8 + 8 * table.numel()).view(torch.int64)
    key, kept = memory[:1], memory[1:]
    if not bug or int(key) != table.data_ptr():
        kept.copy_(table)
    key[0] = table.data_ptr()
    return a.healthy(replace(call, inputs={**call.inputs, "kv_indices": kept})) and call.outputs


TABLES: dict[tuple[int, ...], torch.Tensor] = {}


def by_shape(bug: bool, call: Call) -> Outputs:
    """The bug: queries are copied once for each shape, and that copy is used for whatever has the same."""
    q = call.inputs["q"]
    values = TABLES.setdefault(tuple(q.shape), q.clone()) if bug else q
    a.healthy(replace(call, inputs={**call.inputs, "q": values}))
    return call.outputs


FACTOR = [1.0]
MARK = 0x5EED0


def outliving(bug: bool, call: Call) -> Outputs:
    """Whose the workspace was is marked there. The bug: behind another's launch a buffer that the library keeps for
    itself is never clean again, whatever is launched then and with which workspace.
    """
    import torch

    mark = call.workspace(8).view(torch.int64)
    if bug and int(mark) in (MARK, MARK + 1) and int(mark) != MARK + call.case.seed:
        FACTOR[0] = 0.5
    mark[0] = MARK + call.case.seed
    a.healthy(call)
    call.outputs["out"].mul_(FACTOR[0] if bug else 1.0)
    return call.outputs


def narrow(bug: bool, call: Call) -> Outputs:
    """Z9. The bug: a page's number times the elements of a page is computed in 32 bits."""
    import torch

    pages, stride = call.inputs["kv_indices"].long(), call.inputs["k_pages"].stride(0)
    offsets = (pages * stride).to(torch.int32).long() if bug else pages * stride
    a.healthy(replace(call, inputs={**call.inputs, "kv_indices": offsets // stride}))
    return call.outputs


def writes_behind(bug: bool, call: Call) -> Outputs:
    """The bug: one element too many of the output is written."""
    a.healthy(call)
    if bug:
        ctypes.memset(end_of(call.outputs["out"]), 0, 4)
    return call.outputs


def reads_behind(bug: bool, call: Call) -> Outputs:
    """The bug: one query too many is loaded, and never used."""
    if bug:
        ctypes.string_at(end_of(call.inputs["q"]), 4)
    return a.healthy(call) and call.outputs


def end_of(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() + tensor.numel() * tensor.element_size()


LONGEST = [0]


def plan_longest(bug: bool, call: Call) -> list[int]:
    """The keys of the longest request. The bug: the library has one plan for all."""
    longest = max(request.kv_len for request in call.case.axes.requests)
    if not bug:
        return [longest]
    LONGEST[0] = longest
    return LONGEST


def up_to_longest(_bug: bool, call: Call) -> Outputs:
    """As many keys as were planned."""
    (longest,) = call.plan
    for part in a.parts(call):
        seen = part.seen.clone()
        seen[:, longest:] = False
        a.write(call, part, a.attend(replace(part, seen=seen), call.case.axes.scale))
    return call.outputs


EARLIER: list[Callable[[], torch.Tensor | None]] = [lambda: None]


def strays(bug: bool, call: Call) -> Outputs:
    """The bug: the output of the launch before is cleared, if it still exists."""
    earlier = EARLIER[0]()
    if bug and earlier is not None:
        earlier.zero_()
    EARLIER[0] = ref(call.outputs["out"])
    return a.healthy(call) and call.outputs


def plan_count(_bug: bool, _call: Call) -> list[int]:
    return [0]


def seventh(bug: bool, call: Call) -> Outputs:
    """The bug: every seventh launch of a plan differs in its last bits, within every tolerance."""
    call.plan[0] += 1
    a.healthy(call)
    if bug and call.plan[0] % 7 == 0:
        call.outputs["lse"].mul_(1 + 2.0**-22)
    return call.outputs


@dataclass
class Plan:
    """What a launch needs: where its accumulator lies, and how many keys each request has."""

    accumulator: torch.Tensor
    lengths: tuple[int, ...]


def plan_anew(bug: bool, call: Call) -> Plan:
    """A plan that can be planned anew. The bug: it keeps the lengths that it was made with."""
    import torch

    axes = call.case.axes
    rows = call.outputs["out"].numel()
    accumulator = call.workspace(4 * rows).view(torch.float32)
    lengths = tuple(request.kv_len for request in axes.requests)
    plan = call.plan or Plan(accumulator, lengths)
    plan.accumulator = accumulator
    if not bug:
        plan.lengths = lengths
    return plan


def planned(_bug: bool, call: Call) -> Outputs:
    """The planned lengths, through the planned workspace."""
    plan, out = call.plan, call.outputs["out"]
    accumulator = plan.accumulator.view(out.shape)
    for number, part in enumerate(a.parts(call)):
        seen = part.seen.clone()
        seen[:, plan.lengths[number % len(plan.lengths)] :] = False
        result, lse = a.attend(replace(part, seen=seen), call.case.axes.scale)
        accumulator[part.rows] = result
        a.write(call, part, (accumulator[part.rows], lse))
    return call.outputs


def pair(name: str, launch: Launch, plan: Any = None, *, few: Any = None, **contract: bool) -> tuple[Kernel, Kernel]:
    """The planted bug ``name``, and its healthy twin. ``few``: the cases, where each failure costs a worker."""
    drawn: dict[str, Any] = {"cases": few, "simpler": lambda _case: ()} if few else {"cases": cases, "simpler": simpler}

    def kernel(kind: str, bug: bool) -> Kernel:
        return Kernel(
            name=f"{name}[{kind}]",
            # An operator of its own: beside each other, they would crash each other's hunts.
            operator=replace(paged_prefill, relations=(), **drawn),
            launch=functools.partial(launch, bug),
            plan=plan and functools.partial(plan, bug),
            numerics=a.numerics,
            unsupported=needs_lse,
            devices=("cpu",),
            contract=LaunchContract(shares_workspace=True, **contract),
        )

    return kernel("planted", True), kernel("twin", False)


counter, counter_twin = pair("counter", counted)
accumulator, accumulator_twin = pair("accumulator", accumulated)
unwritten, unwritten_twin = pair("unwritten", keyless)
memory, memory_twin = pair("memory", remembered)
table, table_twin = pair("table", translated)
shape, shape_twin = pair("shape", by_shape)
offset, offset_twin = pair("far_offset", narrow, few=one_case)
write, write_twin = pair("write_behind", writes_behind, few=one_case)
read, read_twin = pair("read_behind", reads_behind, few=one_case)
one_plan, one_plan_twin = pair("one_plan", up_to_longest, plan_longest)
outlives, outlives_twin = pair("outlives", outliving, few=two_cases)
stray, stray_twin = pair("stray", strays)
repeat, repeat_twin = pair("repeat", seventh, plan_count)
replan, replan_twin = pair("replan", planned, plan_anew, replans=True)
