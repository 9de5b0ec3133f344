"""The operator ``mla_paged_attention``: absorbed multi-head latent attention over a paged cache of latents.

The queries have been multiplied by W_UK already, and the outputs will be by W_UV: each head attends in the space of the
latents. score = scale (q_nope · ckv + q_pe · kpe), out = Σ p ckv, with scale = 1 / √(nope_dim + rope_dim), of the head
before absorption. Query i of a request of ``qo_len`` queries and ``kv_len`` keys sees key j iff, when ``causal``,
j <= i + kv_len - qo_len (aligned at the bottom right). A row that sees no key has out = 0 and lse = -Inf.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from kerneltest.model import Case, ErrorBudget, InputStrategy, Materials, Numerics, Operator, Paging

from ..attention import paged_prefill as attention
from ..attention._cases import INPUTS
from ._axes import Mla, as_attention
from ._cases import captures, cases, simpler
from ._relations import RELATIONS

if TYPE_CHECKING:
    import torch

    from kerneltest.oracle.attention_terms import AttentionTerms

NAME = "mla_paged_attention"


def materialize(case: Case[Mla]) -> Materials:
    """Host tensors; see :func:`._materials.materialize`."""
    from . import _materials

    return _materials.materialize(case)


def reference(case: Case[Mla], inputs: Mapping[str, torch.Tensor], device: str) -> AttentionTerms:
    """Float64 values and budget terms, of attention with one KV head."""
    from ..attention._reference import paged_attention_terms
    from . import _materials

    tensors = _materials.as_attention(inputs)
    return paged_attention_terms(tensors, causal=case.axes.causal, sm_scale=case.axes.scale, device=device)


def budget(
    case: Case[Mla], terms: AttentionTerms, numerics: Numerics, strategy: InputStrategy
) -> Mapping[str, ErrorBudget]:
    """The budgets of ``out`` and ``lse``; a score is a sum of rank + rope_dim products."""
    from kerneltest.oracle.attention import attention_budget

    budgets = attention_budget(terms, numerics, head_dim=case.axes.key_dim, tier=strategy.tier)
    return {name: budget for name, budget in budgets.items() if name != "lse" or case.axes.return_lse}


def locate(case: Case[Mla], output: str, index: tuple[int, ...]) -> str:
    """An index in words, as attention has them."""
    return attention.locate(as_attention(case, case.axes.rank), output, index)


def explain(case: Case[Mla], inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> str | None:
    """Which slots of which request were lost or doubled, where that can be told; see attention's ``_attribution``."""
    return attention.explain(as_attention(case, case.axes.rank), inputs, outputs)


mla_paged_attention = Operator(
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
