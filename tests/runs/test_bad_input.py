"""Broken suite files, kernels and fixtures: each is one failing item that says why, and nothing else suffers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from user_project import HUNT

if TYPE_CHECKING:
    from user_project import Project, Run

SUITE_FORM = "a Python file that imports without a GPU and binds kerneltest.model.Kernel objects to module-level names"
FIXTURE_FORM = (
    'a JSON object with "schema": "kerneltest.case/1", "suite", "kernel", "kind", "key", "culprit", "what" and "case"'
)
LAUNCHES = """
def raises(call):
    raise ValueError("page size 4 is too small\\nand more on the next line")


def shape(call):
    a.healthy(call)
    return {"out": call.outputs["out"], "lse": call.outputs["lse"].unsqueeze(0)}


def dtype(call):
    a.healthy(call)
    return {"out": call.outputs["out"].double(), "lse": call.outputs["lse"]}


def nothing(call):
    a.healthy(call)


def forgets(call):
    a.healthy(call)
    return {"out": call.outputs["out"]}


def refuses(case, device):
    return "seed 0 is refused" if case.seed == 0 else "no seed is accepted"


raising = kernel("bad.raises", raises)
shaped = kernel("bad.shape", shape)
typed = kernel("bad.dtype", dtype)
none = kernel("bad.none", nothing)
forgetful = kernel("bad.forgets", forgets)
refusing = kernel("bad.refuses", a.healthy, unsupported=refuses)
"""


@dataclass(frozen=True)
class Hunted:
    root: Path
    run: Run
    texts: dict[str, str]


@pytest.fixture(scope="module")
def hunted(new_project: Callable[[], Project]) -> Hunted:
    project = new_project()
    project.suite(
        "bad",
        absent="import a_module_that_is_not_there\n",
        syntax="def f(:\n",
        twins='one = kernel("bad.same", a.healthy)\ntwo = kernel("bad.same", a.healthy)',
        launches=LAUNCHES,
        zealous='healthy = kernel("bad.healthy", a.healthy)',
    )
    run = project.pytest(
        "--kernel-suite=bad", *HUNT, "--kernel-seed=1", "--junitxml=junit.xml", "-p", "no:cacheprovider"
    )
    assert (project.root / "junit.xml").is_file(), run.out + run.err
    texts = {f"{file.split('.')[2]}::{name}": text for file, name, text in project.junit("junit.xml")}
    return Hunted(project.root, run, texts)


def test_every_bad_input_is_one_failing_item(hunted: Hunted) -> None:
    assert sorted(hunted.texts) == [
        "absent::import",
        *(f"launches::bad.{name}" for name in ("dtype", "forgets", "none", "raises", "refuses", "shape")),
        "syntax::import",
        "twins::import",
        "zealous::bad.healthy",
    ]
    assert [name for name, text in hunted.texts.items() if not text] == ["zealous::bad.healthy"]
    assert hunted.run.totals == "9 failed, 1 passed"


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("absent", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("syntax", "SyntaxError: invalid syntax (syntax.py, line 3)"),
        ("twins", "ValueError: {path} defines two kernels named 'bad.same'"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(hunted: Hunted, file: str, reason: str) -> None:
    path = hunted.root / "suites" / "bad" / f"{file}.py"
    expected = f"{path}\n  {reason.format(path=path)}\n  expected: {SUITE_FORM}"
    assert hunted.texts[f"{file}::import"] == expected


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        ("bad.shape", "lse has shape (1, 2, 1); expected (2, 1)"),
        ("bad.dtype", "out has dtype float64; expected float32"),
        ("bad.none", "launch returned NoneType; expected a mapping of out, lse to tensors"),
        ("bad.forgets", "launch did not return 'lse'; it returned 'out'"),
    ],
)
def test_a_wrong_output_is_told_from_the_right_form(hunted: Hunted, kernel: str, what: str) -> None:
    lines = hunted.texts[f"launches::{kernel}"].splitlines()
    assert lines[:2] == [f"WrongOutput in {kernel}", f"  {what}"]


def test_an_exception_is_shown_with_the_line_that_raised_it(hunted: Hunted) -> None:
    text = hunted.texts["launches::bad.raises"]
    assert text.startswith("LaunchRaised in bad.raises\n  ValueError: page size 4 is too small\n")
    line = r'  at \S+/suites/bad/launches\.py:\d+ in raises: raise ValueError\("page size 4 is too small'
    assert re.search(line, text)


def test_a_kernel_that_supports_nothing_is_not_green(hunted: Hunted) -> None:
    text = hunted.texts["launches::bad.refuses"]
    expected = (
        r"NothingChecked in bad\.refuses\n  none of 9 drawn cases is supported:\n"
        r"  6 x no seed is accepted\n  3 x seed 0 is refused\n  on: \S.*"
    )
    assert re.fullmatch(expected, text)


def test_broken_files_are_in_the_list_of_what_was_not_checked(hunted: Hunted) -> None:
    for file in ("absent", "syntax", "twins"):
        path = hunted.root / "suites" / "bad" / f"{file}.py"
        assert f"unchecked suites/bad/{file}.py::import: {path}" in hunted.run.lines


def test_a_file_that_exits_when_imported_does_not_end_the_run(new_project: Callable[[], Project]) -> None:
    project = new_project()
    project.suite("bad", exits="raise SystemExit('not today')\n", zealous='healthy = kernel("bad.healthy", a.healthy)')
    run = project.pytest("--kernel-suite=bad", "--collect-only", "-q", "--kernel-sequences=0", "--kernel-misused=0")
    assert (run.code, run.node_ids) == (0, ["suites/bad/exits.py::import", "suites/bad/zealous.py::bad.healthy"])


GOOD: dict[str, Any] = {
    "schema": "kerneltest.case/1",
    "suite": "fine",
    "kernel": "fine.healthy",
    "kind": "Mismatch",
    "key": "lse",
    "culprit": None,
    "what": "lse: 1 of 2 elements (50 %) lie outside their error budget",
    "case": {
        "operator": "paged_prefill",
        "axes": {
            "requests": [{"qo_len": 2, "kv_len": 3}],
            "dtype": "float32",
            "head_dim": 64,
            "kv_heads": 1,
            "group": 1,
            "page_size": 4,
            "causal": True,
            "shuffled": False,
            "spare_pages": 0,
        },
        "inputs": "generic",
        "seed": 3,
    },
}


def changed(path: str, value: Any) -> str:
    """The good fixture as JSON with one field changed, or taken out if the value is ``...``."""
    data = json.loads(json.dumps(GOOD))
    *outer, last = path.split(".")
    inner = data
    for name in outer:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(data)


# name: (content, reason)
MALFORMED = {
    "no-json": ("{not JSON", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    "no-object": ("[1, 2]", "value: expected an object (Repro), got [1, 2]"),
    "unknown-kernel": (
        changed("kernel", "fine.healthie"),
        "suite 'fine' has no kernel 'fine.healthie'; valid: fine.healthy",
    ),
    "unknown-suite": (changed("suite", "fein"), "unknown suite 'fein'; valid: attention, fine, mixed"),
    "missing-field": (changed("kind", ...), "field 'kind' is missing"),
    "missing-axis": (changed("case.axes.causal", ...), "case.axes: field 'causal' is missing"),
    "unknown-field": (changed("sede", 1), "unknown field 'sede'"),
    "wrong-schema": (
        changed("schema", "kerneltest.case/2"),
        "schema 'kerneltest.case/2' is not known to this release, which reads 'kerneltest.case/1'",
    ),
    "axis-of-the-wrong-type": (
        changed("case.axes.head_dim", "64"),
        "case.axes.head_dim: expected int, got '64'",
    ),
    "axis-out-of-range": (changed("case.axes.page_size", 0), "case.axes: page_size must be at least 1, got 0"),
    "unknown-inputs": (
        changed("case.inputs", "nice"),
        "paged_prefill has no input strategy 'nice'; valid: generic",
    ),
}
REPLAY = "fixtures/{}/Mismatch-0123abcd/case.json"


@pytest.fixture(scope="module")
def project_with_fixtures(new_project: Callable[[], Project]) -> Project:
    project = new_project()
    project.suite("fine", fine='healthy = kernel("fine.healthy", a.healthy)')
    project.suite(
        "mixed", a_broken="import a_module_that_is_not_there\n", fine='k = kernel("mixed.healthy", a.healthy)'
    )
    project.write(REPLAY.format("good"), json.dumps(GOOD))
    for name, (content, _) in MALFORMED.items():
        project.write(REPLAY.format(name), content)
    return project


@pytest.fixture(scope="module")
def replayed(project_with_fixtures: Project) -> Hunted:
    project = project_with_fixtures
    run = project.pytest("fixtures", "--kernel-device=cpu", "--junitxml=junit.xml", "-p", "no:cacheprovider")
    # Every item is called read or replay: what tells them apart is the folder.
    texts = {file.split(".")[1]: text for file, _, text in project.junit("junit.xml")}
    return Hunted(project.root, run, texts)


def test_every_malformed_fixture_is_one_failing_item_and_the_good_one_runs(replayed: Hunted) -> None:
    assert replayed.run.totals == f"{len(MALFORMED)} failed, 1 passed"
    assert sorted(replayed.texts) == sorted([*MALFORMED, "good"])
    assert replayed.texts["good"] == ""


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_fixture_says_why(replayed: Hunted, name: str) -> None:
    path, reason = replayed.root / REPLAY.format(name), MALFORMED[name][1]
    lines = replayed.texts[name].splitlines()
    assert lines[0] == str(path)
    assert reason in lines[1]
    assert lines[-1] == f"  expected: {FIXTURE_FORM}"


def test_a_malformed_fixture_says_it_once(replayed: Hunted) -> None:
    forms = {name: replayed.texts[name].count("expected: a JSON object with") for name in MALFORMED}
    paths = {name: replayed.texts[name].count(str(replayed.root / REPLAY.format(name))) for name in MALFORMED}
    assert forms == paths == dict.fromkeys(MALFORMED, 1)


def test_a_broken_file_does_not_take_the_fixtures_of_its_suite_along(project_with_fixtures: Project) -> None:
    path = REPLAY.format("beside-a-broken-file")
    content = changed("suite", "mixed").replace("fine.healthy", "mixed.healthy")
    project_with_fixtures.write(path, content)
    run = project_with_fixtures.pytest(path, "--collect-only", "-q")
    assert (run.code, run.node_ids) == (0, [f"{path}::replay"])
