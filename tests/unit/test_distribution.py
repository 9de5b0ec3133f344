"""The hunt of distributions: with a runner that answers by rule, and with a worker that draws, over several nights."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kerneltest import discovery
from kerneltest.engine import evidence as stored
from kerneltest.engine.distribution import DistributionTrail, hunt_distribution, replay_distribution
from kerneltest.engine.evidence import LIMIT, BadEvidence, Store
from kerneltest.engine.hunt import Target
from kerneltest.engine.job import Job
from kerneltest.engine.pool import InProcess
from kerneltest.engine.profile import PROFILES
from kerneltest.model import (
    Case,
    Device,
    Drawn,
    Finding,
    Outcome,
    Series,
    Start,
    Started,
    Status,
)

SUITE = (Path(__file__).parent / "tiny_samplers.py").read_text()
DEVICE = Device(kind="cpu", ordinal=0, name="", sm=(0, 0), units=1)
NIGHT = replace(PROFILES["quick"], cpu_draws=60_000, draw_seconds=60.0)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Target]]:
    root = tmp_path_factory.mktemp("project") / "suites"
    path = root / "tiny" / "kernels.py"
    path.parent.mkdir(parents=True)
    path.write_text(SUITE)
    discovery.use_roots([root])
    kernels = discovery.load_kernels(path)
    by_name = {kernel.name: Target(kernel=kernel, source=path) for kernel in kernels.values()}
    yield by_name.__getitem__
    discovery.use_roots([])


@pytest.fixture(scope="module")
def worker(suite: Callable[[str], Target]) -> Iterator[InProcess]:
    roots = (str(suite("tiny.right").source.parents[1]),)
    before = dict(os.environ)
    yield InProcess(Start(device="cpu", suite_roots=roots, libraries=()), {})
    # That Triton is to interpret is said in the environment, and other tests compile.
    os.environ.clear()
    os.environ.update(before)


Hunt = Callable[..., DistributionTrail]


@pytest.fixture
def hunt(suite: Callable[[str], Target], worker: InProcess, tmp_path: Path) -> Hunt:
    def follow(name: str, seed: int = 1, **more: Any) -> DistributionTrail:
        profile = replace(NIGHT, **more)
        return hunt_distribution(suite(name), worker, profile, Store(tmp_path / "evidence"), seed)

    return follow


def counted(folder: Path) -> dict[str, dict[str, Any]]:
    """The evidence of each config on disk."""
    files = (json.loads(path.read_text())["evidence"] for path in sorted((folder / "evidence").glob("*/*.json")))
    return {file["config"]: file for file in files}


def test_a_right_sampler_stays_green_and_its_evidence_grows(hunt: Hunt, tmp_path: Path) -> None:
    draws, coarsest = [], []
    for _ in range(4):
        trail = hunt("tiny.right")
        assert (trail.caught, trail.unchecked) == (None, ())
        assert len(trail.cases) == len(trail.distributions) == 3
        draws.append([one.draws for one in trail.distributions])
        coarsest.append(max(one.detectable for one in trail.distributions))
        assert all(one.drawn >= 60_000 for one in trail.distributions)
        assert all(one.log10_e is not None and one.log10_e < 3 for one in trail.distributions)
    assert draws == [[night * 61_440] * 3 for night in (1, 2, 3, 4)]
    assert sorted(coarsest, reverse=True) == coarsest
    assert coarsest[-1] < 0.6 * coarsest[0]
    for evidence in counted(tmp_path).values():
        for part in evidence["partitions"]:
            assert sum(part["counts"]) == evidence["draws"] == 4 * 61_440


def test_the_same_seed_never_counts_the_same_draws_twice(hunt: Hunt, tmp_path: Path) -> None:
    hunt("tiny.right", seed=5)
    first = counted(tmp_path)
    hunt("tiny.right", seed=5)
    second = counted(tmp_path)
    for config, evidence in second.items():
        before = first[config]
        launches = before["draws"] // 4096
        assert evidence["next_draw"] == before["next_draw"] + launches
        new = [
            [late - early for late, early in zip(b["counts"], a["counts"], strict=True)]
            for a, b in zip(before["partitions"], evidence["partitions"], strict=True)
        ]
        assert new != [part["counts"] for part in before["partitions"]]


def test_a_run_begins_with_the_random_numbers_of_its_seed(hunt: Hunt, tmp_path: Path) -> None:
    hunt("tiny.right", seed=5)
    first = counted(tmp_path)
    hunt("tiny.small", seed=5)
    (tmp_path / "evidence").rename(tmp_path / "old")
    hunt("tiny.right", seed=5)
    assert counted(tmp_path) == first
    (tmp_path / "evidence").rename(tmp_path / "older")
    hunt("tiny.right", seed=6)
    other = counted(tmp_path)
    assert all(other[config]["partitions"] != first[config]["partitions"] for config in first)


def test_a_biased_sampler_is_red_and_says_where(hunt: Hunt, tmp_path: Path) -> None:
    trail = hunt("tiny.even_ids", cpu_draws=2_000_000)
    caught = trail.caught
    assert caught is not None
    assert (caught.finding.kind, caught.finding.key) == ("WrongDistribution", "e-process")
    assert caught.finding.by_chance
    assert caught.draws < 500_000  # it stops when it is rejected
    assert (caught.fresh, caught.fresh_of) == (1, 1)
    assert f"config {caught.case.id}: {caught.draws:,} draws, do not follow the distribution: E = 10^" in (
        caught.finding.what
    )
    assert "10^9 rejects" in caught.finding.what
    assert caught.finding.details[0].startswith("most by id mod 4: E = 10^")
    assert any(line.startswith(("ids 0 mod 4: ", "ids 2 mod 4: ")) for line in caught.finding.details)
    assert caught.finding.details[-1].endswith("remove that once the kernel has changed")
    assert [(item.what, item.why) for item in trail.unchecked] == [
        ("tiny.even_ids: the distributions of 2 more configs", f"not drawn from after config {caught.case.id} failed")
    ]

    again = hunt("tiny.even_ids")  # E has been over the limit: the next night it still is
    assert again.caught is not None
    assert "of them in earlier runs" in again.caught.finding.what
    assert again.distributions[0].drawn == 0


def test_a_bias_that_one_night_does_not_show_is_found_in_several(hunt: Hunt) -> None:
    nights = [hunt("tiny.even_ids", cpu_draws=30_000).caught is not None for _ in range(10)]
    assert nights[0] is False
    assert nights[-1] is True


def test_a_frozen_state_of_random_numbers_is_red(hunt: Hunt, tmp_path: Path) -> None:
    trail = hunt("tiny.frozen")
    assert trail.caught is not None
    assert trail.caught.finding.key == "frozen"
    assert trail.caught.finding.what.endswith("the same 4,096 tokens: the state of the random numbers is frozen")
    assert (trail.caught.reproduced, trail.caught.confirmed_of) == (1, 1)
    assert trail.launches == 4
    assert counted(tmp_path) == {}


@pytest.mark.parametrize("name", ["tiny.impossible", "tiny.outside"])
def test_a_token_of_probability_0_is_red_at_once(hunt: Hunt, name: str) -> None:
    trail = hunt(name)
    assert trail.caught is not None
    assert trail.caught.finding.key == "impossible"
    assert "have probability 0" in trail.caught.finding.what
    assert trail.distributions[0].log10_e is None
    again = hunt(name)
    assert again.caught is not None


def test_a_launch_that_changes_its_inputs_is_told_as_such(hunt: Hunt, tmp_path: Path) -> None:
    trail = hunt("tiny.spoiling")
    assert trail.caught is not None
    assert trail.caught.finding.kind == "InputMutated"
    assert counted(tmp_path) == {}


def test_refused_configs_are_counted_and_the_rest_is_drawn(hunt: Hunt) -> None:
    trail = hunt("tiny.small")
    assert trail.unsupported == {"too many": 2}
    assert len(trail.distributions) == 1


def test_what_time_does_not_allow_is_told(hunt: Hunt) -> None:
    trail = hunt("tiny.right", cpu_draws=10**9, draw_seconds=0.2)
    (item,) = trail.unchecked
    assert item.what == "tiny.right: 1,000,000,000 draws of each config"
    assert item.why.startswith("3 of 3 configs were drawn from less often in 0.2 s, the slowest ")


def test_more_series_than_may_share_the_false_alarms_are_not_drawn(
    hunt: Hunt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "MOST", 2)
    for _ in range(2):
        trail = hunt("tiny.right")
        assert len(trail.distributions) == 2
        (item,) = trail.unchecked
        assert "as many series as may share the false alarms" in item.why
    assert len(counted(tmp_path)) == 2


def test_a_corrupt_file_is_named(hunt: Hunt, tmp_path: Path) -> None:
    hunt("tiny.right")
    path = sorted((tmp_path / "evidence").glob("*/*.json"))[0]
    path.write_text(path.read_text()[:100])
    with pytest.raises(BadEvidence, match=re.escape(str(path))):
        hunt("tiny.right")


def test_evidence_of_another_distribution_is_not_added_to(hunt: Hunt, tmp_path: Path) -> None:
    hunt("tiny.right")
    path = sorted((tmp_path / "evidence").glob("*/*.json"))[0]
    file = json.loads(path.read_text())
    file["evidence"]["partitions"][0]["probabilities"][0] *= 1 + 1e-6
    path.write_text(json.dumps(file))
    before = path.read_text()
    trail = hunt("tiny.right")
    (item,) = trail.unchecked
    assert "is of another distribution than this case has now" in item.why
    assert str(path) in item.why
    assert path.read_text() == before


def test_a_replay_draws_from_nothing(hunt: Hunt, suite: Callable[[str], Target], worker: InProcess) -> None:
    caught = hunt("tiny.even_ids", cpu_draws=2_000_000).caught
    assert caught is not None
    subject = Drawn(case=caught.case, draws=caught.draws)
    red = replay_distribution(suite("tiny.even_ids"), worker, NIGHT, subject, 3)
    assert red.caught is not None
    assert red.caught.finding.identity == caught.finding.identity
    green = replay_distribution(suite("tiny.right"), worker, NIGHT, subject, 3)
    assert green.caught is None
    assert green.distributions[0].drawn >= 2 * caught.draws


class Rule:
    """A runner that says of each config what ``rule`` says, and keeps the messages."""

    def __init__(self, rule: Callable[[Case[Any], Series], Outcome]) -> None:
        self.rule = rule
        self.asked: list[tuple[Case[Any], Series, float]] = []
        self.started = Started(device=DEVICE, libraries={"torch": "2.0", "lib": "1.2+cu13"})

    def run(self, job: Job, *, deadline: float, cold: float) -> Outcome:
        assert job.series is not None
        self.asked.append((job.case, job.series, deadline))
        return self.rule(job.case, job.series)

    def close(self) -> None: ...


def drawn(case: Case[Any], series: Series) -> Outcome:
    evidence = replace(series.evidence, draws=series.evidence.draws + series.draws, detectable=0.01)
    return Outcome(status=Status.PASSED, launches=3, evidence=evidence)


def test_the_worker_is_told_draws_seconds_and_limit(suite: Callable[[str], Target], tmp_path: Path) -> None:
    rule, store = Rule(drawn), Store(tmp_path)
    target = suite("tiny.right")
    target = replace(target, kernel=replace(target.kernel, library="lib"))
    trail = hunt_distribution(target, rule, NIGHT, store, 1)
    assert trail.launches == 9
    for _, series, deadline in rule.asked:
        assert (series.draws, series.seconds, series.limit) == (60_000, 60.0, LIMIT)
        assert deadline == NIGHT.deadline + 60
        assert series.evidence.library == "lib 1.2+cu13"
        assert 0 <= series.evidence.next_draw < 2**31
    assert math.isclose(LIMIT, math.log(1e9))
    hunt_distribution(target, rule, NIGHT, store, 2)
    starts = [series.evidence.next_draw for _, series, _ in rule.asked]
    assert starts[:3] == starts[3:]  # the worker's to move; the seed of a later run does not
    assert [series.evidence.draws for _, series, _ in rule.asked] == [0] * 3 + [60_000] * 3


def test_a_new_version_of_the_library_begins_anew(suite: Callable[[str], Target], tmp_path: Path) -> None:
    rule, store = Rule(drawn), Store(tmp_path)
    hunt_distribution(suite("tiny.right"), rule, NIGHT, store, 1)
    rule.started = replace(rule.started, libraries={"torch": "2.1"})
    hunt_distribution(suite("tiny.right"), rule, NIGHT, store, 1)
    assert [series.evidence.draws for _, series, _ in rule.asked] == [0] * 6


def test_a_crash_is_caught_like_any_other(suite: Callable[[str], Target], tmp_path: Path) -> None:
    finding = Finding(kind="Crashed", kernel="tiny.right", key="SIGSEGV", what="")
    rule = Rule(lambda case, series: Outcome(status=Status.FAILED, finding=finding, fatal=True))
    trail = hunt_distribution(suite("tiny.right"), rule, NIGHT, Store(tmp_path), 1)
    assert trail.caught is not None
    assert (trail.caught.reproduced, trail.caught.confirmed_of, trail.caught.draws) == (1, 1, 1)
    assert len(rule.asked) == 2


def test_a_replay_that_has_not_the_time_says_nothing(suite: Callable[[str], Target]) -> None:
    case = suite("tiny.right").kernel.operator.draws.cases(None)[0]  # type: ignore[union-attr, arg-type]
    rule = Rule(lambda case, series: drawn(case, replace(series, draws=10)))
    trail = replay_distribution(suite("tiny.right"), rule, NIGHT, Drawn(case=case, draws=50), 1)
    assert trail.cases == ()
    assert trail.unchecked[0].why == "10 draws in 600 s; it once took 50 to reject the distribution"
