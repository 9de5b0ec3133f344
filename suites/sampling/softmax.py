"""The operator ``softmax``: probabilities of logits over a temperature, one for all rows or one for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kerneltest.model import Case, ErrorBudget, InputStrategy, Materials, Operator, OutputSpec

from ._axes import DTYPES, Family, Rows, cases, locate, simpler, strategies
from ._operators import materializer
from ._relations import ROW_PERMUTATION, TEMPERATURE_SCALE

if TYPE_CHECKING:
    import torch

    from kerneltest.oracle.softmax import SoftmaxNumerics

RELATIONS = (ROW_PERMUTATION, TEMPERATURE_SCALE)
FAMILY = Family(
    operator="softmax",
    inputs=strategies("generic", "large", "ties", "masked", "heavy_tail", "peaked", "subnormal_logits", "uniform"),
    parameters=("temperature",),
    dtypes=DTYPES,
    relations=RELATIONS,
)


def outputs(axes: Rows) -> dict[str, OutputSpec]:
    """``probs`` [rows, V], float32 whatever the logits are."""
    return {"probs": OutputSpec(shape=(axes.rows, axes.vocabulary), dtype="float32")}


def materialize(case: Case[Rows]) -> Materials:
    """``logits`` [rows, V], and ``temperature`` float32 [rows] if it differs by row."""
    return materializer(FAMILY, outputs, logits=True)(case)


def reference(
    case: Case[Rows], inputs: Mapping[str, torch.Tensor], device: str
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """The logits and the temperature, on the device; the budget computes what they make."""
    assert case.axes.temperature is not None
    logits = inputs["logits"].to(device)
    return logits, inputs["temperature"].to(device).unsqueeze(-1) if case.axes.per_row else case.axes.temperature


def budget(
    case: Case[Rows],
    terms: tuple[torch.Tensor, torch.Tensor | float],
    numerics: SoftmaxNumerics,
    strategy: InputStrategy,
) -> Mapping[str, ErrorBudget]:
    """The budget of ``probs``; see :func:`kerneltest.oracle.softmax.softmax_budget`."""
    from kerneltest.oracle.softmax import softmax_budget

    return {"probs": softmax_budget(*terms, numerics)}


softmax = Operator(
    name=FAMILY.operator,
    axes=Rows,
    inputs=FAMILY.inputs,
    cases=cases(FAMILY),
    materialize=materialize,
    reference=reference,
    budget=budget,
    locate=locate,
    simpler=simpler(FAMILY),
    relations=RELATIONS,
)
