"""The reports: what a reader finds in them, and that the HTML can be neither broken into nor misread."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from kerneltest.model import (
    CaseRecord,
    Conclusion,
    Coverage,
    Device,
    FailureRecord,
    KernelRecord,
    Place,
    RunRecord,
    Status,
    StepRecord,
    Unchecked,
    encode,
)
from kerneltest.report.html import html
from kerneltest.report.listener import ReportListener, _lines
from kerneltest.report.summary import summary

FIXTURE = "fixtures/lib.attend-fa2/StaleState-1a2b3c4d/case.json"
CASE = "attend(dtype=bf16, requests=[1/1], inputs=normal, seed=0)"
SECTIONS = ["failures", "kernels", "coverage", "unchecked", "environment", "cases"]
VOID = {"meta", "col", "input", "br", "hr", "link", "img"}
BLOCKS = {"b", "dd", "div", "dt", "label", "li", "p", "pre", "strong", "summary", "td", "th", "title"}


class Reader(HTMLParser):
    """Text per section and all tags; fails on tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {"head": ""}
        self._open: list[str] = []
        self.rows: dict[str, list[list[str]]] = {"head": []}
        self._section = "head"
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"]
            self.text[self._section] = ""
            self.rows[self._section] = []
        if tag == "tr":
            self.rows[self._section].append([])
        if tag in ("td", "th"):
            self.rows[self._section][-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag in BLOCKS:
            self.text[self._section] += " "

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.text[self._section] += data
            if {"td", "th"} & set(self._open):
                self.rows[self._section][-1][-1] += data

    def section(self, name: str) -> str:
        return " ".join(self.text[name].split())


def case(number: int = 0, **changes) -> CaseRecord:
    fields = {"id": f"{number:08x}", "text": f"attend(seed={number})", "status": Status.PASSED, "seconds": 0.25}
    return CaseRecord(**{"inputs": "generic", **fields, "used": {"out": 0.31}, **changes})


def failure(**changes) -> FailureRecord:
    fields = {
        "kernel": "lib.attend[fa2]",
        "kind": "StaleState",
        "culprit": "bytes in unused slots",
        "what": "out: 3 of 64 elements changed with the hidden bytes",
        "text": "StaleState in lib.attend[fa2]\n  first at out[0, 17]",
        "case": {"seed": 0},
        "case_text": CASE,
        "fixture": FIXTURE,
        "seconds_to_find": 3.25,
        "seconds_to_shrink": 11.5,
        "replay": f"pytest {FIXTURE} --kernel-device=cuda:1",
    }
    return FailureRecord(**{**fields, **changes})


def kernel(name: str = "lib.attend[fa2]", verdict: Conclusion = Conclusion.GREEN, **changes) -> KernelRecord:
    fields = {"name": name, "suite": "attention", "verdict": verdict, "seconds": 12.5}
    if verdict is not Conclusion.UNCHECKED:
        fields |= {"cases": (case(),), "launches": 7}
    return KernelRecord(**{**fields, **changes})


def company(name: str = "lib.attend[fa2]", **changes) -> KernelRecord:
    fields = {
        "verdict": Conclusion.GREEN,
        "hunt": "sequences",
        "cases": (case(1, text="torch.softmax; attend(seed=1)"), case(2, text="attend(seed=2)")),
        "before": {"torch.softmax": 3, "lib.rope": 1},
        "kinds": {"begin > poison": 1, "poison > launch": 2, "begin > launch": 1200},
    }
    return kernel(name, **{**fields, **changes})


def run(*kernels: KernelRecord, **changes) -> RunRecord:
    fields = {"began": "2026-01-02T15:14:15+02:00", "seconds": 64.25, "command": "pytest --kernel-suite=attention"}
    fields |= {"version": "1.2.3", "profile": "thorough", "seed": 4711, "unchecked": ()}
    return RunRecord(**{**fields, "kernels": kernels, **changes})


def read(*kernels: KernelRecord, **changes) -> Reader:
    return Reader(html(run(*kernels, **changes)))


FAILED = case(status=Status.FAILED, used={}, note="StaleState")
RED = kernel(verdict=Conclusion.RED, failures=(failure(),), cases=(FAILED,))
ABSENT = kernel("lib.hopper", Conclusion.UNCHECKED, unchecked=(Unchecked(what="lib.hopper", why="needs sm 9.0"),))


def test_single_file_without_references_to_the_outside():
    page = html(run(kernel(), RED, ABSENT))
    assert not re.search(r"https?://|\bsrc\s*=|@import|url\(|<link|<iframe|<object", page)
    reader = Reader(page)
    targets = [attrs["href"] for _, attrs in reader.tags if "href" in attrs]
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert targets
    assert all(target.startswith("#") and target[1:] in ids for target in targets)
    assert len(ids) == len(set(ids))


def test_sections_come_in_order():
    assert list(read(kernel(), RED).text) == ["head", *SECTIONS]


def test_everything_from_outside_is_escaped():
    name, text = "<script>alert(1)</script>", 'a "quoted" <b>&'
    hostile = kernel(
        name,
        Conclusion.RED,
        suite=text,
        failures=(failure(kernel=name, kind=text, culprit=text, what=text, text=text, case_text=text, fixture=text),),
        cases=(case(id=text, text=text, note=text, used={text: 0.5}),),
        unsupported={text: 1},
        unchecked=(Unchecked(what=text, why=f"{text}\n{text}"),),
        libraries={text: text},
        coverage=(Coverage(place=Place.REGISTERS, share=None, note=text),),
        device=Device(kind=text, ordinal=0, name=text, sm=(9, 0), units=1),
    )
    step = StepRecord(kind=f"{text}1", text=f"{text}2", without=f"{text}3")
    sequences = company(
        name,
        verdict=Conclusion.RED,
        failures=(failure(steps=(step,)),),
        before={text: 1, name: 2},
        kinds={f"{text} > {name}": 1, name: 1},
        repeated=(1, 1),
    )
    page = html(run(hostile, sequences, command=text, profile=text, version=text, began=text))
    assert name not in page
    assert "<b>&" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;&amp;" in page
    reader = Reader(page)
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert text in reader.section("failures")
    assert f"{text}2 ({text}1) without it: {text}3" in reader.section("failures")
    assert name in reader.section("kernels")
    assert [row[0] for row in reader.rows["pairs"]] == ["Just before", name, text]
    assert name in reader.section("steps")
    assert name in reader.section("cases")


def test_header():
    head = read(
        kernel(cases=(case(1), case(2)), unsupported={"x": 1500}),
        kernel(cases=(case(2), case(3))),
        RED,
        ABSENT,
    ).section("head")
    assert "RED 1 of 3 kernels that ran failed; 1 kernel was not checked." in head
    for fact in ("2 kernels green", "1 kernels red", "1 kernels unchecked", "1,500 cases unsupported", "21 launches"):
        assert fact in head
    assert "4 distinct cases" in head  # seeds 1 to 3 and the failing one: the same case of two items counts once
    for fact in ("2026-01-02 13:14:15 UTC", "pytest --kernel-suite=attention", "thorough", "4711", "1.2.3", "64.2"):
        assert fact in head


def test_all_green():
    head = read(kernel(), kernel("lib.other"), ABSENT).section("head")
    assert "GREEN All 2 kernels that ran are green; 1 kernel was not checked." in head
    assert "RED " not in head
    assert "No kernel failed" in read(kernel()).section("failures")


def test_one_red_is_red():
    page = html(run(kernel(), RED))
    assert "RED" in Reader(page).section("head")
    assert "GREEN" not in page


def test_a_broken_item_is_red_though_every_kernel_is_green():
    why = "def fixture():\n>   import nowhere\nE   ImportError: nowhere\nconftest.py:3: ImportError"
    reader = read(kernel(), unchecked=(Unchecked(what="suite.py::lib.broken", why=why),))
    assert "RED 1 item broke before a verdict." in reader.section("head")
    assert "1 item broke before a verdict" in reader.section("failures")
    assert "✗ broke suite.py::lib.broken ImportError: nowhere def fixture()" in reader.section("unchecked")


@pytest.mark.parametrize("kernels", [(), (ABSENT,)], ids=["no kernel", "only unchecked"])
def test_nothing_run_is_not_green(kernels):
    page = html(run(*kernels))
    assert "GREEN" not in page
    assert "NOTHING CHECKED" in Reader(page).section("head")


def test_empty_run():
    empty = RunRecord(began="", seconds=0, command="", version="", profile="", seed=None, kernels=(), unchecked=())
    reader = Reader(html(empty))
    assert "Seed none" in reader.section("head")
    said = {
        "failures": "No kernel failed",
        "kernels": "No kernel was collected",
        "coverage": "No worker reported any",
        "unchecked": "Nothing was left out",
        "environment": "No worker reported a device",
        "cases": "No case ran",
    }
    for name in SECTIONS:
        assert said[name] in reader.section(name)


def test_a_hunt_with_many_failures_shows_the_first_and_folds_the_others():
    found = [failure(culprit=f"argument {number}", replay=f"pytest {number}") for number in range(3)]
    red = kernel(verdict=Conclusion.RED, failures=tuple(found), cases=(FAILED,))
    section = read(red).section("failures")
    assert html(run(red)).count("<article") == 1
    assert "Found in the same hunt: 2 failures more." in section
    for one in found[1:]:
        assert f"{one.kind}: {one.culprit}" in re.sub(r"\s+:", ":", section)
    assert all(one.replay in section for one in found)


def test_failure():
    found = failure()
    reader = read(RED)
    section = reader.section("failures")
    facts = [found.kind, found.kernel, found.what, found.culprit, CASE, FIXTURE, found.replay, "3.25 s to find"]
    for fact in [*facts, "11.5 s to shrink", "first at out[0, 17]"]:
        assert fact in section
    assert f"<pre>{found.text}</pre>" in unescape(html(run(RED)))
    assert f"<pre>{found.replay}</pre>" in unescape(html(run(RED)))


def test_failure_without_a_case():
    nothing = failure(kind="NothingChecked", culprit=None, case=None, case_text="", fixture=None, replay="")
    section = read(kernel(verdict=Conclusion.RED, failures=(nothing,), cases=())).section("failures")
    assert "Culprit none named" in section
    assert "no single case shows it" in section
    assert "no fixture to replay" in section
    assert "to shrink" not in section


def test_kernels():
    refusing = kernel(
        cases=(case(1, used={"out": 0.31, "lse": 0.004}), case(2, used={"out": 0.2})),
        unsupported={"head_dim 256 in fp32": 12, "page_size 1": 3},
        launches=1450,
    )
    section = read(refusing, RED, ABSENT).section("kernels")
    assert "lib.attend[fa2] attention ✓ green 2" in section
    assert "15 for 2 reasons 12 × head_dim 256 in fp32 3 × page_size 1" in section
    assert "1,450" in section
    assert "✗ red" in section
    assert "○ unchecked why" in section
    assert "out 0.31 lse 0.004" in section
    assert "vacuous" in section


@pytest.mark.parametrize(
    ("share", "shown", "width", "over"),
    [
        (0.0, "0", "0.0", False),
        (0.00004, "4.0e-05", "0.0", False),
        (0.0123, "0.012", "1.2", False),
        (0.374, "0.37", "37.4", False),
        (1.0, "1.00", "100.0", False),
        (1.0001, ">1.00", "100", True),
        (1.3, "1.30", "100", True),
        (12345.0, "1.2e+04", "100", True),
        (float("inf"), "inf", "100", True),
        (float("nan"), "nan", "100", True),
    ],
)
def test_budget_share(share, shown, width, over):
    reader = read(kernel(cases=(case(used={"out": share}),)))
    assert f"out {shown} " in reader.section("kernels")
    assert ("✗ over" in reader.section("kernels")) is over
    bars = [attrs["style"] for tag, attrs in reader.tags if tag == "i"]
    assert bars == [f"width:{width}%"]


def test_coverage():
    places = (
        Coverage(place=Place.ALLOCATOR_POOL, share=1.0, note="blocks of a fresh torch.empty"),
        Coverage(place=Place.SHARED_MEMORY, share=0.99999, note="on 132 SMs"),
        Coverage(place=Place.REGISTERS, share=None, note="no compiler"),
    )
    reader = read(kernel(coverage=places), kernel("lib.other", coverage=places))
    section = reader.section("coverage")
    assert "allocator pool 100 % blocks of a fresh torch.empty" in section
    assert "shared memory ○ partly 99.99 % on 132 SMs" in section
    assert "registers ○ not here no compiler" in section
    assert section.count("registers") == 1
    assert "poison in registers no compiler" in reader.section("unchecked")


def test_unchecked():
    section = read(kernel(), ABSENT).section("unchecked")
    assert "lib.hopper needs sm 9.0" in section
    assert "broke" not in section


def test_environment():
    gpu = Device(kind="cuda", ordinal=1, name="NVIDIA H200", sm=(9, 0), units=132)
    cpu = Device(kind="cpu", ordinal=0, name="Some CPU", sm=(0, 0), units=16)
    section = read(
        kernel(device=gpu, libraries={"torch": "2.9.1", "lib": "1.0"}),
        kernel(device=gpu, libraries={"torch": "2.10.0"}),
    ).section("environment")
    assert "NVIDIA H200 (cuda:1) Compute capability 9.0 SMs 132" in section
    assert section.count("H200") == 1
    assert "lib 1.0 torch 2.9.1, 2.10.0" in section
    section = read(kernel(device=cpu)).section("environment")
    assert "Some CPU (cpu) Threads 16" in section
    assert "SMs" not in section


def test_cases():
    ran = (
        case(1, used={"out": 0.31, "lse": 0.001}),
        case(2, status=Status.FAILED, used={}, note="StaleState"),
    )
    section = read(kernel(), RED, kernel("lib.third", Conclusion.RED, cases=ran)).section("cases")
    assert "lib.third 2 cases, 1 failed" in section
    assert "Id Case Status Seconds out lse Note" in section
    assert "00000001 attend(seed=1) ✓ passed 0.250 0.31 <0.01" in section
    assert "00000002 attend(seed=2) ✗ failed 0.250 – – StaleState" in section


def test_kernels_that_are_alike_have_cases_of_their_own():
    ids = [attrs["id"] for tag, attrs in read(kernel(), ABSENT, kernel()).tags if tag == "details" and "id" in attrs]
    assert ids == ["cases-1", "cases-3"]


def test_ten_thousand_cases_stay_plain_rows():
    reader = read(kernel(cases=tuple(case(number) for number in range(10_000))))
    rows = [attrs for tag, attrs in reader.tags if tag == "tr"]
    assert len(rows) > 10_000
    assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
    assert "10,000 cases" in reader.section("cases")


def test_slack_is_shown_beside_the_share_that_it_makes_smaller() -> None:
    assert "slack × 1.5" in read(kernel(slack=1.5)).section("kernels")
    assert "slack ×" not in read(kernel()).section("kernels")


def test_energy_has_a_row_for_each_output_and_a_column_for_each_strategy() -> None:
    cases = (
        case(1, energy={"out": 0.5}),
        case(2, energy={"out": 0.7}),
        case(3, inputs="scaled", energy={"out": 0.25}),
        case(4, inputs="count"),
    )
    section = read(kernel(cases=cases), kernel("lib.second", cases=(case(5, energy={"out": 0.9}),))).section("kernels")
    assert "Kernel Output generic scaled" in section
    assert "lib.attend[fa2] out 0.60 0.25" in section
    assert "lib.second out 0.90 none" in section
    assert "Energy" not in read(kernel()).section("kernels")


STEPS = (
    StepRecord(kind="neighbour", text="lib.rope: rope(seed=3)", without="correct"),
    StepRecord(kind="stream", text="on another stream", without="Mismatch: out: 1 of 64 elements"),
)


def test_the_two_hunts_of_a_kernel_are_told_apart():
    reader = read(kernel(), company(verdict=Conclusion.RED, failures=(failure(steps=STEPS),)))
    assert [row[0] for row in reader.rows["kernels"]] == ["Kernel", "lib.attend[fa2]", "lib.attend[fa2] in company"]
    assert [row[3] for row in reader.rows["kernels"]] == ["Cases", "1", "2 sequences"]
    assert "StaleState in lib.attend[fa2] in company" in reader.section("failures")
    cases = reader.section("cases")
    assert "lib.attend[fa2] 1 case " in cases
    assert "lib.attend[fa2] in company 2 sequences" in cases
    assert "Id Sequence Status" in cases


def test_the_header_counts_cases_sequences_and_hunts_for_themselves():
    head = read(kernel(cases=(case(1), case(2), case(3))), company()).section("head")
    assert "3 distinct cases 2 distinct sequences 14 launches" in head
    assert "All 2 hunts that ran are green." in head
    assert "2 hunts green" in head
    assert "0 cases or sequences unsupported" in head
    assert "kernels green" not in head
    alone = read(kernel()).section("head")
    assert "sequences" not in alone
    assert "hunt" not in alone


def test_sequences_alone_are_not_an_empty_run():
    reader = read(company())
    assert "0 distinct cases 2 distinct sequences" in reader.section("head")
    assert "No case ran" not in reader.section("cases")


def test_failure_lists_its_steps_and_what_comes_without_each():
    found = failure(steps=STEPS)
    section = read(company(verdict=Conclusion.RED, failures=(found,))).section("failures")
    assert (
        "Steps it takes lib.rope: rope(seed=3) (neighbour) without it: correct "
        "on another stream (stream) without it: Mismatch: out: 1 of 64 elements Minimal case"
    ) in section
    assert "culprit after 14.8 s: 3.25 s to find, 11.5 s to reduce" in section


def test_steps_are_an_ordered_list_and_say_nothing_where_nothing_was_asked():
    unasked = StepRecord(kind="stream", text="on another stream", without="")
    reader = read(company(verdict=Conclusion.RED, failures=(failure(steps=(unasked,)),)))
    assert [tag for tag, _ in reader.tags].count("ol") == 1
    assert "without it" not in reader.section("failures")
    alone = read(RED)
    assert "ol" not in [tag for tag, _ in alone.tags]
    assert "culprit after" not in alone.section("failures")


def test_pairs_of_launches():
    reader = read(
        kernel("lib.alone"),
        company("lib.b", before={"torch.softmax": 1500, "lib.a": 2}),
        company("lib.a", before={"lib.b": 4}),
        company("lib.a", before={"lib.b": 3, "torch.softmax": 0}),
        kernel("lib.absent", Conclusion.UNCHECKED, hunt="sequences"),
    )
    assert list(reader.text) == ["head", "failures", "kernels", "pairs", "steps", *SECTIONS[2:]]
    assert reader.rows["pairs"] == [
        ["Just before", "lib.a", "lib.b"],
        ["lib.a", "·", "2"],
        ["lib.b", "7", "·"],
        ["torch.softmax", "·", "1,500"],
    ]
    assert "3 of 6 ordered pairs tried" in reader.section("pairs")


def test_a_pair_that_was_not_tried_is_marked_and_named():
    cells = [attrs for tag, attrs in read(company("lib.a"), company("lib.b", before={})).tags if tag == "td"]
    untried = [attrs for attrs in cells if attrs.get("title") == "not tried" and attrs["data-label"].startswith("lib.")]
    assert [(attrs["data-label"], attrs["class"]) for attrs in untried] == [("lib.b", "number untried")] * 2
    tried = [attrs for attrs in cells if attrs.get("data-label") == "lib.a"]
    assert [attrs.get("title") for attrs in tried] == [None, None]


def test_pairs_of_steps_are_summed_over_the_kernels():
    reader = read(company(), company("lib.b", kinds={"poison > launch": 5, "stream > poison": 1}))
    assert reader.rows["steps"] == [
        ["First", "poison", "stream", "launch"],
        ["begin", "1", "·", "1,200"],
        ["poison", "·", "·", "7"],
        ["stream", "1", "·", "·"],
    ]
    assert "4 of 9 ordered pairs of step kinds tried" in reader.section("steps")


def test_without_company_there_are_no_pairs():
    reader = read(kernel(), RED)
    assert list(reader.text) == ["head", *SECTIONS]
    assert "Pairs" not in reader.section("head")
    assert "ordered pairs" not in html(run(kernel(), RED))
    kept = list(read(company(before={})).text)
    assert "pairs" not in kept
    assert "steps" in kept


def test_repeated_launches():
    section = read(kernel(), company(repeated=(1200, 3)), company("lib.b", repeated=(4, 0))).section("kernels")
    assert "lib.attend[fa2] in company: 3 of 1,200 repeated launches differ in some bit" in section
    assert "lib.b in company: 0 of 4 repeated launches differ in some bit" in section
    assert "repeated launches" not in read(kernel(), company()).section("kernels")


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            kernel(slack=2.0),
            "lib.attend[fa2]: 1 cases, 0 unsupported, budget used out 0.31 of a budget widened by slack 2",
        ),
        (
            company(unsupported={"x": 3}),
            "lib.attend[fa2] in company: 2 sequences, 3 unsupported, after 2 different launches",
        ),
        (
            company(before={}, repeated=(12, 1)),
            "lib.attend[fa2] in company: 2 sequences, 0 unsupported, after 0 different launches, "
            "12 repeated launches, 1 differ",
        ),
    ],
    ids=["cases", "sequences", "repeats"],
)
def test_terminal_line(record, line):
    assert _lines(run(record)) == [f"green     {line}, 12.5 s"]


