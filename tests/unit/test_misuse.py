"""What can be wrong with a call, which errors help, and a hunt on bad input against a runner that answers by rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kerneltest.engine.hunt import Target
from kerneltest.engine.job import Job
from kerneltest.engine.misuse import hunt_misuse, replay_misuse
from kerneltest.engine.profile import PROFILES
from kerneltest.engine.text import misuse_text
from kerneltest.model import (
    FP32,
    IEEE_FP32,
    Case,
    Conclusion,
    DecodeError,
    Device,
    ErrorBudget,
    Finding,
    Guard,
    InputStrategy,
    Kernel,
    KernelRecord,
    LaunchContract,
    Materials,
    Misuse,
    Misused,
    MisuseTally,
    Numerics,
    Operator,
    Outcome,
    OutputSpec,
    Paging,
    RunRecord,
    Started,
    Status,
    decode,
    encode,
)
from kerneltest.report.html import html
from kerneltest.report.listener import _lines as lines
from kerneltest.report.summary import as_dict
from kerneltest.worker import acceptance
from kerneltest.worker.memory import Memory
from kerneltest.worker.misuse import Bench, Misuser, unclear
from kerneltest.worker.poison import Pattern
from kerneltest.worker.rig import Rig
from kerneltest.worker.tampering import Layout, Tampering, catalogue, placed

CPU = Device(kind="cpu", ordinal=0, name="", sm=(0, 0), units=1)
CUDA = replace(CPU, kind="cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Rows of data, each multiplied by ``scale`` and by its own weight, and then picked in some order."""

    rows: int = 3
    width: int = 4
    scale: float = 1.0
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.rounds > 1:
            raise ValueError("no")


def materialize(case: Case[Axes]) -> Materials:
    axes = case.axes
    return Materials(
        inputs={
            "data": torch.arange(axes.rows * axes.width).reshape(axes.rows, axes.width).float(),
            "weight": torch.arange(1, axes.rows + 1).float(),
            "order": torch.arange(axes.rows).flip(0).int(),
            "offsets": torch.tensor([0, 1, axes.rows], dtype=torch.int32),
            "count": torch.tensor([7, 9], dtype=torch.int64),
            "mask": torch.ones(axes.rows, dtype=torch.bool),
            "nothing": torch.zeros(0, dtype=torch.int32),
        },
        dead=(),
        outputs={"out": OutputSpec(shape=(axes.rows, axes.width), dtype="float32")},
    )


def picked(x: Any, scale: float) -> torch.Tensor:
    return (x["data"] * x["weight"].unsqueeze(-1) * scale)[x["order"].long()]


def launch(call: Any) -> dict[str, torch.Tensor]:
    """Believes everything."""
    call.outputs["out"].copy_(picked(call.inputs, call.case.axes.scale))
    return dict(call.outputs)


def budget(case: Any, terms: torch.Tensor, numerics: Any, strategy: Any) -> dict[str, ErrorBudget]:
    return {"out": ErrorBudget(ref=terms, hard=torch.zeros_like(terms), out=FP32)}


def operator(**more: Any) -> Operator:
    from hypothesis import strategies as st

    settings: dict[str, Any] = {
        "name": "pick",
        "axes": Axes,
        "inputs": (InputStrategy(name="integers", tier="exact"),),
        "cases": lambda size: st.sampled_from((3, 4)).map(case),
        "materialize": materialize,
        "reference": lambda case, inputs, device: picked(
            {name: value.double() for name, value in inputs.items()}, case.axes.scale
        ),
        "budget": budget,
        "locate": lambda case, output, index: str(index),
        "addresses": {"order": "data"},
    }
    return Operator(**(settings | more))


def kernel(launch: Callable[[Any], Any] = launch, **more: Any) -> Kernel:
    numerics = Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=FP32, out=FP32)
    settings = {"numerics": lambda case, device: numerics, "operator": operator()}
    return Kernel(name="pick", launch=launch, **(settings | more))


def case(rows: int = 3) -> Case[Axes]:
    return Case(operator="pick", axes=Axes(rows=rows), inputs="integers", seed=0)


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


MISUSES = tuple(
    Misuse(role="input", argument=argument, kind=kind, change=change, says=f"is {change}")
    for argument in ("q", "k")
    for kind, change in (("dtype", "int64"), ("dtype", "float64"), ("indptr", "falling"))
)


