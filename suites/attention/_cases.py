"""Which cases of paged prefill are drawn, how often, and how one becomes simpler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from kerneltest.model import Case, InputStrategy, Pattern, Size

from ._axes import LN_2, MASKS, PagedPrefill, Request
from ._relations import LARGEST_MASK, RELATIONS

if TYPE_CHECKING:
    from hypothesis import strategies as st

HEAD_DIMS = (128, 64, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What cases are specialised for before any option: dtype and head dimension, and that of V if it is another."""

    dtype: str
    head_dim: int
    head_dim_vo: int | None = None


# The most common one comes first: that is where shrinking ends, in a kernel that everybody has compiled.
COMMON = Kind(dtype="bfloat16", head_dim=128)
# How often each is drawn. Each of 16 bits is another module to compile for some libraries; 192 and 128 are the
# dimensions of DeepSeek's prefill.
KINDS = {
    COMMON: 8,
    Kind(dtype="bfloat16", head_dim=64): 2,
    Kind(dtype="float16", head_dim=128): 2,
    Kind(dtype="bfloat16", head_dim=256): 1,
    Kind(dtype="bfloat16", head_dim=192, head_dim_vo=128): 1,
    Kind(dtype="float32", head_dim=64): 3,
    Kind(dtype="float32", head_dim=128): 1,
    Kind(dtype="float32", head_dim=256): 1,
    Kind(dtype="float32", head_dim=48, head_dim_vo=32): 1,
}
GROUPS = (1, 2, 4, 7, 8)
KV_HEADS = (1, 2, 4)
PAGE_SIZES = (1, 4, 16, 64)
TILES = (64, 128)
MAX_SPARE_PAGES = 3
# Beside the keys themselves: none to the left, one, around a page and a tile.
WINDOWS = (0, 1, 15, 16, 63, 64, 127, 200)
# Those of Gemma 2 and Grok-1; and one that scores of the usual size reach.
SOFTCAPS = (30.0, 50.0, 2.0)
# No powers of two, and exact in fp32.
SCALES = (0.375, 1.6875, 0.6875)
# Keys in a piece of a fixed size.
PIECES = (128, 512)
# The options that are a module of their own for some libraries.
COMPILED = ("window_left", "softcap", "kv_dtype", "alibi")
# How often each option is set where only one may be. Half of the cases have none.
OPTIONS_DRAWN = {"": 18, "window": 3, "softcap": 2, "mask": 4, "quantised": 2, "unsplit": 1, "pieces": 2, "alibi": 2}
# A second one, which is rarer. Gemma 2 has a window and a soft-cap.
SECOND_DRAWN = {"": 12, "window": 1, "softcap": 1, "mask": 1, "quantised": 1, "alibi": 1}
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
# Their weights need no rounding, unless ALiBi makes them anything between 0 and 1.
EXACT = tuple(strategy.name for strategy in INPUTS if strategy.tier == "exact")
# How often each is drawn; the simplest comes first. What finds most alone must not be missing in a short run.
WEIGHTS = dict.fromkeys((strategy.name for strategy in INPUTS), 1) | {
    "generic": 3,
    "count": 3,
    "dyadic": 2,
    "poison": 2,
    "needle": 2,
}


@cache
def _requests(size: Size, page_size: int, min_qo_len: int = 0) -> st.SearchStrategy[Request]:
    from hypothesis import strategies as st

    from kerneltest.strategies import edges, weighted

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
        keys=weighted(KEYS),
    )


