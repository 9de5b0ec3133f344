"""The operator ``paged_decode``: each request of a batch has one new query, which attends to its paged keys.

``q`` [batch, q_heads, d]; everything else as in ``paged_prefill`` with one query for each request. A request without
keys has out = 0 and lse = -Inf.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Case, Size

from ._cases import COMMON, Kind, of_kind, with_more_keys
from .paged_prefill import PagedPrefill, paged_prefill

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
# Each is another module to compile for some libraries, and so is each option.
KINDS = {COMMON: 8, Kind(dtype="float16", head_dim=64): 1, Kind(dtype="float32", head_dim=64): 2}
# What only a prefill has, and the one fp8 format that is enough for a decode.
NEVER = {"causal": False, "mask": "none", "packed_mask": False, "head_dim_vo": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedDecode(PagedPrefill):
    """Axes of a case: paged prefill with one query for each request, which no causal mask concerns."""

    def __post_init__(self) -> None:
        PagedPrefill.__post_init__(self)
        if any(request.qo_len != 1 for request in self.requests):
            raise ValueError("each request of a decode has one query")
        for name, value in NEVER.items():
            if getattr(self, name) != value:
                raise ValueError(f"a decode has no {name}")


def cases(size: Size) -> st.SearchStrategy[Case[PagedDecode]]:
    """Those of ``paged_prefill`` with one query for each request."""
    from hypothesis import strategies as st

    from kerneltest.strategies import weighted

    def build(drawn: Case[PagedPrefill], kind: Kind) -> Case[PagedDecode]:
        given: dict[str, Any] = {field.name: getattr(drawn.axes, field.name) for field in fields(PagedPrefill)} | NEVER
        given["requests"] = tuple(replace(request, qo_len=1) for request in drawn.axes.requests)
        if given["kv_dtype"] != "same":
            given["kv_dtype"] = "float8_e4m3fn"
        given = of_kind(given, kind)
        if given["kv_dtype"] == "same":
            given |= {"k_scale": 1.0, "v_scale": 1.0}
        case = Case(operator="paged_decode", axes=PagedDecode(**given), inputs=drawn.inputs, seed=drawn.seed)
        applies = drawn.relation in RELATIONS and paged_prefill.relation(drawn.relation).applies(case)
        return replace(case, relation=drawn.relation) if applies else case

    return st.builds(build, paged_prefill.cases(size), weighted(KINDS))


def simpler(case: Case[PagedDecode]) -> Iterator[Case[PagedDecode]]:
    """Those of paged prefill: none of its steps has more queries, or an option that there was not."""
    yield from paged_prefill.simpler(case)


def captures(case: Case[PagedDecode]) -> st.SearchStrategy[Case[PagedDecode]]:
    """Cases of the same batch in which every request has at least as many keys: what a graph is captured with."""
    return with_more_keys(case, (0, 1, 17, 57))


paged_decode = replace(
    paged_prefill,
    name="paged_decode",
    axes=PagedDecode,
    cases=cases,
    simpler=simpler,
    captures=captures,
    relations=tuple(paged_prefill.relation(name) for name in RELATIONS),
)
