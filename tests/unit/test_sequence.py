"""A launch sequence as JSON, as an id and in words."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import pytest
from attention_cases import PagedPrefill, case

from kerneltest.model import (
    Again,
    Beside,
    Case,
    Data,
    DecodeError,
    EmptyCache,
    FarPages,
    FewSMs,
    Graph,
    Keeps,
    LateInputs,
    LaunchSequence,
    Load,
    Neighbour,
    OtherStream,
    PageTable,
    Pattern,
    Place,
    Poison,
    Repeat,
    Reuse,
    Step,
    TorchOp,
)
from kerneltest.model.sequence import SCHEMA, STEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The axes of another operator."""

    rows: int


CASE, OTHER = case((3, 5), seed=7), case((1, 2))
ROWS = Case(operator="norm", axes=Rows(rows=4), inputs="generic", seed=1)
# Every kind once, with no field at its default.
EACH: tuple[Step, ...] = (
    Poison(place=Place.WORKSPACE, pattern=Pattern.RANDOM),
    Neighbour(kernel="norm", case=ROWS, data=Data.NAN),
    TorchOp(op="sort", elements=1024, data=Data.INF),
    Again(case=OTHER, keeps=Keeps.RESIZED),
    Reuse(buffers="moved"),
    PageTable(),
    EmptyCache(),
    Graph(captured=OTHER, replays=3),
    OtherStream(),
    Beside(case=OTHER),
    Load(what="bandwidth"),
    FewSMs(sms=8),
    LateInputs(),
    FarPages(),
    Repeat(times=10),
)
# As EACH, with what differs in one field only.
VARIANTS: tuple[Step, ...] = (
    Poison(place=Place.OUTPUTS, pattern=Pattern.RANDOM),
    Poison(place=Place.WORKSPACE, pattern=Pattern.NAN),
    Neighbour(kernel="norm2", case=ROWS, data=Data.NAN),
    Neighbour(kernel="norm", case=dataclasses.replace(ROWS, seed=2), data=Data.NAN),
    Neighbour(kernel="norm", case=ROWS),
    TorchOp(op="cos", elements=1024, data=Data.INF),
    TorchOp(op="sort", elements=2048, data=Data.INF),
    TorchOp(op="sort", elements=1024, data=Data.NAN),
    *(Again(case=OTHER, keeps=keeps) for keeps in Keeps if keeps is not Keeps.RESIZED),
    Again(case=CASE, keeps=Keeps.RESIZED),
    Reuse(),
    Graph(captured=OTHER),
    Graph(captured=CASE, replays=3),
    Beside(case=CASE),
    Load(),
    FewSMs(sms=16),
    Repeat(times=2),
)


def axes_of(kernel: str) -> type[Any]:
    known = {"norm": Rows, "norm2": Rows, "prefill": PagedPrefill}
    if kernel not in known:
        raise ValueError(f"unknown kernel {kernel!r}; valid: {', '.join(known)}")
    return known[kernel]


def sequence(*steps: Step, plan_first: bool = True) -> LaunchSequence:
    return LaunchSequence(case=CASE, steps=steps, plan_first=plan_first)


def read(data: Any) -> LaunchSequence:
    return LaunchSequence.from_json(CASE, json.loads(json.dumps(data)), axes_of)


def refused(data: Any) -> str:
    with pytest.raises(DecodeError) as error:
        read(data)
    return str(error.value)


def written(*steps: Any) -> dict[str, Any]:
    """A file's part, with the empty cache as step 0."""
    return {"schema": SCHEMA, "plan_first": True, "steps": [{"step": "empty_cache"}, *steps]}


def test_every_kind_of_step_is_tested_here() -> None:
    assert [step.kind for step in EACH] == list(STEPS)


@pytest.mark.parametrize("step", [*EACH, *VARIANTS], ids=lambda step: type(step).__name__)
def test_json_brings_back_the_same_step(step: Step) -> None:
    back = read(sequence(step).to_json())
    assert back == sequence(step)
    assert [type(one) for one in back.steps] == [type(step)]
    assert (back.id, str(back), hash(back)) == (sequence(step).id, str(sequence(step)), hash(sequence(step)))


