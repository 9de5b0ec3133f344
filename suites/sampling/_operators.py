"""From a family of cases to an operator: what all samplers have in common, and all filters of a distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kerneltest.model import Case, Draws, ErrorBudget, Materials, Operator, OutputSpec, Rejection, Relation, Size

from ._axes import Family, Rows, cases, locate, simpler

if TYPE_CHECKING:
    import torch

    from ._certify import Terms
    from ._semantics import Semantics

Outputs = Callable[[Rows], dict[str, OutputSpec]]
Portfolio = Callable[[Size], tuple[Case[Rows], ...]]


def materializer(family: Family, outputs: Outputs, *, logits: bool) -> Callable[[Case[Rows]], Materials]:
    """What builds a case's tensors; see :func:`._inputs.materials`."""

    def materialize(case: Case[Rows]) -> Materials:
        from ._inputs import materials

        return materials(case, logits=logits, outputs=outputs(case.axes), draws=family.draws)

    return materialize


def reference(case: Case[Rows], inputs: Mapping[str, torch.Tensor], device: str) -> Terms:
    """What a certificate needs of the inputs."""
    from . import _certify

    return _certify.reference(case, inputs, device)


def no_budget(*_: object) -> Mapping[str, ErrorBudget]:
    """Of outputs that only a certificate can judge."""
    return {}


def certifier(
    name: str, **options: Any
) -> Callable[[Case[Rows], Terms, Semantics, Mapping[str, torch.Tensor]], Iterable[Rejection]]:
    """The certificate of that name in :mod:`._certify`."""

    def certify(
        case: Case[Rows], terms: Terms, semantics: Semantics, outputs: Mapping[str, torch.Tensor]
    ) -> Iterable[Rejection]:
        from . import _certify

        found: Iterable[Rejection] = getattr(_certify, name)(case, terms, semantics, outputs, **options)
        return found

    return certify


def sampler(family: Family, portfolio: Portfolio, *, logits: bool = False) -> Operator:
    """An operator that draws ``tokens`` [draws], int32 or of the dtype of the indices."""

    def outputs(axes: Rows) -> dict[str, OutputSpec]:
        return {"tokens": OutputSpec(shape=(axes.draws,), dtype=axes.indices or "int32")}

    def probabilities(case: Case[Rows], inputs: Mapping[str, torch.Tensor], device: str) -> torch.Tensor:
        from ._portfolio import probabilities

        return probabilities(case, inputs, device, logits=logits)

    def categories(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return outputs["tokens"].long()

    return Operator(
        name=family.operator,
        axes=Rows,
        inputs=family.inputs,
        cases=cases(family),
        materialize=materializer(family, outputs, logits=logits),
        reference=reference,
        budget=no_budget,
        locate=locate,
        simpler=simpler(family),
        addresses={"indices": "logits" if logits else "probs"},
        distributions=() if logits else ("probs",),
        certified=("tokens",),
        certify=certifier("certify_tokens", logits=logits),
        draws=Draws(cases=portfolio, probabilities=probabilities, categories=categories),
    )


def distribution(
    family: Family, output: str, certificate: str, *, logits: bool = False, relations: tuple[Relation, ...] = ()
) -> Operator:
    """An operator that puts out [rows, V] of its input's dtype."""

    def outputs(axes: Rows) -> dict[str, OutputSpec]:
        return {output: OutputSpec(shape=(axes.rows, axes.vocabulary), dtype=axes.dtype)}

    return Operator(
        name=family.operator,
        axes=Rows,
        inputs=family.inputs,
        cases=cases(family),
        materialize=materializer(family, outputs, logits=logits),
        reference=reference,
        budget=no_budget,
        locate=locate,
        simpler=simpler(family),
        relations=relations,
        distributions=() if logits else ("probs",),
        certified=(output,),
        certify=certifier(certificate),
    )
