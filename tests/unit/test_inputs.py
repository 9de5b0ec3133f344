"""The input strategies of attention: each holds what it promises, excuses no right kernel, and shows what it is for."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections import Counter
from typing import Any

import pytest
import torch
from attention_cases import case, draws, paged
from attention_kernel import RIGHT, Flaw, judged, with_inputs
from hypothesis import given

from kerneltest.model import FORMATS, FP32, Case, Size
from kerneltest.oracle.verdict import Tier

strategies = importlib.import_module(f"{paged.__package__}._inputs")

NAMES = [strategy.name for strategy in paged.INPUTS]
SMALL = paged.cases(Size(batch=3, qo_len=40, kv_len=140, heads=8))
TYPICAL = case((40, 200), (3, 70), (1, 129), head_dim=128, kv_heads=2, group=2, page_size=16, causal=True)


def made(inputs: str, **axes: Any) -> Any:
    """q, K and V of the typical case, float64."""
    typical = with_inputs(dataclasses.replace(TYPICAL, axes=dataclasses.replace(TYPICAL.axes, **axes)), inputs)
    found = paged.materialize(typical).inputs
    return typical, *(found[name].double() for name in ("q", "k_pages", "v_pages"))


def keys_of(one: Case[Any], request: int) -> tuple[slice, slice]:
    """The rows of a request and its pages, where pages are not shuffled."""
    rows = sum(r.qo_len for r in one.axes.requests[:request])
    pages = sum(one.axes.pages(r) for r in one.axes.requests[:request])
    this = one.axes.requests[request]
    return slice(rows, rows + this.qo_len), slice(pages, pages + one.axes.pages(this))


def scores(one: Case[Any], q: torch.Tensor, k: torch.Tensor, request: int) -> torch.Tensor:
    """Of all keys of a request, masked ones as well: [q_heads, qo_len, kv_len]."""
    rows, pages = keys_of(one, request)
    keys = k[pages].flatten(0, 1)[: one.axes.requests[request].kv_len].repeat_interleave(one.axes.group, 1)
    return torch.einsum("thd,jhd->htj", q[rows], keys) * one.axes.scale


@pytest.mark.parametrize("inputs", NAMES)
@pytest.mark.parametrize(("tile", "l_from"), [(16, "fp32"), (64, "rounded_p")])
def test_right_kernels_stay_inside(inputs: str, tile: int, l_from: str) -> None:
    @draws(40)
    @given(SMALL)
    def prop(one: Case[Any]) -> None:
        _, verdicts = judged(with_inputs(one, inputs), tile=tile, l_from=l_from)
        for output, verdict in verdicts.items():
            assert verdict.ok, (output, verdict)

    prop()


@pytest.mark.parametrize("inputs", ["scaled", "outlier"])
def test_noise_on_uneven_inputs_is_noise_of_the_expected_size(inputs: str) -> None:
    # What makes these inputs generic: their tiers have the room that they have on normal ones.
    for seed in range(10):
        _, verdicts = judged(with_inputs(dataclasses.replace(TYPICAL, seed=seed), inputs))
        out = verdicts["out"]
        assert out.energy is not None
        assert 0.3 < out.energy < 1.5
        assert out.z_row < 5


@pytest.mark.parametrize("head_dim", [64, 128, 256, 3, 5, 6, 7, 40, 100])
def test_the_moduli_are_coprime_and_share_all_channels(head_dim: int) -> None:
    larger, smaller = strategies.moduli(head_dim)
    assert larger + smaller == head_dim
    assert math.gcd(larger, smaller) == 1
    if head_dim in paged.HEAD_DIMS:
        # Runs of 2^k tokens are seen to begin somewhere.
        assert larger % 2 == smaller % 2 == 1
        assert larger * smaller > head_dim**2 / 4 - 2


@pytest.mark.parametrize("dtype", paged.DTYPES)
@pytest.mark.parametrize("head_dim", paged.HEAD_DIMS)
def test_counting_inputs_count(dtype: str, head_dim: int) -> None:
    counting, q, _, v = made("count", dtype=dtype, head_dim=head_dim)
    assert not q.any()
    assert set(v.unique().tolist()) == {0.0, 1.0}
    blocks = v.split(strategies.moduli(head_dim), -1)
    assert all((block.sum(-1) == 1).all() for block in blocks)
    # Tokens of all requests and heads are numbered through.
    numbers = Counter()
    for request, this in enumerate(counting.axes.requests):
        _, pages = keys_of(counting, request)
        residues = [block[pages].flatten(0, 1)[: this.kv_len].argmax(-1) for block in blocks]
        numbers.update(zip(*(r.flatten().tolist() for r in residues), strict=True))
    total = 2 * (200 + 70 + 129)
    assert sum(numbers.values()) == total
    assert len(numbers) == min(total, math.prod(strategies.moduli(head_dim)))
    # The right answer counts tokens: a row that sees n keys holds multiples of 1/n, n of them in each block.
    terms = paged.reference(counting, paged.materialize(counting).inputs, "cpu")
    counts = terms.out * terms.keys.unsqueeze(-1)
    assert (counts - counts.round()).abs().max() < 1e-9
    for block in counts.round().split(strategies.moduli(head_dim), -1):
        assert torch.equal(block.sum(-1), terms.keys)


def test_keys_do_not_matter_where_tokens_are_counted() -> None:
    for inputs in ("count", "integer"):
        one, q, k, _ = made(inputs)
        assert k.abs().max() > 1
        assert not scores(one, q, k, 0).any()


@pytest.mark.parametrize("dtype", paged.DTYPES)
def test_dyadic_weights_need_no_rounding(dtype: str) -> None:
    one, q, k, v = made("dyadic", dtype=dtype)
    assert set(q.unique().tolist()) == set(k.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert (q.count_nonzero(-1) == 7).all()
    dots = scores(one, q, k, 0) / math.log(2.0)
    assert (dots - dots.round()).abs().max() < 1e-12
    # Weights relative to any running maximum, not the final one alone.
    lowest = dots.round().amin() - dots.round().amax()
    assert -14 <= lowest <= -8
    for weight in 2.0 ** torch.arange(int(lowest), 1):
        assert weight >= torch.finfo(torch.float16).tiny
        assert float(weight.half()) == float(weight.bfloat16()) == float(weight)
    assert len(v.unique()) > 1000


@pytest.mark.parametrize("scale", [None, 0.5, 0.693147])
def test_dyadic_inputs_with_another_scale_are_refused(scale: float | None) -> None:
    with pytest.raises(ValueError, match=r"inputs 'dyadic' need sm_scale = ln 2 = 0\.6931471805599453, got "):
        paged.materialize(case((1, 1), inputs="dyadic", sm_scale=scale))


@pytest.mark.parametrize("axes", [{"k_scale": 0.5}, {"softcap": 30.0}])
def test_dyadic_inputs_with_other_changes_of_the_scores_are_refused(axes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="need scores that no other scale and no soft-cap changes"):
        paged.materialize(case((1, 1), inputs="dyadic", sm_scale=math.log(2.0), **axes))


@pytest.mark.parametrize("inputs", NAMES)
def test_inputs_whose_weights_are_exact_are_refused_with_a_bias(inputs: str) -> None:
    one = case((3, 5), inputs=inputs, alibi=True, sm_scale=math.log(2.0) if inputs == "dyadic" else None)
    if paged.paged_prefill.strategy(inputs).tier == "exact":
        with pytest.raises(ValueError, match=f"inputs '{inputs}' need scores to which no ALiBi is added"):
            paged.materialize(one)
    else:
        paged.materialize(one)


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("inputs", NAMES)
def test_eight_bits_hold_every_kind_of_input(inputs: str, kv_dtype: str) -> None:
    one, _, k, v = made(inputs, kv_dtype=kv_dtype, v_scale=1.6875)
    _, _, wide_k, wide_v = made(inputs)
    fmt = FORMATS[kv_dtype]
    for narrow, wide in ((k, wide_k), (v, wide_v)):
        assert narrow.isfinite().all()
        if inputs in ("scaled", "special", "outlier"):
            continue  # of another magnitude
        assert ((narrow - wide).abs() <= wide.abs() * (fmt.u + 2.0**-8) + fmt.eta + 1e-30).all()
    if inputs in ("count", "integer", "dyadic"):
        # What makes them exact needs no more than eight bits.
        assert inputs == "dyadic" or torch.equal(v, wide_v)
        assert inputs != "dyadic" or torch.equal(k, wide_k)
    assert v.abs().max() <= fmt.max / 2
    assert one.axes.kv_format == kv_dtype


def test_a_soft_cap_is_reached_by_the_usual_scores_and_by_large_ones() -> None:
    for inputs, cap in (("generic", 2.0), ("large_logits", 50.0), ("needle", 30.0)):
        one, q, k, _ = made(inputs)
        largest = float(scores(one, q, k, 0).abs().max())
        assert largest > cap, inputs
        capped = dataclasses.replace(one, axes=dataclasses.replace(one.axes, softcap=cap))
        right, verdicts = judged(capped)
        assert all(verdict.ok for verdict in verdicts.values())
        # A kernel that forgets it is seen.
        assert not torch.equal(judged(one)[0]["lse"], right["lse"])


@draws(300)
@given(paged.cases(Size(batch=1, qo_len=3, kv_len=9, heads=2)))
def test_strategies_are_drawn_with_the_scale_that_they_need(one: Case[Any]) -> None:
    assert one.axes.sm_scale == (math.log(2.0) if one.inputs == "dyadic" else None)
    if one.inputs == "dyadic":
        assert (one.axes.k_scale, one.axes.softcap) == (1.0, 0.0)
    for simpler in paged.simpler(one):
        paged.materialize(simpler)


@pytest.mark.parametrize("dtype", paged.DTYPES)
def test_integer_sums_are_exact_in_any_order(dtype: str) -> None:
    _, q, _, v = made("integer", dtype=dtype)
    assert not q.any()
    assert torch.equal(v, v.round())
    assert float(v.abs().max()) == strategies.LARGEST_INTEGER
    values = v.flatten(0, 1).float()
    for seed in range(5):
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(values[order].cumsum(0)[-1].double(), v.flatten(0, 1).sum(0))
    # With the longest request of any profile the sums would still be.
    assert strategies.LARGEST_INTEGER * 8300 < 2**24


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", paged.HEAD_DIMS)
def test_needles_outweigh_all_other_keys(head_dim: int, causal: bool) -> None:
    one, q, k, v = made("needle", causal=causal, head_dim=head_dim)
    visible_targets, masked_targets = 0, 0
    for request, this in enumerate(one.axes.requests):
        s = scores(one, q, k, request)
        top = s.argmax(-1)
        visible = torch.arange(this.qo_len) + this.kv_len - this.qo_len + 1 if causal else torch.tensor(this.kv_len)
        # A needle is visible or the first that is not.
        assert (top <= visible).all()
        assert (s.softmax(-1).amax(-1) > 0.999).all()
        visible_targets += int((top < visible).sum())
        masked_targets += int((top == visible).sum())
    assert visible_targets > 100
    assert (masked_targets > 5) == causal
    # Values that differ tell which one it was.
    flat = v.flatten(0, 1)[:, 0]
    assert torch.pdist(flat).min() > 1


def test_needles_reach_every_place_that_matters() -> None:
    axes = case((64, 300), page_size=16, kv_heads=2, group=2, causal=True).axes
    slot = strategies.needles(axes, axes.requests[0], 5)
    row = torch.arange(64).unsqueeze(-1)
    reached = {
        "first": slot == 0,
        "last visible": slot == 236 + row,
        "first masked": slot == 237 + row,
        "end of page 0": slot == 15,
        "start of page 1": slot == 16,
        **{f"tile edge {edge}": slot == edge for edge in (63, 64, 127, 128)},
        **{f"page {page}": slot // 16 == page for page in range(300 // 16)},
    }
    assert [name for name, where in reached.items() if not where.any()] == []
    assert (slot >= 0).all()
    assert (slot < 300).all()


def test_needles_reach_both_ends_of_a_window() -> None:
    axes = case((64, 300), page_size=16, kv_heads=2, group=2, causal=True, window_left=100).axes
    slot = strategies.needles(axes, axes.requests[0], 5)
    row = torch.arange(64).unsqueeze(-1)
    reached = {
        "last before it": slot == 135 + row,
        "first": slot == 136 + row,
        "last": slot == 236 + row,
        "first masked": slot == 237 + row,
        "start of a page": slot % 16 == 0,
        "nothing else": torch.ones(1),
    }
    assert [name for name, where in reached.items() if not where.any()] == []
    assert (slot >= 135 + row).all()
    assert (slot <= 237 + row).all()


@pytest.mark.parametrize(("qo_len", "kv_len"), [(1, 1), (5, 2), (2, 5), (70, 64), (3, 1000)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_left", [-1, 0, 3, 64, 2000])
def test_needles_exist(qo_len: int, kv_len: int, causal: bool, window_left: int) -> None:
    axes = case((qo_len, kv_len), page_size=16, kv_heads=2, group=2, causal=causal, window_left=window_left).axes
    for start in range(40):
        slot = strategies.needles(axes, axes.requests[0], start)
        assert ((slot >= 0) & (slot < kv_len)).all()


def test_scaled_inputs_have_any_magnitude() -> None:
    exponents, ratios = set(), set()
    for seed in range(60):
        found = paged.materialize(dataclasses.replace(with_inputs(TYPICAL, "scaled"), seed=seed)).inputs
        one, other = found["v_pages"].double().std((0, 1, 3)).log2().round().tolist()
        assert other - one == 2
        exponents.add(one)
        q = found["q"].double().std((0, 2)).log2().round()
        assert set(q.tolist()) <= {-1.0, 0.0, 1.0}
        ratios.add(float(q[0] - q[1]))
    assert {-10.0, 10.0} <= exponents
    assert {-2.0, 0.0, 2.0} <= ratios


@pytest.mark.parametrize("dtype", paged.DTYPES)
def test_outliers_are_one_channel_each(dtype: str) -> None:
    _, *tensors = made("outlier", dtype=dtype)
    for tensor, factor in zip(tensors, (8, 8, 64), strict=True):
        of_channel = tensor.std(list(range(tensor.dim() - 1))).sort(descending=True).values
        assert 0.8 * factor < of_channel[0] < 1.2 * factor
        assert of_channel[1] < 1.3


@pytest.mark.parametrize("dtype", paged.DTYPES)
@pytest.mark.parametrize("head_dim", paged.HEAD_DIMS)
def test_large_logits_are_large_in_three_ways(dtype: str, head_dim: int) -> None:
    one, q, k, _ = made("large_logits", dtype=dtype, head_dim=head_dim)
    s = scores(one, q, k, 0)
    ways = [
        "high" if head.min() > 250 else "low" if head.max() < -250 else "apart" if head.abs().max() > 300 else "?"
        for head in s
    ]
    assert set(ways) == {"high", "low", "apart"}
    assert s.abs().max() < 1000
    for way, p in zip(ways, s.softmax(-1), strict=True):
        # One weight of 1, or many.
        assert (p.amax(-1).mean() > 0.8) == (way == "apart")
    # Out of reach of an fp32 exponential, both ways.
    assert float(torch.tensor(250.0).exp()) == math.inf
    assert float(torch.tensor(-250.0).exp()) == 0


@pytest.mark.parametrize("dtype", paged.DTYPES)
def test_special_inputs_hold_what_they_say(dtype: str) -> None:
    found = paged.materialize(
        with_inputs(dataclasses.replace(TYPICAL, axes=dataclasses.replace(TYPICAL.axes, dtype=dtype)), "special")
    ).inputs
    fmt = FORMATS[dtype]
    for name in ("q", "k_pages", "v_pages"):
        tensor = found[name]
        assert tensor.isfinite().all()
        values = tensor.double()
        assert ((values == 0) & torch.signbit(values)).double().mean() > 0.03
        for size in (2 * fmt.eta, 2.0**fmt.emin - 2 * fmt.eta):
            assert {-size, size} <= set(values[values.abs() == size].tolist()), (name, size)
    q, k, v = (found[name].double() for name in ("q", "k_pages", "v_pages"))
    (of_keys,) = (k.abs() > 1000).all((0, 1, 2)).nonzero().flatten().tolist()
    assert not q[..., of_keys].any()
    assert torch.signbit(q[..., of_keys]).unique().numel() == 2
    assert float(k[..., of_keys].abs().max()) == 2.0 ** (fmt.emax - 2)
    (of_values,) = (v.abs() > 1000).all((0, 1, 2)).nonzero().flatten().tolist()
    # The sum of twice the keys is what a kernel may have to hold in fp32.
    assert 2 * 200 * float(v[..., of_values].abs().max()) < FP32.max / 2
    assert float(v.abs().max()) <= fmt.max / 4


def lose(slot: int) -> Flaw:
    return Flaw(times=lambda request, times: times[:, slot : slot + 1].zero_())


def double(first: int, end: int) -> Flaw:
    return Flaw(times=lambda request, times: times[:, first:end].mul_(2))


def leak(_request: int, times: torch.Tensor) -> None:
    """The first masked slot of every row."""
    visible = times.sum(-1).long()
    for row in range(len(times)):
        if 0 < visible[row] < times.shape[1]:
            times[row, visible[row]] = 1


def swapped_pages(table: torch.Tensor) -> torch.Tensor:
    """Page 1 of the table is page 2."""
    table = table.clone()
    table[1] = table[2]
    return table


CAUGHT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "first slot lost": ({"flaw": lose(0)}, {"count", "needle", "integer", "dyadic"}),
    "slot at the end of a page lost": ({"flaw": lose(15)}, {"count", "needle", "integer", "dyadic"}),
    "slot doubled": ({"flaw": double(64, 65)}, {"count", "needle", "integer", "dyadic"}),
    "tile twice": ({"flaw": double(0, 64)}, {"count", "needle", "integer", "dyadic"}),
    "first masked slot leaks": ({"flaw": Flaw(times=leak)}, {"count", "needle", "integer", "dyadic"}),
    "wrong page": ({"table": swapped_pages}, {"count", "needle", "integer", "dyadic"}),
    "scale of the case ignored": ({"flaw": Flaw(scale=1 / math.sqrt(128))}, {"dyadic"}),
    "maximum not subtracted": ({"flaw": Flaw(no_max=True)}, {"large_logits"}),
    "small outputs flushed": ({"flaw": Flaw(out=lambda out: out * (out.abs() > 1e-4))}, {"scaled"}),
    "values clamped": ({"flaw": Flaw(v=lambda v: v.clamp(-40, 40))}, {"outlier", "scaled"}),
    "values in fp16": ({"flaw": Flaw(v=lambda v: v.half().float())}, {"special"}),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bug", CAUGHT)
def test_each_strategy_catches_what_it_is_for(bug: str, dtype: str) -> None:
    wrong, strategies_that_see = CAUGHT[bug]
    typical = dataclasses.replace(TYPICAL, axes=dataclasses.replace(TYPICAL.axes, dtype=dtype))
    seeds = range(12) if "scaled" in strategies_that_see else range(2)
    for inputs in sorted(strategies_that_see):
        seen = [
            not all(
                v.ok for v in judged(dataclasses.replace(with_inputs(typical, inputs), seed=seed), **wrong)[1].values()
            )
            for seed in seeds
        ]
        # A magnitude has to be drawn first; everything else shows in every case.
        assert any(seen) if inputs == "scaled" else all(seen), inputs


@pytest.mark.parametrize(
    ("bug", "missed_by"),
    [
        ("maximum not subtracted", {"generic", "count", "dyadic", "needle", "integer"}),
        ("values clamped", {"generic", "count", "dyadic", "needle", "integer", "large_logits"}),
        ("values in fp16", {"generic", "count", "dyadic", "needle", "integer", "large_logits", "outlier"}),
    ],
)
def test_some_mistakes_need_their_strategy(bug: str, missed_by: set[str]) -> None:
    typical = dataclasses.replace(TYPICAL, axes=dataclasses.replace(TYPICAL.axes, dtype="bfloat16"))
    for inputs in sorted(missed_by):
        assert all(verdict.ok for verdict in judged(with_inputs(typical, inputs), **CAUGHT[bug][0])[1].values()), inputs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_needle_behind_the_mask_changes_the_answer_altogether(dtype: str) -> None:
    leaky = dataclasses.replace(TYPICAL, axes=dataclasses.replace(TYPICAL.axes, dtype=dtype))
    outputs, verdicts = judged(with_inputs(leaky, "needle"), Flaw(times=leak))
    right, _ = judged(with_inputs(leaky, "needle"), RIGHT)
    assert verdicts["out"].failed is Tier.HARD
    assert verdicts["out"].comparison.outside >= 128
    assert (outputs["out"].double() - right["out"].double()).abs().max() > 1
