"""The operators ``sampling_from_probs`` and ``sampling_from_logits``: one token from each row, and no filter.

A token is drawn in proportion to its probability, or to exp of its logit. One of probability 0, or of a logit of -Inf,
never is.
"""

from __future__ import annotations

from ._axes import ALL, ALL_LOGITS, DTYPES, Family, strategies
from ._operators import sampler
from ._portfolio import portfolio

PROBS = Family(
    operator="sampling_from_probs",
    inputs=strategies(*ALL),
    draws=True,
)
LOGITS = Family(
    operator="sampling_from_logits",
    inputs=strategies(*ALL_LOGITS),
    dtypes=DTYPES,
    draws=True,
)

sampling_from_probs = sampler(PROBS, portfolio(PROBS.operator))
sampling_from_logits = sampler(LOGITS, portfolio(LOGITS.operator), logits=True)
