"""The operator ``top_k``: the k largest of each row, values and indices.

``tie`` says which of equal values at the border are taken: "index" those with the lowest index, "reverse" with the
highest, "any" whichever the kernel declares. ``sorted``: in descending order; otherwise in any.
"""

from __future__ import annotations

from kerneltest.model import Case, Materials, Operator, OutputSpec

from ._axes import ALL_LOGITS, DTYPES, Family, Rows, cases, locate, simpler, strategies
from ._operators import certifier, materializer, no_budget, reference
from ._relations import ROW_PERMUTATION

FAMILY = Family(
    operator="top_k",
    inputs=strategies(*ALL_LOGITS, "near_ties"),
    parameters=("top_k",),
    dtypes=DTYPES,
    per_row=False,
    selects=True,
    relations=(ROW_PERMUTATION,),
)


def outputs(axes: Rows) -> dict[str, OutputSpec]:
    """``values`` of the input's dtype and int64 ``indices``, both [rows, k]."""
    assert axes.top_k is not None
    shape = (axes.rows, axes.top_k)
    return {"values": OutputSpec(shape=shape, dtype=axes.dtype), "indices": OutputSpec(shape=shape, dtype="int64")}


def materialize(case: Case[Rows]) -> Materials:
    """Logits; see :func:`._inputs.materials`."""
    return materializer(FAMILY, outputs, logits=True)(case)


top_k = Operator(
    name=FAMILY.operator,
    axes=Rows,
    inputs=FAMILY.inputs,
    cases=cases(FAMILY),
    materialize=materialize,
    reference=reference,
    budget=no_budget,
    locate=locate,
    simpler=simpler(FAMILY),
    relations=(ROW_PERMUTATION,),
    certified=("values", "indices"),
    certify=certifier("certify_selection"),
)