def cases(size: Size) -> st.SearchStrategy[Case[PagedPrefill]]:
    """Draw cases up to ``size``; the simplest is one request with one query and one key."""
    from hypothesis import strategies as st

    from kerneltest.strategies import weighted

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case[PagedPrefill]:
        page_size = draw(st.sampled_from(PAGE_SIZES))
        # Somebody must ask something; everybody else, before or after, may be empty in queries, keys or both.
        requests = draw(st.lists(_requests(size, page_size), max_size=size.batch - 1))
        somebody = draw(_requests(size, page_size, min_qo_len=1))
        requests.insert(draw(st.integers(0, len(requests))), somebody)
        group = draw(st.sampled_from([g for g in GROUPS if g <= size.heads]))
        kind = draw(weighted(KINDS))
        axes = PagedPrefill(
            requests=tuple(requests),
            dtype=kind.dtype,
            head_dim=kind.head_dim,
            head_dim_vo=kind.head_dim_vo,
            kv_heads=draw(st.sampled_from([h for h in KV_HEADS if h * group <= size.heads])),
            group=group,
            page_size=page_size,
            causal=draw(st.booleans()),
            shuffled=draw(st.booleans()),
            spare_pages=draw(st.integers(0, MAX_SPARE_PAGES)),
            # What costs nobody a module, and what is as likely with any other option.
            layout=draw(weighted({"NHD": 3, "HND": 1})),
            strided_q=draw(weighted({False: 4, True: 1})),
            return_lse=draw(weighted({True: 5, False: 1})),
        )
        inputs = draw(weighted(WEIGHTS))
        options: dict[str, Any] = draw(_options(page_size))
        if axes.mask_bits > LARGEST_MASK:
            options.pop("mask", None)
            options.pop("packed_mask", None)
        if options.get("mask"):
            options["causal"] = False
        if inputs == "dyadic":
            options = {name: value for name, value in options.items() if name not in ("softcap", "k_scale")}
            options["sm_scale"] = LN_2
        if inputs in EXACT:
            options.pop("alibi", None)
        elif "alibi" in options:
            # A module less: the two have nothing to do with each other, as a bias and a soft-cap have.
            options.pop("window_left", None)
        compiled = [name for name in COMPILED if name in options]
        if kind.dtype != "float32" and compiled:
            # A module for each option is enough: not one for each option and kind, and few for pairs of options.
            options |= {"dtype": COMMON.dtype, "head_dim": COMMON.head_dim, "head_dim_vo": None}
            for name in ("kv_dtype", "k_scale", "v_scale") if len(compiled) > 1 else ():
                options.pop(name, None)
        axes = replace(axes, **options)
        case = Case(operator="paged_prefill", axes=axes, inputs=inputs, seed=draw(st.integers(0, 2**32 - 1)))
        # Drawn from all of them, whether they apply or not: shrinking the case must not turn one into another.
        # What pieces of a fixed size promise shows in company alone.
        promised = [other for other in RELATIONS if other.promise == "batch_invariant"] if axes.fixed_split_size else []
        relation = draw(st.sampled_from([None, *RELATIONS, *promised * 6]))
        return replace(case, relation=relation.name) if relation and relation.applies(case) else case

    return draw_case()


