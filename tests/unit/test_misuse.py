"""What a kernel makes of a misuse, as the worker judges it, and which errors help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pick_kernel import CPU, case, kernel, launch, materialize, operator, picked

from kerneltest.model import (
    Materials,
    Misuse,
    Outcome,
    Status,
)
from kerneltest.worker import acceptance
from kerneltest.worker.misuse import Bench, Misuser, unclear
from kerneltest.worker.rig import Rig


@pytest.mark.parametrize(
    "error",
    [
        ValueError(),
        AssertionError(""),
        RuntimeError("42"),
        KeyError("float64"),
        IndexError("list index out of range"),
        AttributeError("'NoneType' object has no attribute 'shape'"),
        RuntimeError("CUDA error: invalid argument"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
        ZeroDivisionError("division by zero"),
    ],
)
def test_an_error_that_names_nothing_is_unclear(error: Exception) -> None:
    assert unclear(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("q must have shape [3, 4], got [2, 4]"),
        TypeError("expected int32"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0"),
        AssertionError("indptr must start at 0"),
    ],
)
def test_an_error_that_names_something_is_clear(error: Exception) -> None:
    assert not unclear(error)


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(CPU)


def outcome(rig: Rig, launch: Callable[[Any], Any], *name: str, **more: Any) -> Outcome:
    """What a kernel makes of a misuse."""
    misuser, subject = Misuser(rig), kernel(launch, **more)
    misuses = {misuse.name: misuse for misuse in misuser.misuses(subject, case()).misuses}
    return misuser.run(subject, case(), misuses[name])  # type: ignore[index]


def test_garbage_is_accepted_bad_input(rig: Rig) -> None:
    def reinterprets(call: Any) -> Any:
        data = call.inputs["data"]
        return {"out": picked({**call.inputs, "data": data.view(torch.float32)}, call.case.axes.scale)}

    got = outcome(rig, reinterprets, "input", "data", "dtype", "int32")
    assert got.finding is not None
    assert (got.finding.kind, got.finding.key) == ("BadInputAccepted", "dtype of data")
    assert got.finding.culprit == "data is int32 instead of float32"
    assert "there was no error, but this: out: " in got.finding.what
    assert not got.fatal


@pytest.mark.parametrize(
    "name",
    [
        ("input", "data", "dtype", "float64"),
        ("input", "data", "dtype", "int32"),  # the same numbers
        ("input", "data", "strides", "strided"),
        ("input", "data", "strides", "gaps"),
        ("input", "data", "alignment", "late"),
        ("output", "out", "strides", "gaps"),
        ("output", "out", "dtype", "float64"),
        ("input", "order", "dtype", "int64"),
        ("input", "count", "value out of range", "begins with -1"),  # which it does not read
        ("input", "data", "shape", "one dimension more"),
    ],
)
def test_the_right_answer_is_one(rig: Rig, name: tuple[str, ...]) -> None:
    def tolerant(call: Any) -> Any:
        x = {key: value.to(torch.float32) if key == "data" else value for key, value in call.inputs.items()}
        x["data"] = x["data"].reshape(3, 4)
        call.outputs["out"].copy_(picked(x, call.case.axes.scale))
        return dict(call.outputs)

    got = outcome(rig, tolerant, *name)
    assert (got.status, got.reaction, got.finding) == (Status.PASSED, "right", None)


def test_nan_that_is_handed_on_is_right_and_nan_that_is_swallowed_is_not(rig: Rig) -> None:
    def swallows(call: Any) -> Any:
        return {"out": picked(call.inputs, call.case.axes.scale).nan_to_num(0.0)}

    for name in (("parameter", "scale", "nan", "nan"), ("input", "weight", "nan of a row", "begins with NaN")):
        assert outcome(rig, launch, *name).reaction == "right"
        assert (found := outcome(rig, swallows, *name).finding) is not None
        assert found.kind == "BadInputAccepted"


def test_a_negative_index_that_wraps_is_not_right(rig: Rig) -> None:
    # Of an order from the last row to the first, -1 is the last row as well.
    assert outcome(rig, launch, "input", "order", "index out of range", "begins with -1").reaction == "right"
    first = operator(materialize=lambda case: _ascending(materialize(case)))
    found = outcome(rig, launch, "input", "order", "index out of range", "begins with -1", operator=first).finding
    assert found is not None
    assert found.kind == "BadInputAccepted"


def _ascending(materials: Materials) -> Materials:
    return replace(materials, inputs={**materials.inputs, "order": materials.inputs["order"].sort().values})


def test_an_error_is_right_and_its_words_are_kept(rig: Rig) -> None:
    got = outcome(rig, launch, "input", "order", "index out of range", "begins with 3, of 3")
    assert (got.status, got.reaction) == (Status.PASSED, "raised")
    assert got.reason is not None
    assert got.reason.startswith("IndexError: index 3 is out of bounds for dimension 0 with size 3")


def test_an_error_without_words_is_kept_apart(rig: Rig) -> None:
    def asserts(call: Any) -> Any:
        if call.inputs["order"].dtype != torch.int32:
            raise AssertionError
        return launch(call)

    got = outcome(rig, asserts, "input", "order", "dtype", "float32")
    assert got.status is Status.PASSED
    assert (got.reaction, got.reason) == ("raised without a clear message", "AssertionError: no message")


def test_an_answer_that_lies_elsewhere_is_none(rig: Rig) -> None:
    got = outcome(rig, launch, "output", "out", "device", "meta")
    assert got.finding is not None
    assert got.finding.what == "there was no error, but this: out has device meta; expected cpu"


def test_fewer_rows_may_be_answered_by_fewer_rows_and_by_no_others(rig: Rig) -> None:
    def each_row(call: Any) -> Any:
        return {"out": call.inputs["data"] * call.case.axes.scale}

    def padded(call: Any) -> Any:
        return {"out": torch.cat([call.inputs["data"], torch.zeros(9, 4)])[:3]}

    rows = operator(reference=lambda case, inputs, device: inputs["data"].double(), addresses={})
    name = ("input", "data", "shape", "dimension 0 is one less")
    assert outcome(rig, each_row, *name, operator=rows).reaction == "right"
    found = outcome(rig, padded, *name, operator=rows).finding
    assert found is not None
    assert found.kind == "BadInputAccepted"


def test_an_answer_is_read_on_the_host_wherever_the_kernel_ran(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = replace(CPU, kind="cuda")
    monkeypatch.setattr(rig, "device", on_cuda)
    monkeypatch.setattr(acceptance, "_is_right", lambda *_: True)
    narrow = replace(case(), axes=replace(case().axes, width=3))
    materials = materialize(narrow)
    seen = {"out": torch.zeros(3, 3)}
    assert acceptance.right_for_what_it_is(kernel(), case(), rig, materials, {}, seen, {})
    assert not acceptance.right_for_what_it_is(kernel(), case(), rig, materials, {}, {"out": torch.zeros(3, 5)}, {})


def test_what_is_left_behind_is_found_and_ends_the_worker(rig: Rig) -> None:
    state = {"plus": 0.0}

    def remembers(call: Any) -> Any:
        if call.inputs["order"].dtype != torch.int32:
            state["plus"] = 1.0
            raise TypeError("order must be int32")
        return {"out": picked(call.inputs, call.case.axes.scale) + state["plus"]}

    got = outcome(rig, remembers, "input", "order", "dtype", "int64")
    assert got.finding is not None
    assert (got.finding.kind, got.finding.culprit) == (
        "StaleState",
        "after a call in which order is int64 instead of int32",
    )
    assert got.fatal


def test_an_input_that_is_changed_is_found_also_where_the_answer_is_right(rig: Rig) -> None:
    def scribbles(call: Any) -> Any:
        if call.inputs["data"].dtype == torch.float64:
            call.inputs["count"].zero_()
        return launch(call)

    found = outcome(rig, scribbles, "input", "data", "dtype", "float64").finding
    assert found is not None
    assert found.kind == "InputMutated"


def test_a_case_that_is_wrong_by_itself_has_no_catalogue(rig: Rig) -> None:
    got = Misuser(rig).misuses(kernel(lambda call: {"out": torch.zeros(3, 4)}), case())
    assert (got.status, got.misuses) == (Status.FAILED, ())


def test_a_kernel_that_allocates_its_outputs_is_given_no_wrong_ones(rig: Rig) -> None:
    bench = Bench(kernel(lambda call: {"out": picked(call.inputs, call.case.axes.scale)}), case(), rig)
    assert bench.right.lent == ()
    assert {one.misuse.role for one in bench.tamperings.values()} == {"input", "parameter"}


def test_a_misuse_that_a_case_does_not_have_is_unsupported(rig: Rig) -> None:
    absent = Misuse(role="input", argument="absent", kind="dtype", change="int64", says="is int64")
    got = Misuser(rig).run(kernel(), case(), absent)
    assert (got.status, got.reason) == (Status.UNSUPPORTED, "this call has no absent is int64")
