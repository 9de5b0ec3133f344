"""The operators ``top_p_renorm``, ``top_k_renorm`` and ``top_k_mask_logits``: filters that put out a distribution.

A renormalisation leaves 0 where its filter does, and each other token its share of what is left. A mask leaves -Inf,
and every other logit as it is.
"""

from __future__ import annotations

from ._axes import ALL, ALL_LOGITS, DTYPES, Family, strategies
from ._operators import distribution
from ._relations import ROW_PERMUTATION

TOP_P = Family(
    operator="top_p_renorm",
    inputs=strategies(*ALL, "unnormalised"),
    parameters=("top_p",),
    relations=(ROW_PERMUTATION,),
)
TOP_K = Family(
    operator="top_k_renorm",
    inputs=strategies(*ALL),
    parameters=("top_k",),
    dtypes=DTYPES,
    relations=(ROW_PERMUTATION,),
)
MASK = Family(
    operator="top_k_mask_logits",
    inputs=strategies(*ALL_LOGITS),
    parameters=("top_k",),
    dtypes=DTYPES,
    relations=(ROW_PERMUTATION,),
)

top_p_renorm = distribution(TOP_P, "renorm_probs", "certify_renorm", relations=(ROW_PERMUTATION,))
top_k_renorm = distribution(TOP_K, "renorm_probs", "certify_renorm", relations=(ROW_PERMUTATION,))
top_k_mask_logits = distribution(MASK, "masked_logits", "certify_mask", logits=True, relations=(ROW_PERMUTATION,))
