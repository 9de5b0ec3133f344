"""What the options accept, refuse and select. Nothing is hunted here."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kerneltest
from kerneltest import discovery

if TYPE_CHECKING:
    from user_project import Project, Run

PREFILL = [
    "flashinfer.py::flashinfer.paged_prefill[fa2]",
    "flashinfer.py::flashinfer.paged_prefill[fa3]",
    "torch_eager.py::torch.paged_prefill[eager]",
    "torch_sdpa.py::torch.paged_prefill[sdpa]",
    "triton_paged.py::triton.paged_prefill[online]",
]
# A kernel of each of the plugin's own suites.
SUITES = [
    "torch_sdpa.py::torch.paged_prefill[sdpa]",
    "torch_gather.py::torch.mla_paged_attention[gather]",
    "torch_sort.py::torch.top_p_sampling[sort]",
]
OWN = [
    "suites/mine/mine.py::mine.first",
    "suites/mine/mine.py::mine.second[a]",
    "suites/other/other.py::other.third",
]


@pytest.fixture(scope="module")
def project(new_project: Callable[[], Project]) -> Project:
    project = new_project()
    project.suite("mine", mine='first = kernel("mine.first", a.healthy)\nsecond = kernel("mine.second[a]", a.healthy)')
    project.suite("other", other='third = kernel("other.third", a.healthy)')
    project.write("somewhere/unused.py", "")
    return project


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH whose kerneltest is laid out as in a wheel, its suites far from the project."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(Path(kerneltest.__file__).parent, site / "kerneltest")
    if not (site / "kerneltest" / "_suites").exists():
        shutil.copytree(discovery.builtin_root(), site / "kerneltest" / "_suites")
    return str(site)


def collect(project: Project, *commands: Sequence[str], **environment: str) -> list[list[str]]:
    """The node ids that each of the commands selects, without the hunts of launch sequences."""
    plain = ["--collect-only", "-q", "--kernel-sequences=0", "--kernel-misused=0"]
    runs = project.pytest_each(*([*plain, *command] for command in commands), **environment)
    for command, run in zip(commands, runs, strict=True):
        assert run.code == 0, (command, run.out + run.err)
    return [run.node_ids for run in runs]


def tails(ids: list[str]) -> list[str]:
    """Node ids without the folder, which for a suite outside of the project depends on where it is installed."""
    return [name.rpartition("/")[2] for name in ids]


REFUSED = {
    "unknown suite": (
        "--kernel-suite=mine,nope",
        "--kernel-suite: unknown value 'nope'; valid: all, attention, mine, mla, other, sampling",
    ),
    "unknown profile": (
        "--kernel-profile=slow",
        "--kernel-profile: unknown value 'slow'; valid: quick, default, nightly",
    ),
    "unknown device": (
        "--kernel-device=gpu",
        "--kernel-device: unknown device 'gpu'; valid: auto, cpu, cuda, cuda:N",
    ),
    "device without a number": (
        "--kernel-device=cuda:",
        "--kernel-device: unknown device 'cuda:'; valid: auto, cpu, cuda, cuda:N",
    ),
    "library without a folder": (
        "--kernel-library=flashinfer",
        "--kernel-library: expected NAME=FOLDER, got 'flashinfer'",
    ),
    "library without a name": (
        "--kernel-library==somewhere",
        "--kernel-library: expected NAME=FOLDER, got '=somewhere'",
    ),
    "axis without a value": (
        "--kernel-only=alibi",
        "--kernel-only: expected AXIS=VALUE or AXIS!=VALUE, got 'alibi'",
    ),
    "folder without the package": (
        "--kernel-library=flashinfer=somewhere",
        "--kernel-library: {root}/somewhere holds no package 'flashinfer'",
    ),
    "library that no kernel uses": (
        "--kernel-library=unused=somewhere",
        "--kernel-library: unknown value 'unused'; valid: flashinfer, triton",
    ),
}


@pytest.fixture(scope="module")
def refused(project: Project) -> dict[str, Run]:
    runs = project.pytest_each(*(["--kernel-suite=mine", option] for option, _ in REFUSED.values()))
    return dict(zip(REFUSED, runs, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_makes_no_sense_is_a_usage_error(project: Project, refused: dict[str, Run], name: str) -> None:
    run, message = refused[name], REFUSED[name][1].format(root=project.root)
    assert run.code == pytest.ExitCode.USAGE_ERROR
    assert run.err.strip() == f"ERROR: {message}"
    assert "test session starts" not in run.out


def test_isolation_lists_its_choices(project: Project) -> None:
    run = project.pytest("--kernel-suite=mine", "--kernel-isolation=thread")
    assert run.code == pytest.ExitCode.USAGE_ERROR
    assert re.search(
        r"argument --kernel-isolation: invalid choice: 'thread' \(choose from '?worker'?, '?inprocess'?\)", run.err
    )


def test_a_device_that_is_not_there_is_a_usage_error_and_nothing_runs(project: Project) -> None:
    run = project.pytest("--kernel-suite=mine", "--kernel-device=cuda", CUDA_VISIBLE_DEVICES="")
    assert run.code == pytest.ExitCode.USAGE_ERROR
    assert re.fullmatch(
        r"ERROR: --kernel-device: cuda was asked for, but this machine has no CUDA device that torch \S+ can use",
        run.err.strip(),
    )
    assert "test session starts" not in run.out


def test_a_bad_option_of_a_replay_is_said_in_words(project: Project) -> None:
    case = '{"schema": "kerneltest.case/1", "suite": "mine", "kernel": "mine.first", "kind": "Mismatch", "key": "lse", '
    case += '"culprit": null, "what": "", "case": {}}'
    path = project.write("fixtures/mine.first/Mismatch-0123abcd/case.json", case)
    run = project.pytest(str(path.relative_to(project.root)), "--kernel-device=gpu")
    said = run.out + run.err
    assert run.code not in (pytest.ExitCode.OK, pytest.ExitCode.INTERNAL_ERROR)
    assert "--kernel-device: unknown device 'gpu'; valid: auto, cpu, cuda, cuda:N" in said
    # A person's slip, not a mistake in the plugin: no line of its code belongs on the screen.
    assert "collection.py" not in said


def test_suites_are_chosen_by_name(project: Project) -> None:
    one, two = collect(project, ["--kernel-suite=mine"], ["--kernel-suite=other,mine"])
    assert one == OWN[:2]
    assert sorted(two) == OWN


def test_a_value_of_an_axis_selects_the_kernels_that_have_it(project: Project) -> None:
    everything, pages, none = project.pytest_each(
        *(
            ["--collect-only", "-q", "--kernel-suite=attention,sampling", "--kernel-sequences=0", *more]
            for more in ([], ["--kernel-only=page_size=16,dtype=bfloat16"], ["--kernel-only=nonsense=1"])
        )
    )
    assert any("page" not in name for name in everything.node_ids)
    assert 0 < len(pages.node_ids) < len(everything.node_ids)
    assert all("page" in name for name in pages.node_ids)
    assert (none.code, none.node_ids) == (pytest.ExitCode.NO_TESTS_COLLECTED, [])


def test_every_kernel_has_a_hunt_of_sequences_and_one_on_bad_input_too(project: Project) -> None:
    (ids,) = collect(project, ["--kernel-suite=mine", "--kernel-sequences=3", "--kernel-misused=1"])
    others = [f"{node_id}{end}" for node_id in OWN[:2] for end in ("", "-in-company")]
    assert ids == [*others, *(f"{node_id}-on-bad-input" for node_id in OWN[:2])]


def test_a_listed_node_id_selects_its_item_alone(project: Project) -> None:
    assert collect(project, *(["--kernel-suite=mine,other", node_id] for node_id in OWN)) == [[name] for name in OWN]


def test_all_takes_the_suites_of_the_project_and_those_of_the_plugin(project: Project, installed: str) -> None:
    everything, selected = collect(
        project,
        ["--kernel-suite=all"],
        ["--kernel-suite=all", "-k", "paged_prefill and sdpa"],
        PYTHONPATH=installed,
    )
    assert everything[:3] == OWN
    assert set(SUITES) < set(tails(everything[3:]))
    assert tails(selected) == ["torch_sdpa.py::torch.paged_prefill[sdpa]"]


def test_a_listed_node_id_of_an_installed_suite_selects_its_item_alone(project: Project, installed: str) -> None:
    (ids,) = collect(project, ["--kernel-suite=attention", "-k", "paged_prefill"], PYTHONPATH=installed)
    assert tails(ids) == PREFILL
    found = collect(project, *(["--kernel-suite=attention", node_id] for node_id in ids), PYTHONPATH=installed)
    assert [tails(one) for one in found] == [[name] for name in PREFILL]


def test_installed_suites_of_one_file_name_have_different_node_ids(project: Project, installed: str) -> None:
    """Or --lf and a report would take one kernel for the other."""
    for suite in ("one", "two"):
        folder = Path(installed, "kerneltest", "_suites", suite)
        folder.mkdir()
        for name in ("_attention", "_cheap"):
            shutil.copy(project.root / "suites" / "mine" / f"{name}.py", folder)
        text = "from . import _attention as a\nfrom ._cheap import kernel\nk = kernel('same', a.healthy)\n"
        (folder / "same.py").write_text(text)
    try:
        (ids,) = collect(project, ["--kernel-suite=one,two"], PYTHONPATH=installed)
    finally:
        for suite in ("one", "two"):
            shutil.rmtree(Path(installed, "kerneltest", "_suites", suite))
    assert len(ids) == 2
    assert len(set(ids)) == 2


def test_the_suites_of_this_installation_are_found_from_another_folder(project: Project) -> None:
    """As above, but with kerneltest as it lies here: in a checkout, unless the wheel is what is being tested."""
    (ids,) = collect(project, ["--kernel-suite=attention", "-k", "paged_prefill"])
    assert tails(ids) == PREFILL


def test_what_a_path_changes(project: Project) -> None:
    plain, suite, both = collect(project, [], ["--kernel-suite=other"], ["tests", "--kernel-suite=other"])
    assert plain == ["tests/test_plain.py::test_plain"]
    assert suite == OWN[2:]  # testpaths are the project's other tests
    assert both == [*plain, *suite]


def test_the_plugin_can_be_switched_off(project: Project) -> None:
    off, plain = project.pytest_each(["-p", "no:kerneltest", "--kernel-suite=all"], ["-p", "no:kerneltest", "-q"])
    assert off.code == pytest.ExitCode.USAGE_ERROR
    assert "unrecognized arguments: --kernel-suite=all" in off.err
    assert (plain.code, plain.totals) == (0, "1 passed")
