"""Metamorphic relations: what the answers to two related cases have to do with each other, whatever they are.

A relation makes other cases of one case and says what their answers mean for the first. Both answers come from the
kernel, so that nothing is asked of a reference: what a kernel and its reference both misread still shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kerneltest.model.case import Case
from kerneltest.model.materials import Materials

if TYPE_CHECKING:
    import torch


class Inapplicable(Exception):
    """Raised by a transformation that this case or its values do not allow; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounded:
    """Float64 values and how far each may be from the exact one: 0 for equal bits, Inf where nothing is known."""

    value: torch.Tensor
    error: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A transformed case and its tensors, which no longer follow from the case alone."""

    case: Case[Any]
    materials: Materials


@dataclass(frozen=True, slots=True, kw_only=True)
class Related:
    """Cases whose answers together say what the answer to the original is.

    ``back(answers, numerics)``: from the outputs of each variant, by name, to the original's, errors included. What no
    variant has is left out.
    """

    variants: tuple[Variant, ...]
    back: Callable[[Sequence[Mapping[str, Bounded]], Any], Mapping[str, Bounded]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """One relation of an operator.

    ``change``: what is different, in words that follow "with". ``promise``: the promise of a kernel that makes equal
    bits of equal answers; without one they agree within their error budgets. ``applies(case)``: whether it says
    anything of the case. ``transform(case, materials)``: what to compare the case with; may raise
    :class:`Inapplicable`. ``needs``: outputs that it cannot do without.
    """

    name: str
    change: str
    promise: Literal["deterministic", "batch_invariant"] | None
    applies: Callable[[Case[Any]], bool]
    transform: Callable[[Case[Any], Materials], tuple[Related, ...]]
    needs: tuple[str, ...] = ()
