"""A run of the benchmark: the same table from the same seed, whatever interrupts it; and figures that add up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kerneltest.model import decode, encode
from kerneltest.power.corpus import SIZES, Size, Unit
from kerneltest.power.emulated import Emulated
from kerneltest.power.run import ProgressFile, ProgressFileError, run
from kerneltest.power.subjects import MUTANTS
from kerneltest.power.summary import Limits, Summary, portfolio, summarise
from kerneltest.power.tally import Tally
from kerneltest.power.trials import ALL, DETECTORS

FEW: Mapping[str, Mapping[str, int]] = {"normal": {"mla": 1}, "poison": {"mla": 1}}
TINY = Size(name="tiny", mutants=FEW, legal={"normal": {"mla": 1}}, zoo=0, judged=True)
HEADER = {"schema": "test", "seed": 7}


@dataclass(frozen=True)
class Counting:
    """A corpus that says how often it was asked, and breaks off where it is told to."""

    asked: list[str]
    stop_after: int = 1_000
    together: int = 1

    def units(self, size: Size) -> Sequence[Unit]:
        return [Unit(group="count", subject=str(n), family="f", strategy="s", trials=n) for n in range(1, 7)]

    def run(self, units: Sequence[Unit], seed: int) -> list[Tally]:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.extend(unit.subject for unit in units)
        return [Tally(trials=unit.trials, flagged={ALL: seed}, margins={"m": 1 / unit.trials}) for unit in units]


def summary(tallies: Mapping[Unit, Tally], size: Size = TINY, limits: Limits = Limits()) -> Summary:  # noqa: B008
    return summarise(tallies, size, 7, version="0", torch_version="0", zoo_absent="not here", limits=limits)


@pytest.fixture(scope="module")
def tallies() -> dict[Unit, Tally]:
    return run([Emulated()], TINY, 7)


def test_same_seed_same_tallies_another_seed_others(tallies: dict[Unit, Tally]) -> None:
    units = [unit for unit in tallies if unit.group == "legal"] + list(tallies)[:12]
    assert Emulated().run(units, 7) == [tallies[unit] for unit in units]
    assert [tally.margins for tally in Emulated().run(units[:3], 8)] != [tallies[unit].margins for unit in units[:3]]


def test_trials_do_not_depend_on_each_other(tallies: dict[Unit, Tally]) -> None:
    units = [unit for unit in tallies if unit.group == "mutant"][:3]
    assert Emulated().run(units[::-1], 7) == [tallies[unit] for unit in units[::-1]]


def test_an_interrupted_run_goes_on_and_ends_with_the_same_table(tmp_path: Path) -> None:
    whole, path = run([Counting([])], TINY, 7), tmp_path / "deep" / "progress.jsonl"
    progress = ProgressFile(path, HEADER)
    with pytest.raises(KeyboardInterrupt):
        run([Counting([], stop_after=4)], TINY, 7, progress=progress)
    progress.close()
    # Killed in the middle of a line as well.
    with path.open("ab") as file:
        file.write(b'{"unit": "count/5/f/s/5", "tal')
    progress, second = ProgressFile(path, HEADER), Counting([])
    assert run([second], TINY, 7, progress=progress) == whole
    progress.close()
    assert second.asked == ["5", "6"]
    third = Counting([])
    progress = ProgressFile(path, HEADER)
    assert run([third], TINY, 7, progress=progress) == whole
    progress.close()
    assert third.asked == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": "test", "seed": 8}\n', "seed is 8, this run's is 7"),
        ('{"schema": "other"}\n', "schema is 'other'"),
        ("not JSON\n", "no progress file"),
        ('{"schema": "test", "seed": 7}\n{"unit": "u", "tally": {"trials": "many"}}\n', "tally.trials"),
    ],
)
def test_a_file_of_another_run_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_text(content)
    with pytest.raises(ProgressFileError, match="progress") as error:
        ProgressFile(path, HEADER)
    assert message in str(error.value)
    assert path.read_text() == content


def test_two_processes_give_what_one_gives() -> None:
    size = replace(TINY, mutants={"poison": {"mla": 1}}, legal={})
    assert run([Emulated()], size, 3, processes=2) == run([Emulated()], size, 3)


def test_every_size_tries_every_mutant_and_the_default_meets_its_own_counts() -> None:
    for size in SIZES.values():
        units = Emulated().units(size)
        assert {unit.subject for unit in units if unit.group == "mutant"} == set(MUTANTS)
        assert len({unit.key for unit in units}) == len(units)
    batch = {"decode": 4, "long": 2, "prefill": 2, "mla": 2}
    legal = [unit for unit in Emulated().units(SIZES["default"]) if unit.group == "legal"]
    assert sum(unit.trials * batch[unit.family] for unit in legal) >= Limits().correct_cases


def test_tallies_add_up_and_survive_json() -> None:
    one = Tally(trials=3, equivalent=1, outputs=5, flagged={"a": 2}, margins={"m": 0.5}, notes=("n",))
    other = Tally(trials=1, batches=1, flagged={"a": 1, "b": 1}, margins={"m": 0.25, "k": 1.0}, notes=("n", "o"))
    assert one + other == Tally(
        trials=4,
        equivalent=1,
        outputs=5,
        batches=1,
        flagged={"a": 3, "b": 1},
        margins={"m": 0.5, "k": 1.0},
        notes=("n", "o"),
    )
    assert one.share("a") == 1.0
    assert decode(Tally, json.loads(json.dumps(encode(one)))) == one


def test_portfolio_is_the_chance_that_one_case_of_each_strategy_shows_it() -> None:
    def tally(judged: int, flagged: int) -> Tally:
        return Tally(trials=judged + 2, equivalent=2, flagged={"d": flagged})

    cells = {
        ("a", "normal"): tally(4, 2),
        ("a", "count"): tally(4, 3),
        ("a", "dyadic"): tally(0, 0),  # never differed: adds nothing
        ("b", "normal"): tally(4, 4),
        ("c", "normal"): tally(0, 0),  # a family that cannot show it
    }
    assert portfolio(cells, "d") == pytest.approx((1 - 0.5 * 0.25 + 1) / 2)
    assert portfolio({("c", "normal"): tally(0, 0)}, "d") is None


def test_a_missed_target_says_so(tallies: dict[Unit, Tally]) -> None:
    missed = {target.name for target in summary(tallies).targets if target.judged and not target.met}
    assert "correct cases" in missed
    modest = Limits(portfolio_mean=0, logic_min=0, generic_mean=0, numeric_mean=0, correct_cases=1, variants=1)
    assert all(target.met for target in summary(tallies, limits=modest).targets)
    impossible = summary(tallies, limits=replace(modest, generic_mean=1.01))
    assert [target.met for target in impossible.targets if "logic mutants" in target.name] == [True, False]


def test_a_weak_oracle_misses_its_targets(tallies: dict[Unit, Tally]) -> None:
    """What a cosine of 0.99 detects, passed off as ours."""
    weak = {
        unit: replace(tally, flagged={**tally.flagged, ALL: tally.flagged.get("cos 0.99", 0)})
        for unit, tally in tallies.items()
    }
    seen = summary(weak)
    assert seen.portfolio_mean < summary(tallies).portfolio_mean - 0.1
    assert {t.met for t in seen.targets if t.name.startswith(("portfolio", "one normal"))} == {False}


def test_a_false_alarm_fails_a_run_of_any_size(tallies: dict[Unit, Tally]) -> None:
    small = replace(TINY, judged=False)
    assert all(target.met for target in summary(tallies, small).targets if target.judged)
    first = next(unit for unit in tallies if unit.group == "legal")
    alarmed = summary({**tallies, first: replace(tallies[first], flagged_batches={ALL: 1})}, small)
    assert alarmed.false_alarms == 1
    assert [target.met for target in alarmed.targets if target.judged] == [False, True]


def test_a_flagged_twin_is_a_false_alarm_and_a_flagged_plant_is_not(tallies: dict[Unit, Tally]) -> None:
    zoo = {
        Unit(group="zoo", subject=name, family="cpu", strategy="drawn", trials=3): Tally(
            trials=3, flagged={"kerneltest": count}
        )
        for name, count in (("zoo.a[planted]", 3), ("zoo.a[twin]", 0), ("zoo.b[sound]", 2))
    }
    seen = summary({**tallies, **zoo}, replace(TINY, judged=False))
    assert (seen.zoo_false_alarms, len(seen.zoo)) == (2, 3)
    assert [target.met for target in seen.targets if target.judged] == [True, False]


def test_equivalent_answers_are_counted_and_excluded(tallies: dict[Unit, Tally]) -> None:
    row = next(row for row in summary(tallies).mutants if row.name == "stale shared memory times 0")
    assert (row.trials, row.single[ALL], row.portfolio[ALL]) == (2, None, 1.0)
    assert row.equivalent == 1
    assert set(row.single) == set(DETECTORS)