def test_summary_of_sequences():
    found = json.loads(summary(run(kernel(), company(failures=(failure(steps=STEPS),), repeated=(12, 1)), RED)))
    assert (found["schema"], found["cases"], found["sequences"]) == ("kerneltest.summary/1", 2, 2)
    alone, sequences, _ = found["kernels"]
    assert [alone[key] for key in ("hunt", "before", "kinds", "repeated")] == ["cases", {}, {}, [0, 0]]
    assert (sequences["name"], sequences["hunt"], sequences["cases"]) == ("lib.attend[fa2]", "sequences", 2)
    assert sequences["before"] == {"torch.softmax": 3, "lib.rope": 1}
    assert sequences["kinds"] == {"begin > poison": 1, "poison > launch": 2, "begin > launch": 1200}
    assert sequences["repeated"] == [12, 1]
    assert [failure["steps"] for failure in found["failures"]] == [
        [
            {"kind": "neighbour", "text": "lib.rope: rope(seed=3)", "without": "correct"},
            {"kind": "stream", "text": "on another stream", "without": "Mismatch: out: 1 of 64 elements"},
        ],
        [],
    ]


def test_a_summary_is_there_after_each_kernel_for_a_run_that_is_cut_off(tmp_path: Path) -> None:
    option = SimpleNamespace(kernel_json=str(tmp_path / "s.json"), kernel_profile="quick", kernel_seed=1)
    config = SimpleNamespace(option=option, invocation_params=SimpleNamespace(args=("-q",)))
    listener = ReportListener(config)  # type: ignore[arg-type]
    for count, name in enumerate(("one", "two"), 1):
        record = KernelRecord(name=name, suite="mine", verdict=Conclusion.GREEN, seconds=1.0)
        listener.pytest_runtest_logreport(SimpleNamespace(kerneltest=encode(record), failed=False))  # type: ignore[arg-type]
        kernels = json.loads((tmp_path / "s.json").read_text())["kernels"]
        assert len(kernels) == count
        assert kernels[-1]["name"] == name