class Rule:
    """Lists MISUSES for each case, and answers to each what ``rule`` says."""

    def __init__(self, rule: Callable[[Case[Any], Misuse], Outcome]) -> None:
        self.rule = rule
        self.started = Started(device=CPU, no_guards="none here")
        self.asked: list[Misuse] = []

    def run(self, job: Job, *, deadline: float, cold: float) -> Outcome:
        if job.misuse == "list":
            return Outcome(status=Status.PASSED, misuses=MISUSES)
        assert isinstance(job.misuse, Misuse)
        self.asked.append(job.misuse)
        return self.rule(job.case, job.misuse)

    def close(self) -> None: ...


RIGHT = Outcome(status=Status.PASSED, reaction="right")
RAISED = Outcome(status=Status.PASSED, reaction="raised", reason="ValueError: no")
MUMBLED = Outcome(status=Status.PASSED, reaction="raised without a clear message", reason="ValueError: no message")
PROFILE = replace(PROFILES["default"], misused=2)


def accepted(misuse: Misuse, kind: str = "BadInputAccepted", *, fatal: bool = False) -> Outcome:
    key = "signal SIGABRT" if kind == "Crashed" else misuse.key
    finding = Finding(kind=kind, kernel="pick", key=key, what=f"it was {misuse}", culprit=str(misuse))
    return Outcome(status=Status.FAILED, finding=finding, fatal=fatal)


def target(**contract: Any) -> Target:
    return Target(kernel=kernel(contract=LaunchContract(**contract)), source=Path("pick.py"))


def test_every_misuse_of_every_case_is_run_and_counted() -> None:
    runner = Rule(lambda case, misuse: {"int64": RIGHT, "float64": RAISED}.get(misuse.change, MUMBLED))
    trail = hunt_misuse(target(), runner, PROFILE, 1)
    assert len(runner.asked) == len(trail.cases) == 2 * len(MISUSES)
    unclear = ("q is falling: ValueError: no message", "k is falling: ValueError: no message")
    assert trail.tally == MisuseTally(raised=8, right=4, unclear=unclear)
    assert (trail.found, trail.caught, trail.unchecked) == ((), None, ())


def test_a_bug_is_found_once_for_each_kind_of_misuse_and_argument() -> None:
    runner = Rule(lambda case, misuse: accepted(misuse) if misuse.kind == "dtype" else RAISED)
    trail = hunt_misuse(target(), runner, PROFILE, 1)
    assert [(caught.finding.key, caught.reproduced, caught.confirmed_of) for caught in trail.found] == [
        ("dtype of q", 1, 1),
        ("dtype of k", 1, 1),
    ]
    # Each twice, and not in the other case, nor with another dtype.
    assert sum(misuse.kind == "dtype" for misuse in runner.asked) == 4
    assert (trail.tally.failed, trail.tally.raised) == (8, 4)
    assert trail.caught is trail.found[0]
    assert trail.caught.case == min((caught.case for caught in trail.found), key=str)


def test_a_death_is_about_the_misuse_and_is_not_asked_again() -> None:
    runner = Rule(lambda case, misuse: accepted(misuse, "Crashed", fatal=True) if misuse.argument == "k" else RIGHT)
    trail = hunt_misuse(target(), runner, replace(PROFILE, misused=1), 1)
    assert [caught.finding.key for caught in trail.found] == ["indptr of k", "dtype of k"]
    assert [caught.finding.culprit for caught in trail.found] == ["k is falling", "k is int64"]
    assert len(runner.asked) == 5  # float64 has the key of int64


def test_a_death_that_takes_a_guard_page_is_out_of_bounds() -> None:
    def rule(case: Case[Any], misuse: Misuse) -> Outcome:
        if case.guard is Guard.NONE or misuse.kind != "indptr":
            return RIGHT
        finding = Finding(kind="Crashed", kernel="pick", key="signal SIGSEGV", what="dead")
        return Outcome(status=Status.FAILED, finding=finding, fatal=True)

    runner = Rule(rule)
    runner.started = Started(device=CPU)
    trail = hunt_misuse(target(), runner, PROFILE, 1)
    assert {(caught.finding.kind, caught.finding.key) for caught in trail.found} == {
        ("OutOfBounds", "indptr of q"),
        ("OutOfBounds", "indptr of k"),
    }


