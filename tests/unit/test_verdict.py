"""The tiers beyond the interval: rounding noise passes, whatever its order; errors with a pattern do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kerneltest.model import BF16, FP16, IEEE_FP32, ErrorBudget, Noise, Numerics
from kerneltest.oracle.attention import attention_budget
from kerneltest.oracle.attention_terms import Attended, attention_terms, weight_spread
from kerneltest.oracle.verdict import Tier, Verdict, energy_limit, judge

torch.set_num_threads(1)
HEADS, DIM = 8, 128
PLAIN = {"qk": IEEE_FP32, "pv": IEEE_FP32, "p": BF16, "out": BF16}

Rounding = Callable[[torch.Tensor], torch.Tensor]


def nearest(p: torch.Tensor) -> torch.Tensor:
    return p.bfloat16().float()


def truncated(p: torch.Tensor) -> torch.Tensor:
    return (p.view(torch.int32) & ~0xFFFF).view(torch.float32)


def attend(x: Attended, round_p: Rounding, *, share_of_l: Rounding | None = None) -> torch.Tensor:
    """A kernel in fp32 that rounds its weights; ``share_of_l`` is what it sums for the denominator."""
    group = x.q.shape[1] // x.k.shape[1]
    k, v = (t.float().repeat_interleave(group, 1) for t in (x.k, x.v))
    s = (x.q.float() @ k.mT * x.scale).masked_fill(~x.seen.unsqueeze(1), -torch.inf)
    p = torch.exp(s - s.amax(-1, keepdim=True))
    total = (share_of_l or (lambda p: p))(p).sum(-1, keepdim=True)
    return (round_p(p) @ v / total).bfloat16()


def draw(seed: int, keys: int, rows: int = 1, dim: int = DIM) -> Attended:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=random).bfloat16()
        for shape in ((1, HEADS, rows, dim), (1, 2, keys, dim), (1, 2, keys, dim))
    )
    return Attended(q=q, k=k, v=v, seen=torch.ones(1, rows, keys, dtype=torch.bool), scale=dim**-0.5)


def budget_of(x: Attended, **numerics: Any) -> ErrorBudget:
    terms = attention_terms(x)
    terms = replace(terms, spread=lambda w, centred: weight_spread(x, terms.out, w, centred=centred))
    return attention_budget(terms, Numerics(**PLAIN | numerics), head_dim=x.q.shape[-1], tier="generic")["out"]


def verdict(seed: int, keys: int, round_p: Rounding = nearest, rows: int = 1, **numerics: Any) -> Verdict:
    x = draw(seed, keys, rows)
    rounded_l = nearest if numerics.get("l_from") == "rounded_p" else None
    return judge(attend(x, round_p, share_of_l=rounded_l), budget_of(x, **numerics))


@pytest.mark.parametrize("l_from", ["fp32", "rounded_p"])
@pytest.mark.parametrize(("keys", "rows"), [(1, 1), (2, 5), (3, 40), (17, 40), (130, 40), (1500, 20)])
def test_rounding_to_nearest_passes_every_tier(keys: int, rows: int, l_from: str) -> None:
    for seed in range(40):
        result = verdict(seed, keys, rows=rows, l_from=l_from)
        assert result.ok, (seed, result)


def test_noise_is_as_large_as_the_model_says() -> None:
    # The mean of error² / variance says whether sigma is the standard deviation or only some bound on it.
    for keys in (130, 1500):
        energies = [verdict(seed, keys, rows=4).energy for seed in range(12)]
        assert all(energy is not None and 0.4 < energy < 1.1 for energy in energies), energies


def test_truncated_weights_are_a_bias_that_no_interval_sees() -> None:
    results = [verdict(seed, 300, truncated, rows=4) for seed in range(10)]
    assert all(result.comparison.outside == 0 for result in results)
    assert {result.failed for result in results} <= {Tier.BIAS, Tier.ENERGY, Tier.STATISTICAL}
    assert not any(result.ok for result in results)


def test_bias_alone_is_the_matched_filter_s() -> None:
    x = draw(3, 300, rows=64)
    budget = budget_of(x)
    healthy = attend(x, nearest)
    assert judge(healthy, budget).ok
    # One part in 800 too large: a quarter of a bfloat16 step, mostly rounded away.
    pushed = judge((attend_exactly(x) * (1 + 1 / 800)).bfloat16(), budget)
    assert pushed.failed is Tier.BIAS
    assert pushed.z_case > 7.5


def attend_exactly(x: Attended) -> torch.Tensor:
    return attention_terms(x).out


def test_energy_of_a_row_is_seen_inside_the_interval() -> None:
    x = draw(4, 1500)
    budget = budget_of(x)
    noise = budget.noise
    assert noise is not None
    # Three standard deviations in every element of one row, of alternating sign: no element is remarkable.
    error = 3 * noise.sigma
    error[:, 1:] = 0
    error[..., ::2] *= -1
    result = judge((budget.ref + error).bfloat16(), budget)
    assert result.comparison.unlikely == 0
    assert result.failed is Tier.ENERGY
    assert result.where == (0, 0, 0)


def test_an_element_beyond_the_statistical_interval() -> None:
    x = draw(5, 1500)
    budget = budget_of(x)
    noise = budget.noise
    assert noise is not None
    out = budget.ref.clone()
    out[0, 2, 0, 7] += noise.det[0, 2, 0, 7] + 30 * noise.sigma[0, 2, 0, 7]
    result = judge(out.bfloat16(), budget)
    assert result.comparison.outside == 0
    assert result.failed is Tier.STATISTICAL


def test_without_noise_only_the_interval_counts() -> None:
    x = draw(6, 300, rows=4)
    result = judge(attend(x, truncated), replace(budget_of(x), noise=None))
    assert result.ok
    assert result.energy is None


def test_energy_limit_is_what_chance_exceeds_that_rarely() -> None:
    random = torch.Generator().manual_seed(0)
    for freedom in (1, 5, 60):
        mean = torch.randn(400_000, freedom, generator=random).square().mean(-1)
        for odds in (2.0, 5.0):
            beyond = float((mean > energy_limit(torch.tensor(float(freedom)), odds)).double().mean())
            assert 0 < beyond <= math.exp(-odds)


@pytest.mark.parametrize("keys", [1, 2, 5])
def test_rows_of_few_keys_have_little_to_say(keys: int) -> None:
    # A weight of exactly 1 rounds to itself, so that sigma promises more noise than there is; never less.
    result = verdict(1, keys, rows=30)
    assert result.ok
    assert result.energy is not None
    assert result.energy < 1.5


def carried(share: float, dim: int) -> Attended:
    """A row of 64 keys of which the first has all the weight but for ``share``."""
    random = torch.Generator().manual_seed(dim)
    others = torch.rand(63, generator=random) + 0.2
    k = torch.cat([torch.zeros(1), torch.log(others / others.sum() * share / (1 - share))])
    v = torch.randn(1, 1, 64, dim, generator=random).bfloat16()
    seen = torch.ones(1, 1, 64, dtype=torch.bool)
    return Attended(q=torch.ones(1, 1, 1, 1), k=k.reshape(1, 1, 64, 1), v=v, seen=seen, scale=1.0)


def in_halves(x: Attended) -> torch.Tensor:
    """The output of weights that nobody rounds, merged from two partial outputs that are."""
    halves = zip(x.k.split(32, 2), x.v.split(32, 2), x.seen.split(32, 2), strict=True)
    parts = [attention_terms(replace(x, k=k, v=v, seen=seen)) for k, v, seen in halves]
    shares = torch.stack([part.lse for part in parts]).softmax(0).unsqueeze(-1)
    return (shares * torch.stack([nearest(part.out) for part in parts])).sum(0).bfloat16()


@pytest.mark.parametrize("dim", [128, 512])
@pytest.mark.parametrize("share", [n * 2.0**-9 for n in (0.01, 0.25, 0.8, 1.5, 2, 4, 6, 8, 20)])
def test_a_row_that_one_key_carries_may_be_rounded_back_to_its_value(share: float, dim: int) -> None:
    # Errors of one direction: a share of 0.8 * 2^-9 makes 17 standard deviations of them in 512 channels, and twice as
    # large a one of outputs that are rounded twice.
    x = carried(share, dim)
    once = judge(attend_exactly(x).bfloat16(), budget_of(x, l_from="rounded_p"))
    twice = judge(in_halves(x), budget_of(x, l_from="rounded_p", partial=BF16))
    for result in (once, twice):
        assert result.ok
        assert result.z_row < 5


@pytest.mark.parametrize("share", [2.0**-20, 2.0**-12, 2.0**-10])
def test_what_rounding_does_not_explain_is_seen_in_such_rows_too(share: float) -> None:
    x = carried(share, 512)
    cut = truncated(attend_exactly(x).float())
    assert judge(cut, budget_of(x, l_from="rounded_p")).failed is Tier.BIAS


@pytest.mark.parametrize("keys", [20, 3000])
def test_a_row_of_many_keys_is_not_taken_for_one_value_however_many_channels_it_has(keys: int) -> None:
    x = draw(keys, keys, rows=8, dim=512)
    budget = budget_of(x, l_from="rounded_p", partial=BF16)
    assert judge(attend(x, nearest, share_of_l=nearest), budget).ok
    assert judge((attend_exactly(x) * (1 + 1 / 800)).bfloat16(), budget).failed is Tier.BIAS


def test_a_legal_infinity_is_no_bias() -> None:
    ref = torch.randn(40, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ref[0, 0] = 65500.0  # half a step below the overflow of float16
    det = torch.zeros_like(ref)
    det[0, 0] = 100.0
    noise = Noise(
        det=det,
        sigma=torch.full_like(ref, 1e-2),
        freedom=torch.full((40,), 128.0, dtype=torch.float64),
        along=lambda weight: (1e-2 * weight.norm(dim=-1), (det * weight.abs()).sum(-1)),
    )
    budget = ErrorBudget(ref=ref, hard=det + 0.1, out=FP16, noise=noise)
    actual = ref.half()
    actual[0, 0] = torch.inf
    assert judge(actual, budget).ok
    actual[1] *= 1.02
    assert not judge(actual, budget).ok


def test_a_bug_in_one_token_is_not_diluted_by_the_others() -> None:
    x = draw(8, 300, rows=1)
    alone = budget_of(x)
    right = attend(x, nearest)
    wrong = attend(x, truncated)
    assert judge(wrong, alone).failed is Tier.BIAS
    # 200 tokens of which one is truncated: [tokens, heads, d]
    many = [draw(100 + seed, 300, rows=1) for seed in range(20)]
    budgets = [budget_of(other) for other in many]

    def token(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(1, 2).flatten(0, 1)

    def together(first: ErrorBudget) -> ErrorBudget:
        every = [first, *budgets]
        noises = [b.noise for b in every if b.noise is not None]

        def along(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            parts = [n.along(w.unsqueeze(0).transpose(1, 2)) for n, w in zip(noises, weight.split(1), strict=True)]
            deviation, bias = zip(*parts, strict=True)
            return torch.cat([token(part) for part in deviation]), torch.cat([token(part) for part in bias])

        noise = Noise(
            det=torch.cat([token(n.det) for n in noises]),
            sigma=torch.cat([token(n.sigma) for n in noises]),
            freedom=torch.cat([token(n.freedom) for n in noises]),
            along=along,
        )
        return ErrorBudget(
            ref=torch.cat([token(b.ref) for b in every]),
            hard=torch.cat([token(b.hard) for b in every]),
            out=BF16,
            noise=noise,
        )

    others = [attend(other, nearest) for other in many]
    budget = together(alone)
    assert judge(torch.cat([token(o) for o in (right, *others)]), budget).ok
    result = judge(torch.cat([token(o) for o in (wrong, *others)]), budget)
    assert result.failed is Tier.BIAS
    assert result.where is not None
    assert result.where[0] == 0
