"""The command ``kerneltest``, from its arguments to its exit status, its table and its files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kerneltest
from kerneltest import cli
from kerneltest.model import Case
from kerneltest.power import command
from kerneltest.power.corpus import SIZES, Size, Unit
from kerneltest.power.summary import Limits
from kerneltest.power.zoo import DETECTORS, USUAL, ZOO, Zoo

TINY = Size(
    name="default",
    mutants={"normal": {"mla": 1}, "poison": {"mla": 1}},
    legal={"normal": {"mla": 1}},
    zoo=0,
    judged=True,
)
REACHABLE = Limits(portfolio_mean=0, logic_min=0, generic_mean=0, numeric_mean=0, correct_cases=1, variants=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "default", TINY)
    monkeypatch.setattr(command, "LIMITS", REACHABLE)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"kerneltest {kerneltest.__version__}\n")


def test_without_a_command_it_prints_help() -> None:
    done = subprocess.run([sys.executable, "-m", "kerneltest.cli"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: kerneltest" in done.stderr
    assert "power" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["powder"], "invalid choice: 'powder'"),
        (["power", "--jobs", "0"], "'0' is not a whole number of at least 1"),
        (["power", "--jobs", "two"], "'two' is not a whole number of at least 1"),
        (["power", "--seed", "-1"], "'-1' is not a whole number of at least 0"),
        (["power", "--zoo", "no/such/folder"], "'no/such/folder' is not a folder"),
        (["power", "--size", "huge"], "unrecognized arguments: --size"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_prints_its_table_stores_it_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a" / "one.json", tmp_path / "two.json"
    arguments = ["power", "--jobs", "1", "--seed", "3", "--resume", str(tmp_path)]
    assert cli.main([*arguments, "--json", str(first)]) == 0
    table = capsys.readouterr()
    assert "The zoo was not run" in table.out
    assert "MISSED" not in table.out
    assert table.err == ""
    stored: dict[str, Any] = json.loads(first.read_text())
    assert stored["schema"] == "kerneltest.power/1"
    assert {"portfolio_mean", "logic_min", "generic_mean", "numeric_mean", "false_alarms", "correct_cases"} <= set(
        stored
    )
    assert (stored["correct_cases"], stored["false_alarms"], stored["seed"]) == (20, 0, 3)
    assert len(stored["mutants"]) == 25
    assert {cell["strategy"] for row in stored["mutants"] for cell in row["cells"]} == {"normal", "poison"}
    assert stored["margins"]["T2"] < 1
    progress = (tmp_path / command.PROGRESS_NAME).read_text()
    assert cli.main([*arguments, "--json", str(second)]) == 0
    assert (second.read_text(), capsys.readouterr().out) == (first.read_text(), table.out)
    assert (tmp_path / command.PROGRESS_NAME).read_text() == progress
    # Another seed is another run.
    assert cli.main([*arguments, "--seed", "4"]) == 2
    assert "seed is 3, this run's is 4" in capsys.readouterr().err


def test_a_missed_target_is_an_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    only_legal = replace(TINY, mutants={"normal": {"mla": 1}}, legal={})
    monkeypatch.setitem(SIZES, "default", only_legal)
    monkeypatch.setattr(command, "LIMITS", replace(REACHABLE, correct_cases=21))
    assert cli.main(["power", "--jobs", "1"]) == 1
    seen = capsys.readouterr()
    assert seen.err == "kerneltest power: target missed: correct cases\n"
    assert "correct cases: 0, wanted 21: MISSED" in seen.out


def test_an_interrupted_run_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.runs, "run", interrupt)
    assert cli.main(["power", "--resume", str(tmp_path / "p.jsonl")]) == 130
    assert f"--resume {tmp_path / 'p.jsonl'}" in capsys.readouterr().err


def test_an_unwritable_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["power", "--jobs", "1", "--resume", str(tmp_path / "file" / "progress")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_zoo_kernel_that_kills_its_process_does_not_kill_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1] / "zoo" / "suites"
    zoo = Zoo(str(root))
    names = ("zoo.z13[planted]", "zoo.torch[twin]")
    units = [Unit(group=ZOO, subject=name, family="cpu", strategy="drawn", trials=1) for name in names]
    aborting = _long_request(zoo)
    monkeypatch.setattr("kerneltest.power.zoo._draw", lambda *_: [aborting])
    aborts, twin = zoo.run(units, 0)
    assert set(USUAL) < set(DETECTORS)
    assert aborts.flagged == dict.fromkeys(DETECTORS, 1)
    assert aborts.notes == ("Crashed in 1",)
    assert (twin.trials, twin.flagged.get("kerneltest", 0), twin.flagged.get("fixed 1e-2", 0)) == (1, 0, 0)


def _long_request(zoo: Zoo) -> Case[Any]:
    """A case with more keys than the planted kernel survives."""
    kernel, _ = zoo.kernels()["zoo.z13[planted]"]
    axes = {
        "requests": [{"qo_len": 1, "kv_len": 65}],
        "dtype": "bfloat16",
        "head_dim": 64,
        "kv_heads": 1,
        "group": 1,
        "page_size": 16,
        "causal": False,
        "shuffled": False,
        "spare_pages": 0,
    }
    data = {"operator": kernel.operator.name, "axes": axes, "inputs": kernel.operator.inputs[0].name, "seed": 0}
    return Case.from_json(data, kernel.operator.axes)
