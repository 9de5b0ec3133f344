"""The budgets of softmax and of renormalised probabilities, by simulation in float32."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from attention_cases import draws
from hypothesis import given
from hypothesis import strategies as st

from kerneltest.model import BF16, FP16, FP32, IEEE_FP32, AccModel, Fmt
from kerneltest.oracle.softmax import SoftmaxNumerics, renorm_budget, softmax_budget
from kerneltest.oracle.verdict import judge

# 32 lanes that add side by side, then a tree of 5 levels.
WARP = AccModel(24, "rne", 32, extra=5)
LOG2_E = torch.tensor(1.4426950408889634)
TILE = 64


def add_up(x: torch.Tensor) -> torch.Tensor:
    """Σ over the last dimension in float32: 32 lanes, then a tree."""
    lanes = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    total = torch.zeros_like(lanes[..., 0, :])
    for step in lanes.unbind(-2):
        total = total + step
    while total.shape[-1] > 1:
        first, second = total.chunk(2, -1)
        total = first + second
    return total


def flush(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 2.0**-126, 0.0, x)


def ex2(power: torch.Tensor) -> torch.Tensor:
    """ex2.approx.ftz, as far off as it may be."""
    return flush((torch.exp2(power.double()) * (1 + 2.0**-22.1)).float())


def plain(logits: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    s = logits / t
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / add_up(e)


def of_base_2(logits: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    s = logits * (1 / t) * LOG2_E
    e = ex2(s - s.amax(-1, keepdim=True))
    return flush(e * (1 / add_up(e)))


def fused(logits: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """log2 e and the maximum in one fused multiply-add."""
    s = logits * (1 / t)
    shift = s.amax(-1, keepdim=True) * LOG2_E
    e = ex2((s.double() * LOG2_E.double() - shift.double()).float())
    return flush(e / add_up(e))


def online(logits: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A running maximum and sum over tiles, then a second pass."""
    s = logits / t
    m, total = torch.full_like(s[..., :1], -torch.inf), torch.zeros_like(s[..., :1])
    for tile in s.split(TILE, -1):
        new = torch.maximum(m, tile.amax(-1, keepdim=True))
        safe = torch.where(new.isinf(), 0.0, new)
        total = total * ex2((m - safe) * LOG2_E) + add_up(ex2(tile * LOG2_E - safe * LOG2_E))
        m = new
    return flush(ex2((s - m) * LOG2_E) / total)


LEGAL: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "plain": plain,
    "base 2": of_base_2,
    "fused": fused,
    "online": online,
    "library": lambda logits, t: torch.softmax(logits / t, -1),
}


