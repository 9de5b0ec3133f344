"""The host tensors of MLA over a paged cache, and the same batch in the words of attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from kerneltest.model import Case, DeadBytes, Materials, OutputSpec

from ..attention import paged_prefill as attention
from . import _inputs, _layer_inputs
from ._axes import Mla

# The tensors of the cache, and attention's that have the same dead slots.
PAGES = {"ckv_pages": "v_pages", "kpe_pages": "k_pages"}
Fill = Callable[[Case[Mla], Sequence[torch.Tensor], int, torch.Generator], Sequence[torch.Tensor]]


def materialize(case: Case[Mla]) -> Materials:
    """Of ``mla_paged_attention``, all of them from ``case.seed``:

    ``q_nope`` [total_qo, heads, rank], ``q_pe`` [total_qo, heads, rope]; ``ckv_pages`` [pages, page_size, rank],
    ``kpe_pages`` [.., rope]; int32 ``qo_indptr``, ``kv_indptr`` [batch + 1] (the latter counts pages), ``kv_indices``
    [referenced pages] and ``kv_len`` [batch]. Raises ValueError if the inputs' scale does not fit them.
    """
    return _paged(case, ("q_nope", "q_pe", "ckv_pages", "kpe_pages"), _inputs.values, case.axes.rank)


def materialize_layer(case: Case[Mla]) -> Materials:
    """Of ``mla_attention``: the same, but ``q_nope`` [total_qo, heads, nope]; and the projections ``w_uk`` [heads,
    nope, rank] and ``w_uv`` [heads, v_dim, rank].
    """
    names = ("q_nope", "q_pe", "ckv_pages", "kpe_pages", "w_uk", "w_uv")
    return _paged(case, names, _layer_inputs.values, case.axes.dims.v_dim)


def _paged(case: Case[Mla], names: Sequence[str], values: Fill, out_dim: int) -> Materials:
    axes = case.axes
    # Page tables do not depend on values: those of the smallest head there is are thrown away.
    plain = Case(operator="paged_prefill", axes=axes.as_attention(1), inputs="integer", seed=case.seed)
    layout = attention.materialize(plain)
    pages = torch.split(layout.inputs["kv_indices"].long(), [axes.pages(request) for request in axes.requests])
    drawn = values(case, pages, len(layout.inputs["k_pages"]), torch.Generator().manual_seed(case.seed))
    inputs = dict(zip(names, drawn, strict=True))
    inputs |= {name: layout.inputs[name] for name in ("qo_indptr", "kv_indptr", "kv_indices")}
    inputs["kv_len"] = torch.tensor([request.kv_len for request in axes.requests], dtype=torch.int32)
    rows = (axes.total_qo, axes.heads)
    return Materials(inputs=inputs, dead=_dead(layout.dead), outputs=_outputs(axes, (*rows, out_dim)))


def _outputs(axes: Mla, shape: tuple[int, ...]) -> dict[str, OutputSpec]:
    lse = {"lse": OutputSpec(shape=shape[:-1], dtype="float32")} if axes.return_lse else {}
    return {"out": OutputSpec(shape=shape, dtype=axes.dtype)} | lse


def _dead(of_attention: tuple[DeadBytes, ...]) -> tuple[DeadBytes, ...]:
    """Dead slots of the cache of latents, from those of K and V pages."""
    names = {theirs: ours for ours, theirs in PAGES.items()}
    return tuple(replace(one, tensor=names[one.tensor]) for one in of_attention)


def as_attention(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of ``paged_prefill`` with one KV head: q = [q_nope, q_pe], K = [latent, rotated key], V = latent.

    Of ``mla_paged_attention`` that is what it computes; of ``mla_attention`` only a way to say which request has which
    rows and slots.
    """
    page_size = inputs["ckv_pages"].shape[1]
    kv_len = inputs["kv_len"]
    return {
        "q": torch.cat([inputs["q_nope"], inputs["q_pe"]], -1),
        "k_pages": torch.cat([inputs["ckv_pages"], inputs["kpe_pages"]], -1).unsqueeze(2),
        "v_pages": inputs["ckv_pages"].unsqueeze(2),
        **{name: inputs[name] for name in ("qo_indptr", "kv_indptr", "kv_indices")},
        "kv_last_page_len": torch.where(kv_len > 0, (kv_len - 1) % page_size + 1, 0),
    }


def from_attention(original: Materials, materials: Materials) -> Materials:
    """Back from the tensors of attention: of any batch over a cache like the original's, the rest as it was there."""
    x, was = materials.inputs, original.inputs
    nope, rank, page_size = was["q_nope"].shape[-1], was["ckv_pages"].shape[-1], x["k_pages"].shape[1]
    pages, last = x["kv_indptr"].diff(), x["kv_last_page_len"]
    rows = tuple(x["q"].shape[:2])
    shapes = {"out": (*rows, original.outputs["out"].shape[-1]), "lse": rows}
    return Materials(
        inputs={
            **was,
            "q_nope": x["q"][..., :nope].contiguous(),
            "q_pe": x["q"][..., nope:].contiguous(),
            "ckv_pages": x["k_pages"].squeeze(2)[..., :rank].contiguous(),
            "kpe_pages": x["k_pages"].squeeze(2)[..., rank:].contiguous(),
            **{name: x[name] for name in ("qo_indptr", "kv_indptr", "kv_indices")},
            "kv_len": torch.where(pages > 0, (pages - 1) * page_size + last, 0).to(torch.int32),
        },
        dead=_dead(materials.dead),
        outputs={name: replace(spec, shape=shapes[name]) for name, spec in original.outputs.items()},
    )
