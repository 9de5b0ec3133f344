"""The host tensors of MLA over a paged cache, and the same batch in the words of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from kerneltest.model import Case, DeadBytes, Materials, OutputSpec

from ..attention import paged_prefill as attention
from ._axes import Mla
from ._inputs import values

# The tensors of the cache, and attention's that have the same dead slots.
PAGES = {"ckv_pages": "v_pages", "kpe_pages": "k_pages"}


def materialize(case: Case[Mla]) -> Materials:
    """All of them from ``case.seed``:

    ``q_nope`` [total_qo, heads, rank], ``q_pe`` [total_qo, heads, rope]; ``ckv_pages`` [pages, page_size, rank],
    ``kpe_pages`` [.., rope]; int32 ``qo_indptr``, ``kv_indptr`` [batch + 1] (the latter counts pages), ``kv_indices``
    [referenced pages] and ``kv_len`` [batch]. Raises ValueError if the inputs' scale does not fit them.
    """
    axes = case.axes
    # Page tables do not depend on values: those of the smallest head there is are thrown away.
    plain = Case(operator="paged_prefill", axes=axes.as_attention(1), inputs="integer", seed=case.seed)
    layout = attention.materialize(plain)
    pages = torch.split(layout.inputs["kv_indices"].long(), [axes.pages(request) for request in axes.requests])
    total = len(layout.inputs["k_pages"])
    drawn = values(case, pages, total, torch.Generator().manual_seed(case.seed))
    inputs = dict(zip(("q_nope", "q_pe", "ckv_pages", "kpe_pages"), drawn, strict=True))
    inputs |= {name: layout.inputs[name] for name in ("qo_indptr", "kv_indptr", "kv_indices")}
    inputs["kv_len"] = torch.tensor([request.kv_len for request in axes.requests], dtype=torch.int32)
    return Materials(inputs=inputs, dead=dead(layout.dead), outputs=outputs(axes))


def outputs(axes: Mla) -> dict[str, OutputSpec]:
    return {
        "out": OutputSpec(shape=(axes.total_qo, axes.heads, axes.rank), dtype=axes.dtype),
        "lse": OutputSpec(shape=(axes.total_qo, axes.heads), dtype="float32"),
    }


def dead(of_attention: tuple[DeadBytes, ...]) -> tuple[DeadBytes, ...]:
    """Dead slots of the cache of latents, from those of K and V pages."""
    names = {theirs: ours for ours, theirs in PAGES.items()}
    return tuple(replace(one, tensor=names[one.tensor]) for one in of_attention)


def as_attention(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of ``paged_prefill`` with one KV head: K = [latent, rotated key], V = latent."""
    page_size = inputs["ckv_pages"].shape[1]
    kv_len = inputs["kv_len"]
    return {
        "q": torch.cat([inputs["q_nope"], inputs["q_pe"]], -1),
        "k_pages": torch.cat([inputs["ckv_pages"], inputs["kpe_pages"]], -1).unsqueeze(2),
        "v_pages": inputs["ckv_pages"].unsqueeze(2),
        **{name: inputs[name] for name in ("qo_indptr", "kv_indptr", "kv_indices")},
        "kv_last_page_len": torch.where(kv_len > 0, (kv_len - 1) % page_size + 1, 0),
    }


def from_attention(case: Case[Mla], materials: Materials) -> Materials:
    """Back from the tensors of attention, of any batch over a cache of the case's kind."""
    x, rank, page_size = materials.inputs, case.axes.rank, case.axes.page_size
    pages, last = x["kv_indptr"].diff(), x["kv_last_page_len"]
    rows = x["q"].shape[:2]
    return Materials(
        inputs={
            "q_nope": x["q"][..., :rank].contiguous(),
            "q_pe": x["q"][..., rank:].contiguous(),
            "ckv_pages": x["k_pages"].squeeze(2)[..., :rank].contiguous(),
            "kpe_pages": x["k_pages"].squeeze(2)[..., rank:].contiguous(),
            **{name: x[name] for name in ("qo_indptr", "kv_indptr", "kv_indices")},
            "kv_len": torch.where(pages > 0, (pages - 1) * page_size + last, 0).to(torch.int32),
        },
        dead=dead(materials.dead),
        outputs={
            "out": OutputSpec(shape=(*rows, rank), dtype=case.axes.dtype),
            "lse": OutputSpec(shape=tuple(rows), dtype="float32"),
        },
    )
