"""A caught bug on disk: written, found again by its path, read back, and refused where it is malformed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from attention_cases import PagedPrefill, case

from kerneltest.engine import repro
from kerneltest.engine.hunt import Caught
from kerneltest.model import Case, DecodeError, Device, Finding, Started
from kerneltest.model.repro import SCHEMA, Repro
from kerneltest.plugin import is_repro

FINDING = Finding(
    kind="StaleState",
    kernel="lib.attend[fa2]",
    key="out",
    what="out depends on the workspace",
    details=("7 of 64 elements differ",),
    culprit="workspace",
)
CAUGHT = Caught(
    finding=FINDING,
    case=case((1, 1), (0, 5), page_size=16),
    seconds_to_find=1.0,
    seconds_to_shrink=2.0,
    reproduced=3,
    confirmed_of=3,
    others=(),
    complete=True,
)
STARTED = Started(
    device=Device(kind="cuda", ordinal=0, name="GPU 9000", sm=(9, 0), units=132), libraries={"torch": "2.9", "lib": "1"}
)


def test_a_bug_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = repro.write(tmp_path, "attention", CAUGHT, STARTED)
    assert is_repro(path)
    assert repro.read(path) == Repro(
        schema="kerneltest.case/1",
        suite="attention",
        kernel="lib.attend[fa2]",
        kind="StaleState",
        key="out",
        culprit="workspace",
        what="out depends on the workspace",
        case=json.loads(path.read_text())["case"],
        found_on={"device": "GPU 9000", "kind": "cuda", "torch": "2.9", "lib": "1"},
    )
    assert Case.from_json(repro.read(path).case, PagedPrefill) == CAUGHT.case


def test_where_a_bug_is_written(tmp_path: Path) -> None:
    path = repro.write(tmp_path / "new" / "fixtures", "attention", CAUGHT, STARTED)
    kernel, bug, name = path.relative_to(tmp_path / "new" / "fixtures").parts
    assert (kernel, name) == ("lib.attend-fa2", "case.json")
    kind, digest = bug.split("-")
    assert kind == "StaleState"
    assert len(digest) == 8
    assert int(digest, 16) >= 0
    assert path.read_text().endswith("}\n")


def test_a_bug_without_a_device_is_written_too(tmp_path: Path) -> None:
    path = repro.write(tmp_path, "attention", CAUGHT, Started(device=None))
    assert repro.read(path).found_on == {}


def test_the_same_bug_gets_the_same_name(tmp_path: Path) -> None:
    first = repro.write(tmp_path, "attention", CAUGHT, STARTED)
    reworded = dataclasses.replace(FINDING, what="worded differently", details=(), culprit=None)
    again = dataclasses.replace(CAUGHT, finding=reworded, seconds_to_find=9.0, complete=False)
    assert repro.write(tmp_path, "attention", again, Started(device=None)) == first
    assert repro.read(first).what == "worded differently"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [first]


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(CAUGHT, finding=dataclasses.replace(FINDING, kind="Mismatch")),
        dataclasses.replace(CAUGHT, finding=dataclasses.replace(FINDING, key="lse")),
        dataclasses.replace(CAUGHT, finding=dataclasses.replace(FINDING, kernel="lib.attend-fa2")),
        dataclasses.replace(CAUGHT, case=dataclasses.replace(CAUGHT.case, seed=1)),
    ],
)
def test_another_bug_gets_another_name(tmp_path: Path, other: Caught) -> None:
    # Even where two kernels share a folder because their names differ in brackets only.
    paths = {repro.write(tmp_path, "attention", caught, STARTED) for caught in (CAUGHT, other)}
    assert len(paths) == 2


@pytest.mark.parametrize(
    ("kernel", "folder"),
    [
        ("triton.paged_prefill[online]", "triton.paged_prefill-online"),
        ("plain", "plain"),
        ("a[b][c]", "a-b-c"),
        ("group/kernel", "group-kernel"),
    ],
)
def test_slug(kernel: str, folder: str) -> None:
    assert repro.slug(kernel) == folder
    assert Path(folder).parts == (folder,)


@pytest.mark.parametrize(
    ("path", "accepted"),
    [
        ("fixtures/k/StaleState-1a2b3c4d/case.json", True),
        ("/abs/k/Mismatch-00000000/case.json", True),
        ("StaleState-1a2b3c4d/case.json", True),
        ("fixtures/k/StaleState-1a2b3c4d/other.json", False),
        ("fixtures/k/StaleState-1a2b3c4d/case.json.bak", False),
        ("fixtures/k/StaleState-1a2b3c4d", False),
        ("fixtures/k/StaleState-1a2b3c4/case.json", False),
        ("fixtures/k/StaleState-1a2b3c4d5/case.json", False),
        ("fixtures/k/StaleState1a2b3c4d/case.json", False),
        ("fixtures/k/staleState-1a2b3c4d/case.json", False),
        ("fixtures/k/-1a2b3c4d/case.json", False),
        ("fixtures/k/Release-unstable/case.json", False),
        ("fixtures/k/StaleState-/case.json", False),
        ("case.json", False),
    ],
)
def test_which_paths_are_bugs(path: str, accepted: bool) -> None:
    assert is_repro(Path(path)) is accepted


def written(tmp_path: Path, change: dict[str, Any]) -> Path:
    """A file of a bug with some fields set, or removed where they are ``...``."""
    path = repro.write(tmp_path, "attention", CAUGHT, STARTED)
    data = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))
    return path


def refused(path: Path) -> str:
    with pytest.raises(DecodeError) as caught:
        repro.read(path)
    return str(caught.value)


def test_the_expected_form_names_every_field() -> None:
    assert SCHEMA in repro.EXPECTED_FORM
    for field in ("suite", "kernel", "kind", "key", "culprit", "what", "case"):
        assert f'"{field}"' in repro.EXPECTED_FORM


@pytest.mark.parametrize("text", ["", "{", "not JSON", '{"schema": }', "\ufeff{}"])
def test_what_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "case.json"
    path.write_text(text, encoding="utf-8")
    assert "line 1 column" in refused(path)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert "decode" in refused(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "case.json")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"case"'])
def test_json_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "case.json"
    path.write_text(text)
    assert "expected an object (Repro)" in refused(path)


@pytest.mark.parametrize("field", ["schema", "suite", "kernel", "kind", "key", "culprit", "what", "case"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    assert refused(written(tmp_path, {field: ...})) == f"Repro: field {field!r} is missing"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"comment": "mine"}, "Repro: unknown field 'comment'; known: schema, suite, kernel"),
        ({"kernel": 3}, "kernel: expected str, got 3"),
        ({"culprit": False}, "culprit: expected str, got False"),
        ({"found_on": []}, "found_on: expected an object, got []"),
        ({"found_on": {"torch": 2.9}}, "found_on.torch: expected str, got 2.9"),
        ({"schema": "kerneltest.case/2"}, "schema 'kerneltest.case/2' is not known to this release"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    assert reason in refused(written(tmp_path, change))


def test_only_where_it_was_found_may_be_left_out(tmp_path: Path) -> None:
    assert repro.read(written(tmp_path, {"found_on": ...})).found_on == {}
    assert repro.read(written(tmp_path, {"culprit": None})).culprit is None
