"""The operator ``mla_attention``: a whole layer of multi-head latent attention, between its projections of q and o.

Of each head: k_j = W_UK c_j, v_j = W_UV c_j, score = scale (q_nope · k_j + q_pe · r_j), out = Σ p v, over a paged cache
of latents c and rotated keys r, with scale = 1 / √(nope_dim + rope_dim). A kernel may decompress keys and values, all
at once or block by block, or absorb W_UK into the queries and apply W_UV to the attended latent: the same function,
three ways to round. Masks, empty requests and rows are as in ``mla_paged_attention``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from kerneltest.model import Case, ErrorBudget, InputStrategy, Materials, Operator, Paging

from ..attention import paged_prefill as attention
from ..attention._cases import INPUTS
from ._axes import Mla, as_attention
from ._cases import captures, cases, simpler
from ._numerics import MlaNumerics
from ._relations import RELATIONS

if TYPE_CHECKING:
    import torch

    from ._layer_terms import LayerTerms

NAME = "mla_attention"


def materialize(case: Case[Mla]) -> Materials:
    """Host tensors; see :func:`._materials.materialize_layer`."""
    from . import _materials

    return _materials.materialize_layer(case)


def reference(case: Case[Mla], inputs: Mapping[str, torch.Tensor], device: str) -> LayerTerms:
    """Float64 values and budget terms; see :mod:`._layer_terms`."""
    from ._layer_terms import layer_terms

    return layer_terms(inputs, causal=case.axes.causal, sm_scale=case.axes.scale, device=device)


def budget(
    case: Case[Mla], terms: LayerTerms, numerics: MlaNumerics, strategy: InputStrategy
) -> Mapping[str, ErrorBudget]:
    """The budgets of ``out`` and ``lse``; see :func:`._layer_budget.layer_budget`."""
    from ._layer_budget import layer_budget

    budgets = layer_budget(terms, numerics, case.axes.dims, strategy.tier)
    return {name: budget for name, budget in budgets.items() if name != "lse" or case.axes.return_lse}


def locate(case: Case[Mla], output: str, index: tuple[int, ...]) -> str:
    """An index in words, as attention has them."""
    return attention.locate(as_attention(case, case.axes.dims.v_dim), output, index)


def explain(case: Case[Mla], inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> str | None:
    """Which slots of which request were lost or doubled, where that can be told; see attention's ``_attribution``."""
    import torch

    if case.inputs != "count" or "out" not in outputs:
        return None
    # Values of count inputs are shifted by a channel for each head.
    heads = [outputs["out"][:, head].roll(head, -1) for head in range(case.axes.heads)]
    plain = {**outputs, "out": torch.stack(heads, 1)}
    return attention.explain(as_attention(case, case.axes.dims.v_dim), inputs, plain)


mla_attention = Operator(
    name=NAME,
    axes=Mla,
    inputs=INPUTS,
    cases=partial(cases, NAME, RELATIONS),
    materialize=materialize,
    reference=reference,
    budget=budget,
    locate=locate,
    simpler=simpler,
    relations=RELATIONS,
    paging=Paging(pages=("ckv_pages", "kpe_pages"), table="kv_indices"),
    captures=captures,
    explain=explain,
)
