"""Attention beside paged prefill: references against plain loops, forms, and cases that can be."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import block_sparse_axes, draws, slopes
from hypothesis import given

from kerneltest import discovery
from kerneltest.engine.chase import draw
from kerneltest.model import Case, Device, Kernel, Size, encode
from kerneltest.worker.tampering import catalogue

PACKAGE = f"{discovery.PACKAGE}.attention"
ragged = importlib.import_module(f"{PACKAGE}.ragged_prefill").ragged_prefill
single_prefill = importlib.import_module(f"{PACKAGE}.single_prefill").single_prefill
single_decode = importlib.import_module(f"{PACKAGE}.single_decode").single_decode
paged_decode = importlib.import_module(f"{PACKAGE}.paged_decode").paged_decode
block_sparse = importlib.import_module(f"{PACKAGE}.block_sparse").block_sparse
dense = importlib.import_module(f"{PACKAGE}._dense")
sparse = importlib.import_module(f"{PACKAGE}._block_sparse")
Request = importlib.import_module(f"{PACKAGE}.paged_prefill").Request
OPERATORS = {op.name: op for op in (ragged, single_prefill, single_decode, paged_decode, block_sparse)}
SIZE = Size(batch=3, qo_len=9, kv_len=40, heads=8)
TINY = Size(batch=2, qo_len=4, kv_len=9, heads=4)
Loop = tuple[np.ndarray, np.ndarray]


def attend(q: Any, k: Any, v: Any, seen: Any, scale: float, softcap: float = 0.0, alibi: bool = False) -> Loop:
    """One query head at a time, one key at a time, in float64."""
    rows, heads, _ = q.shape
    group = heads // k.shape[1]
    out, lse = np.zeros((rows, heads, v.shape[-1])), np.full((rows, heads), -np.inf)
    for row in range(rows):
        for head in range(heads):
            keys = [j for j in range(len(k)) if seen[row][j]]
            scores = []
            for j in keys:
                s = scale * math.fsum(
                    float(a) * float(b) for a, b in zip(q[row, head], k[j, head // group], strict=True)
                )
                s += slopes(heads)[head] * (j - row) if alibi else 0.0
                scores.append(softcap * math.tanh(s / softcap) if softcap else s)
            if keys:
                peak = max(scores)
                weights = [math.exp(s - peak) for s in scores]
                total = math.fsum(weights)
                lse[row, head] = peak + math.log(total)
                for weight, j in zip(weights, keys, strict=True):
                    out[row, head] += weight / total * v[j, head // group]
    return out, lse


def sees(axes: Any, rows: int, keys: int) -> list[list[bool]]:
    place = [i + keys - rows for i in range(rows)]
    left = axes.window_left
    return [
        [(not axes.causal or j <= place[i]) and (left < 0 or j >= place[i] - left) for j in range(keys)]
        for i in range(rows)
    ]


def numpy(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


def dense_loop(case: Case[Any], x: Mapping[str, torch.Tensor]) -> Loop:
    axes, outs, lses = case.axes, [], []
    q = x["q"] if x["q"].dim() == 3 else x["q"].unsqueeze(0)
    k, v = (t.transpose(0, 1) if axes.layout == "HND" else t for t in (x["k"], x["v"]))
    row = key = 0
    for request in axes.requests:
        rows, keys = slice(row, row + request.qo_len), slice(key, key + request.kv_len)
        row, key = rows.stop, keys.stop
        seen = sees(axes, request.qo_len, request.kv_len)
        out, lse = attend(numpy(q[rows]), numpy(k[keys]), numpy(v[keys]), seen, axes.scale, axes.softcap, axes.alibi)
        outs.append(out)
        lses.append(lse)
    return np.concatenate(outs), np.concatenate(lses)


def decode_loop(case: Case[Any], x: Mapping[str, torch.Tensor]) -> Loop:
    axes, outs, lses, page = case.axes, [], [], 0
    k_pages, v_pages = (x[n].transpose(1, 2) if axes.layout == "HND" else x[n] for n in ("k_pages", "v_pages"))
    for number, request in enumerate(axes.requests):
        keys, values = [], []
        for position in range(request.kv_len):
            physical = int(x["kv_indices"][page + position // axes.page_size])
            keys.append(k_pages[physical, position % axes.page_size].float() * axes.k_scale)
            values.append(v_pages[physical, position % axes.page_size].float() * axes.v_scale)
        page += axes.pages(request)
        q = x["q"][number : number + 1, : axes.q_heads]
        shape = (0, axes.kv_heads, axes.head_dim)
        k, v = (torch.stack(t) if t else torch.zeros(shape) for t in (keys, values))
        seen = sees(axes, 1, request.kv_len)
        out, lse = attend(numpy(q), numpy(k), numpy(v), seen, axes.scale, axes.softcap, axes.alibi)
        outs.append(out)
        lses.append(lse)
    return np.concatenate(outs), np.concatenate(lses)


def sparse_loop(case: Case[Any], x: Mapping[str, torch.Tensor]) -> Loop:
    axes = case.axes
    seen = [[False] * axes.columns for _ in range(axes.rows)]
    for row in range(axes.rows):
        down = row // axes.block_rows
        for block in range(int(x["indptr"][down]), int(x["indptr"][down + 1])):
            for column in range(axes.block_columns):
                shown = not axes.masked or bool(x["mask"][block, row % axes.block_rows, column])
                seen[row][int(x["indices"][block]) * axes.block_columns + column] = shown
    return attend(numpy(x["q"]), numpy(x["k"]), numpy(x["v"]), seen, axes.scale)


LOOPS = {paged_decode.name: decode_loop, block_sparse.name: sparse_loop}


@pytest.mark.parametrize("name", OPERATORS)
def test_reference_is_what_plain_loops_give(name: str) -> None:
    operator = OPERATORS[name]
    reached = set()

    @draws(25)
    @given(operator.cases(TINY))
    def prop(case: Case[Any]) -> None:
        inputs = operator.materialize(case).inputs
        terms = operator.reference(case, inputs, "cpu")
        out, lse = LOOPS.get(name, dense_loop)(case, inputs)
        scale = max(1.0, float(np.abs(out).max(initial=0.0)))
        np.testing.assert_allclose(terms.out.numpy(), out, rtol=0, atol=1e-9 * scale)
        np.testing.assert_allclose(terms.lse.numpy(), lse, rtol=1e-9, atol=1e-9)
        reached.update({"empty"} if bool(np.isinf(lse).any()) else {"full"})

    prop()
    assert "full" in reached


def asks_for_lse(case: Case[Any]) -> bool:
    return getattr(case.axes, "return_lse", True)


@pytest.mark.parametrize("name", OPERATORS)
def test_cases_can_be(name: str) -> None:
    """What is drawn has tensors of the form that its operator says, relations that apply, and a JSON form."""
    operator, drawn = OPERATORS[name], []

    def prop(case: Case[Any]) -> None:
        drawn.append(case)
        made = operator.materialize(case)
        assert ("lse" in made.outputs) == asks_for_lse(case)
        if asks_for_lse(case):
            assert made.outputs["out"].shape[:-1] == made.outputs["lse"].shape
        assert all(bool(x.float().isfinite().all()) for x in made.inputs.values() if x.is_floating_point())
        assert Case.from_json(encode(case), operator.axes) == case
        if case.relation:
            assert operator.relation(case.relation).applies(case)
        last = tuple(size - 1 for size in made.outputs["out"].shape)
        assert operator.locate(case, "out", last)
        assert operator.locate(case, "lse", last[:-1])

    draw(operator.cases(SIZE), prop, 60, 1)
    assert len({case.inputs for case in drawn}) >= 6
    assert any(case.relation for case in drawn)
    assert {asks_for_lse(case) for case in drawn} == ({True} if name == "block_sparse" else {True, False})


@pytest.mark.parametrize("name", OPERATORS)
def test_simpler_cases_can_be_and_come_to_an_end(name: str) -> None:
    operator = OPERATORS[name]

    @draws(10)
    @given(operator.cases(SIZE))
    def prop(case: Case[Any]) -> None:
        for step in range(200):
            found = list(operator.simpler(case))
            assert case not in found
            for one in found[:3]:
                operator.materialize(one)
            if not found:
                break
            case = found[step % len(found)]
        else:
            pytest.fail("200 steps, and still not the simplest case")

    prop()


@pytest.mark.parametrize("name", OPERATORS)
def test_relations_hold_for_the_reference(name: str) -> None:
    """A variant's exact answers, mapped back, are the original's: whatever the transformation did to the tensors."""
    from kerneltest.model import FP32, IEEE_FP32, Bounded, Inapplicable, Numerics

    operator, checked = OPERATORS[name], set()
    numerics = Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=FP32, out=FP32, lse_base="e")

    def exact(case: Case[Any], inputs: Mapping[str, torch.Tensor]) -> dict[str, Bounded]:
        strategy = operator.strategy(case.inputs)
        terms = operator.reference(case, inputs, "cpu")
        budgets = operator.budget(case, terms, numerics, strategy)
        return {n: Bounded(value=b.ref, error=torch.full_like(b.ref, 1e-9)) for n, b in budgets.items()}

    @draws(25)
    @given(operator.cases(TINY))
    def prop(case: Case[Any]) -> None:
        given_ = operator.materialize(case)
        original = exact(case, given_.inputs)
        for relation in operator.relations:
            if not relation.applies(case):
                continue
            try:
                related = relation.transform(case, given_)
            except Inapplicable:
                continue
            for one in related:
                answers = [exact(variant.case, variant.materials.inputs) for variant in one.variants]
                for variant, answer in zip(one.variants, answers, strict=True):
                    for output, spec in variant.materials.outputs.items():
                        assert tuple(answer[output].value.shape) == spec.shape
                for output, back in one.back(answers, numerics).items():
                    mine = original[output].value
                    known = back.error.isfinite() & mine.isfinite()
                    error = (back.value - mine).abs()[known]
                    size = 1e-7 * max(1.0, float(mine[mine.isfinite()].abs().max()) if known.any() else 1.0)
                    assert bool((error <= size).all()), (relation.name, output)
            checked.add(relation.name)

    prop()
    assert checked == {relation.name for relation in operator.relations}


def test_dense_tensors_and_pages_of_one_token_are_the_same() -> None:
    @draws(40)
    @given(ragged.cases(SIZE))
    def prop(case: Case[Any]) -> None:
        made = ragged.materialize(case)
        again = dense.unpaged(case, dense.Layout(batched=True), dense.pages(case, made.inputs))
        assert again.outputs == made.outputs
        for name, value in made.inputs.items():
            assert torch.equal(again.inputs[name], value), name

    prop()


@pytest.mark.parametrize(
    ("operator", "requests", "message"),
    [
        (single_prefill, ((1, 1), (1, 1)), "single_prefill has one request, got 2"),
        (single_decode, ((2, 2),), "single_decode has one query, got 2"),
    ],
)
def test_more_than_the_form_holds_is_refused(operator: Any, requests: tuple[Any, ...], message: str) -> None:
    axes = dense.DenseAttention(
        requests=tuple(Request(qo_len=qo, kv_len=kv) for qo, kv in requests),
        dtype="bfloat16",
        head_dim=64,
        kv_heads=1,
        group=1,
        causal=False,
    )
    with pytest.raises(ValueError, match=message):
        operator.materialize(Case(operator=operator.name, axes=axes, inputs="generic", seed=0))


def test_a_graph_is_captured_with_tensors_that_are_nowhere_smaller() -> None:
    @draws(40)
    @given(ragged.cases(TINY).flatmap(lambda case: ragged.captures(case).map(lambda other: (case, other))))
    def prop(pair: tuple[Case[Any], Case[Any]]) -> None:
        mine, captured = (ragged.materialize(case).inputs for case in pair)
        for name, value in mine.items():
            other = captured[name].shape
            assert other[1:] == value.shape[1:], name
            assert other[0] >= value.shape[0], name

    prop()


def test_rows_without_blocks_and_dead_keys_occur() -> None:
    empty = dead = False
    for seed in range(20):
        sizes = {"rows": 7, "columns": 12, "block_rows": 2, "block_columns": 4}
        axes = block_sparse_axes(**sizes, dtype="bfloat16", masked=bool(seed % 2))
        case = Case(operator="block_sparse", axes=axes, inputs="generic", seed=seed)
        made = block_sparse.materialize(case)
        visible = sparse.seen(case, made.inputs)
        blocks = made.inputs["indptr"].long().diff().repeat_interleave(2)[:7]
        assert torch.equal(visible.any(1), blocks > 0)
        empty |= bool((blocks == 0).any())
        for part in made.dead:
            dead = True
            assert not bool(visible[:, part.mask].any())
    assert empty
    assert dead


@pytest.mark.parametrize("operator", [single_prefill, single_decode, paged_decode], ids=lambda operator: operator.name)
def test_draws_reach_each_option_alone_and_with_the_common_kind(operator: Any) -> None:
    """Each is a module of its own: no two of them, and none with another dtype or head dimension."""
    seen: list[Case[Any]] = []
    draw(operator.cases(Size(batch=3, qo_len=40, kv_len=90, heads=8)), seen.append, 600, 1)
    options: dict[str, Callable[[Any], bool]] = {
        "window": lambda axes: axes.window_left >= 0,
        "soft-cap": lambda axes: axes.softcap > 0,
        "ALiBi": lambda axes: axes.alibi,
        "eight bits": lambda axes: getattr(axes, "kv_dtype", "same") != "same",
    }
    wanted = set(options) - (set() if operator is paged_decode else {"eight bits"})
    asked = [(one.axes, {name for name, asks in options.items() if asks(one.axes)}) for one in seen]
    for name in wanted:
        assert sum(name in names for _, names in asked) >= len(set(seen)) / 100, name
    assert max(len(names) for _, names in asked) == 1
    assert {(axes.dtype, axes.head_dim) for axes, names in asked if names} == {("bfloat16", 128)}
    assert len({(axes.dtype, axes.head_dim) for axes, names in asked if not names}) == 3
    assert sum(not axes.return_lse for axes, _ in asked) >= len(set(seen)) / 20


def test_block_columns_that_look_like_offsets_are_indices() -> None:
    axes = block_sparse_axes(rows=2, columns=8, block_rows=2, block_columns=4, head_dim=128, masked=True)
    seeds = (Case(operator="block_sparse", axes=axes, inputs="generic", seed=seed) for seed in range(100))
    case = next(one for one in seeds if sparse.pattern(one)["indices"].tolist() == [0, 1])
    inputs = block_sparse.materialize(case).inputs
    assert len(inputs["k"]) == 8
    kernel = Kernel(name="sparse", operator=block_sparse, launch=lambda call: call.outputs)
    host = Device(kind="cpu", ordinal=0, name="CPU", sm=(0, 0), units=1)
    found = [one.misuse for one in catalogue(kernel, case, inputs, host, outputs={}, workspace=False).values()]
    values = {one.says: one.kind for one in found if one.argument == "indices" and "begins with" in one.says}
    assert values.keys() >= {"begins with -1", "begins with 2, of 2"}
    assert set(values.values()) == {"index out of range"}
    assert not [one for one in found if one.argument == "indices" and one.kind == "indptr"]
