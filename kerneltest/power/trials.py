"""One trial: a problem, a kernel, and what each detector says to the answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from kerneltest.model import ErrorBudget, Noise, Numerics
from kerneltest.oracle.attention import attention_budget
from kerneltest.oracle.attention_terms import TENSORS, Attended, AttentionTerms, from_tensors
from kerneltest.oracle.compare import likely
from kerneltest.oracle.rounding import half_ulp
from kerneltest.oracle.verdict import LOG_ODDS, Tier, Verdict, energy_limit, judge
from kerneltest.power.checkers import CHECKERS, Answers, plain_bfloat16
from kerneltest.power.emulation import Arithmetic, Planted, attend
from kerneltest.power.problems import Problem, reference, with_spread
from kerneltest.power.tally import Tally

T1, T1_T4, LSE, ALL = "T1", "T1-T4", "LSE", "T1-T4 + LSE"
# The oracle's tiers on ``out`` alone, its judgement of ``lse`` alone, both together.
TIERS = (T1, T1_T4, LSE, ALL)
DETECTORS = (*TIERS, *CHECKERS)


def flawed(problem: Problem, how: Arithmetic, planted: Planted, victim: int) -> Tally:
    """The flaw strikes one request of the batch; the batch is judged as a whole."""
    alone = problem.request(victim)
    healthy, wrong = attend(alone, how), attend(alone, how, planted)
    if all(_same_bits(a, b) for a, b in zip(healthy, wrong, strict=True)):
        return Tally(trials=1, equivalent=1)
    out, lse = attend(problem, how)
    out[problem.tokens(victim)], lse[problem.tokens(victim)] = wrong
    x = problem.attended()
    terms = reference(x)
    flagged, _ = _flagged(problem, terms, how.numerics(problem.softcap), _answers(x, terms, out, lse))
    return Tally(trials=1, outputs=out.numel(), flagged=flagged)


def correct(problem: Problem, how: Arithmetic) -> Tally:
    """The healthy kernel: each request judged by itself, and the batch as a whole."""
    out, lse = attend(problem, how)
    x = problem.attended()
    terms = reference(x)
    numerics, answers = how.numerics(problem.softcap), _answers(x, terms, out, lse)
    flagged, margins = _flagged(problem, terms, numerics, answers)
    tally = Tally(batches=1, flagged_batches=flagged, margins=margins)
    for number in range(len(problem.lengths)):
        tokens = problem.tokens(number)
        alone = with_spread(_of(terms, tokens), _request(x, number, problem.lengths[number]))
        flagged, margins = _flagged(problem, alone, numerics, answers.of(tokens))
        tally += Tally(trials=1, outputs=out[tokens].numel(), flagged=flagged, margins=margins)
    return tally


def _answers(x: Attended, terms: AttentionTerms, out: torch.Tensor, lse: torch.Tensor) -> Answers:
    return Answers(
        out=out,
        lse=lse,
        ref=terms.out,
        ref_lse=terms.lse,
        plain=plain_bfloat16(x),
        softcap=x.softcap > 0,
    )


def _of(terms: AttentionTerms, tokens: slice) -> AttentionTerms:
    return from_tensors({name: getattr(terms, name)[tokens] for name in TENSORS})


def _request(x: Attended, number: int, keys: int) -> Attended:
    """One request of a batch, without the batch's padding."""
    one = slice(number, number + 1)
    return replace(x, q=x.q[one], k=x.k[one, :, :keys], v=x.v[one, :, :keys], seen=x.seen[one, :, :keys])


def _flagged(
    problem: Problem, terms: AttentionTerms, numerics: Numerics, answers: Answers
) -> tuple[dict[str, int], dict[str, float]]:
    """1 for every detector that rejects the answers, and the margins of the oracle."""
    budgets = attention_budget(
        terms, numerics, head_dim=problem.family.head_dim, tier=problem.tier, softcap=problem.softcap
    )
    out, lse = judge(answers.out, budgets["out"]), judge(answers.lse, budgets["lse"])
    found = {
        T1: out.failed in (Tier.FINITE, Tier.HARD),
        T1_T4: not out.ok,
        LSE: not lse.ok,
        ALL: not (out.ok and lse.ok),
        **{name: not accepts(answers) for name, accepts in CHECKERS.items()},
    }
    return {name: 1 for name, yes in found.items() if yes}, dict(_margins(answers, budgets["out"], out, lse))


def _margins(answers: Answers, budget: ErrorBudget, out: Verdict, lse: Verdict) -> Iterator[tuple[str, float]]:
    """How near to each limit the answers come; 1 is the limit, except for T4's, which count standard deviations."""
    generic = budget.noise is not None
    yield ("T1, generic inputs" if generic else "T1, exact inputs"), out.used
    yield "LSE", lse.used
    if budget.noise is not None:
        error = (answers.out.double() - budget.ref).abs()
        yield "T2", float((error / (likely(budget, budget.noise) + half_ulp(budget))).max())
        row, case = _energy_shares(budget, budget.noise, out)
        yield "T3, row", row
        yield "T3, case", case
        yield "T4, row, standard deviations", out.z_row
        yield "T4, case, standard deviations", out.z_case


def _energy_shares(budget: ErrorBudget, noise: Noise, out: Verdict) -> tuple[float, float]:
    """The largest energy of a row, and that of the case, over their limits."""
    energy = out.comparison.row_energy
    if energy is None or out.energy is None:
        return 0.0, 0.0
    freedom = 1 / (1 / budget.ref.shape[-1] + 1 / noise.freedom)
    odds = LOG_ODDS + math.log(energy.numel())
    return float((energy / energy_limit(freedom, odds)).max()), out.energy / float(energy_limit(freedom.sum(), odds))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    width = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(width), b.view(width))
