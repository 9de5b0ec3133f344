"""Block-sparse attention: which blocks there are, the tensors of a case, its float64 reference, its relations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from kerneltest.model import Case, DeadBytes, Materials, OutputSpec, Place, Related, Relation, Variant
from kerneltest.oracle.attention_terms import (
    TENSORS,
    Attended,
    AttentionTerms,
    attention_terms,
    from_tensors,
    weight_spread,
)

from ._block_sparse_axes import BlockSparse, paged_case

# Of the blocks of a block row: none, a quarter, half, all.
DENSITIES = (0.0, 0.25, 0.5, 1.0)
# Of the pairs of a block, where it is masked.
MASK_DENSITY = 0.5

Tensors = Mapping[str, torch.Tensor]


def pattern(case: Case[BlockSparse]) -> dict[str, torch.Tensor]:
    """``indptr``, ``indices`` and, of a masked case, ``mask``. There is at least one block."""
    axes, random = case.axes, torch.Generator().manual_seed(case.seed)
    density = torch.tensor(DENSITIES)[torch.randint(len(DENSITIES), (axes.blocks_down, 1), generator=random)]
    there = torch.rand(axes.blocks_down, axes.blocks_across, generator=random) < density
    if not bool(there.any()):
        there[-1, -1] = True
    found = {
        "indptr": torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0)).to(torch.int32),
        "indices": there.nonzero()[:, 1].to(torch.int32),
    }
    if axes.masked:
        shape = (int(there.sum()), axes.block_rows, axes.block_columns)
        mask = torch.rand(shape, generator=random) < MASK_DENSITY
        # The first column of the first block of each block row, so that every row with blocks sees something.
        mask[found["indptr"][:-1].long()[there.any(1)], :, 0] = True
        found["mask"] = mask
    return found


def seen(case: Case[BlockSparse], inputs: Tensors) -> torch.Tensor:
    """Which keys each query sees, bool [rows, columns]: written out block by block."""
    axes = case.axes
    result = torch.zeros(axes.blocks_down * axes.block_rows, axes.columns, dtype=torch.bool)
    indptr, indices = inputs["indptr"].tolist(), inputs["indices"].tolist()
    for down in range(axes.blocks_down):
        for block in range(indptr[down], indptr[down + 1]):
            rows = slice(down * axes.block_rows, (down + 1) * axes.block_rows)
            columns = slice(indices[block] * axes.block_columns, (indices[block] + 1) * axes.block_columns)
            result[rows, columns] = inputs["mask"][block].cpu() if "mask" in inputs else True
    return result[: axes.rows]


def materials(case: Case[BlockSparse], paged: Tensors, blocks: Tensors) -> Materials:
    """The tensors of one request over pages of one token, with these blocks."""
    axes, order = case.axes, paged["kv_indices"].long()
    inputs = {"q": paged["q"], "k": paged["k_pages"][order, 0], "v": paged["v_pages"][order, 0], **blocks}
    used = torch.zeros(axes.blocks_across, dtype=torch.bool)
    used[blocks["indices"].long()] = True
    dead = ~used.repeat_interleave(axes.block_columns)
    place = Place.UNREFERENCED_PAGES
    return Materials(
        inputs=inputs,
        dead=tuple(DeadBytes(place=place, tensor=name, mask=dead) for name in ("k", "v") if bool(dead.any())),
        outputs={
            "out": OutputSpec(shape=(axes.rows, axes.q_heads, axes.head_dim), dtype=axes.dtype),
            "lse": OutputSpec(shape=(axes.rows, axes.q_heads), dtype="float32"),
        },
    )


def terms(case: Case[BlockSparse], inputs: Tensors, device: str) -> AttentionTerms:
    """Terms shaped [rows, q_heads] and [rows, q_heads, d]."""
    q, k, v = (inputs[name].to(device).transpose(0, 1).unsqueeze(0) for name in ("q", "k", "v"))
    visible = seen(case, inputs).to(device)
    # Keys that nobody sees must be finite; what they hold is anybody's guess.
    alive = visible.any(0)[:, None]
    k, v = (torch.where(alive, x, 0) for x in (k, v))
    x = Attended(q=q, k=k, v=v, seen=visible.unsqueeze(0), scale=case.axes.scale)
    whole = attention_terms(x)

    def spread(filters: torch.Tensor, centred: bool) -> torch.Tensor:
        found = weight_spread(x, whole.out, filters.transpose(0, 1).unsqueeze(0), centred=centred)
        return found.squeeze(0).transpose(0, 1)

    return from_tensors({name: getattr(whole, name).squeeze(0).transpose(0, 1) for name in TENSORS}, spread)


def transformed(base: Relation, case: Case[BlockSparse], given: Materials) -> tuple[Related, ...]:
    """A relation of paged attention that changes nothing but q, K, V and the scale, with the blocks as they are."""
    x = given.inputs
    count = len(x["k"])
    paged = {
        "q": x["q"],
        "k_pages": x["k"].unsqueeze(1),
        "v_pages": x["v"].unsqueeze(1),
        "qo_indptr": torch.tensor([0, len(x["q"])], dtype=torch.int32),
        "kv_indptr": torch.tensor([0, count], dtype=torch.int32),
        "kv_indices": torch.arange(count, dtype=torch.int32),
        "kv_last_page_len": torch.ones(1, dtype=torch.int32),
    }
    blocks = {name: x[name] for name in ("indptr", "indices", "mask") if name in x}

    def sparse(variant: Variant) -> Variant:
        axes = replace(case.axes, sm_scale=variant.case.axes.sm_scale)
        other = replace(case, axes=axes, relation="")
        return Variant(case=other, materials=materials(other, variant.materials.inputs, blocks))

    related = base.transform(paged_case(case), Materials(inputs=paged, dead=(), outputs={}))
    return tuple(replace(one, variants=tuple(map(sparse, one.variants))) for one in related)
