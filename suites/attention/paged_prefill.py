"""The operator ``paged_prefill``: a batch of prefill or append requests attends to a paged KV cache.

Layout NHD. Semantics: query i of a request of ``qo_len`` queries and ``kv_len`` keys sees key j iff, when ``causal``,
j <= i + kv_len - qo_len (aligned at the bottom right). A row that sees no key has out = 0 and lse = -Inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from kerneltest.model import (
    Case,
    DeadBytes,
    ErrorBudget,
    InputStrategy,
    Materials,
    Numerics,
    Operator,
    OutputSpec,
    Paging,
    Pattern,
    Place,
    Size,
)

from ._relations import RELATIONS

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st

    from kerneltest.oracle.attention_terms import AttentionTerms

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
# The most common specialisation comes first: that is where shrinking ends, in a kernel that everybody has compiled.
HEAD_DIMS = (128, 64, 256)
GROUPS = (1, 2, 4, 7, 8)
KV_HEADS = (1, 2, 4)
PAGE_SIZES = (1, 4, 16, 64)
TILES = (64, 128)
MAX_SPARE_PAGES = 3
LN_2 = math.log(2.0)
# How often a request has which keys. A prefill of the whole prompt has as many keys as queries: the commonest request,
# and too rare by chance, as are rows that see no key, because there are fewer keys than queries or none at all.
KEYS = {"any": 7, "of the prompt": 7, "fewer": 1, "none": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Query and KV tokens of one request; either may be 0."""

    qo_len: int
    kv_len: int

    def __post_init__(self) -> None:
        if self.qo_len < 0 or self.kv_len < 0:
            raise ValueError(f"lengths must be at least 0, got {self.qo_len} and {self.kv_len}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedPrefill:
    """Axes of a case. ``group`` query heads share a KV head; ``spare_pages`` lie in the cache and belong to nobody.

    ``shuffled``: physical pages in random order, so that a request's pages are neither contiguous nor ascending.
    ``sm_scale`` multiplies the scores; None means 1 / √head_dim.
    """

    requests: tuple[Request, ...]
    dtype: str
    head_dim: int
    kv_heads: int
    group: int
    page_size: int
    causal: bool
    shuffled: bool
    spare_pages: int
    sm_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("head_dim", "kv_heads", "group", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not self.requests:
            raise ValueError("requests must not be empty")
        if self.spare_pages < 0:
            raise ValueError(f"spare_pages must be at least 0, got {self.spare_pages}")

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def total_qo(self) -> int:
        return sum(request.qo_len for request in self.requests)

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        return 1.0 / math.sqrt(self.head_dim) if self.sm_scale is None else self.sm_scale

    def pages(self, request: Request) -> int:
        """Pages that the request references."""
        return -(-request.kv_len // self.page_size)


def _requests(size: Size, page_size: int, min_qo_len: int = 0) -> st.SearchStrategy[Request]:
    from hypothesis import strategies as st

    from kerneltest.strategies import edges

    def build(qo_len: int, kv_len: int, keys: str) -> Request:
        shorter = {
            "any": kv_len,
            "of the prompt": min(qo_len, size.kv_len),
            "fewer": min(kv_len, qo_len // 2),
            "none": 0,
        }
        return Request(qo_len=qo_len, kv_len=shorter[keys])

    return st.builds(
        build,
        qo_len=edges(size.qo_len, *TILES, minimum=min_qo_len),
        kv_len=edges(size.kv_len, page_size, *TILES),
        keys=st.sampled_from([name for name, weight in KEYS.items() for _ in range(weight)]),
    )


def cases(size: Size) -> st.SearchStrategy[Case[PagedPrefill]]:
    """Draw cases up to ``size``; the simplest is one request with one query and one key."""
    from hypothesis import strategies as st

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case[PagedPrefill]:
        page_size = draw(st.sampled_from(PAGE_SIZES))
        # Somebody must ask something; everybody else, before or after, may be empty in queries, keys or both.
        requests = draw(st.lists(_requests(size, page_size), max_size=size.batch - 1))
        somebody = draw(_requests(size, page_size, min_qo_len=1))
        requests.insert(draw(st.integers(0, len(requests))), somebody)
        group = draw(st.sampled_from([g for g in GROUPS if g <= size.heads]))
        axes = PagedPrefill(
            requests=tuple(requests),
            dtype=draw(st.sampled_from(DTYPES)),
            head_dim=draw(st.sampled_from(HEAD_DIMS)),
            kv_heads=draw(st.sampled_from([h for h in KV_HEADS if h * group <= size.heads])),
            group=group,
            page_size=page_size,
            causal=draw(st.booleans()),
            shuffled=draw(st.booleans()),
            spare_pages=draw(st.integers(0, MAX_SPARE_PAGES)),
        )
        inputs = draw(st.sampled_from([name for name, weight in WEIGHTS.items() for _ in range(weight)]))
        axes = replace(axes, sm_scale=LN_2 if inputs == "dyadic" else None)
        case = Case(operator="paged_prefill", axes=axes, inputs=inputs, seed=draw(st.integers(0, 2**32 - 1)))
        # Drawn from all of them, whether they apply or not: shrinking the case must not turn one into another.
        relation = draw(st.sampled_from([None, *RELATIONS]))
        return replace(case, relation=relation.name) if relation and relation.applies(case) else case

    return draw_case()


def materialize(case: Case[PagedPrefill]) -> Materials:
    """Host tensors, all of them from ``case.seed``:

    ``q`` [total_qo, q_heads, d]; ``k_pages``, ``v_pages`` [pages, page_size, kv_heads, d]; int32 ``qo_indptr``,
    ``kv_indptr`` [batch + 1] (the latter counts pages), ``kv_indices`` [referenced pages] and
    ``kv_last_page_len`` [batch], which is 0 for a request without keys. The values of q, k and v are those of
    ``case.inputs``; raises ValueError if its scale does not fit them.
    """
    import torch

    from ._inputs import values

    axes = case.axes
    random = torch.Generator().manual_seed(case.seed)
    counts = [axes.pages(request) for request in axes.requests]
    referenced = sum(counts)
    # At least one page, because a cache of none is not a cache.
    total = max(referenced + axes.spare_pages, 1)
    order = torch.randperm(total, generator=random) if axes.shuffled else torch.arange(total)
    indices = order[:referenced]
    live = torch.zeros(total, axes.page_size, dtype=torch.bool)
    pages = torch.split(indices, counts)
    for request, own in zip(axes.requests, pages, strict=True):
        live[own] = torch.arange(own.numel() * axes.page_size).view(-1, axes.page_size) < request.kv_len
    q, k, v = values(case, pages, total, random)
    in_use = torch.zeros(total, dtype=torch.bool)
    in_use[indices] = True
    dead = [
        (Place.UNUSED_SLOTS, in_use.unsqueeze(-1) & ~live),
        (Place.UNREFERENCED_PAGES, ~in_use.unsqueeze(-1) & ~live),
    ]
    last = [0 if r.kv_len == 0 else (r.kv_len - 1) % axes.page_size + 1 for r in axes.requests]
    return Materials(
        inputs={
            "q": q,
            "k_pages": k,
            "v_pages": v,
            "qo_indptr": _indptr([request.qo_len for request in axes.requests]),
            "kv_indptr": _indptr(counts),
            "kv_indices": indices.to(torch.int32),
            "kv_last_page_len": torch.tensor(last, dtype=torch.int32),
        },
        dead=tuple(
            DeadBytes(place=place, tensor=tensor, mask=mask)
            for place, mask in dead
            for tensor in ("k_pages", "v_pages")
            if bool(mask.any())
        ),
        outputs={
            "out": OutputSpec(shape=(axes.total_qo, axes.q_heads, axes.head_dim), dtype=axes.dtype),
            "lse": OutputSpec(shape=(axes.total_qo, axes.q_heads), dtype="float32"),
        },
    )


def _indptr(lengths: list[int]) -> torch.Tensor:
    import torch

    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def reference(case: Case[PagedPrefill], inputs: Mapping[str, torch.Tensor], device: str) -> AttentionTerms:
    """Float64 values and budget terms; see :mod:`._reference`."""
    from ._reference import paged_attention_terms

    return paged_attention_terms(inputs, causal=case.axes.causal, sm_scale=case.axes.scale, device=device)


def budget(
    case: Case[PagedPrefill], terms: AttentionTerms, numerics: Numerics, strategy: InputStrategy
) -> Mapping[str, ErrorBudget]:
    """The budgets of ``out`` and ``lse``."""
    from kerneltest.oracle.attention import attention_budget

    return attention_budget(terms, numerics, head_dim=case.axes.head_dim, tier=strategy.tier)


def simpler(case: Case[PagedPrefill]) -> Iterator[Case[PagedPrefill]]:
    """The case with one request less, or one number at its simplest value."""
    axes = case.axes
    if case.relation:
        yield replace(case, relation="")

    def with_requests(requests: list[Request]) -> Case[PagedPrefill]:
        return replace(case, axes=replace(axes, requests=tuple(requests)))

    for number, request in enumerate(axes.requests):
        before, after = axes.requests[:number], axes.requests[number + 1 :]
        if any(other.qo_len for other in (*before, *after)):
            yield with_requests([*before, *after])
        for shorter in (
            replace(request, qo_len=1),
            replace(request, kv_len=1),
            replace(request, kv_len=request.qo_len),
        ):
            if (shorter.qo_len, shorter.kv_len) < (request.qo_len, request.kv_len):
                yield with_requests([*before, shorter, *after])
    simplest: dict[str, Any] = {
        "dtype": DTYPES[0],
        "head_dim": HEAD_DIMS[0],
        "kv_heads": KV_HEADS[0],
        "group": GROUPS[0],
        "page_size": PAGE_SIZES[0],
        "causal": False,
        "shuffled": False,
        "spare_pages": 0,
    }
    for name, value in simplest.items():
        if getattr(axes, name) != value:
            yield replace(case, axes=replace(axes, **{name: value}))
    if case.inputs != INPUTS[0].name or axes.sm_scale is not None:
        # Together: a strategy may need its scale.
        yield replace(case, inputs=INPUTS[0].name, axes=replace(axes, sm_scale=None))
    if case.seed:
        yield replace(case, seed=0)
    # Last, because there may be many of them, and each may cost a worker.
    for number, request in enumerate(axes.requests):
        before, after = axes.requests[:number], axes.requests[number + 1 :]
        for shorter in (
            replace(request, qo_len=-(-request.qo_len // 2)),
            replace(request, kv_len=max(request.kv_len // 2, 1)),
            replace(request, kv_len=max(request.kv_len - 1, 1)),
        ):
            if (shorter.qo_len, shorter.kv_len) < (request.qo_len, request.kv_len):
                yield with_requests([*before, shorter, *after])
    # A row without keys has two causes, causal masking and an empty cache; the second is the plainer one.
    if axes.causal and len(axes.requests) == 1:
        yield replace(case, axes=replace(axes, causal=False, requests=(Request(qo_len=1, kv_len=0),)))


def captures(case: Case[PagedPrefill]) -> st.SearchStrategy[Case[PagedPrefill]]:
    """Cases of the same batch in which every request is at least as long: what a graph is captured with."""
    from hypothesis import strategies as st

    def longer(extra: list[tuple[int, int]]) -> Case[PagedPrefill]:
        requests = tuple(
            Request(qo_len=request.qo_len + rows, kv_len=request.kv_len + rows + keys)
            for request, (rows, keys) in zip(case.axes.requests, extra, strict=True)
        )
        return replace(case, axes=replace(case.axes, requests=requests))

    count = len(case.axes.requests)
    more = st.tuples(st.sampled_from((0, 1, 17)), st.sampled_from((0, 1, 40)))
    return st.lists(more, min_size=count, max_size=count).map(longer)


def locate(case: Case[PagedPrefill], output: str, index: tuple[int, ...]) -> str:
    """An index in words: "request 3, token 17, head 2, dim 5" for ``out``; ``lse`` has no dim."""
    row = index[0]
    for number, request in enumerate(case.axes.requests):
        if row < request.qo_len:
            place = f"request {number}, token {row}, head {index[1]}"
            return place if output == "lse" else f"{place}, dim {index[2]}"
        row -= request.qo_len
    raise IndexError(f"{output} has no row {index[0]}")


def explain(
    case: Case[PagedPrefill], inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> str | None:
    """Which slots of which request were lost or doubled, where that can be told; see :mod:`._attribution`."""
    from . import _attribution

    return _attribution.explain(case, inputs, outputs)


INPUTS = (
    InputStrategy(name="generic", tier="generic"),
    InputStrategy(name="count", tier="exact"),
    InputStrategy(name="dyadic", tier="exact"),
    InputStrategy(name="poison", tier="generic", patterns=(Pattern.NAN, Pattern.INF, Pattern.MAX)),
    InputStrategy(name="needle", tier="hard"),
    InputStrategy(name="integer", tier="exact"),
    InputStrategy(name="scaled", tier="generic"),
    InputStrategy(name="outlier", tier="generic"),
    InputStrategy(name="large_logits", tier="hard"),
    InputStrategy(name="special", tier="hard"),
)
# How often each is drawn; the simplest comes first. What finds most alone must not be missing in a short run.
WEIGHTS = dict.fromkeys((strategy.name for strategy in INPUTS), 1) | {
    "generic": 3,
    "count": 3,
    "dyadic": 2,
    "poison": 2,
    "needle": 2,
}

paged_prefill = Operator(
    name="paged_prefill",
    axes=PagedPrefill,
    inputs=INPUTS,
    cases=cases,
    materialize=materialize,
    reference=reference,
    budget=budget,
    locate=locate,
    simpler=simpler,
    relations=RELATIONS,
    paging=Paging(pages=("k_pages", "v_pages"), table="kv_indices"),
    captures=captures,
    explain=explain,
)
