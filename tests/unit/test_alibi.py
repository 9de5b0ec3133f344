"""ALiBi: its slopes, and the budget of scores to which it is added: what a right kernel may do, and what none may."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import alibi, axes_of, case, draws, gathered, paged, shown
from attention_cases import slopes as of_the_paper
from attention_kernel import Flaw, biased_and_capped, judged
from hypothesis import given
from hypothesis import strategies as st

from kerneltest import discovery
from kerneltest.model import FORMATS, FP32, IEEE_FP32, Case, Numerics, Size
from kerneltest.oracle.verdict import Verdict, judge

ours = importlib.import_module(f"{discovery.PACKAGE}.attention._alibi")
LOG2_E = math.log2(math.e)
PLAIN = {"kv_heads": 2, "group": 2, "head_dim": 64}
BATCH = case((20, 90), (1, 300), (33, 33), alibi=True, **PLAIN)


def test_slopes_are_those_of_the_paper() -> None:
    assert ours.slopes(8) == [2.0**-h for h in range(1, 9)]
    assert ours.slopes(1) == [2.0**-8]
    # Eight of 12 heads are those of 8, the other four every second one of 16.
    assert ours.slopes(12)[8:] == [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    for heads in range(1, 130):
        assert ours.slopes(heads) == pytest.approx(of_the_paper(heads), rel=1e-13, abs=0)


def in_fp32(heads: int) -> torch.Tensor:
    """As powers in fp32, in the way of FlashInfer: of a rounded base."""
    below = 2 ** int(math.log2(heads))
    first = torch.pow(2.0 ** (-8 / below), torch.arange(1, below + 1))
    odd = 2 * torch.arange(heads - below) + 1
    return torch.cat([first, torch.pow(2.0 ** (-4 / below), odd)])


def test_powers_in_fp32_are_as_wrong_as_declared() -> None:
    worst = 0.0
    for heads in range(1, 130):
        powers = in_fp32(heads)
        assert powers.dtype == torch.float32
        right = torch.tensor(ours.slopes(heads), dtype=torch.float64)
        used = float((powers.double() / right - 1).abs().max()) / ours.error_of_powers(heads)
        assert used <= 1
        worst = max(worst, used)
    # It is the base that is rounded: a bound that forgot it would be too small.
    assert worst > 0.1
    right = torch.tensor(ours.slopes(128), dtype=torch.float64)
    assert float((in_fp32(128).double() / right - 1).abs().max()) > ours.POWF


def with_alibi(of: Case[Any]) -> Case[Any]:
    """The case with ALiBi; with inputs of which it leaves something."""
    if paged.paged_prefill.strategy(of.inputs).tier == "exact":
        of = replace(of, inputs="generic", axes=replace(of.axes, sm_scale=None))
    return replace(of, relation="", axes=replace(of.axes, alibi=True))


drawn = paged.cases(Size(batch=3, qo_len=40, kv_len=200, heads=8)).map(with_alibi)


@pytest.mark.parametrize(("tile", "l_from"), [(16, "fp32"), (64, "rounded_p")])
def test_right_kernels_stay_inside(tile: int, l_from: str) -> None:
    @draws(100)
    @given(drawn)
    def prop(of: Case[Any]) -> None:
        for name, verdict in judged(of, tile=tile, l_from=l_from)[1].items():
            assert verdict.ok, (name, verdict)

    prop()


def base_2(of: Case[Any], inputs: Mapping[str, torch.Tensor], *, tile: int, slopes: float) -> dict[str, torch.Tensor]:
    """Scores in base 2, whose maximum is subtracted by fused multiply-adds, with slopes that are powers in fp32.

    ``slopes`` multiplies them.
    """
    slope, scale, outs, lses = in_fp32(of.axes.q_heads) * slopes, torch.tensor(of.axes.scale), [], []
    unit, dtype = torch.tensor(LOG2_E), getattr(torch, of.axes.dtype)

    def less(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # a · unit, not rounded, less b · unit, which is.
        return (a.double() * unit.double() - (b * unit).double()).float()

    for (request, q, k, v), seen in zip(gathered(of, inputs), shown(of, inputs), strict=True):
        i, j = torch.arange(request.qo_len).unsqueeze(-1), torch.arange(request.kv_len)
        bias = slope[:, None, None] * (j - i).float()
        s = (q @ k.mT * scale + bias).masked_fill(~seen, -torch.inf)
        m = torch.full(s.shape[:-1], -5e4)
        total, acc = torch.zeros_like(m), torch.zeros(*m.shape, v.shape[-1])
        for start in range(0, request.kv_len, tile):
            here = s[..., start : start + tile]
            new = torch.maximum(m, here.amax(-1))
            rescale = torch.exp2(less(m, new))
            p = torch.exp2(less(here, new.unsqueeze(-1))).to(dtype).float()
            total = total * rescale + p.sum(-1)
            acc = acc * rescale.unsqueeze(-1) + p @ v[:, start : start + tile]
            m = new
        outs.append((acc / total.unsqueeze(-1)).transpose(0, 1))
        lses.append((m * unit + total.log2()).transpose(0, 1))
    return {"out": torch.cat(outs).to(dtype), "lse": torch.cat(lses)}


def judged_in_base_2(of: Case[Any], *, tile: int = 16, slopes: float = 1.0, **declared: Any) -> dict[str, Verdict]:
    inputs = paged.materialize(of).inputs
    fmt = FORMATS[of.axes.dtype]
    said = {"slope_rel": ours.error_of_powers(of.axes.q_heads), "p": fmt, "out": fmt} | declared
    numerics = Numerics(qk=IEEE_FP32, pv=IEEE_FP32, l_from="rounded_p", tile=tile, lse_base="2", **said)
    terms = paged.reference(of, inputs, "cpu")
    budgets = paged.budget(of, terms, numerics, paged.paged_prefill.strategy(of.inputs))
    outputs = base_2(of, inputs, tile=tile, slopes=slopes)
    return {name: judge(outputs[name], budget) for name, budget in budgets.items()}


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("lengths", [((1, 3000),), ((40, 900), (3, 17)), ((120, 120),)])
def test_a_bias_of_thousands_and_its_rescales_stay_inside(lengths: Any, tile: int) -> None:
    # Scores of up to 2,500 nats, of which fp32 keeps no more than 1e-4, and a maximum that is new in each tile.
    for seed in range(6):
        for causal in (False, True):
            of = case(*lengths, kv_heads=2, group=7, alibi=True, causal=causal, seed=seed, page_size=16)
            for name, verdict in judged_in_base_2(of, tile=tile).items():
                assert verdict.ok, (name, seed, causal, verdict)


def test_slopes_must_be_as_exact_as_declared() -> None:
    # Some 2,000 times a slope that is off by 2^-19; with 16 keys there is little else that is not exact.
    of = case((1, 3000), alibi=True, group=12, window_left=15, dtype="float32", page_size=16, head_dim=16)
    assert all(verdict.ok for verdict in judged_in_base_2(of).values())
    worse = {"slopes": 1 + 2.0**-19}
    assert not judged_in_base_2(of, **worse)["lse"].ok
    assert all(verdict.ok for verdict in judged_in_base_2(of, **worse, slope_rel=2.0**-18).values())


@pytest.mark.parametrize("heads", [2, 14])
def test_a_maximum_that_is_new_with_each_key_is_in_the_budget(heads: int) -> None:
    of = case((1, 3000), alibi=True, group=heads, dtype="float32", page_size=16, head_dim=16)
    assert all(verdict.ok for verdict in judged_in_base_2(of, tile=1).values())


def in_bf16(s: torch.Tensor, bias: torch.Tensor | None, axes: Any) -> torch.Tensor:
    """The slopes have been rounded to 8 bits."""
    assert bias is not None
    slope = torch.tensor(of_the_paper(axes.q_heads)).view(-1, 1, 1)
    return biased_and_capped(s, bias / slope * slope.bfloat16().float(), axes)


def test_slopes_that_are_less_exact_than_declared_are_seen() -> None:
    # Those of four heads in 12 are no powers of two.
    of = case((3, 300), alibi=True, kv_heads=4, group=3, dtype="bfloat16")
    assert all(verdict.ok for verdict in judged(of)[1].values())
    verdicts = judged(of, Flaw(scores=in_bf16))[1]
    assert not verdicts["lse"].ok


def from_the_end(s: torch.Tensor, bias: torch.Tensor | None, axes: Any) -> torch.Tensor:
    """From a query's own place, for the first request, of which the others have more queries or fewer keys."""
    assert bias is not None
    later = axes.requests[0].kv_len - axes.requests[0].qo_len
    slope = torch.tensor(of_the_paper(axes.q_heads)).view(-1, 1, 1)
    return biased_and_capped(s, bias - slope * later, axes)


