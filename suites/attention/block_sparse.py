"""The operator ``block_sparse``: attention whose mask is a block-sparse matrix, the same for all heads.

``q`` [rows, q_heads, d], ``k`` and ``v`` [columns, kv_heads, d]. The matrix has blocks of ``block_rows`` x
``block_columns`` (the last row of blocks may be shorter), in the format BSR: int32 ``indptr`` [block rows + 1] and
``indices`` [blocks], the block columns of each block row, ascending. A query sees the keys of its blocks; with a
``mask``, bool [blocks, block_rows, block_columns], those of them where it is set, of which there is at least one. A
row without blocks has out = 0 and lse = -Inf. ``out`` as ``q``, ``lse`` [rows, q_heads].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Case, ErrorBudget, InputStrategy, Materials, Numerics, Operator, Related, Relation, Size

from ._axes import LN_2
from ._block_sparse_axes import BlockSparse, paged_case
from ._cases import COMMON, GROUPS, KV_HEADS, WEIGHTS, Kind
from .paged_prefill import paged_prefill

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st

    from kerneltest.oracle.attention_terms import AttentionTerms

KINDS = {COMMON: 8, Kind(dtype="float16", head_dim=64): 1, Kind(dtype="float32", head_dim=64): 2}
BLOCK_ROWS = (1, 2, 3, 4, 16, 64)
BLOCK_COLUMNS = (1, 4, 16, 64)
# Those of paged prefill that change nothing but q, K and V.
RELATIONS = ("value_sign", "value_scale", "score_scale", "head_permutation", "repeat")


def cases(size: Size) -> st.SearchStrategy[Case[BlockSparse]]:
    """Draw cases up to ``size``; the simplest is one row and one column."""
    from hypothesis import strategies as st

    from kerneltest.strategies import edges, weighted

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case[BlockSparse]:
        block_rows = draw(st.sampled_from([n for n in BLOCK_ROWS if n <= size.qo_len]))
        block_columns = draw(st.sampled_from([n for n in BLOCK_COLUMNS if n <= size.kv_len]))
        group = draw(st.sampled_from([g for g in GROUPS if g <= size.heads]))
        kind = draw(weighted(KINDS))
        inputs = draw(weighted(WEIGHTS))
        axes = BlockSparse(
            rows=draw(edges(size.qo_len, block_rows, minimum=1)),
            columns=block_columns * draw(st.integers(1, size.kv_len // block_columns)),
            block_rows=block_rows,
            block_columns=block_columns,
            dtype=kind.dtype,
            head_dim=kind.head_dim,
            kv_heads=draw(st.sampled_from([h for h in KV_HEADS if h * group <= size.heads])),
            group=group,
            masked=draw(st.booleans()),
            sm_scale=LN_2 if inputs == "dyadic" else None,
        )
        case = Case(operator="block_sparse", axes=axes, inputs=inputs, seed=draw(st.integers(0, 2**32 - 1)))
        relation = draw(st.sampled_from(["", *RELATIONS]))
        applies = relation and paged_prefill.relation(relation).applies(paged_case(case))
        return replace(case, relation=relation) if applies else case

    return draw_case()


def materialize(case: Case[BlockSparse]) -> Materials:
    """Host tensors, all of them from ``case.seed``. Keys that no block has are dead."""
    from ._block_sparse import materials, pattern

    return materials(case, paged_prefill.materialize(paged_case(case)).inputs, pattern(case))


def reference(case: Case[BlockSparse], inputs: Mapping[str, torch.Tensor], device: str) -> AttentionTerms:
    """Float64 values and budget terms, dense."""
    from ._block_sparse import terms

    return terms(case, inputs, device)


def budget(
    case: Case[BlockSparse], terms: AttentionTerms, numerics: Numerics, strategy: InputStrategy
) -> Mapping[str, ErrorBudget]:
    """The budgets of ``out`` and ``lse``."""
    return paged_prefill.budget(paged_case(case), terms, numerics, strategy)


def simpler(case: Case[BlockSparse]) -> Iterator[Case[BlockSparse]]:
    """The case with one number at its simplest value, or half of it."""
    axes = case.axes
    if case.relation:
        yield replace(case, relation="")
    simplest: dict[str, Any] = {"rows": 1, "kv_heads": 1, "group": 1, "masked": False}
    simplest |= {"dtype": COMMON.dtype, "head_dim": COMMON.head_dim, "block_rows": 1}
    for name, value in simplest.items():
        if getattr(axes, name) != value:
            yield replace(case, axes=replace(axes, **{name: value}))
    if axes.block_columns > 1:
        yield replace(case, axes=replace(axes, block_columns=1, columns=axes.blocks_across))
    for across in {1, axes.blocks_across // 2, axes.blocks_across - 1}:
        if 0 < across < axes.blocks_across:
            yield replace(case, axes=replace(axes, columns=across * axes.block_columns))
    for rows in {axes.rows // 2, axes.rows - 1}:
        if 0 < rows < axes.rows:
            yield replace(case, axes=replace(axes, rows=rows))
    if case.inputs != "generic" or axes.sm_scale is not None:
        yield replace(case, inputs="generic", axes=replace(axes, sm_scale=None))
    if case.seed:
        yield replace(case, seed=0)


def locate(case: Case[BlockSparse], output: str, index: tuple[int, ...]) -> str:
    """An index in words: "row 17 (block row 1), head 2, dim 5" for ``out``; ``lse`` has no dim."""
    place = f"row {index[0]} (block row {index[0] // case.axes.block_rows}), head {index[1]}"
    return place if output == "lse" else f"{place}, dim {index[2]}"


def _relation(name: str) -> Relation:
    base = paged_prefill.relation(name)

    def applies(case: Case[BlockSparse]) -> bool:
        return base.applies(paged_case(case))

    def transform(case: Case[BlockSparse], materials: Materials) -> tuple[Related, ...]:
        from ._block_sparse import transformed

        return transformed(base, case, materials)

    return replace(base, applies=applies, transform=transform)


block_sparse = Operator(
    name="block_sparse",
    axes=BlockSparse,
    inputs=paged_prefill.inputs,
    cases=cases,
    materialize=materialize,
    reference=reference,
    budget=budget,
    locate=locate,
    simpler=simpler,
    relations=tuple(map(_relation, RELATIONS)),
    addresses={"indices": lambda case: case.axes.blocks_across},
)