def test_what_is_trusted_is_not_run_and_listed_with_its_reason() -> None:
    runner = Rule(lambda case, misuse: RAISED)
    trail = hunt_misuse(target(trusts={"indptr": "it lies on the device"}), runner, PROFILE, 1)
    assert {misuse.kind for misuse in runner.asked} == {"dtype"}
    assert (trail.tally.trusted, trail.tally.total) == (4, 12)
    (unchecked,) = trail.unchecked
    assert unchecked.what == "pick: bad input, indptr (4 calls)"
    assert unchecked.why == "left to the caller: it lies on the device"


def test_what_there_was_no_time_for_is_listed() -> None:
    trail = hunt_misuse(target(), Rule(lambda case, misuse: RAISED), replace(PROFILE, cpu_misuse_seconds=-1.0), 1)
    assert trail.cases == ()
    assert [unchecked.what for unchecked in trail.unchecked] == [
        "pick: bad input, 6 calls more",
        "pick: bad input in further cases (1)",
    ]


def test_a_case_that_fails_by_itself_is_not_held_against_the_misuse() -> None:
    def rule(case: Case[Any], misuse: Misuse) -> Outcome:
        finding = Finding(kind="Mismatch", kernel="pick", key="out", what="wrong anyway")
        return Outcome(status=Status.FAILED, finding=finding)

    trail = hunt_misuse(target(), Rule(rule), PROFILE, 1)
    assert (trail.found, trail.cases) == ((), ())
    assert trail.unsupported == {"the case failed without anything being wrong": 12}


def test_a_replay_asks_also_what_is_trusted() -> None:
    runner = Rule(lambda case, misuse: accepted(misuse))
    trail = replay_misuse(target(trusts={"indptr": "why"}), runner, PROFILE, Misused(case=case(), misuse=MISUSES[2]))
    assert trail.caught is not None
    assert len(runner.asked) == 1


def test_the_text_lists_every_finding_before_the_first_in_full() -> None:
    trail = hunt_misuse(target(), Rule(lambda case, misuse: accepted(misuse)), PROFILE, 1)
    lines = misuse_text(trail.found, trail.tally, "FULL TEXT").splitlines()
    assert lines[0] == "4 findings in pick on bad input, of 12 calls with something wrong"
    assert lines[1:5] == [
        "  BadInputAccepted: q is falling",
        "  BadInputAccepted: k is falling",
        "  BadInputAccepted: q is int64",
        "  BadInputAccepted: k is int64",
    ]
    assert lines[-1] == "FULL TEXT"
    assert misuse_text(trail.found[:1], trail.tally, "FULL TEXT") == "FULL TEXT"


def test_reports_say_what_became_of_each_call() -> None:
    tally = MisuseTally(raised=5, right=4, failed=3, trusted=2, unclear=("q is <int64>: KeyError: 1",))
    record = KernelRecord(
        name="pick", suite="mine", verdict=Conclusion.RED, seconds=1.0, hunt="misuse", misuses=tally, device=CPU
    )
    run = RunRecord(
        began="", seconds=1.0, command="", version="", profile="quick", seed=1, kernels=(record,), unchecked=()
    )
    page = html(run)
    assert '<a href="#misuse">Bad input</a>' in page
    assert "q is &lt;int64&gt;: KeyError: 1" in page
    assert "pick on bad input" in page
    (kernel,) = as_dict(run)["kernels"]
    assert kernel["misuses"] == encode(tally)
    assert lines(run)[0] == (
        "red       pick on bad input: 14 misuses: 5 raised, 4 answered rightly, 3 neither, 2 left to the caller, "
        "1 unclear errors, 1.0 s"
    )


def test_a_misuse_survives_json() -> None:
    for misuse in MISUSES:
        assert decode(Misuse, encode(misuse)) == misuse
    misused = Misused(case=case(), misuse=MISUSES[0])
    assert Misused.from_json(case(), misused.to_json()) == misused
    assert misused.id != replace(misused, misuse=MISUSES[1]).id
    with pytest.raises(DecodeError, match=r"misuse: 'colour' is no kind of misuse; valid: dtype, device"):
        Misused.from_json(case(), encode(MISUSES[0]) | {"kind": "colour"})


def test_a_contract_cannot_trust_in_what_is_no_kind_of_misuse() -> None:
    with pytest.raises(ValueError, match="'colour' is no kind of misuse; valid: dtype"):
        LaunchContract(trusts={"colour": "why"})