def of_kind(given: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Drawn axes, of that kind. Of the options that are a module of their own one stays, with the common kind."""
    plain = {name: PagedPrefill.__dataclass_fields__[name].default for name in COMPILED if name in given}
    options = [name for name in plain if given[name] != plain[name]]
    kind = COMMON if options else kind
    named = {"dtype": kind.dtype, "head_dim": kind.head_dim, "head_dim_vo": kind.head_dim_vo}
    return dict(given) | {name: plain[name] for name in options[1:]} | named


# What belongs together in one step: one without the other may be no case, or no module that anybody has.
TOGETHER: tuple[dict[str, Any], ...] = (
    {"dtype": COMMON.dtype, "head_dim": COMMON.head_dim, "head_dim_vo": COMMON.head_dim_vo},
    {"head_dim": COMMON.head_dim, "head_dim_vo": COMMON.head_dim_vo},
    {"mask": "none", "packed_mask": False},
    {"kv_dtype": "same", "k_scale": 1.0, "v_scale": 1.0},
)
SIMPLEST: dict[str, Any] = {
    "window_left": -1,
    "softcap": 0.0,
    "alibi": False,
    "packed_mask": False,
    "k_scale": 1.0,
    "v_scale": 1.0,
    "fixed_split_size": 0,
    "disable_split_kv": False,
    "layout": "NHD",
    "strided_q": False,
    "return_lse": True,
    "kv_heads": KV_HEADS[0],
    "group": GROUPS[0],
    "page_size": PAGE_SIZES[0],
    "causal": False,
    "shuffled": False,
    "spare_pages": 0,
}


def simpler(case: Case[PagedPrefill]) -> Iterator[Case[PagedPrefill]]:
    """The case with one request less, or one number at its simplest value."""
    axes = case.axes
    if case.relation:
        yield replace(case, relation="")
    # All at once, for what needs nothing but its requests: where each step costs a worker, they are too many.
    everything = {name: value for step in (*TOGETHER, SIMPLEST) for name, value in step.items()}
    plainest = replace(case, inputs=INPUTS[0].name, seed=0, axes=replace(axes, **everything, sm_scale=None))
    if plainest != case:
        yield plainest

    def with_requests(requests: list[Request]) -> Case[PagedPrefill]:
        return replace(case, axes=replace(axes, requests=tuple(requests)))

    yield from map(with_requests, fewer(axes.requests))
    for number, request in enumerate(axes.requests):
        before, after = axes.requests[:number], axes.requests[number + 1 :]
        for shorter in (
            replace(request, qo_len=1),
            replace(request, kv_len=1),
            replace(request, kv_len=request.qo_len),
        ):
            if (shorter.qo_len, shorter.kv_len) < (request.qo_len, request.kv_len):
                yield with_requests([*before, shorter, *after])
    for together in TOGETHER:
        if any(getattr(axes, name) != value for name, value in together.items()):
            yield replace(case, axes=replace(axes, **together))
    for name, value in SIMPLEST.items():
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
    # A row without keys has two causes, causal masking and an empty cache; the second is the plainer one.
    if axes.causal and len(axes.requests) == 1:
        yield replace(case, axes=replace(axes, causal=False, requests=(Request(qo_len=1, kv_len=0),)))


def fewer(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Half of the requests, or all but one of them, if somebody among them asks something."""
    half = len(requests) // 2
    parts = [requests[:half], requests[half:]] if len(requests) > 2 else []
    parts += [[*requests[:number], *requests[number + 1 :]] for number in range(len(requests))]
    yield from (list(part) for part in parts if any(request.qo_len for request in part))


def shortened(request: Request) -> Iterator[Request]:
    """The request with fewer queries, fewer keys, or as many fewer of both, which leaves the diagonal where it was.

    By large steps and by one; each may cost a worker.
    """
    queries, keys = request.qo_len, request.kv_len
    half = -(-queries // 2)
    for asking, left in (
        (half, keys),
        (half, keys - (queries - half)),
        *((queries, keys - keys // part) for part in (2, 4, 8)),
        *((queries, keys - tile) for tile in TILES),
        (queries - 1, keys),
        (queries - 1, keys - 1),
        (queries, keys - 1),
    ):
        shorter = Request(qo_len=max(asking, 1), kv_len=max(left, 1))
        if (shorter.qo_len, shorter.kv_len) < (queries, keys):
            yield shorter


@cache
def _options(page_size: int) -> st.SearchStrategy[dict[str, Any]]:
    """The options of a case that are not at their defaults, by the names of the axes: mostly none, rarely two."""
    from hypothesis import strategies as st

    from kerneltest.strategies import weighted

    each: dict[str, st.SearchStrategy[dict[str, Any]]] = {
        "": st.just({}),
        "window": st.fixed_dictionaries({"window_left": st.sampled_from(WINDOWS)}),
        "softcap": st.fixed_dictionaries({"softcap": st.sampled_from(SOFTCAPS)}),
        "mask": st.fixed_dictionaries({"mask": st.sampled_from(MASKS[1:]), "packed_mask": st.booleans()}),
        "quantised": st.fixed_dictionaries(
            {
                "kv_dtype": weighted({"float8_e4m3fn": 3, "float8_e5m2": 1}),
                "k_scale": st.sampled_from((1.0, *SCALES)),
                "v_scale": st.sampled_from((*SCALES, 1.0)),
            }
        ),
        "unsplit": st.just({"disable_split_kv": True}),
        "alibi": st.just({"alibi": True}),
        "pieces": st.sampled_from(PIECES).map(lambda keys: {"fixed_split_size": max(1, keys // page_size)}),
    }
    one, other = (weighted(drawn).flatmap(each.__getitem__) for drawn in (OPTIONS_DRAWN, SECOND_DRAWN))
    return st.builds(lambda a, b: a | b if a else {}, one, other)


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


def with_more_keys(case: Case[Any], more: tuple[int, ...]) -> st.SearchStrategy[Case[Any]]:
    """Cases of the same batch in which every request has so many keys more, one of ``more``."""
    from hypothesis import strategies as st

    def longer(extra: list[int]) -> Case[Any]:
        requests = tuple(
            replace(request, kv_len=request.kv_len + keys)
            for request, keys in zip(case.axes.requests, extra, strict=True)
        )
        return replace(case, axes=replace(case.axes, requests=requests))

    count = len(case.axes.requests)
    return st.lists(st.sampled_from(more), min_size=count, max_size=count).map(longer)
