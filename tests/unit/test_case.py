"""A case as JSON, as an id and as a line of text."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from attention_cases import PagedPrefill, Request, case, draws, paged
from hypothesis import given

from kerneltest.model import Case, DecodeError, Size, encode

drawn = paged.cases(Size(batch=4, qo_len=300, kv_len=1100, heads=16))
plain = case((3, 5), (0, 7), page_size=16, causal=True, seed=7)


@draws(200)
@given(drawn)
def test_json_brings_back_the_same_case(case: Case[Any]) -> None:
    back = Case.from_json(json.loads(json.dumps(encode(case))), PagedPrefill)
    assert back == case
    assert hash(back) == hash(case)
    assert type(back.axes) is PagedPrefill
    assert all(type(request) is Request for request in back.axes.requests)
    assert (back.id, str(back)) == (case.id, str(case))


@draws(200)
@given(drawn)
def test_a_case_is_one_line(case: Case[Any]) -> None:
    assert str(case).splitlines() == [str(case)]
    shown = [f.name for f in dataclasses.fields(case.axes) if getattr(case.axes, f.name) != f.default]
    assert all(f"{name}=" in str(case) for name in shown)
    assert len(case.id) == 8
    assert set(case.id) <= set("0123456789abcdef")


def test_text_and_id_of_a_known_case() -> None:
    # The id names the files of bugs that were found: a release that changes it loses them.
    assert plain.id == "13656ae7"
    assert str(plain) == (
        "paged_prefill(requests=[3/5,0/7], dtype=bfloat16, head_dim=64, kv_heads=1, group=1, page_size=16, "
        "causal=True, shuffled=False, spare_pages=0, inputs=generic, seed=7)"
    )


def test_what_holds_its_default_changes_neither_text_nor_id() -> None:
    # Fields that came later have defaults: fixtures from before do not name them, and keep their ids.
    data = encode(plain)
    del data["relation"], data["axes"]["sm_scale"]
    old = Case.from_json(data, PagedPrefill)
    assert (old, old.id, str(old)) == (plain, plain.id, str(plain))


def test_a_relation_is_shown_and_survives() -> None:
    related = dataclasses.replace(plain, relation="split")
    assert str(related) == str(plain).removesuffix(")") + ", relation=split)"
    assert Case.from_json(encode(related), PagedPrefill) == related


def test_the_id_depends_on_every_field_and_on_nothing_else() -> None:
    again = case((3, 5), (0, 7), page_size=16, causal=True, seed=7)
    assert again is not plain
    assert again.id == plain.id
    axes = {
        "requests": (Request(qo_len=0, kv_len=7), Request(qo_len=3, kv_len=5)),
        "dtype": "float16",
        "head_dim": 65,
        "kv_heads": 2,
        "group": 2,
        "page_size": 17,
        "causal": False,
        "shuffled": True,
        "spare_pages": 1,
        "sm_scale": 0.5,
        "window_left": 3,
        "softcap": 30.0,
        "mask": "random",
        "packed_mask": True,
        "kv_dtype": "float8_e4m3fn",
        "k_scale": 0.5,
        "v_scale": 0.5,
        "layout": "HND",
        "strided_q": True,
        "head_dim_vo": 32,
        "fixed_split_size": 2,
        "disable_split_kv": True,
        "alibi": True,
        "return_lse": False,
    }
    assert set(axes) == {field.name for field in dataclasses.fields(PagedPrefill)}
    # What one without the other would make no case of.
    needed = {"mask": {"causal": False}, "packed_mask": {"causal": False, "mask": "tree"}}
    others = [
        dataclasses.replace(plain, axes=dataclasses.replace(plain.axes, **{k: v}, **needed.get(k, {})))
        for k, v in axes.items()
    ]
    others += [
        dataclasses.replace(plain, **{k: v})
        for k, v in {"operator": "x", "inputs": "count", "seed": 8, "relation": "split"}.items()
    ]
    ids = {other.id for other in others}
    assert len(ids) == len(others)
    assert plain.id not in ids


def test_the_order_of_json_fields_does_not_matter() -> None:
    data = encode(plain)
    turned = {name: data[name] for name in reversed(data)}
    turned["axes"] = {name: data["axes"][name] for name in reversed(data["axes"])}
    assert list(turned) != list(data)
    assert Case.from_json(turned, PagedPrefill).id == plain.id


def changed(where: tuple[Any, ...], value: object) -> Any:
    """The JSON of the plain case with one place set to ``value``, or removed where that is ``...``."""
    data = copy.deepcopy(encode(plain))
    *path, last = where
    inner = data
    for step in path:
        inner = inner[step]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return data


AXES = [("axes", f.name) for f in dataclasses.fields(PagedPrefill) if f.default is dataclasses.MISSING]
REQUEST = ("axes", "requests", 1)


@pytest.mark.parametrize(
    "where", [("operator",), ("axes",), ("inputs",), ("seed",), *AXES, (*REQUEST, "qo_len"), (*REQUEST, "kv_len")]
)
def test_a_missing_field_is_named(where: tuple[Any, ...]) -> None:
    with pytest.raises(DecodeError) as caught:
        Case.from_json(changed(where, ...), PagedPrefill)
    path = {1: "case", 2: "case.axes", 4: "case.axes.requests[1]"}[len(where)]
    assert str(caught.value) == f"{path}: field {where[-1]!r} is missing"


@pytest.mark.parametrize(
    ("where", "path"), [((), "case"), (("axes",), "case.axes"), (REQUEST, "case.axes.requests[1]")]
)
def test_an_unknown_field_is_named_with_the_known_ones(where: tuple[Any, ...], path: str) -> None:
    with pytest.raises(DecodeError) as caught:
        Case.from_json(changed((*where, "pagesize"), 4), PagedPrefill)
    message = str(caught.value)
    assert message.startswith(f"{path}: unknown field 'pagesize'; known: ")
    known = {(): "relation", ("axes",): "page_size", REQUEST: "kv_len"}[where]
    assert known in message.partition("known: ")[2].split(", ")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("operator",), 3, "case.operator: expected str, got 3"),
        (("inputs",), None, "case.inputs: expected str, got None"),
        (("seed",), "7", "case.seed: expected int, got '7'"),
        (("seed",), 7.0, "case.seed: expected int, got 7.0"),
        (("seed",), True, "case.seed: expected int, got True"),
        (("axes", "page_size"), True, "case.axes.page_size: expected int, got True"),
        (("axes", "page_size"), "16", "case.axes.page_size: expected int, got '16'"),
        (("axes", "spare_pages"), 1.5, "case.axes.spare_pages: expected int, got 1.5"),
        (("axes", "causal"), 1, "case.axes.causal: expected bool, got 1"),
        (("axes", "shuffled"), None, "case.axes.shuffled: expected bool, got None"),
        (("axes", "dtype"), 16, "case.axes.dtype: expected str, got 16"),
        (("axes", "requests"), {"0": {}}, "case.axes.requests: expected a list, got {'0': {}}"),
        (("axes", "requests"), "33", "case.axes.requests: expected a list, got '33'"),
        (REQUEST, [3, 5], "case.axes.requests[1]: expected an object (Request), got [3, 5]"),
        (REQUEST, None, "case.axes.requests[1]: expected an object (Request), got None"),
        ((*REQUEST, "qo_len"), False, "case.axes.requests[1].qo_len: expected int, got False"),
        ((*REQUEST, "kv_len"), [], "case.axes.requests[1].kv_len: expected int, got []"),
    ],
)
def test_a_wrong_type_is_named(where: tuple[Any, ...], value: object, message: str) -> None:
    with pytest.raises(DecodeError) as caught:
        Case.from_json(changed(where, value), PagedPrefill)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [[], "axes", 3, None])
def test_axes_that_are_no_object_are_named(value: object) -> None:
    with pytest.raises(DecodeError, match=r"^case\b.*\baxes: expected an object") as caught:
        Case.from_json(changed(("axes",), value), PagedPrefill)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [[], "text", 3, None, True])
def test_a_case_that_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(DecodeError, match=r"^fixture: expected an object"):
        Case.from_json(value, PagedPrefill, "fixture")


@pytest.mark.parametrize(
    ("where", "value", "path", "reason"),
    [
        (("axes", "page_size"), 0, "case.axes", "page_size must be at least 1, got 0"),
        (("axes", "head_dim"), 0, "case.axes", "head_dim must be at least 1, got 0"),
        (("axes", "kv_heads"), -1, "case.axes", "kv_heads must be at least 1, got -1"),
        (("axes", "group"), 0, "case.axes", "group must be at least 1, got 0"),
        (("axes", "spare_pages"), -1, "case.axes", "spare_pages must be at least 0, got -1"),
        (("axes", "requests"), [], "case.axes", "requests must not be empty"),
        (("axes", "dtype"), "float8", "case.axes", "dtype must be one of bfloat16, float16, float32, got 'float8'"),
        ((*REQUEST, "qo_len"), -1, "case.axes.requests[1]", "lengths must be at least 0, got -1 and 7"),
        ((*REQUEST, "kv_len"), -7, "case.axes.requests[1]", "lengths must be at least 0, got 0 and -7"),
    ],
)
def test_impossible_axes_are_refused_with_their_path(
    where: tuple[Any, ...], value: object, path: str, reason: str
) -> None:
    with pytest.raises(DecodeError) as caught:
        Case.from_json(changed(where, value), PagedPrefill)
    assert str(caught.value) == f"{path}: {reason}"
