"""The operator ``paged_prefill``: a batch of prefill or append requests attends to a paged KV cache.

Semantics: query i of a request of ``qo_len`` queries and ``kv_len`` keys sees key j iff, when ``causal``,
j <= i + kv_len - qo_len (aligned at the bottom right), with a window j >= i + kv_len - qo_len - window_left, and with a
mask its bit is set. A row that sees no key has out = 0 and lse = -Inf; ``lse`` is there if it is asked for.

With ALiBi (Press, Smith and Lewis, 2108.12409) slope_h · (j - i) is added to the scaled score of query i and key j,
before the soft-cap. Both are counted from the first of their request: against a bias that counts from a query's own
place i + kv_len - qo_len every score of a row, and so its lse, is larger by slope_h · (kv_len - qo_len), which the
output does not show, unless there is a soft-cap. It is FlashInfer's convention (variants.cuh:68-71 of 0.6.18.post1; the
query of a decode has i = 0, decode.cuh:91).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kerneltest.model import (
    Case,
    ErrorBudget,
    InputStrategy,
    Materials,
    Numerics,
    Operator,
    Paging,
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

    ``q`` [total_qo, q_width, d], of which the first q_heads are q, whatever follows is dead; ``k_pages``, ``v_pages``
    [pages, page_size, kv_heads, d], or [pages, kv_heads, page_size, d] in the layout HND; int32 ``qo_indptr``,
    ``kv_indptr`` [batch + 1] (the latter counts pages), ``kv_indices`` [referenced pages] and
    ``kv_last_page_len`` [batch], which is 0 for a request without keys. With a mask ``custom_mask``, bool
    [Σ qo_len · kv_len], and where it is packed ``packed_mask``, uint8, whose requests begin at the bytes
    ``mask_indptr``, int32 [batch + 1]. The values of q, k and v are those of ``case.inputs``; raises ValueError if its
    scales do not fit them.
    """
    import torch

    from . import _masks
    from ._inputs import values
    from ._tensors import as_laid_out, dead_bytes, indptr, outputs

    axes = case.axes
    random = torch.Generator().manual_seed(case.seed)
    counts = [axes.pages(request) for request in axes.requests]
    referenced = sum(counts)
    # At least one page, because a cache of none is not a cache.
    total = max(referenced + axes.spare_pages, 1)
    order = torch.randperm(total, generator=random) if axes.shuffled else torch.arange(total)
    indices = order[:referenced]
    pages = torch.split(indices, counts)
    q, k, v = values(case, pages, total, random)
    if axes.strided_q:
        rest = torch.randn(axes.total_qo, axes.q_width - axes.q_heads, axes.head_dim, generator=random)
        q = torch.cat([q, rest.to(q.dtype)], 1)
    last = [0 if r.kv_len == 0 else (r.kv_len - 1) % axes.page_size + 1 for r in axes.requests]
    inputs = {
        "q": q,
        "k_pages": as_laid_out(axes, k),
        "v_pages": as_laid_out(axes, v),
        "qo_indptr": indptr([request.qo_len for request in axes.requests]),
        "kv_indptr": indptr(counts),
        "kv_indices": indices.to(torch.int32),
        "kv_last_page_len": torch.tensor(last, dtype=torch.int32),
    }
    if axes.mask != "none":
        inputs |= _masks.tensors(axes, _masks.draw(axes, random), random)
    keys = [request.kv_len for request in axes.requests]
    return Materials(inputs=inputs, dead=dead_bytes(axes, total, pages, keys), outputs=outputs(axes))


def reference(case: Case[PagedPrefill], inputs: Mapping[str, torch.Tensor], device: str) -> AttentionTerms:
    """Float64 values and budget terms; see :mod:`._reference`."""
    from ._reference import terms_of

    return terms_of(case.axes, inputs, device)


def budget(
    case: Case[PagedPrefill], terms: AttentionTerms, numerics: Numerics, strategy: InputStrategy
) -> Mapping[str, ErrorBudget]:
    """The budgets of ``out`` and ``lse``."""
    from kerneltest.oracle.attention import attention_budget

    from ._rescaling import rounded_before_scale

    axes = case.axes
    budgets = attention_budget(terms, numerics, head_dim=axes.head_dim, tier=strategy.tier, softcap=axes.softcap)
    if not axes.return_lse:
        budgets.pop("lse", None)
    if numerics.unscaled and axes.v_scale != 1.0:
        budgets["out"] = rounded_before_scale(budgets["out"], numerics.unscaled, axes.v_scale, slack=numerics.slack)
    return budgets


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
