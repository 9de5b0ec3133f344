"""Dataclasses to JSON and back: every kind of field, and the refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest

from kerneltest.model import (
    Coverage,
    DecodeError,
    Device,
    Finding,
    Outcome,
    Place,
    Started,
    Status,
    decode,
    encode,
)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 0


@dataclass(frozen=True)
class Everything:
    whole: int
    real: float
    text: str
    flag: bool
    colour: Colour
    point: Point
    many: tuple[Point, ...]
    pair: tuple[int, str]
    maybe: float | None
    maybe_point: Point | None
    shares: Mapping[str, float]
    by_name: dict[str, tuple[Colour, ...]]
    anything: Any
    tags: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


FULL = Everything(
    whole=1,
    real=0.5,
    text="a",
    flag=True,
    colour=Colour.BLUE,
    point=Point(1, 2),
    many=(Point(3), Point(4, 5)),
    pair=(6, "b"),
    maybe=None,
    maybe_point=Point(7),
    shares={"out": 0.25},
    by_name={"c": (Colour.RED,)},
    anything=[1, {"d": None}],
    tags=("e",),
    counts={"f": 8},
)
JSON = {
    "whole": 1,
    "real": 0.5,
    "text": "a",
    "flag": True,
    "colour": "blue",
    "point": {"x": 1, "y": 2},
    "many": [{"x": 3, "y": 0}, {"x": 4, "y": 5}],
    "pair": [6, "b"],
    "maybe": None,
    "maybe_point": {"x": 7, "y": 0},
    "shares": {"out": 0.25},
    "by_name": {"c": ["red"]},
    "anything": [1, {"d": None}],
    "tags": ["e"],
    "counts": {"f": 8},
}


def test_every_kind_of_field_goes_to_json_and_back() -> None:
    assert encode(FULL) == JSON
    assert decode(Everything, json.loads(json.dumps(JSON))) == FULL


def test_fields_with_a_default_may_be_left_out() -> None:
    few = {name: value for name, value in JSON.items() if name not in ("tags", "counts")}
    back = decode(Everything, {**few, "point": {"x": 1}})
    assert (back.tags, back.counts, back.point) == ((), {}, Point(1, 0))


def test_a_whole_number_is_a_float_where_one_is_expected() -> None:
    back = decode(Everything, {**JSON, "real": 2, "maybe": 3, "shares": {"out": 1}})
    values = (back.real, back.maybe, back.shares["out"])
    assert values == (2.0, 3.0, 1.0)
    assert [type(value) for value in values] == [float] * 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("whole", True, "whole: expected int, got True"),
        ("whole", 1.0, "whole: expected int, got 1.0"),
        ("whole", None, "whole: expected int, got None"),
        ("real", False, "real: expected float, got False"),
        ("real", "0.5", "real: expected float, got '0.5'"),
        ("text", 1, "text: expected str, got 1"),
        ("flag", 0, "flag: expected bool, got 0"),
        ("colour", "green", "colour: expected one of 'red', 'blue', got 'green'"),
        ("colour", "RED", "colour: expected one of 'red', 'blue', got 'RED'"),
        ("colour", ["red"], "colour: expected one of 'red', 'blue', got ['red']"),
        ("point", [1, 2], "point: expected an object (Point), got [1, 2]"),
        ("point", {"x": "1"}, "point.x: expected int, got '1'"),
        ("point", {"y": 1}, "point: field 'x' is missing"),
        ("point", {"x": 1, "z": 2}, "point: unknown field 'z'; known: x, y"),
        ("many", {"x": 1}, "many: expected a list, got {'x': 1}"),
        ("many", [{"x": 1}, {"x": 2, "y": None}], "many[1].y: expected int, got None"),
        ("pair", [6], "pair: expected a list of 2, got [6]"),
        ("pair", [6, "b", 7], "pair: expected a list of 2, got [6, 'b', 7]"),
        ("pair", [6, 7], "pair[1]: expected str, got 7"),
        ("maybe", "x", "maybe: expected float, got 'x'"),
        ("maybe_point", {}, "maybe_point: field 'x' is missing"),
        ("shares", [], "shares: expected an object, got []"),
        ("shares", {"out": "much"}, "shares.out: expected float, got 'much'"),
        ("by_name", {"c": ["red", "green"]}, "by_name.c[1]: expected one of 'red', 'blue', got 'green'"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(name: str, value: object, message: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(Everything, {**JSON, name: value})
    assert str(caught.value) == message
    with pytest.raises(DecodeError) as caught:
        decode(Everything, {**JSON, name: value}, "top")
    assert str(caught.value) == f"top.{message}"


def test_without_a_path_the_class_is_named() -> None:
    with pytest.raises(DecodeError, match=r"^Point: field 'x' is missing$"):
        decode(Point, {})
    with pytest.raises(DecodeError, match=r"^value: expected an object \(Point\), got 3$"):
        decode(Point, 3)


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), Point, 1j])
def test_what_has_no_json_form_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=f"{type(value).__name__} has no JSON form"):
        encode({"deep": [value]})


@pytest.mark.parametrize(
    "message",
    [
        Started(
            device=Device(kind="cuda", ordinal=1, name="GPU", sm=(9, 0), units=132),
            libraries={"torch": "2.9"},
            missing={"flashinfer": "No module named 'flashinfer'"},
            coverage=(
                Coverage(place=Place.SHARED_MEMORY, share=0.995),
                Coverage(place=Place.REGISTERS, share=None, note="no CUDA"),
            ),
        ),
        Started(device=None, error="no device"),
        Outcome(
            status=Status.FAILED,
            seconds=1.5,
            launches=4,
            finding=Finding(kind="Mismatch", kernel="k", key="out", what="w", details=("a", "b"), culprit="c"),
            used={"out": 1.25},
            unjudged=("lse",),
            fatal=True,
        ),
        Outcome(status=Status.UNSUPPORTED, reason="too wide"),
    ],
)
def test_messages_between_processes_survive(message: Started | Outcome) -> None:
    assert decode(type(message), json.loads(json.dumps(encode(message)))) == message