def test_json_brings_back_all_of_them_in_their_order() -> None:
    for plan_first in (True, False):
        whole = sequence(*EACH, plan_first=plan_first)
        assert read(whole.to_json()) == whole


def test_a_neighbours_case_has_the_axes_of_its_own_operator() -> None:
    steps = (Neighbour(kernel="norm", case=ROWS), Neighbour(kernel="prefill", case=OTHER))
    back = read(sequence(*steps).to_json())
    assert [type(step.case.axes) for step in back.neighbours] == [Rows, PagedPrefill]


def test_what_has_a_default_may_be_left_out() -> None:
    data = {
        "schema": SCHEMA,
        "steps": [{"step": "reuse"}, {"step": "load"}, {"step": "torch", "op": "cos", "elements": 1}],
    }
    assert read(data) == sequence(Reuse(), Load(), TorchOp(op="cos", elements=1))


def test_an_unknown_step_is_named_with_its_place_and_what_is_known() -> None:
    message = refused(written({"step": "reboot"}))
    assert message == f"sequence.steps[1]: unknown step 'reboot'; this release knows {', '.join(STEPS)}"
    for strange in ({"kind": "poison"}, "poison", None, 3, []):
        assert refused(written(strange)).startswith("sequence.steps[1]: unknown step")


def test_an_unknown_field_is_named_with_its_step_and_what_is_known() -> None:
    assert refused(written({"step": "repeat", "times": 2, "pause": 1})) == (
        "sequence.steps[1]: step 'repeat' has no field 'pause'; known: times"
    )
    assert refused(written({"step": "stream", "priority": 1})) == (
        "sequence.steps[1]: step 'stream' has no field 'priority'; known: none"
    )


@pytest.mark.parametrize(
    ("step", "field"),
    [
        ({"step": "poison", "pattern": "nan"}, "place"),
        ({"step": "neighbour", "case": {}}, "kernel"),
        ({"step": "neighbour", "kernel": "norm"}, "case"),
        ({"step": "torch", "op": "cos"}, "elements"),
        ({"step": "again"}, "case"),
        ({"step": "graph", "replays": 2}, "captured"),
        ({"step": "repeat"}, "times"),
    ],
)
def test_a_missing_field_is_named_with_its_step(step: dict[str, Any], field: str) -> None:
    assert refused(written(step)) == f"sequence.steps[1]: step {step['step']!r} lacks its field {field!r}"


@pytest.mark.parametrize(
    ("step", "path"),
    [
        ({"step": "poison", "place": "attic", "pattern": "nan"}, "place"),
        ({"step": "poison", "place": "workspace", "pattern": "green"}, "pattern"),
        ({"step": "torch", "op": "cos", "elements": "many"}, "elements"),
        ({"step": "reuse", "buffers": "none"}, "buffers"),
        ({"step": "again", "case": 3}, "case"),
    ],
)
def test_a_wrong_value_is_named_with_its_step_and_field(step: dict[str, Any], path: str) -> None:
    assert refused(written(step)).startswith(f"sequence.steps[1].{path}: ")


def test_an_unknown_kernel_of_a_neighbour_is_named_with_those_that_are_known() -> None:
    data = sequence(EmptyCache(), Neighbour(kernel="norm", case=ROWS)).to_json()
    data["steps"][1]["kernel"] = "gone"
    assert refused(data) == "sequence.steps[1]: unknown kernel 'gone'; valid: norm, norm2, prefill"


def test_a_neighbours_case_of_another_operator_is_refused_by_its_field() -> None:
    data = sequence(EmptyCache(), Neighbour(kernel="prefill", case=OTHER)).to_json()
    data["steps"][1]["kernel"] = "norm"
    assert refused(data).startswith("sequence.steps[1].case.axes")


