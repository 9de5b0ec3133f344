"""The metamorphic relations of MLA: those of attention that hold where V is a part of K, and MLA's own.

Absent are those that change V and not K. In their place the whole latent is scaled or negated, and what meets it in a
score undoes that: the query where it is absorbed, and W_UK in a whole layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from kerneltest.model import Case, Materials, Related, Relation

from ..attention._relations import RELATIONS as OF_ATTENTION
from ._axes import Mla, as_attention

SHARED = (
    "page_permutation",
    "score_scale",
    "batch_order",
    "batch_size",
    "repeat",
    "split",
    "decode",
    "key_permutation",
    "duplicate_keys",
)


def _transform(name: str, case: Case[Mla], materials: Materials) -> tuple[Related, ...]:
    from . import _transformations

    return _transformations.transform(name, case, materials)


def _shared(relation: Relation) -> Relation:
    return replace(
        relation,
        applies=lambda case: relation.applies(as_attention(case, case.axes.rank)),
        transform=partial(_transform, relation.name),
    )


def _always(_axes: Mla) -> bool:
    return True


def _several_heads(axes: Mla) -> bool:
    return axes.heads > 1


def _own(
    name: str, change: str, promise: Literal["deterministic"] | None, applies: Callable[[Mla], bool] = _always
) -> Relation:
    def applies_to(case: Case[Mla]) -> bool:
        return any(r.qo_len and r.kv_len for r in case.axes.requests) and applies(case.axes)

    return Relation(name=name, change=change, promise=promise, applies=applies_to, transform=partial(_transform, name))


RELATIONS = (
    *(_shared(relation) for relation in OF_ATTENTION if relation.name in SHARED),
    _own("latent_sign", "the negative of the latents and of what meets them in a score", "deterministic"),
    _own("latent_scale", "4 times the latents and a quarter of what meets them in a score", "deterministic"),
    _own("latent_permutation", "the channels of the latents in another order", None),
    _own("head_permutation", "the heads in another order", "deterministic", _several_heads),
)
