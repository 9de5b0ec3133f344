"""Drawing and shrinking without a worker: a runner that answers from a rule shows where shrinking ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attention_cases import paged

from kerneltest.engine.hunt import Target, hunt, replay
from kerneltest.engine.job import Job
from kerneltest.engine.profile import PROFILES, Chosen
from kerneltest.engine.text import failure_text
from kerneltest.model import Case, Device, Finding, Kernel, Outcome, Started, Status

CPU = Device(kind="cpu", ordinal=0, name="", sm=(0, 0), units=1)


class Rule:
    """Fails with the kind that ``rule`` names for a case, passes if it names none, refuses at "unsupported"."""

    def __init__(
        self,
        rule: Callable[[Any], str | None],
        *,
        by_chance: bool = False,
        used: Callable[[Any], float] = lambda case: 0.0,
        lethal: str = "",
        mute: str = "",
    ) -> None:
        self.rule, self.by_chance, self.used, self.lethal = rule, by_chance, used, lethal
        self.mute = mute
        self.asked: list[Any] = []
        self.deadlines: list[float] = []
        self.beside: list[tuple[str, str | None]] = []
        self.started = Started(device=CPU)

    def run(self, job: Job, *, deadline: float, cold: float) -> Outcome:
        kernel, case, peer = job.kernel, job.case, job.peer
        self.beside.append((kernel.name, peer[0].name if peer else None))
        self.asked.append(case)
        self.deadlines.append(deadline)
        if peer and peer[0].name == self.lethal:
            finding = Finding(kind="Crashed", kernel=kernel.name, key="SIGSEGV", what="")
            return Outcome(status=Status.FAILED, finding=finding, fatal=True)
        kind = self.rule(case) if kernel.name == TARGET.kernel.name else None
        if kind == "unsupported":
            return Outcome(status=Status.UNSUPPORTED, reason="by rule")
        if kind is None:
            compared = peer[0].name if peer and peer[0].name not in self.mute else None
            return Outcome(status=Status.PASSED, launches=2, used={"out": self.used(case)}, compared_with=compared)
        finding = Finding(kind=kind, kernel=kernel.name, key="", what="", by_chance=self.by_chance)
        return Outcome(status=Status.FAILED, finding=finding)

    def close(self) -> None: ...


TARGET = Target(
    kernel=Kernel(
        name="rule",
        operator=paged.paged_prefill,
        launch=lambda call: {},
        numerics=lambda case, device: None,  # type: ignore[arg-type, return-value]
    ),
    source=Path("rule.py"),
)
QUICK = PROFILES["default"]


def requests(case: Case[Any]) -> list[tuple[int, int]]:
    return [(request.qo_len, request.kv_len) for request in case.axes.requests]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("rule", "minimal"),
    [
        (lambda c: "Mismatch" if any(r.kv_len > 64 for r in c.axes.requests) else None, [(1, 65)]),
        (
            lambda c: "Mismatch" if any(r.qo_len > r.kv_len > 0 for r in c.axes.requests) else None,
            [(2, 1)],
        ),
        (lambda c: "Mismatch" if c.axes.page_size == 16 and c.axes.group > 2 else None, [(1, 1)]),
        (lambda c: "Mismatch" if len(c.axes.requests) == 2 else None, [(1, 1), (1, 1)]),
    ],
)
def test_shrinks_to_the_smallest_case(seed: int, rule: Callable[[Any], str | None], minimal: Any) -> None:
    caught = hunt(TARGET, Rule(rule), QUICK, seed).caught
    assert caught is not None
    assert sorted(requests(caught.case)) == minimal
    assert caught.case.axes.kv_heads == 1
    assert not caught.case.axes.shuffled
    assert caught.case.axes.spare_pages == 0
    assert caught.reproduced == caught.confirmed_of == 3


def test_does_not_slide_to_another_bug() -> None:
    def rule(case: Any) -> str | None:
        longest = max(r.kv_len for r in case.axes.requests)
        return "StaleState" if longest > 64 else "Mismatch" if longest > 16 else None

    for seed in range(6):
        caught = hunt(TARGET, Rule(rule), QUICK, seed).caught
        assert caught is not None
        longest = max(r.kv_len for r in caught.case.axes.requests)
        assert (caught.finding.kind, longest) in {("StaleState", 65), ("Mismatch", 17)}


def test_counts_distinct_cases_and_refusals() -> None:
    rule = Rule(lambda c: "unsupported" if c.axes.causal else None)
    trail = hunt(TARGET, rule, QUICK, 1)
    assert trail.caught is None
    assert len({case.id for case in trail.cases}) == len(trail.cases) >= 0.6 * QUICK.cases
    assert trail.unsupported == {"by rule": len(rule.asked) - len(trail.cases)}
    assert trail.unsupported["by rule"] > 20
    assert trail.launches == 2 * len(trail.cases)


def test_the_same_seed_draws_the_same_cases() -> None:
    asked = []
    for seed in (5, 5, 6):
        rule = Rule(lambda c: None)
        hunt(TARGET, rule, QUICK, seed)
        asked.append([case.id for case in rule.asked])
    assert asked[0] == asked[1] != asked[2]


def test_refusing_everything_is_not_an_error_of_the_hunt() -> None:
    trail = hunt(TARGET, Rule(lambda c: "unsupported"), QUICK, 1)
    assert (trail.cases, trail.caught) == ((), None)


def test_replay_runs_the_one_case() -> None:
    rule = Rule(lambda c: "Mismatch")
    found = hunt(TARGET, Rule(lambda c: "Mismatch"), QUICK, 1).caught
    assert found is not None
    trail = replay(TARGET, rule, QUICK, found.case)
    assert trail.caught is not None
    assert rule.asked == [found.case]


def test_a_failure_that_does_not_come_again_stays_a_failure() -> None:
    failed: list[Any] = []

    def once(case: Any) -> str | None:
        if case in failed:
            return None
        failed.append(case)
        return "Mismatch"

    trail = hunt(TARGET, Rule(once), QUICK, 1)
    assert trail.caught is not None
    assert (trail.caught.reproduced, trail.caught.confirmed_of) == (0, 3)
    assert all(case.status is Status.FAILED for case in trail.cases)


def test_a_hang_is_shrunk_with_less_patience() -> None:
    rule = Rule(lambda c: "Hung" if c.axes.causal else None)
    caught = hunt(TARGET, rule, QUICK, 1).caught
    assert caught is not None
    first = next(number for number, case in enumerate(rule.asked) if case.axes.causal)
    assert set(rule.deadlines[: first + 1]) == {QUICK.deadline}
    assert set(rule.deadlines[first + 1 :]) == {2.0}
    assert len(rule.deadlines) > first + 4

    rule = Rule(lambda c: "Mismatch" if c.axes.causal else None)
    hunt(TARGET, rule, QUICK, 1)
    assert set(rule.deadlines) == {QUICK.deadline}


def test_every_input_strategy_is_run() -> None:
    # Five cases cannot hold them all by chance; what is missing is drawn after them.
    few = replace(QUICK, cases=5)
    for seed in range(5):
        trail = hunt(TARGET, Rule(lambda c: None), few, seed)
        ran = Counter(case.inputs for case in trail.cases)
        assert set(ran) == {strategy.name for strategy in paged.INPUTS}
        assert ran["generic"] >= 2
        assert trail.unchecked == ()


def test_every_relation_that_applies_is_run() -> None:
    few = replace(QUICK, cases=12)
    for seed in range(4):
        trail = hunt(TARGET, (rule := Rule(lambda c: None)), few, seed)
        assert trail.caught is None
        missing = {relation.name for relation in paged.RELATIONS} - {case.relation for case in rule.asked}
        plain = [case for case in rule.asked if not case.relation]
        assert not any(
            relation.applies(case) for relation in paged.RELATIONS if relation.name in missing for case in plain
        )
        assert len(missing) < 4


def test_a_bug_that_only_one_relation_shows_is_found_in_few_cases() -> None:
    for relation in ("value_sign", "batch_size"):
        rule = Rule(lambda c, name=relation: "RelationBroken" if c.relation == name else None)
        caught = hunt(TARGET, rule, replace(QUICK, cases=12), 3).caught
        assert caught is not None
        assert caught.case.relation == relation


def test_a_bug_that_only_one_strategy_shows_is_found_in_few_cases() -> None:
    few = replace(QUICK, cases=3)
    for name in (strategy.name for strategy in paged.INPUTS):
        caught = hunt(TARGET, Rule(lambda c, name=name: "Mismatch" if c.inputs == name else None), few, 1).caught
        assert caught is not None
        assert caught.case.inputs == name


def test_a_strategy_that_the_kernel_refuses_is_told() -> None:
    trail = hunt(TARGET, Rule(lambda c: "unsupported" if c.inputs == "count" else None), QUICK, 1)
    assert [(item.what, item.why) for item in trail.unchecked] == [("rule: input strategy count", "no case of it ran")]


def test_cases_are_bred_for_the_share_of_the_budget() -> None:
    # The share grows with the length of the longest request: chance alone seldom comes near the limit of 140 keys.
    def share(case: Any) -> float:
        return sum(r.kv_len for r in case.axes.requests) / 280

    best = [max(share(case) for case in asked_with(seed, share)) for seed in range(4)]
    assert sum(best) / len(best) > 0.9, best


def asked_with(seed: int, share: Callable[[Any], float]) -> list[Any]:
    rule = Rule(lambda c: None, used=share)
    hunt(TARGET, rule, QUICK, seed)
    return rule.asked


def test_a_verdict_by_chance_is_asked_again_with_other_data() -> None:
    caught = hunt(TARGET, Rule(lambda c: "Mismatch" if c.seed % 2 == 0 else None, by_chance=True), QUICK, 1).caught
    assert caught is not None
    assert caught.case.seed == 0
    assert (caught.reproduced, caught.fresh, caught.fresh_of) == (3, 1, 3)
    certain = hunt(TARGET, Rule(lambda c: "Mismatch"), QUICK, 1).caught
    assert certain is not None
    assert certain.fresh_of == 0


def beside(*names: str) -> Target:
    peers = (Target(kernel=replace(TARGET.kernel, name=name), source=Path(f"{name}.py")) for name in names)
    return replace(TARGET, peers=tuple(peers))


def test_a_quarter_of_the_cases_has_a_peer_that_the_case_alone_tells() -> None:
    rule = Rule(lambda c: None)
    hunt(beside("one", "two"), rule, QUICK, 1)
    with_peer = {case.id: peer for case, (_, peer) in zip(rule.asked, rule.beside, strict=True) if peer}
    assert 0.12 < len(with_peer) / len(rule.asked) < 0.4
    assert set(with_peer.values()) == {"one", "two"}
    again = Rule(lambda c: None)
    hunt(beside("one", "two"), again, QUICK, 2)
    both = {case.id: peer for case, (_, peer) in zip(again.asked, again.beside, strict=True) if case.id in with_peer}
    assert both == {name: with_peer[name] for name in both}


def test_other_kernels_are_asked_about_the_minimal_case() -> None:
    rule = Rule(lambda c: "Mismatch" if c.axes.causal else None)
    caught = hunt(beside("one", "two"), rule, QUICK, 1).caught
    assert caught is not None
    assert {name: outcome.status for name, outcome in caught.peers.items()} == dict.fromkeys(
        ("one", "two"), Status.PASSED
    )
    assert rule.asked[-2:] == [caught.case] * 2


def test_a_peer_that_did_not_answer_has_not_failed() -> None:
    """It may have been compiled all the time."""
    caught = hunt(beside("one"), Rule(lambda c: "Mismatch" if c.axes.causal else None), QUICK, 1).caught
    assert caught is not None
    finding = Finding(kind="Hung", kernel="one", key="deadline", what="no answer after 120.6 s; the worker was killed")
    hung = Outcome(status=Status.FAILED, finding=finding, fatal=True)
    lines = failure_text(replace(caught, peers={"one": hung}), Started(device=CPU), None, 1).splitlines()
    assert f"  one said nothing of this case: {finding.what}" in lines


def test_a_peer_that_kills_the_worker_is_not_the_kernels_crash() -> None:
    rule = Rule(lambda c: None, lethal="two")
    trail = hunt(beside("one", "two"), rule, QUICK, 1)
    assert trail.caught is None
    assert [name for _, name in rule.beside].count("two") == 1
    assert [(item.what, item.why) for item in trail.unchecked] == [
        ("rule: agreement with two", "the worker died of it")
    ]


def test_a_peer_that_was_never_compared_is_told() -> None:
    trail = hunt(beside("one", "two"), Rule(lambda c: None, mute="two"), QUICK, 1)
    assert [(item.what, item.why) for item in trail.unchecked] == [
        ("rule: agreement with two", "no case was right in both")
    ]
    assert hunt(beside("one", "two"), Rule(lambda c: None), QUICK, 1).unchecked == ()


def test_a_bug_that_was_left_out_is_not_what_another_is_shrunk_to() -> None:
    def rule(case: Case[Any]) -> str | None:
        return "Mismatch" if case.axes.page_size == 1 or case.axes.group > 2 else None

    left_out = replace(QUICK, only=(Chosen(axis="page_size", value=1, equal=False),))
    caught = hunt(TARGET, Rule(rule), left_out, 1).caught
    assert caught is not None
    assert caught.case.axes.page_size != 1
    assert caught.case.axes.group > 2
    everything = hunt(TARGET, Rule(rule), QUICK, 1).caught
    assert everything is not None
    assert everything.case.axes.page_size == 1


def test_compiles_no_more_specialisations_than_allowed() -> None:
    kernel = replace(TARGET.kernel, specialisation=lambda case: f"d{case.axes.head_dim}")
    runner = Rule(lambda case: "unsupported" if case.axes.head_dim == 128 else None)
    trail = hunt(replace(TARGET, kernel=kernel), runner, replace(QUICK, compiles=1), 1)
    # What the kernel refuses is not compiled, and does not count.
    assert len({case.axes.head_dim for case in runner.asked if case.axes.head_dim != 128}) == 1
    assert len(trail.cases) > QUICK.cases // 2
    assert trail.unsupported["this run compiles 1 specialisations at most"] > 0


def test_peers_are_compiled_for_no_more_either() -> None:
    peer = replace(TARGET.kernel, name="peer", specialisation=lambda case: f"d{case.axes.head_dim}")
    runner, target = Rule(lambda case: None), replace(TARGET, peers=(Target(kernel=peer, source=Path("peer.py")),))
    hunt(target, runner, replace(QUICK, compiles=1), 1)
    beside = [case for case, (_, name) in zip(runner.asked, runner.beside, strict=True) if name == "peer"]
    # The first case drawn is the simplest.
    assert {case.axes.head_dim for case in beside} == {128}