def test_a_schema_of_another_release_says_which_steps_are_strange() -> None:
    data = written({"step": "repeat", "times": 2}, {"step": "reboot"}, {"step": "unplug"}) | {
        "schema": "kerneltest.sequence/2"
    }
    message = refused(data)
    assert message.startswith(
        f"sequence: schema 'kerneltest.sequence/2' is of another release, this one reads {SCHEMA!r}; "
    )
    assert "of its steps [2] 'reboot', [3] 'unplug' are unknown" in message
    assert message.endswith(f"known: {', '.join(STEPS)}")
    data["steps"] = data["steps"][:3]
    assert "of its steps [2] 'reboot' is unknown" in refused(data)
    data["steps"] = data["steps"][:2]
    assert "all of its steps are known by name" in refused(data)


@pytest.mark.parametrize("data", [None, [], {"steps": []}, {"schema": SCHEMA}, {"schema": SCHEMA, "steps": {}}, 7])
def test_what_is_no_sequence_at_all_is_refused(data: Any) -> None:
    assert refused(data).startswith("sequence")


def test_ids_and_texts_are_stable_and_tell_steps_apart() -> None:
    every = [sequence(), *map(sequence, (*EACH, *VARIANTS))]
    assert len({one.id for one in every}) == len(every)
    assert len({str(one) for one in every}) == len(every)
    again = [LaunchSequence(case=case((3, 5), seed=7), steps=one.steps) for one in every]
    assert [one.id for one in again] == [one.id for one in every]
    assert all(set(one.id) <= set("0123456789abcdef") and len(one.id) == 8 for one in every)


def test_the_id_depends_on_case_and_order_and_on_when_it_plans() -> None:
    one, other = EmptyCache(), PageTable()
    both = sequence(one, other)
    different = [
        sequence(other, one),
        sequence(one, other, other),
        sequence(one, other, plan_first=False),
        dataclasses.replace(both, case=OTHER),
    ]
    assert len({both.id, *(sequence.id for sequence in different)}) == 5


def test_ids_of_known_sequences() -> None:
    # The id names the files of bugs that were found: a release that changes it loses them.
    assert (sequence().id, sequence(*EACH).id) == ("c8857c58", "d52d188c")


def test_a_sequence_is_one_line_that_begins_with_its_case() -> None:
    text = str(sequence(*EACH))
    assert text.splitlines() == [text]
    assert text.split("; ") == [str(CASE), *map(str, EACH)]


def test_without_leaves_out_one_step() -> None:
    steps = (EmptyCache(), Reuse(), EmptyCache())
    whole = sequence(*steps, plan_first=False)
    assert [whole.without(number).steps for number in range(3)] == [
        (Reuse(), EmptyCache()),
        (EmptyCache(), EmptyCache()),
        (EmptyCache(), Reuse()),
    ]
    assert whole.without(1) == sequence(EmptyCache(), EmptyCache(), plan_first=False)
    assert whole.steps == steps


def test_cases_are_those_that_the_kernel_itself_is_given() -> None:
    assert sequence(*EACH).cases == (CASE, OTHER, OTHER, OTHER)
    assert sequence(Neighbour(kernel="norm", case=ROWS)).cases == (CASE,)
    assert [step.kernel for step in sequence(*EACH).neighbours] == ["norm"]


@pytest.mark.parametrize("step", [*EACH, *VARIANTS], ids=lambda step: type(step).__name__)
def test_words_read_behind_the_name_of_a_kernel(step: Step) -> None:
    # "StaleState in KERNEL after torch.sort: shared memory"
    first = step.short.split()[0]
    assert first in {"after", "on", "in", "beside", "with", "replayed", "launched", "planned"}
    assert not step.short.endswith((".", ":", " "))
    assert str(step).startswith(step.short)
    assert step.details in str(step)


def test_words_name_what_differs() -> None:
    words = {type(step): str(step) for step in EACH}
    assert words[Neighbour] == f"after norm with NaN among its inputs: {ROWS}"
    assert words[TorchOp] == "after torch.sort with Inf among its inputs: 1024 elements"
    assert words[Graph] == f"replayed 3 times from a CUDA graph of another case: {OTHER}"
    assert words[FewSMs] == "in a green context of 8 SMs"
    assert words[Repeat] == "launched 10 times more"
