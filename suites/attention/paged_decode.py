"""The operator ``paged_decode``: each request of a batch has one new query, which attends to its paged keys.

``q`` [batch, q_heads, d]; everything else as in ``paged_prefill`` with one query for each request. A request without
keys has out = 0 and lse = -Inf.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Case, Size

from .paged_prefill import PagedPrefill, Request, paged_prefill

if TYPE_CHECKING:
    from hypothesis import strategies as st

RELATIONS = (
    "page_permutation",
    "value_sign",
    "value_scale",
    "score_scale",
    "head_permutation",
    "batch_order",
    "batch_size",
    "repeat",
    "split",
    "key_permutation",
    "duplicate_keys",
)
# (dtype, head_dim), as often as each is drawn: every one is another module to compile.
KINDS = (*[("bfloat16", 128)] * 8, ("bfloat16", 64), ("float16", 128))


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedDecode(PagedPrefill):
    """Axes of a case: paged prefill with one query for each request, which no causal mask concerns."""

    def __post_init__(self) -> None:
        PagedPrefill.__post_init__(self)
        if self.causal or any(request.qo_len != 1 for request in self.requests):
            raise ValueError("each request of a decode has one query, and no causal mask")


def cases(size: Size) -> st.SearchStrategy[Case[PagedDecode]]:
    """Those of ``paged_prefill`` with one query for each request."""
    from hypothesis import strategies as st

    def build(drawn: Case[PagedPrefill], kind: tuple[str, int]) -> Case[PagedDecode]:
        axes: dict[str, Any] = {name: getattr(drawn.axes, name) for name in PagedPrefill.__dataclass_fields__}
        axes |= {
            "requests": tuple(Request(qo_len=1, kv_len=request.kv_len) for request in drawn.axes.requests),
            "causal": False,
            "dtype": kind[0],
            "head_dim": kind[1],
        }
        case = Case(operator="paged_decode", axes=PagedDecode(**axes), inputs=drawn.inputs, seed=drawn.seed)
        applies = drawn.relation in RELATIONS and paged_prefill.relation(drawn.relation).applies(case)
        return replace(case, relation=drawn.relation) if applies else case

    return st.builds(build, paged_prefill.cases(size), st.sampled_from(KINDS))


def simpler(case: Case[PagedDecode]) -> Iterator[Case[PagedDecode]]:
    """Those of paged prefill that still are a decode."""
    for other in paged_prefill.simpler(case):
        if not other.axes.causal and all(request.qo_len == 1 for request in other.axes.requests):
            yield other


def captures(case: Case[PagedDecode]) -> st.SearchStrategy[Case[PagedDecode]]:
    """Cases of the same batch in which every request has at least as many keys: what a graph is captured with."""
    from hypothesis import strategies as st

    def longer(extra: list[int]) -> Case[PagedDecode]:
        requests = tuple(
            replace(request, kv_len=request.kv_len + keys)
            for request, keys in zip(case.axes.requests, extra, strict=True)
        )
        return replace(case, axes=replace(case.axes, requests=requests))

    count = len(case.axes.requests)
    return st.lists(st.sampled_from((0, 1, 17, 57)), min_size=count, max_size=count).map(longer)


paged_decode = replace(
    paged_prefill,
    name="paged_decode",
    axes=PagedDecode,
    cases=cases,
    simpler=simpler,
    captures=captures,
    relations=tuple(paged_prefill.relation(name) for name in RELATIONS),
)
