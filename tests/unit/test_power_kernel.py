"""The emulated kernel: right where it is healthy, wrong where it is told to be, and every switch is connected."""

from __future__ import annotations

import pytest
import torch

from kerneltest.power.emulation import Arithmetic, Flaw, Planted, attend
from kerneltest.power.problems import FAMILIES, STRATEGIES, draw, generator, reference
from kerneltest.power.subjects import LEGAL, MUTANTS, Kind
from kerneltest.power.trials import ALL, LSE, T1_T4, correct, flawed

torch.set_num_threads(1)
# The long family costs seconds; the others have every feature.
SHORT = ("decode", "prefill", "mla")


def trial(flaw: Flaw, family: str, strategy: str, number: int, at: float = 0.5):
    mutant = MUTANTS[flaw.value]
    problem = draw(FAMILIES[family], STRATEGIES[strategy], generator("test", flaw.value, family, strategy, number))
    return flawed(problem, mutant.how, Planted(flaw=flaw, at=at), 0)


def test_the_corpus_is_the_one_that_was_measured_before() -> None:
    kinds = [mutant.kind for mutant in MUTANTS.values()]
    assert (kinds.count(Kind.LOGIC), kinds.count(Kind.NUMERIC)) == (21, 4)
    assert {mutant.flaw for mutant in MUTANTS.values()} == set(Flaw)
    assert len(LEGAL) >= 7


@pytest.mark.parametrize("flaw", Flaw, ids=lambda flaw: flaw.name)
def test_every_switch_changes_some_answer_and_the_oracle_sees_it(flaw: Flaw) -> None:
    seen = 0
    for number in range(12):
        for family in (f for f in MUTANTS[flaw.value].families if f in SHORT):
            # Only poison shows what 0 times stale memory does.
            tally = trial(flaw, family, "poison", number, at=0.0)
            seen += tally.flagged.get(ALL, 0)
        if seen:
            return
    pytest.fail(f"{flaw} never mattered")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", LEGAL)
def test_legal_variants_are_never_flagged(name: str, strategy: str) -> None:
    # Every variant meets every family under some strategy; `kerneltest power` does all of them, many times.
    family = SHORT[(list(LEGAL).index(name) + list(STRATEGIES).index(strategy)) % len(SHORT)]
    problem = draw(FAMILIES[family], STRATEGIES[strategy], generator("legal", name, strategy))
    tally = correct(problem, LEGAL[name])
    assert (tally.flagged.get(ALL, 0), tally.flagged_batches.get(ALL, 0)) == (0, 0)
    assert (tally.trials, tally.batches) == (FAMILIES[family].batch, 1)
    assert tally.margins["LSE"] < 1


def test_healthy_answers_are_those_of_a_plain_softmax() -> None:
    problem = draw(FAMILIES["prefill"], STRATEGIES["normal"], generator("plain"))
    out, lse = attend(problem, Arithmetic(splits=2))
    x = problem.attended()
    group = x.q.shape[1] // x.k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (x.k, x.v))
    s = (x.q.double() @ k.mT * x.scale).masked_fill(~x.seen[:, None], -torch.inf)
    expected = (s.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), s.logsumexp(-1).transpose(1, 2).flatten(0, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference(x).out, expected, rtol=1e-12, atol=1e-12)


def test_count_inputs_count() -> None:
    problem = draw(FAMILIES["decode"], STRATEGIES["count"], generator("count"))
    _, lse = attend(problem, Arithmetic())
    n = torch.tensor(problem.lengths, dtype=torch.float64)
    torch.testing.assert_close(lse.double(), n.log()[:, None].expand_as(lse), rtol=1e-6, atol=1e-6)
    # Two KV heads count by two coprime moduli, so a slot is known by its remainders.
    first, second = problem.v[0, 0].argmax(-1), problem.v[0, 1].argmax(-1)
    pairs = set(zip(first.tolist(), second.tolist(), strict=True))
    assert len(pairs) == problem.v.shape[2]


def test_dyadic_weights_need_no_rounding() -> None:
    problem = draw(FAMILIES["mla"], STRATEGIES["dyadic"], generator("dyadic"))
    rounded, exact = (attend(problem, LEGAL[name]) for name in ("tile 64", "P in fp32"))
    assert torch.equal(rounded[0], exact[0])


def test_answers_equal_to_the_healthy_ones_are_not_counted() -> None:
    tally = trial(Flaw.STALE_TIMES_ZERO, "decode", "normal", 0)
    assert (tally.trials, tally.equivalent, tally.judged) == (1, 1, 0)
    assert tally.share(ALL) is None
    assert trial(Flaw.STALE_TIMES_ZERO, "decode", "poison", 0).flagged[T1_T4] == 1


def test_tiers_are_told_apart() -> None:
    only_lse = trial(Flaw.LSE_BASE, "decode", "normal", 0).flagged
    assert (only_lse.get(LSE), only_lse.get(T1_T4), only_lse[ALL]) == (1, None, 1)
    only_out = trial(Flaw.ROW_UNWRITTEN, "decode", "normal", 0).flagged
    assert (only_out.get(LSE), only_out.get(T1_T4), only_out[ALL]) == (None, 1, 1)


def test_one_request_is_struck_and_no_other() -> None:
    problem = draw(FAMILIES["decode"], STRATEGIES["normal"], generator("victim"))
    healthy, _ = attend(problem.request(2), Arithmetic())
    wrong, _ = attend(problem.request(2), Arithmetic(), Planted(flaw=Flaw.LAST_DROPPED))
    assert not torch.equal(healthy, wrong)
    with pytest.raises(AssertionError, match="one request"):
        attend(problem, Arithmetic(), Planted(flaw=Flaw.LAST_DROPPED))
