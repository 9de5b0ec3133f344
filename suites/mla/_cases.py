"""Which cases of MLA are drawn, how often, and how one becomes simpler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from kerneltest.model import Case, Relation, Size

from ..attention._cases import INPUTS, WEIGHTS, fewer, shortened, with_more_keys
from ..attention.paged_prefill import DTYPES, LN_2, Request
from ._axes import DEEPSEEK, SMALL, Dims, Mla

if TYPE_CHECKING:
    from hypothesis import strategies as st

# Most cases have the size that everybody compiles and runs. On a CPU that is nobody's, and costs ten times as much.
DIMS = {"cpu": (DEEPSEEK, SMALL, SMALL), "cuda": (DEEPSEEK, DEEPSEEK, DEEPSEEK, SMALL)}
# What a device is given of the model's 128, 64, 40 or 16 heads; not all of them divide a tile of queries and heads.
HEADS = (1, 2, 5, 8, 16, 20, 64, 128)
PAGE_SIZES = (1, 16, 32, 64)
TILES = (64, 128)
MAX_SPARE_PAGES = 3
# How often a request has which keys; a decode step has many, a prompt as many as queries.
KEYS = {"any": 6, "on the diagonal": 6, "of the prompt": 3, "none": 1}


def _for_cpu(size: Size) -> bool:
    return size.heads < 16


def most_heads(size: Size) -> int:
    """Query heads that a case of this size may have; on a GPU 8 times as many as of attention, since they share K."""
    return size.heads if _for_cpu(size) else 8 * size.heads


def most_queries(size: Size, heads: int, dims: Dims) -> int:
    """Queries of one request. A row of DeepSeek's latent is four of attention's, so there are a quarter as many."""
    rows = (8 if dims == SMALL else 2) * size.qo_len
    return min(size.qo_len, max(1, rows // heads))


@cache
def _requests(size: Size, queries: int, page_size: int, heads: int, *, decode: bool) -> st.SearchStrategy[Request]:
    from hypothesis import strategies as st

    from kerneltest.strategies import edges, weighted

    def build(qo_len: int, kv_len: int, keys: str, row: int, seen: int) -> Request:
        lengths = {
            "any": kv_len,
            "on the diagonal": min(seen + max(qo_len - 1 - row, 0), size.kv_len),
            "of the prompt": min(qo_len, size.kv_len),
            "none": 0,
        }
        return Request(qo_len=qo_len, kv_len=lengths[keys])

    return st.builds(
        build,
        qo_len=st.just(1) if decode else edges(queries, *TILES),
        kv_len=edges(size.kv_len, page_size, *TILES),
        keys=weighted(KEYS),
        # The first query, or one whose heads lie in two tiles of rows, sees the end of a tile of keys, or one more.
        row=st.sampled_from([0, *(tile // heads for tile in TILES)]),
        seen=st.sampled_from(sorted({n * tile + more for n in (1, 2, 4) for tile in TILES for more in (0, 1)})),
    )


def cases(operator: str, relations: Sequence[Relation], size: Size) -> st.SearchStrategy[Case[Mla]]:
    """Draw cases up to ``size``: decode steps, of one query each, or chunks of prompts among them."""
    from hypothesis import strategies as st

    from kerneltest.strategies import weighted

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case[Mla]:
        page_size = draw(st.sampled_from(PAGE_SIZES))
        heads = draw(st.sampled_from([h for h in HEADS if h <= most_heads(size)]))
        dims = draw(st.sampled_from(DIMS["cpu" if _for_cpu(size) else "cuda"]))
        request = _requests(size, most_queries(size, heads, dims), page_size, heads, decode=draw(st.booleans()))
        requests = draw(st.lists(request, max_size=size.batch - 1))
        # Somebody must ask something; everybody else, before or after, may be empty in queries, keys or both.
        somebody = draw(request.map(lambda r: replace(r, qo_len=max(r.qo_len, 1))))
        requests.insert(draw(st.integers(0, len(requests))), somebody)
        axes = Mla(
            requests=tuple(requests),
            dtype=draw(st.sampled_from(DTYPES)),
            dims=dims,
            heads=heads,
            page_size=page_size,
            causal=draw(st.booleans()),
            shuffled=draw(st.booleans()),
            spare_pages=draw(st.integers(0, MAX_SPARE_PAGES)),
            return_lse=draw(weighted({True: 5, False: 1})),
        )
        inputs = draw(weighted(WEIGHTS))
        axes = replace(axes, sm_scale=LN_2 if inputs == "dyadic" else None)
        case = Case(operator=operator, axes=axes, inputs=inputs, seed=draw(st.integers(0, 2**32 - 1)))
        # Drawn from all of them, whether they apply or not: shrinking the case must not turn one into another.
        relation = draw(st.sampled_from([None, *relations]))
        return replace(case, relation=relation.name) if relation and relation.applies(case) else case

    return draw_case()


def simpler(case: Case[Mla]) -> Iterator[Case[Mla]]:
    """The case with one request less, or one number at its simplest value."""
    axes = case.axes
    if case.relation:
        yield replace(case, relation="")

    def with_requests(requests: list[Request]) -> Case[Mla]:
        return replace(case, axes=replace(axes, requests=tuple(requests)))

    def with_lengths(*lengths: dict[str, int]) -> Iterator[Case[Mla]]:
        for number, request in enumerate(axes.requests):
            before, after = axes.requests[:number], axes.requests[number + 1 :]
            for length in lengths:
                shorter = replace(request, **length)
                if (shorter.qo_len, shorter.kv_len) < (request.qo_len, request.kv_len):
                    yield with_requests([*before, shorter, *after])

    yield from map(with_requests, fewer(axes.requests))
    yield from with_lengths({"qo_len": 1}, {"kv_len": 1})
    simplest: dict[str, Any] = {
        "dtype": DTYPES[0],
        "dims": SMALL,
        "heads": HEADS[0],
        "page_size": PAGE_SIZES[0],
        "causal": False,
        "shuffled": False,
        "spare_pages": 0,
        "return_lse": True,
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
        for shorter in shortened(request):
            yield with_requests([*before, shorter, *after])


def captures(case: Case[Mla]) -> st.SearchStrategy[Case[Mla]]:
    """Cases of the same batch and the same queries in which every request has at least as many keys.

    A graph of a decode step is captured for its batch and its number of queries; what grows between replays is the
    cache.
    """
    return with_more_keys(case, (0, 1, 40, 300))
