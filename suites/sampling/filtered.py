"""The operators that filter and draw: top-p, top-k, min-p, and top-k with top-p, from probabilities or logits.

top-p keeps a token while the mass before it, in descending order, is less than p. top-k keeps the k largest, min-p
those of at least a share of the largest. What becomes of equal tokens at the border, whether "less" is strict and p a
share of the sum, is each kernel's to declare (:class:`._semantics.Semantics`). Of two filters, in the order "joint"
both look at the same probabilities; in "top_k_first" top-p looks at what top-k left, renormalised.
"""

from __future__ import annotations

from ._axes import ALL, ALL_LOGITS, Family, strategies
from ._operators import sampler
from ._portfolio import portfolio

TOP_P = Family(operator="top_p_sampling", inputs=strategies(*ALL, "unnormalised"), parameters=("top_p",), draws=True)
TOP_K = Family(operator="top_k_sampling", inputs=strategies(*ALL), parameters=("top_k",), draws=True)
MIN_P = Family(operator="min_p_sampling", inputs=strategies(*ALL), parameters=("min_p",), draws=True)
TOP_K_TOP_P = Family(
    operator="top_k_top_p_sampling",
    inputs=strategies(*ALL),
    parameters=("top_k", "top_p"),
    orders=("joint", "top_k_first"),
    draws=True,
)
TOP_K_TOP_P_LOGITS = Family(
    operator="top_k_top_p_sampling_from_logits",
    inputs=strategies(*ALL_LOGITS),
    parameters=("top_k", "top_p"),
    orders=("joint", "top_k_first"),
    draws=True,
)
# Inputs without equal tokens, so that a border means the same to everybody; elsewhere none is among equals.
DISTINCT = ("generic", "zipf")
EVERYTHING = ("uniform", "heavy_tail", "ties")
BOTH_ORDERS = tuple(
    {"top_k": k, "top_p": p, "order": order, "on": on}
    for order in ("joint", "top_k_first")
    for k, p, on in ((2, 1.0, ("generic",)), (50, 0.9, ("zipf",)), (0, 1.0, ("heavy_tail",)))
)

top_p_sampling = sampler(
    TOP_P, portfolio(TOP_P.operator, {"top_p": 0.8, "on": DISTINCT}, {"top_p": 1.0, "on": EVERYTHING})
)
top_k_sampling = sampler(
    TOP_K,
    portfolio(
        TOP_K.operator,
        {"top_k": 2, "on": ("generic",)},
        {"top_k": 100, "on": ("zipf",)},
        {"top_k": 0, "on": EVERYTHING},
    ),
)
min_p_sampling = sampler(
    MIN_P,
    portfolio(
        MIN_P.operator,
        {"min_p": 0.25, "on": ("generic", "ties", "dyadic")},
        {"min_p": 0.02, "on": ("zipf", "uniform")},
        {"min_p": 0.0, "on": ("heavy_tail",)},
    ),
)
top_k_top_p_sampling = sampler(TOP_K_TOP_P, portfolio(TOP_K_TOP_P.operator, *BOTH_ORDERS))
top_k_top_p_sampling_from_logits = sampler(
    TOP_K_TOP_P_LOGITS, portfolio(TOP_K_TOP_P_LOGITS.operator, *BOTH_ORDERS), logits=True
)