def neighbour(s: torch.Tensor, bias: torch.Tensor | None, axes: Any) -> torch.Tensor:
    assert bias is not None
    return biased_and_capped(s, bias.roll(1, 0), axes)


def of_the_group(s: torch.Tensor, bias: torch.Tensor | None, axes: Any) -> torch.Tensor:
    """Every query head of a group has the slope of the first."""
    assert bias is not None
    return biased_and_capped(s, bias[:: axes.group].repeat_interleave(axes.group, 0), axes)


def scaled(s: torch.Tensor, bias: torch.Tensor | None, axes: Any) -> torch.Tensor:
    assert bias is not None
    return biased_and_capped(s, bias * axes.scale, axes)


def after_the_cap(s: torch.Tensor, bias: torch.Tensor | None, axes: Any) -> torch.Tensor:
    assert bias is not None
    return biased_and_capped(s, None, axes) + bias


def scaled_again(s: torch.Tensor, bias: torch.Tensor | None, axes: Any) -> torch.Tensor:
    """The soft-cap is given what is scaled already, and scales it once more."""
    assert bias is not None
    return biased_and_capped((s + bias) * axes.scale, None, axes)


def dropped(s: torch.Tensor, bias: torch.Tensor | None, axes: Any) -> torch.Tensor:
    return biased_and_capped(s, None, axes)


