"""The operators ``page_append`` and ``mla_page_append``: new tokens are copied to the end of requests in a paged cache.

A request that had ``before`` tokens gets ``new`` ones, at slots before, before + 1 ... of its pages. The page table is
that of afterwards: its pages have room for all of them. ``page_append``: keys and values ``append_k``, ``append_v``
[total_new, kv_heads, d] into ``k_pages``, ``v_pages`` [pages, page_size, kv_heads, d] (layout HND: [pages, kv_heads,
page_size, d]). ``mla_page_append``: ``append_ckv`` [total_new, 512], ``append_kpe`` [total_new, 64] into ``ckv_pages``,
``kpe_pages`` [pages, page_size, ...]. All int32: ``append_indptr`` and ``kv_indptr`` [batch + 1], ``kv_indices`` [pages
in use], ``kv_last_page_len`` [batch], which is 0 for a request without tokens.

The outputs are the whole caches afterwards, judged bit by bit: what was appended, and everything that must be as it
was. A kernel that works in place is given a copy. There are no relations: nothing is left for them to find.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kerneltest.model import Case, ErrorBudget, InputStrategy, Materials, Operator, Rejection, Size

from ._page_append_axes import DTYPES, Append, PageAppend, locate

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st

HEAD_DIMS = (128, 64, 256)
KV_HEADS = (1, 2, 4, 8)
PAGE_SIZES = (1, 4, 16, 64)
MAX_SPARE_PAGES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """The arithmetic of a copy: there is none."""

    slack: float = 1.0
    batch_invariant: bool = True

    @property
    def plain(self) -> Exact:
        return self


INPUTS = (
    InputStrategy(name="normal", tier="exact"),
    # Any bits: -0, subnormals, infinities, and NaN with all payloads.
    InputStrategy(name="bits", tier="exact"),
)


def cases(name: str, size: Size) -> st.SearchStrategy[Case[PageAppend]]:
    """Draw cases up to ``size``; the simplest is one token for one request that has none."""
    from hypothesis import strategies as st

    from kerneltest.strategies import edges

    mla = name == "mla_page_append"

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case[PageAppend]:
        page_size = draw(st.sampled_from(PAGE_SIZES))

        def request(least: int) -> st.SearchStrategy[Append]:
            before = st.just(0) | edges(size.kv_len, page_size)
            return st.builds(Append, before=before, new=edges(size.qo_len, page_size, minimum=least))

        requests = draw(st.lists(request(0), max_size=size.batch - 1))
        requests.insert(draw(st.integers(0, len(requests))), draw(request(1)))
        axes = PageAppend(
            requests=tuple(requests),
            dtype=draw(st.sampled_from(DTYPES[:2] if mla else DTYPES)),
            page_size=page_size,
            shuffled=draw(st.booleans()),
            spare_pages=draw(st.integers(0, MAX_SPARE_PAGES)),
        )
        if not mla:
            axes = replace(
                axes,
                kv_heads=draw(st.sampled_from([h for h in KV_HEADS if h <= size.heads])),
                head_dim=draw(st.sampled_from(HEAD_DIMS)),
                layout=draw(st.sampled_from(("NHD", "HND"))),
            )
        inputs = draw(st.sampled_from([strategy.name for strategy in INPUTS]))
        return Case(operator=name, axes=axes, inputs=inputs, seed=draw(st.integers(0, 2**32 - 1)))

    return draw_case()


def materialize(case: Case[PageAppend]) -> Materials:
    """Host tensors, all of them from ``case.seed``. Nothing is dead: every slot has to come back as it was."""
    from ._page_append import materials

    return materials(case)


def reference(case: Case[PageAppend], inputs: Mapping[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """The caches afterwards, on the host, where they are compared."""
    from ._page_append import appended

    return appended(case, inputs)


def budget(
    case: Case[PageAppend], terms: Mapping[str, torch.Tensor], numerics: Exact, strategy: InputStrategy
) -> Mapping[str, ErrorBudget]:
    """None: copies have no errors to allow for."""
    return {}


def certify(
    case: Case[PageAppend],
    terms: Mapping[str, torch.Tensor],
    numerics: Exact,
    outputs: Mapping[str, torch.Tensor],
) -> Iterable[Rejection]:
    """Every slot that is not, bit for bit, what it must be."""
    from ._page_append import rejections

    return rejections(case, terms, outputs)


def simpler(case: Case[PageAppend]) -> Iterator[Case[PageAppend]]:
    """The case with one request less, or one number at its simplest value."""
    axes = case.axes

    def with_requests(requests: list[Append]) -> Case[PageAppend]:
        return replace(case, axes=replace(axes, requests=tuple(requests)))

    for number, request in enumerate(axes.requests):
        before, after = axes.requests[:number], axes.requests[number + 1 :]
        if any(other.new for other in (*before, *after)):
            yield with_requests([*before, *after])
        shorter = {replace(request, new=min(request.new, 1)), replace(request, before=0)}
        shorter |= {replace(request, new=request.new // 2), replace(request, before=request.before // 2)}
        shorter |= {replace(request, new=max(request.new - 1, 0)), replace(request, before=max(request.before - 1, 0))}
        for less in sorted(shorter, key=lambda r: (r.new, r.before)):
            if less != request and any(other.new for other in (*before, less, *after)):
                yield with_requests([*before, less, *after])
    simplest: dict[str, Any] = {
        "dtype": DTYPES[0],
        "head_dim": HEAD_DIMS[0],
        "kv_heads": KV_HEADS[0],
        "page_size": PAGE_SIZES[0],
        "layout": "NHD",
        "shuffled": False,
        "spare_pages": 0,
    }
    for name, value in simplest.items():
        if getattr(axes, name) != value:
            yield replace(case, axes=replace(axes, **{name: value}))
    if case.inputs != INPUTS[0].name:
        yield replace(case, inputs=INPUTS[0].name)
    if case.seed:
        yield replace(case, seed=0)


def _operator(name: str, outputs: tuple[str, str]) -> Operator:
    return Operator(
        name=name,
        axes=PageAppend,
        inputs=INPUTS,
        cases=partial(cases, name),
        materialize=materialize,
        reference=reference,
        budget=budget,
        locate=locate,
        simpler=simpler,
        certified=outputs,
        certify=certify,
    )


page_append = _operator("page_append", ("k_cache", "v_cache"))
mla_page_append = _operator("mla_page_append", ("ckv_cache", "kpe_cache"))