def numerics(name: str, vocabulary: int, out: Fmt = FP32) -> SoftmaxNumerics:
    row_sum = IEEE_FP32 if name == "library" else WARP
    return SoftmaxNumerics(row_sum=row_sum, out=out, rescales=-(-vocabulary // TILE) if name == "online" else 0)


def scores(rows: int, vocabulary: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("name", LEGAL)
def test_legal_kernels_stay_inside(name: str) -> None:
    @draws(150)
    @given(
        vocabulary=st.integers(1, 700),
        scale=st.sampled_from([0.01, 3.0, 30.0, 1000.0, 1e5]),
        offset=st.sampled_from([0.0, -500.0, 80.0]),
        temperature=st.sampled_from([0.05, 0.7, 1.0, 2.0]),
        masked=st.booleans(),
        dtype=st.sampled_from([torch.bfloat16, torch.float32]),
        out=st.sampled_from([FP32, BF16, FP16]),
        seed=st.integers(0, 2**20),
    )
    def prop(
        vocabulary: int,
        scale: float,
        offset: float,
        temperature: float,
        masked: bool,
        dtype: torch.dtype,
        out: Fmt,
        seed: int,
    ) -> None:
        logits = (scores(4, vocabulary, seed, scale) + offset).to(dtype)
        if masked:
            logits[:, 1::3] = -torch.inf
        budget = softmax_budget(logits, temperature, numerics(name, vocabulary, out))
        got = LEGAL[name](logits.float(), torch.tensor(temperature)).to(getattr(torch, out.name))
        verdict = judge(got, budget)
        assert verdict.ok, verdict

    prop()


def test_a_temperature_for_each_row() -> None:
    logits, t = scores(4, 100, 0), torch.tensor([[0.5], [1.0], [1.5], [0.1]])
    assert judge(plain(logits, t), softmax_budget(logits, t, numerics("plain", 100))).ok
    assert not judge(plain(logits, t.flip(0)), softmax_budget(logits, t, numerics("plain", 100))).ok


def total_of_rounded(logits: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    s = logits / t
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / add_up(e.bfloat16().float())


def without_the_last(logits: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    s = logits / t
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / add_up(e[..., :-1])


def one_tile_not_rescaled(logits: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    s = logits / t
    first, rest = s[..., :TILE], s[..., TILE:]
    m = s.amax(-1, keepdim=True)
    total = (first - first.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True) + (rest - m).exp().sum(-1, keepdim=True)
    return (s - m).exp() / total


MUTANTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum of rounded": total_of_rounded,
    "last token not summed": without_the_last,
    "tile not rescaled": one_tile_not_rescaled,
    "temperature in bf16": lambda logits, t: plain(logits, t.bfloat16().float()),
    "scores in bf16": lambda logits, t: plain((logits / t).bfloat16().float(), torch.tensor(1.0)),
    "temperature forgotten": lambda logits, t: plain(logits, torch.tensor(1.0)),
    "base 2 for e": lambda logits, t: of_base_2(logits, t * LOG2_E),
    "log2 e of 16 bits": lambda logits, t: plain(logits, t / (LOG2_E.half().float() / LOG2_E)),
    "result in bf16": lambda logits, t: plain(logits, t).bfloat16().float(),
}


@pytest.mark.parametrize("rescales", [0, 10])
@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_kernels_are_caught(name: str, rescales: int) -> None:
    for seed in range(5):
        # Ascending tiles, so that a rescale that is left out matters.
        logits, t = scores(4, 600, seed) + torch.arange(600) / 100, torch.tensor(0.7)
        declared = SoftmaxNumerics(row_sum=WARP, rescales=rescales)
        budget = softmax_budget(logits, t, declared)
        assert judge(plain(logits, t), budget).ok
        assert not judge(MUTANTS[name](logits, t), budget).ok


def test_sums_of_rounded_weights_show_in_bf16_too() -> None:
    logits, t = scores(32, 600, 0), torch.tensor(0.7)
    budget = softmax_budget(logits, t, numerics("plain", 600, BF16))
    assert judge(plain(logits, t).bfloat16(), budget).ok
    assert not judge(total_of_rounded(logits, t).bfloat16(), budget).ok


def test_masked_tokens_are_zero_and_faint_ones_may_be() -> None:
    logits = torch.tensor([[0.0, -torch.inf, -88.0, -200.0]])
    budget = softmax_budget(logits, 1.0, SoftmaxNumerics(row_sum=WARP))
    for values, ok in (
        ([1.0, 0.0, 6.05e-39, 0.0], True),
        ([1.0, 0.0, 0.0, 0.0], True),
        ([1.0, 1e-44, 0.0, 0.0], False),
        ([1.0, 0.0, 0.0, 1e-37], False),
    ):
        assert judge(torch.tensor([values]), budget).ok is ok


def test_how_much_of_the_softmax_bound_is_used() -> None:
    used = {}
    for name, kernel in LEGAL.items():
        logits, t = scores(200, 300, 0), torch.tensor(0.7)
        used[name] = judge(kernel(logits, t), softmax_budget(logits, t, numerics(name, 300))).used
    assert all(0.05 < share < 0.9 for share in used.values()), used
    assert max(used.values()) > 0.2


def test_the_softmax_in_50_digits() -> None:
    logits = scores(2, 40, 0, 20.0)
    logits[0, 3] = -torch.inf
    # 0.7 reaches a kernel as the float32 next to it.
    temperature = torch.tensor(0.7)
    ref = softmax_budget(logits, 0.7, SoftmaxNumerics(row_sum=WARP)).ref
    with mpmath.workdps(50):
        for row, expected in zip(logits.tolist(), ref.tolist(), strict=True):
            e = [mpmath.exp(mpmath.mpf(v) / mpmath.mpf(temperature.item())) for v in row]
            for value, got in zip(e, expected, strict=True):
                assert abs(value / sum(e) - got) <= 1e-13 * value / sum(e)


def test_what_no_softmax_can_be_is_refused() -> None:
    good, declared = scores(2, 8, 0), SoftmaxNumerics(row_sum=WARP)
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature"):
            softmax_budget(good, temperature, declared)
    for value in (torch.inf, torch.nan):
        bad = good.clone()
        bad[0, 0] = value
        with pytest.raises(ValueError, match="finite"):
            softmax_budget(bad, 1.0, declared)
    with pytest.raises(ValueError, match="finite"):
        softmax_budget(torch.full((1, 4), -torch.inf), 1.0, declared)
    with pytest.raises(ValueError, match="as much as the result"):
        softmax_budget(good, 1.0, SoftmaxNumerics(row_sum=AccModel(2, "rz", 1)))
    with pytest.raises(ValueError, match="exp_rel"):
        SoftmaxNumerics(row_sum=WARP, exp_rel=1.0)


def filtered(rows: int, vocabulary: int, seed: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, and a mask that keeps the largest of them: at least one, ``share`` of all."""
    probs = torch.softmax(scores(rows, vocabulary, seed), -1)
    count = max(1, round(share * vocabulary))
    keep = probs >= probs.sort(-1, descending=True).values[:, count - 1 : count]
    return probs, keep


def renormalise(probs: torch.Tensor, keep: torch.Tensor, variant: str = "division") -> torch.Tensor:
    kept = torch.where(keep, probs, 0.0)
    if variant == "library":
        return kept / kept.sum(-1, keepdim=True)
    if variant == "backwards":
        return kept / add_up(kept.flip(-1))
    total = add_up(kept)
    return kept * (1 / total) if variant == "reciprocal" else kept / total


@pytest.mark.parametrize("variant", ["division", "reciprocal", "backwards", "library"])
def test_legal_renormalisations_stay_inside(variant: str) -> None:
    @draws(200)
    @given(
        vocabulary=st.integers(1, 900),
        share=st.floats(0.0, 1.0),
        out=st.sampled_from([FP32, BF16]),
        seed=st.integers(0, 2**20),
    )
    def prop(vocabulary: int, share: float, out: Fmt, seed: int) -> None:
        probs, keep = filtered(4, vocabulary, seed, share)
        budget = renorm_budget(probs, keep, row_sum=IEEE_FP32 if variant == "library" else WARP, out=out)
        assert judge(renormalise(probs, keep, variant).to(getattr(torch, out.name)), budget).ok

    prop()


@pytest.mark.parametrize("vocabulary", [32, 1000, 32_000])
def test_wrong_renormalisations_are_caught(vocabulary: int) -> None:
    probs, keep = filtered(4, vocabulary, 0, 0.5)
    keep[:, -1], probs[:, -1] = True, 0.001
    right = renormalise(probs, keep)
    budget = renorm_budget(probs, keep, row_sum=WARP)
    assert judge(right, budget).ok
    last = torch.arange(vocabulary) == vocabulary - 1
    inside = torch.where(keep & ~last, probs, 0.0)
    total = add_up(torch.where(keep, probs, 0.0))
    wrong = {
        "all zero": torch.zeros_like(right),
        "last lane not written": torch.where(last, 0.0, right),
        "last lane not summed": torch.where(keep, probs, 0.0) / add_up(inside),
        "zeros that are not": torch.where(keep, right, 1e-30),
        "the smallest number there is": torch.where(keep, right, 2.0**-149),
        "not divided": torch.where(keep, probs, 0.0),
        "not filtered": probs / total,
        "total in bf16": torch.where(keep, probs, 0.0) / total.bfloat16().float(),
    }
    for name, output in wrong.items():
        assert not judge(output, budget).ok, name
    # A fixed tolerance calls all zeros right once no token holds much.
    flat = torch.full((1, 32_000), 1 / 32_000)
    everything = torch.ones_like(flat, dtype=torch.bool)
    assert torch.allclose(torch.zeros_like(flat), flat, rtol=1e-3, atol=1e-3)
    assert not judge(torch.zeros_like(flat), renorm_budget(flat, everything, row_sum=WARP)).ok


def test_zero_leaves_one_number() -> None:
    probs, keep = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[True, False, True]])
    budget = renorm_budget(probs, keep, row_sum=WARP)
    assert (budget.ref[0, 1:] == 0).all()
    assert (budget.hard[0, 1:] == 0).all()
    for value, ok in ((0.0, True), (-0.0, True), (2.0**-149, False), (-(2.0**-149), False), (torch.nan, False)):
        for place in (1, 2):
            output = torch.tensor([[1.0, 0.0, 0.0]])
            output[0, place] = value
            assert judge(output, budget).ok is ok


def test_a_subnormal_probability_may_be_flushed() -> None:
    probs, keep = torch.tensor([[1e-39, 2e-38, 1e-38]]), torch.tensor([[True, True, False]])
    budget = renorm_budget(probs, keep, row_sum=WARP)
    assert judge(torch.tensor([[0.0, 1.0, 0.0]]), budget).ok
    assert judge(torch.tensor([[0.047619, 0.952381, 0.0]]), budget).ok


def test_how_much_of_the_renormalisation_bound_is_used() -> None:
    used = {}
    for vocabulary in (20, 300):
        probs, keep = filtered(200, vocabulary, 0, 0.5)
        used[vocabulary] = judge(renormalise(probs, keep, "reciprocal"), renorm_budget(probs, keep, row_sum=WARP)).used
    assert all(0.15 < share < 0.9 for share in used.values()), used


def test_the_renormalised_in_50_digits() -> None:
    probs, keep = filtered(2, 60, 0, 0.4)
    ref = renorm_budget(probs, keep, row_sum=WARP).ref
    with mpmath.workdps(50):
        for row, mask, expected in zip(probs.tolist(), keep.tolist(), ref.tolist(), strict=True):
            total = sum(mpmath.mpf(p) for p, inside in zip(row, mask, strict=True) if inside)
            for p, inside, got in zip(row, mask, expected, strict=True):
                assert abs((mpmath.mpf(p) / total if inside else 0) - got) <= 1e-15 * p


def test_what_cannot_be_renormalised_is_refused() -> None:
    probs = torch.tensor([[0.5, 0.5]])
    for bad, keep, message in (
        (probs, torch.tensor([[True]]), "keep is"),
        (probs, torch.tensor([[1, 1]]), "keep is"),
        (probs, torch.tensor([[False, False]]), "keeps no probability"),
        (-probs, torch.tensor([[True, True]]), "not negative"),
        (probs * torch.inf, torch.tensor([[True, True]]), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            renorm_budget(bad, keep, row_sum=WARP)
    with pytest.raises(ValueError, match="as much as the sum"):
        renorm_budget(probs, torch.tensor([[True, True]]), row_sum=AccModel(2, "rz", 1))
