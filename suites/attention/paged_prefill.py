"""The operator ``paged_prefill``: a batch of prefill or append requests attends to a paged KV cache.

Layout NHD. Semantics: query i of a request of ``qo_len`` queries and ``kv_len`` keys sees key j iff, when ``causal``,
j <= i + kv_len - qo_len (aligned at the bottom right). A row that sees no key has out = 0 and lse = -Inf.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

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
    Place,
)

from ._axes import DTYPES, LN_2, PagedPrefill, Request
from ._cases import HEAD_DIMS, INPUTS, PAGE_SIZES, TILES, WEIGHTS, captures, cases, simpler
from ._relations import RELATIONS

if TYPE_CHECKING:
    import torch

    from kerneltest.oracle.attention_terms import AttentionTerms

# What other files of the suite and its tests take from here.
__all__ = [
    "DTYPES",
    "HEAD_DIMS",
    "INPUTS",
    "LN_2",
    "PAGE_SIZES",
    "TILES",
    "WEIGHTS",
    "PagedPrefill",
    "Request",
    "paged_prefill",
]


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
