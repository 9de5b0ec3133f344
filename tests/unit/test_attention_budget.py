"""The attention budget by simulation: what a right kernel may do stays inside, and wrong kernels do not.

The kernels here run in torch's float32: an online softmax in tiles, with P rounded before P·V.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from attention_cases import case, draws, gathered, paged, without_options
from hypothesis import given

from kerneltest.model import BF16, FORMATS, FP32, IEEE_FP32, Case, InputStrategy, Numerics, Size
from kerneltest.oracle.compare import Comparison, compare


def kernel(
    case: Case[Any], inputs: Mapping[str, torch.Tensor], *, tile: int, l_from: str, bug: str
) -> dict[str, torch.Tensor]:
    """``out`` and ``lse`` for the whole batch. ``bug`` names what is done wrong."""
    axes = case.axes
    outs, lses = [], []
    for _, q, k, v in gathered(case, inputs):
        out, lse = attend(q, k, v, axes.scale, causal=axes.causal, dtype=axes.dtype, tile=tile, l_from=l_from, bug=bug)
        outs.append(out.transpose(0, 1))
        lses.append(lse.transpose(0, 1))
    return {"out": torch.cat(outs).to(getattr(torch, axes.dtype)), "lse": torch.cat(lses)}


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    dtype: str,
    tile: int,
    l_from: str,
    bug: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, count, dim = q.shape
    keys = k.shape[1]
    if bug == "scale":
        scale *= 1.01
    visible = torch.full((count,), keys)
    if causal:
        visible = torch.arange(count) + 1 + keys - count + (bug == "causal")
    if bug == "last key":
        visible = visible.clamp(max=keys - 1)
    m = torch.full((heads, count), -torch.inf)
    denominator, acc = torch.zeros(heads, count), torch.zeros(heads, count, dim)
    for number, start in enumerate(range(0, keys, tile)):
        j = torch.arange(start, min(start + tile, keys))
        s = (q @ k[:, j].transpose(1, 2)) * torch.tensor(scale)
        s = s.masked_fill(j >= visible[:, None], -torch.inf)
        if bug == "slot 250":
            s = s.masked_fill(j == 250, -torch.inf)
        new = torch.maximum(m, s.amax(-1))
        safe = torch.where(new.isinf(), 0.0, new)
        p = torch.exp(s - safe.unsqueeze(-1))
        correction = torch.exp(m - safe)
        if bug == "rescale" and number == 1:
            correction = torch.ones_like(correction)
        rounded = p.to(getattr(torch, dtype)).float()
        denominator = denominator * correction + (rounded if l_from == "rounded_p" else p).sum(-1)
        acc = acc * correction.unsqueeze(-1) + rounded @ v[:, j]
        m = new
    alive = denominator > 0
    out = acc / torch.where(alive, denominator, 1.0).unsqueeze(-1)
    lse = torch.where(alive, m + denominator.log(), -torch.inf)
    return out, lse * 1.4426950408889634 if bug == "base 2" else lse


def judge(
    case: Case[Any],
    *,
    tile: int = 16,
    l_from: str = "fp32",
    bug: str = "",
    strategy: InputStrategy | None = None,
    declared: dict[str, Any] | None = None,
    sharpness: float = 1.0,
) -> dict[str, Comparison]:
    """Run the kernel and compare; ``declared`` is where its numerics say something else than it does.

    ``sharpness`` multiplies q, and with it every score.
    """
    inputs = dict(paged.materialize(case).inputs)
    inputs["q"] = inputs["q"] * sharpness
    fmt = FORMATS[case.axes.dtype]
    said = {"p": fmt, "out": fmt, "tile": tile, "l_from": l_from, "lse_base": "e"} | (declared or {})
    numerics = Numerics(qk=IEEE_FP32, pv=IEEE_FP32, **said)
    terms = paged.reference(case, inputs, "cpu")
    budgets = paged.budget(case, terms, numerics, strategy or paged.paged_prefill.strategy(case.inputs))
    assert set(budgets) == {"out", "lse"}
    for budget in budgets.values():
        assert not budget.ref.isnan().any()
        assert (budget.hard >= 0).all()
        assert budget.hard.isfinite().all()
    outputs = kernel(case, inputs, tile=tile, l_from=l_from, bug=bug)
    return {name: compare(outputs[name], budgets[name]) for name in budgets}


@pytest.mark.parametrize("l_from", ["fp32", "rounded_p"])
@pytest.mark.parametrize("tile", [16, 64])
def test_right_kernels_stay_inside(tile: int, l_from: str) -> None:
    # The kernel of these tests knows no options: those are left out of whatever is drawn.
    @draws(120)
    @given(paged.cases(Size(batch=3, qo_len=70, kv_len=200, heads=8)).map(without_options))
    def prop(case: Case[Any]) -> None:
        for name, result in judge(case, tile=tile, l_from=l_from).items():
            assert result.ok, (name, result)

    prop()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("l_from", ["fp32", "rounded_p"])
@pytest.mark.parametrize(("dtype", "tile"), [("bfloat16", 16), ("bfloat16", 64), ("float16", 16), ("float16", 64)])
def test_the_budget_of_a_right_kernel_is_used_but_not_used_up(dtype: str, tile: int, l_from: str, seed: int) -> None:
    typical = case(
        (40, 300), (17, 17), (3, 129), dtype=dtype, head_dim=128, kv_heads=2, group=2, causal=True, seed=seed
    )
    results = judge(typical, tile=tile, l_from=l_from)
    assert all(result.ok for result in results.values())
    # A budget that nobody comes near would catch nobody.
    assert 0.3 < results["out"].used < 1.0
    assert results["lse"].used < 1.0


@pytest.mark.parametrize("sharpness", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_large_scores_are_allowed_their_own_rounding(dtype: str, sharpness: float) -> None:
    # A score of s is a float32 and off by s * 2^-24 at least, which outgrows every other term of the budget.
    for seed in range(10):
        results = judge(case((8, 40), dtype=dtype, head_dim=128, seed=seed), sharpness=sharpness)
        assert all(result.ok for result in results.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("bug", "lengths", "axes", "caught_by"),
    [
        ("last key", [(5, 40)], {}, {"out", "lse"}),
        ("scale", [(40, 300)], {"causal": True}, {"lse"}),
        ("causal", [(33, 33)], {"causal": True}, {"out", "lse"}),
        ("base 2", [(5, 40)], {}, {"lse"}),
        ("rescale", [(5, 100)], {}, {"out", "lse"}),
    ],
)
def test_wrong_kernels_are_caught(
    dtype: str, bug: str, lengths: Any, axes: dict[str, Any], caught_by: set[str]
) -> None:
    for seed in range(5):
        fitting = case(*lengths, dtype=dtype, seed=seed, **axes)
        right, wrong = judge(fitting), judge(fitting, bug=bug)
        assert all(result.ok for result in right.values())
        for output in caught_by:
            assert wrong[output].outside > 0, output
            assert wrong[output].used > 1, output


def test_base_2_leaves_the_output_alone() -> None:
    assert judge(case((5, 40)), bug="base 2")["out"].ok


def test_a_denominator_other_than_declared_shows_in_the_lse() -> None:
    typical = case((40, 300), dtype="bfloat16")
    assert judge(typical, l_from="rounded_p")["lse"].ok
    wrong = judge(typical, l_from="rounded_p", declared={"l_from": "fp32"})
    assert (wrong["lse"].ok, wrong["out"].ok) == (False, True)


def test_weights_narrower_than_declared_show_in_the_output() -> None:
    typical = case((40, 300), dtype="bfloat16")
    assert judge(typical)["out"].ok
    assert not judge(typical, declared={"p": FP32})["out"].ok


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_counting_inputs_show_one_slot_in_500(dtype: str, head_dim: int) -> None:
    counting = case((3, 500), inputs="count", dtype=dtype, head_dim=head_dim, kv_heads=2, page_size=16, shuffled=True)
    for tile in (16, 64):
        assert all(result.ok for result in judge(counting, tile=tile).values())
    wrong = judge(counting, bug="slot 250")
    # The dropped slot is in one dim of each row and head; lse is log 499 instead of log 500.
    assert wrong["out"].outside >= 3 * 2
    assert wrong["lse"].outside == 3 * 2


def test_one_slot_in_10000_shows_because_the_weights_are_exact() -> None:
    # 157 slots to a dim: one less is 0.6 %, more than bf16 hides and less than the rounding of P would excuse.
    counting = case((3, 10_000), inputs="count")
    assert judge(counting, tile=64)["out"].ok
    assert judge(counting, tile=64, bug="slot 250")["out"].outside == 3
    excused = InputStrategy(name="count", tier="hard")
    assert judge(counting, tile=64, bug="slot 250", strategy=excused)["out"].ok


def test_partial_outputs_in_16_bits_must_be_declared() -> None:
    # Keys split at 100 of 300, both parts rounded to bf16 before they are merged. Counting inputs leave no other error.
    whole = case((4, 300), dtype="bfloat16", head_dim=128, inputs="count")
    inputs = paged.materialize(whole).inputs
    terms = paged.reference(whole, inputs, "cpu")
    first = case((4, 100), dtype="bfloat16", head_dim=128, inputs="count")
    one = paged.reference(first, paged.materialize(first).inputs, "cpu").out
    two = (300 * terms.out - 100 * one) / 200
    merged = (100 * one.bfloat16().double() + 200 * two.bfloat16().double()) / 300
    verdicts = {}
    for partial in (FP32, BF16):
        numerics = Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=BF16, out=BF16, partial=partial)
        budgets = paged.budget(whole, terms, numerics, paged.paged_prefill.strategy("count"))
        verdicts[partial.name] = compare(merged.bfloat16(), budgets["out"]).ok
    assert verdicts == {"float32": False, "bfloat16": True}
