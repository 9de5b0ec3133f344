"""How a case on rows is transformed for each relation, and what the answer then says of the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from kerneltest.model import Bounded, Case, Inapplicable, Materials, Related, Variant

from ._axes import Rows

POWER = 4.0
# Larger logits of a 16-bit format would overflow.
LARGEST = 8192.0


def rows_permuted(case: Case[Rows], materials: Materials) -> tuple[Related, ...]:
    """All rows, and what belongs to each, in another order. Not of draws, whose random numbers go by place."""
    order = torch.randperm(case.axes.rows, generator=torch.Generator().manual_seed(case.seed ^ 0xFFFF))
    inverse = order.argsort()
    inputs = {name: value[order] for name, value in materials.inputs.items()}
    variant = Variant(case=replace(case, relation=""), materials=replace(materials, inputs=inputs))

    def back(answers: Sequence[Mapping[str, Bounded]], _numerics: Any) -> dict[str, Bounded]:
        (answer,) = answers
        return {
            name: Bounded(value=bounded.value[inverse], error=bounded.error[inverse])
            for name, bounded in answer.items()
        }

    return (Related(variants=(variant,), back=back),)


def temperature_rescaled(case: Case[Rows], materials: Materials) -> tuple[Related, ...]:
    """softmax(4 x / 4 T) = softmax(x / T), and no number but the exponents of x and T changes on the way."""
    logits = materials.inputs["logits"]
    finite = logits[logits.isfinite()]
    if float(finite.abs().max()) > LARGEST:
        raise Inapplicable("the logits are too large to be multiplied in their format")
    axes, inputs = case.axes, {**materials.inputs, "logits": logits * POWER}
    assert axes.temperature is not None
    if axes.per_row:
        inputs["temperature"] = inputs["temperature"] * POWER
    other = replace(case, relation="", axes=replace(axes, temperature=axes.temperature * POWER))
    variant = Variant(case=other, materials=replace(materials, inputs=inputs))
    return (Related(variants=(variant,), back=lambda answers, _numerics: answers[0]),)
