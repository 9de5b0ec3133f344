"""Frozen dataclasses to JSON and back, with an error that names the field that is wrong.

Everything that crosses the process boundary or lies on disk goes through here, so that a malformed file is refused
in one place and in one voice.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class DecodeError(ValueError):
    """The data does not have the expected form; the message starts with the path of the offending field."""


def encode(value: object) -> Any:
    """Turn dataclasses, enums, tuples and mappings into what :mod:`json` writes. Raises TypeError for others."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def decode(expected: type[T], data: object, path: str = "") -> T:
    """Build ``expected`` from decoded JSON; raises :class:`DecodeError` where the data does not fit."""
    return typing.cast("T", _decode(expected, data, path))


def _decode(expected: Any, data: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return data
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _decode(inner, data, path)
    if origin is Literal:
        if data not in arguments:
            raise _wrong(path, "one of " + ", ".join(map(repr, arguments)), data)
        return data
    if origin is tuple:
        if not isinstance(data, list):
            raise _wrong(path, "a list", data)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(data))
        if len(data) != len(arguments):
            raise _wrong(path, f"a list of {len(arguments)}", data)
        pairs = zip(arguments, data, strict=True)
        return tuple(_decode(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(pairs))
    if origin in (dict, Mapping):
        if not isinstance(data, dict):
            raise _wrong(path, "an object", data)
        return {key: _decode(arguments[1], item, f"{path}.{key}") for key, item in data.items()}
    if isinstance(expected, type) and issubclass(expected, Enum):
        try:
            return expected(data)
        except ValueError:
            raise _wrong(path, "one of " + ", ".join(repr(member.value) for member in expected), data) from None
    if dataclasses.is_dataclass(expected):
        return _decode_dataclass(expected, data, path)
    if expected is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, expected) or (isinstance(data, bool) and expected is not bool):
        raise _wrong(path, expected.__name__, data)
    return data


def _decode_dataclass(expected: Any, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise _wrong(path, f"an object ({expected.__name__})", data)
    fields = {field.name: field for field in dataclasses.fields(expected)}
    if unknown := sorted(set(data) - set(fields)):
        raise DecodeError(f"{path or expected.__name__}: unknown field {unknown[0]!r}; known: {', '.join(fields)}")
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in data]:
        raise DecodeError(f"{path or expected.__name__}: field {missing[0]!r} is missing")
    hints = typing.get_type_hints(expected)
    values = {name: _decode(hints[name], item, f"{path}.{name}" if path else name) for name, item in data.items()}
    try:
        return expected(**values)
    except ValueError as error:  # what the dataclass itself refuses, such as a page of no slots
        raise DecodeError(f"{path or expected.__name__}: {error}") from error


def _wrong(path: str, expected: str, data: object) -> DecodeError:
    return DecodeError(f"{path or 'value'}: expected {expected}, got {data!r}")
