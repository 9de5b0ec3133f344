"""The metamorphic relations of operators on rows of a vocabulary."""

from __future__ import annotations

from kerneltest.model import Case, Materials, Related, Relation

from ._axes import Rows


def _permuted(case: Case[Rows], materials: Materials) -> tuple[Related, ...]:
    from ._transformations import rows_permuted

    return rows_permuted(case, materials)


def _rescaled(case: Case[Rows], materials: Materials) -> tuple[Related, ...]:
    from ._transformations import temperature_rescaled

    return temperature_rescaled(case, materials)


def _several_rows(case: Case[Rows]) -> bool:
    return case.axes.rows > 1


def _always(_case: Case[Rows]) -> bool:
    return True


ROW_PERMUTATION = Relation(
    name="row_permutation",
    change="the rows in another order",
    promise="deterministic",
    applies=_several_rows,
    transform=_permuted,
)
TEMPERATURE_SCALE = Relation(
    name="temperature_scale",
    change="four times the logits and the temperature",
    promise="deterministic",
    applies=_always,
    transform=_rescaled,
)
