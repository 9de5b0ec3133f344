"""Merging states: the reference against plain loops, the budget against kernels in fp32, right and wrong."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from attention_cases import draws
from hypothesis import given

from kerneltest import discovery
from kerneltest.model import BF16, FORMATS, FP32, Case, Device, Size, encode
from kerneltest.oracle.verdict import judge

PACKAGE = f"{discovery.PACKAGE}.attention"
merge = importlib.import_module(f"{PACKAGE}.merge_state")
axes_of = importlib.import_module(f"{PACKAGE}._merge_axes")
forms = importlib.import_module(f"{PACKAGE}._merge")
OPERATORS = {op.name: op for op in (merge.merge_state, merge.merge_state_in_place, merge.merge_states)}
SIZE = Size(batch=2, qo_len=9, kv_len=40, heads=8)


def sequential(x: Any, base: str, no_key: float = -math.inf, lanes: int = 1) -> dict[str, torch.Tensor]:
    """FlashInfer's running merge in fp32, state after state.

    ``lanes``: each has some of the states, and all lanes are merged again, their outputs rounded to the type of v.
    """
    exp, log = (torch.exp2, torch.log2) if base == "2" else (torch.exp, torch.log)

    def run(v: list[torch.Tensor], s: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        m, d, o = torch.full_like(s[0], no_key), torch.zeros_like(s[0]), torch.zeros_like(v[0])
        for value, score in zip(v, s, strict=True):
            new = torch.maximum(m, score)
            safe = torch.where(new == -math.inf, 0.0, new)
            old, fresh = exp(m - safe), exp(score - safe)
            d = d * old + fresh
            o = o * old.unsqueeze(-1) + value * fresh.unsqueeze(-1)
            m = new
        return o / torch.where(d > 0, d, 1.0).unsqueeze(-1), m + log(d)

    count = x.s.shape[1]
    v, s = [x.v[:, i].float() for i in range(count)], [x.s[:, i] for i in range(count)]
    if lanes > 1:
        parts = [run(v[lane::lanes], s[lane::lanes]) for lane in range(min(lanes, count))]
        v, s = [part[0].to(x.v.dtype).float() for part in parts], [part[1] for part in parts]
    out, lse = run(v, s)
    if x.mask is not None:
        out = torch.where(x.mask[:, None, None], out, x.v[:, 0].float())
        lse = torch.where(x.mask[:, None], lse, x.s[:, 0])
    return {"out": out.to(x.v.dtype), "lse": lse}


def budgets(operator: Any, case: Case[Any], **declared: Any) -> Any:
    inputs = operator.materialize(case).inputs
    said = {"out": FORMATS[case.axes.dtype], "lse_base": "2"} | declared
    terms = operator.reference(case, inputs, "cpu")
    return operator.budget(case, terms, axes_of.MergeNumerics(**said), operator.strategy(case.inputs))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("base", "lanes"), [("2", 1), ("e", 1), ("2", 8)])
def test_right_kernels_stay_inside(name: str, base: str, lanes: int) -> None:
    operator = OPERATORS[name]

    @draws(60)
    @given(operator.cases(SIZE))
    def prop(case: Case[Any]) -> None:
        x = forms.stacked(case, operator.materialize(case).inputs)
        rounds = {"rounds": 1, "partial": FORMATS[case.axes.dtype]} if lanes > 1 else {}
        allowed = budgets(operator, case, lse_base=base, **rounds)
        outputs = sequential(x, base, lanes=lanes)
        for output, budget in allowed.items():
            verdict = judge(outputs[output], budget)
            assert verdict.ok, (case, output, verdict)

    prop()


def test_a_second_rounding_has_to_be_declared() -> None:
    outside = 0
    for seed in range(20):
        axes = axes_of.MergeStates(rows=4, states=64, heads=2, head_dim=64, dtype="bfloat16")
        case = Case(operator="merge_states", axes=axes, inputs="generic", seed=seed)
        outputs = sequential(forms.values(case), "2", lanes=8)
        outside += not judge(outputs["out"], budgets(merge.merge_states, case)["out"]).ok
        declared = budgets(merge.merge_states, case, rounds=1, partial=BF16)
        assert judge(outputs["out"], declared["out"]).ok
    assert outside > 10


@pytest.mark.parametrize("base", ["2", "e"])
def test_reference_is_what_plain_loops_give(base: str) -> None:
    power = 2.0 if base == "2" else math.e

    @draws(30)
    @given(merge.merge_states.cases(Size(batch=1, qo_len=3, kv_len=5, heads=2)))
    def prop(case: Case[Any]) -> None:
        x = forms.values(case)
        allowed = budgets(merge.merge_states, case, lse_base=base)
        for row in range(case.axes.rows):
            for head in range(case.axes.heads):
                s = [float(value) for value in x.s[row, :, head]]
                peak = max(s)
                weights = [power ** (value - peak) if value > -math.inf else 0.0 for value in s]
                total = math.fsum(weights)
                lse = peak + math.log(total) / math.log(power) if total else -math.inf
                assert float(allowed["lse"].ref[row, head]) == pytest.approx(lse, rel=1e-12, abs=1e-12)
                for dim in (0, case.axes.head_dim - 1):
                    values = [float(value) for value in x.v[row, :, head, dim]]
                    out = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / total if total else 0.0
                    assert float(allowed["out"].ref[row, head, dim]) == pytest.approx(out, rel=1e-9, abs=1e-12)

    prop()


def test_states_of_no_keys_weigh_nothing_and_stand_ins_are_such_where_that_is_declared() -> None:
    axes = axes_of.MergeStates(rows=4, states=2, heads=1, head_dim=64, dtype="bfloat16")
    empty = Case(operator="merge_state", axes=axes, inputs="empty", seed=0)
    allowed = budgets(merge.merge_state, empty)
    assert float(allowed["lse"].ref[0, 0]) == -math.inf
    assert not bool(allowed["out"].ref[0].any())
    stand_in = Case(operator="merge_state", axes=axes, inputs="stand_in", seed=0)
    assert float(budgets(merge.merge_state, stand_in)["lse"].ref[0, 0]) == axes_of.STAND_IN + 1
    declared = budgets(merge.merge_state, stand_in, lse_no_key=-49_000.0)
    assert float(declared["lse"].ref[0, 0]) == -math.inf
    # A merge that counts its own beginning as one more of them.
    assert judge(torch.full((4, 1), axes_of.STAND_IN + math.log2(3)), declared["lse"]).comparison.first != (0, 0)


def test_rows_that_are_not_merged_must_not_change_by_a_bit() -> None:
    axes = axes_of.MergeStates(rows=8, states=2, heads=2, head_dim=64, dtype="bfloat16", masked=True)
    case = Case(operator="merge_state_in_place", axes=axes, inputs="generic", seed=1)
    x = forms.values(case)
    assert x.mask.any()
    assert not x.mask.all()
    outputs, allowed = sequential(x, "2"), budgets(merge.merge_state_in_place, case)
    row = int((~x.mask).nonzero()[0])
    lse = outputs["lse"].clone()
    lse[row, 0] = torch.nextafter(lse[row, 0], torch.tensor(math.inf))
    assert judge(outputs["lse"], allowed["lse"]).ok
    assert not judge(lse, allowed["lse"]).ok


@pytest.mark.parametrize("name", OPERATORS)
def test_cases_can_be_and_forms_come_back(name: str) -> None:
    operator = OPERATORS[name]

    @draws(60)
    @given(operator.cases(SIZE))
    def prop(case: Case[Any]) -> None:
        made = operator.materialize(case)
        x = forms.stacked(case, made.inputs)
        again = forms.materials(case, x)
        assert again.outputs == made.outputs
        assert again.inputs.keys() == made.inputs.keys()
        assert all(torch.equal(value, made.inputs[n]) for n, value in again.inputs.items())
        assert Case.from_json(encode(case), operator.axes) == case
        for one in operator.simpler(case):
            operator.materialize(one)
        if case.relation:
            for related in operator.relation(case.relation).transform(case, made):
                assert related.variants

    prop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lse_base": "10"}, "lse_base must be 'e' or '2', got '10'"),
        ({"rounds": -1}, "rounds must be at least 0"),
    ],
)
def test_impossible_arithmetic_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        axes_of.MergeNumerics(**({"out": FP32, "lse_base": "2"} | change))


def test_rows_in_another_order_keep_their_bits_only_where_that_is_promised() -> None:
    row_order = merge.merge_states.relation("row_order")
    axes = axes_of.MergeStates(rows=7, states=17, heads=3, head_dim=256, dtype="float16")
    # A case in which torch's exp2 gave the last row other bits than the first.
    case = Case(operator="merge_states", axes=axes, inputs="generic", seed=802419039, relation="row_order")
    cpu = Device(kind="cpu", ordinal=0, name="cpu", sm=(0, 0), units=1)
    promised = {}
    for file in ("torch_merge", "flashinfer_cascade"):
        kernel = importlib.import_module(f"{PACKAGE}.{file}").merge_several
        promised[file] = kernel.keeps_bits(row_order, kernel.numerics(case, cpu))
    assert promised == {"torch_merge": False, "flashinfer_cascade": True}


def test_two_states_are_two() -> None:
    axes = axes_of.MergeStates(rows=1, states=3, heads=1, head_dim=64, dtype="bfloat16")
    with pytest.raises(ValueError, match="merge_state merges two states, got 3"):
        merge.merge_state.materialize(Case(operator="merge_state", axes=axes, inputs="generic", seed=0))
