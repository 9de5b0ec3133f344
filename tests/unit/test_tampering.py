"""What can be wrong with a call: the catalogue of misuses, and the tensors that are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pick_kernel import CPU, CUDA, Axes, case, kernel, materialize, operator

from kerneltest.model import (
    Case,
    Guard,
    LaunchContract,
    Misuse,
    OutputSpec,
    Paging,
)
from kerneltest.worker.memory import Memory
from kerneltest.worker.poison import Pattern
from kerneltest.worker.tampering import Layout, Tampering, catalogue, placed


def said(found: dict[Any, Tampering], argument: str, kind: str) -> list[str]:
    return [str(one.misuse) for one in found.values() if (one.misuse.argument, one.misuse.kind) == (argument, kind)]


@pytest.fixture(scope="module")
def found() -> dict[Any, Tampering]:
    spec = {"out": OutputSpec(shape=(3, 4), dtype="float32")}
    return dict(catalogue(kernel(), case(), materialize(case()).inputs, CPU, outputs=spec, workspace=True))


def test_the_catalogue_of_a_tensor(found: dict[Any, Tampering]) -> None:
    assert said(found, "data", "dtype") == [
        "data is float16 instead of float32",
        "data is float64 instead of float32",
        "data is int32 instead of float32",
    ]
    assert said(found, "data", "device") == ["data lies on meta instead of cpu"]
    assert said(found, "data", "shape") == [
        f"data has shape {shape} instead of [3, 4]" for shape in ("[3, 3]", "[4, 4]", "[12]", "[1, 3, 4]")
    ]
    # There are indices to its rows.
    assert said(found, "data", "index out of range") == [
        f"data has shape {shape} instead of [3, 4]" for shape in ("[2, 4]", "[0, 4]")
    ]
    assert said(found, "weight", "shape")[0] == "weight has shape [2] instead of [3]"
    assert said(found, "data", "strides") == ["data has gaps between its elements", "data has gaps between its rows"]
    assert said(found, "data", "alignment") == ["data begins 4 bytes behind a multiple of 16"]
    assert said(found, "out", "shape")[0] == "out has shape [2, 4] instead of [3, 4]"
    assert not any(one.misuse.argument == "nothing" for one in found.values())


def test_fewer_rows_of_a_page_table_are_a_matter_of_its_offsets() -> None:
    paged = kernel(operator=operator(paging=Paging(pages=("data",), table="order")))
    found = dict(catalogue(paged, case(), materialize(case()).inputs, CPU, outputs={}, workspace=False))
    assert "order has shape [2] instead of [3]" in said(found, "order", "indptr")
    assert said(found, "order", "shape") == [f"order has shape {shape} instead of [3]" for shape in ("[4]", "[1, 3]")]


def test_rows_of_probabilities_without_a_token_are_a_matter_of_the_domain() -> None:
    sums = kernel(operator=operator(distributions=("data",), addresses={}))
    found = dict(catalogue(sums, case(), materialize(case()).inputs, CPU, outputs={}, workspace=False))
    assert said(found, "data", "domain") == ["data has shape [3, 3] instead of [3, 4]"]
    assert "data has shape [2, 4] instead of [3, 4]" in said(found, "data", "shape")


def test_integers_that_take_the_place_of_numbers_leave_the_call_an_answer() -> None:
    odds = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]])
    inputs = {"data": odds, "weight": torch.tensor([0.3, 1.5])}
    sums = kernel(operator=operator(distributions=("data",), addresses={}))
    found = dict(catalogue(sums, case(), inputs, CPU, outputs={}, workspace=False))
    values = {name: found["input", name, "dtype", "int32"].value for name in inputs}
    assert values["data"] is not None
    assert values["weight"] is not None
    # The most probable token alone, and never a parameter of 0, which would leave none.
    assert values["data"].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert values["weight"].tolist() == [1, 2]
    plain = dict(catalogue(kernel(), case(), {"data": odds}, CPU, outputs={}, workspace=False))
    assert plain["input", "data", "dtype", "int32"].value.tolist() == [[0, 1, 0], [0, 0, 0]]  # type: ignore[union-attr]


def test_indices_count_along_the_dimension_that_is_named() -> None:
    columns = kernel(operator=operator(addresses={"order": ("data", -1)}))
    found = dict(catalogue(columns, case(), materialize(case()).inputs, CPU, outputs={}, workspace=False))
    assert said(found, "order", "index out of range")[1] == "order begins with 4, of 4"
    assert not said(found, "data", "index out of range")  # nothing counts its rows


def test_what_a_launch_copies_into_its_outputs_says_nothing_of_the_kernel() -> None:
    copies = kernel(contract=LaunchContract(overwrites=("data",)))
    spec = {"out": OutputSpec(shape=(3, 4), dtype="float32")}
    found = dict(catalogue(copies, case(), materialize(case()).inputs, CPU, outputs=spec, workspace=True))
    assert not any(one.misuse.argument == "data" for one in found.values())
    assert said(found, "out", "alignment")


def test_the_catalogue_of_values(found: dict[Any, Tampering]) -> None:
    assert said(found, "order", "index out of range") == [
        "order begins with -1",
        "order begins with 3, of 3",
        "order begins with 1048579, of 3",
    ]
    assert said(found, "offsets", "indptr") == ["offsets falls", "offsets ends with 4, of 3"]
    assert said(found, "count", "value out of range") == ["count begins with -1", "count begins with 1048576"]
    assert said(found, "weight", "nan of a row") == ["weight begins with NaN"]
    assert not said(found, "data", "nan of a row")  # of data NaN has a meaning
    assert {one.misuse.kind for one in found.values() if one.misuse.argument == "mask"}.isdisjoint(
        {"indptr", "value out of range", "index out of range"}
    )
    falls = found["input", "offsets", "indptr", "falls"].value
    assert falls is not None
    assert falls.tolist() == [3, 1, 0]


def test_indices_of_what_no_input_has_are_no_offsets() -> None:
    # From 0 to the number of rows of another input, never falling: nothing but the operator tells them from offsets.
    counts = kernel(operator=operator(addresses={"offsets": lambda case: case.axes.rows + 4}))
    found = dict(catalogue(counts, case(), materialize(case()).inputs, CPU, outputs={}, workspace=False))
    assert not said(found, "offsets", "indptr")
    assert said(found, "offsets", "index out of range") == [
        "offsets begins with -1",
        "offsets begins with 7, of 7",
        "offsets begins with 1048583, of 7",
    ]


def test_the_catalogue_of_parameters(found: dict[Any, Tampering]) -> None:
    assert said(found, "scale", "nan") == ["scale is NaN"]
    assert said(found, "rows", "parameter") == ["rows is 4 where the tensors have 3"]
    # The axes themselves refuse it.
    assert not said(found, "rounds", "parameter")
    assert said(found, "workspace", "workspace") == [
        "workspace has half of the bytes that were asked for",
        "workspace begins 4 bytes behind an aligned address",
    ]


def test_a_parameter_that_no_tensor_contradicts_is_another_call_and_none_that_is_wrong() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class More(Axes):
        top: int = 5

    there = Case(operator="pick", axes=More(), inputs="integers", seed=0)
    inputs = materialize(there).inputs
    found = catalogue(kernel(), there, inputs, CPU, outputs={}, workspace=False)
    assert "top" not in {one.misuse.argument for one in found.values()}


def test_a_parameter_is_left_alone_where_it_would_have_to_be_compiled_for_or_is_not_supported() -> None:
    inputs = materialize(case()).inputs
    for more in (
        {"specialisation": lambda case: str(case.axes.rows)},
        {"unsupported": lambda case, device: "too many" if case.axes.rows == 4 else None},
    ):
        found = catalogue(kernel(**more), case(), inputs, CPU, outputs={}, workspace=False)
        arguments = [one.misuse.argument for one in found.values() if one.misuse.kind == "parameter"]
        assert arguments == ["width"]


def test_without_a_declaration_an_index_is_an_integer_like_others() -> None:
    found = catalogue(
        kernel(operator=operator(addresses={})),
        case(),
        materialize(case()).inputs,
        CPU,
        outputs={},
        workspace=False,
    )
    assert said(dict(found), "order", "value out of range") == ["order begins with -1", "order begins with 1048576"]


def test_only_what_keeps_its_meaning_is_benign(found: dict[Any, Tampering]) -> None:
    benign = {str(one.misuse) for one in found.values() if one.misuse.benign and one.misuse.argument == "weight"}
    assert benign == {
        "weight is float16 instead of float32",  # small integers
        "weight is float64 instead of float32",
        "weight has gaps between its elements",
        "weight begins 4 bytes behind a multiple of 16",
    }
    third = {"data": torch.full((2, 2), 1 / 3)}
    lossy = catalogue(kernel(), case(), third, CPU, outputs={}, workspace=False)
    assert not lossy["input", "data", "dtype", "float16"].misuse.benign
    assert lossy["input", "data", "dtype", "float64"].misuse.benign


def test_on_cuda_the_other_device_is_the_host() -> None:
    found = catalogue(kernel(), case(), materialize(case()).inputs, CUDA, outputs={}, workspace=False)
    assert said(dict(found), "data", "device") == ["data lies on cpu instead of cuda"]


@pytest.mark.parametrize("guard", [Guard.NONE, Guard.AFTER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", [Layout.STRIDED, Layout.GAPS, Layout.MISALIGNED, Layout.PLAIN])
def test_a_layout_changes_where_numbers_lie_and_not_which(guard: Guard, dtype: torch.dtype, layout: Layout) -> None:
    value = torch.arange(12).reshape(3, 4).to(dtype)
    misuse = Misuse(role="input", argument="x", kind="strides", change="", says="")
    with Memory(CPU).arena(guard) as arena:
        made = placed(arena, Tampering(misuse=misuse, value=value, layout=layout), CPU, Pattern.NAN)
        assert torch.equal(made.double(), value.double())
        assert made.is_contiguous() == (layout in (Layout.MISALIGNED, Layout.PLAIN))
        if layout is Layout.MISALIGNED:
            assert made.data_ptr() % 16 == dtype.itemsize
        assert arena.damage() == ()
