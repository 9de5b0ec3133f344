"""Which cases of paged prefill are drawn, how often, and how one becomes simpler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Case, InputStrategy, Pattern, Size

from ._axes import DTYPES, LN_2, PagedPrefill, Request
from ._relations import RELATIONS

if TYPE_CHECKING:
    from hypothesis import strategies as st

# The most common specialisation comes first: that is where shrinking ends, in a kernel that everybody has compiled.
HEAD_DIMS = (128, 64, 256)
GROUPS = (1, 2, 4, 7, 8)
KV_HEADS = (1, 2, 4)
PAGE_SIZES = (1, 4, 16, 64)
TILES = (64, 128)
MAX_SPARE_PAGES = 3
# How often a request has which keys. A prefill of the whole prompt has as many keys as queries: the commonest request,
# and too rare by chance, as are rows that see no key, because there are fewer keys than queries or none at all.
KEYS = {"any": 7, "of the prompt": 7, "fewer": 1, "none": 1}

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
