"""A case: one concrete call as a small recipe, from which worker and reference build the same tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Generic, TypeVar

from kerneltest.model.codec import decode, encode
from kerneltest.model.guard import Guard

A = TypeVar("A")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case(Generic[A]):
    """One call of an operator.

    ``axes`` is the operator's own frozen dataclass (shapes, dtypes, layout), ``inputs`` the name of one of its input
    strategies, ``seed`` what the values are drawn from. ``relation`` names the metamorphic relation that is checked on
    top, if any. ``guard``: which end of its buffers lies at an unmapped page. No tensors: a case prints on a line and
    survives as JSON.
    """

    operator: str
    axes: A
    inputs: str
    seed: int
    relation: str = ""
    guard: Guard = Guard.NONE

    def __str__(self) -> str:
        words = said(self)
        operator, axes = words.pop("operator"), words.pop("axes")
        return f"{operator}({', '.join(f'{name}={_compact(value)}' for name, value in (axes | words).items())})"

    @property
    def id(self) -> str:
        """Eight hexadecimal digits that depend on nothing but the content."""
        text = json.dumps(said(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @classmethod
    def from_json(cls, data: object, axes: type[A], path: str = "case") -> Case[A]:
        """Inverse of :func:`encode`; raises :class:`DecodeError` with the path of the offending field."""
        raw = decode(_RawCase, data, path)
        return cls(
            operator=raw.operator,
            axes=decode(axes, raw.axes, f"{path}.axes"),
            inputs=raw.inputs,
            seed=raw.seed,
            relation=raw.relation,
            guard=raw.guard,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _RawCase:
    operator: str
    axes: Any
    inputs: str
    seed: int
    relation: str = ""
    guard: Guard = Guard.NONE


def said(value: object) -> Any:
    """The JSON form without what holds its default: a field that comes later leaves the ids of older cases alone."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: said(held) for field, held in fields if held != field.default}
    if isinstance(value, (tuple, list)):
        return [said(item) for item in value]
    return encode(value)


def _compact(value: object) -> str:
    if isinstance(value, list):
        return "[" + ",".join(_compact(item) for item in value) + "]"
    if isinstance(value, dict):
        return "/".join(_compact(item) for item in value.values())
    return str(value)