WRONG: list[tuple[Callable[..., torch.Tensor], float, set[str]]] = [
    (from_the_end, 0.0, {"lse"}),
    (from_the_end, 30.0, {"out", "lse"}),
    (neighbour, 0.0, {"out", "lse"}),
    (of_the_group, 0.0, {"out", "lse"}),
    (scaled, 0.0, {"out", "lse"}),
    (after_the_cap, 30.0, {"out", "lse"}),
    (scaled_again, 30.0, {"out", "lse"}),
    (dropped, 0.0, {"out", "lse"}),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("wrong", "softcap", "caught_by"), WRONG)
def test_wrong_kernels_are_caught(
    wrong: Callable[..., torch.Tensor], softcap: float, caught_by: set[str], dtype: str
) -> None:
    for seed in range(3):
        of = replace(BATCH, seed=seed, axes=replace(BATCH.axes, dtype=dtype, softcap=softcap))
        assert all(verdict.ok for verdict in judged(of)[1].values())
        verdicts = judged(of, Flaw(scores=wrong))[1]
        assert {name for name, verdict in verdicts.items() if not verdict.ok} == caught_by


def test_a_budget_without_the_bias_would_accuse_a_right_kernel() -> None:
    # The same terms, as if nothing were added to the scores: what fp32 does to a score of 2,000 is not in them.
    of = case((1, 3000), window_left=15, kv_heads=4, group=3, alibi=True, page_size=16, dtype="float32")
    inputs = paged.materialize(of).inputs
    terms = paged.reference(of, inputs, "cpu")
    numerics = Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=FP32, out=FP32, tile=1 << 24)
    eager = importlib.import_module(f"{discovery.PACKAGE}.attention._eager")
    (part,) = eager.parts(of.axes, inputs)
    answer = dict(zip(("out", "lse"), eager.attend(part, of.axes.scale), strict=True))
    without = replace(terms, bias_out=None, bias_row=None)
    verdicts = {}
    for name, given_ in (("with", terms), ("without", without)):
        budgets = paged.budget(of, given_, numerics, paged.paged_prefill.strategy("needle"))
        verdicts[name] = all(judge(answer[output], budgets[output]).ok for output in answer)
    assert verdicts == {"with": True, "without": False}


@draws(60)
@given(drawn, st.sampled_from(["float64", "float32"]))
def test_what_is_added_is_what_a_loop_over_pairs_adds(of: Case[Any], dtype: str) -> None:
    eager = importlib.import_module(f"{discovery.PACKAGE}.attention._eager")
    for number, request in enumerate(of.axes.requests):
        added = eager.alibi(of.axes, number, torch.device("cpu"))
        assert torch.equal(added, alibi(of, request, torch.float32))


def test_a_case_with_it_says_so() -> None:
    assert axes_of.lacking(BATCH.axes) == "the kernel does not know ALiBi"
    assert axes_of.lacking(BATCH.axes, "alibi") is None
    assert BATCH.id != replace(BATCH, axes=replace(BATCH.axes, alibi=False)).id
    simpler = [other.axes for other in paged.simpler(BATCH)]
    assert replace(BATCH.axes, alibi=False) in simpler
