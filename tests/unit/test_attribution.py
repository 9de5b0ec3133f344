"""Counting inputs name the slot that was lost, doubled or let in; where they cannot, they say nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import case, draws, paged
from attention_kernel import RIGHT, Flaw, judged, kernel
from hypothesis import assume, given
from hypothesis import strategies as st

from kerneltest.model import FORMATS, IEEE_FP32, Call, Case, Device, Kernel, Numerics, Status
from kerneltest.worker.execute import execute
from kerneltest.worker.rig import Rig

CPU = Device(kind="cpu", ordinal=0, name="", sm=(0, 0), units=1)
AXES = {"inputs": "count", "head_dim": 128, "kv_heads": 2, "group": 2, "page_size": 16}
BATCH = case((3, 40), (2, 1100), (5, 200), shuffled=True, **AXES)
CAUSAL = case((33, 33), (20, 90), causal=True, **AXES)


def only(request: int, change: Callable[[torch.Tensor], object]) -> Flaw:
    """A change to how often the rows of one request count its keys, [qo_len, kv_len]."""
    return Flaw(times=lambda number, times: change(times) if number == request else None)


def said(one: Case[Any], flaw: Flaw, *, lse: bool = True, table: Any = torch.clone) -> str | None:
    inputs = paged.materialize(one).inputs
    outputs = kernel(one, {**inputs, "kv_indices": table(inputs["kv_indices"])}, flaw)
    if not lse:
        del outputs["lse"]
    return paged.explain(one, inputs, outputs)


def of_dtype(one: Case[Any], dtype: str) -> Case[Any]:
    return replace(one, axes=replace(one.axes, dtype=dtype))


def page_of_another(table: torch.Tensor) -> torch.Tensor:
    """Page 4 of request 2 is page 1 of request 0; requests 0 and 1 have 3 and 69 pages."""
    table = table.clone()
    table[3 + 69 + 4] = table[1]
    return table


def leak(rows: range) -> Callable[[torch.Tensor], None]:
    def change(times: torch.Tensor) -> None:
        for row in rows:
            times[row, int(times[row].sum())] = 1

    return change


def lose_last(times: torch.Tensor) -> None:
    for row in times:
        row[int(row.sum()) - 1] = 0


def one_row(times: torch.Tensor) -> None:
    times[1, 3] = times[1, 77] = 0


PLANTED: dict[str, tuple[Case[Any], dict[str, Any], str]] = {
    "doubled": (
        BATCH,
        {"flaw": only(1, lambda t: t[:, 1027].mul_(2))},
        "request 1: slot 1027 counted twice in 4 of 4 heads",
    ),
    "three times": (
        BATCH,
        {"flaw": only(1, lambda t: t[:, 5].mul_(3))},
        "request 1: slot 5 counted 3 times in 4 of 4 heads",
    ),
    "lost": (
        BATCH,
        {"flaw": only(1, lambda t: t[:, 228].zero_())},
        "request 1: slot 228 not counted in 4 of 4 heads",
    ),
    "lost everywhere": (
        BATCH,
        {"flaw": Flaw(times=lambda _, t: t[:, 0].zero_())},
        "request 2: slot 0 not counted in 4 of 4 heads; request 0: slot 0 not counted in 4 of 4 heads; "
        "request 1: slot 0 not counted in 4 of 4 heads",
    ),
    "tile twice": (
        BATCH,
        {"flaw": only(2, lambda t: t[:, 64:128].mul_(2))},
        "request 2: slots 64 to 127 counted twice in 4 of 4 heads",
    ),
    "tile twice among many": (
        BATCH,
        {"flaw": only(1, lambda t: t[:, 960:1024].mul_(2))},
        "request 1: slots 960 to 1023 counted twice in 4 of 4 heads",
    ),
    "tile of 128 skipped": (
        BATCH,
        {"flaw": only(1, lambda t: t[:, 128:256].zero_())},
        "request 1: slots 128 to 255 not counted in 4 of 4 heads",
    ),
    "page for page": (
        BATCH,
        {"flaw": only(2, lambda t: (t[:, 16:32].zero_(), t[:, 48:64].mul_(2)))},
        "request 2: slots 16 to 31 not counted in 4 of 4 heads; "
        "request 2: slots 48 to 63 counted twice in 4 of 4 heads",
    ),
    "page of another request": (
        BATCH,
        {"table": page_of_another},
        "request 2: slots 64 to 79 not counted in 4 of 4 heads; "
        "request 2: slots 16 to 31 of request 0 counted in 4 of 4 heads",
    ),
    "two slots in one row": (
        BATCH,
        {"flaw": only(2, one_row)},
        "request 2: slot 3 not counted in 4 of 4 heads and 1 of 5 tokens; "
        "request 2: slot 77 not counted in 4 of 4 heads and 1 of 5 tokens",
    ),
    "nothing counted": (
        BATCH,
        {"flaw": only(0, torch.Tensor.zero_)},
        "request 0: slots 0 to 39 not counted in 4 of 4 heads",
    ),
    "leak at one tile's edge": (
        CAUSAL,
        {"flaw": only(0, leak(range(15, 16)))},
        "request 0: slot 16 counted, though masked in 4 of 4 heads and 1 of 33 tokens",
    ),
    "leaks at tiles' edges": (
        CAUSAL,
        {"flaw": only(0, leak(range(15, 32, 16)))},
        "request 0: the first masked slot counted (slot 16 for token 15, and so on) in 4 of 4 heads and 2 of 33 tokens",
    ),
    "last key of every row": (
        CAUSAL,
        {"flaw": only(1, lose_last)},
        "request 1: the last visible slot not counted (slot 70 for token 0, and so on) in 4 of 4 heads",
    ),
}


@pytest.mark.parametrize("lse", [True, False])
@pytest.mark.parametrize("dtype", paged.DTYPES)
@pytest.mark.parametrize("bug", PLANTED)
def test_the_slot_is_named(bug: str, dtype: str, lse: bool) -> None:
    one, wrong, expected = PLANTED[bug]
    one = of_dtype(one, dtype)
    assert said(one, wrong.get("flaw", RIGHT), lse=lse, table=wrong.get("table", torch.clone)) == expected
    assert not judged(one, **wrong)[1]["out"].ok


@pytest.mark.parametrize("one", [BATCH, CAUSAL])
@pytest.mark.parametrize("dtype", paged.DTYPES)
def test_nothing_is_said_of_right_outputs(one: Case[Any], dtype: str) -> None:
    assert said(of_dtype(one, dtype), RIGHT) is None


def test_a_head_that_reads_its_neighbour() -> None:
    one = case((2, 30), **AXES)
    inputs = dict(paged.materialize(one).inputs)
    swapped = kernel(one, {**inputs, "v_pages": inputs["v_pages"].flip(2)})
    text = paged.explain(one, inputs, swapped)
    assert text is not None
    assert "slots 0 to 29 not counted in 4 of 4 heads" in text
    assert "slots 0 to 29 of KV head 1 counted in 2 of 4 heads" in text
    assert "slots 0 to 29 of KV head 0 counted in 2 of 4 heads" in text


@pytest.mark.parametrize("sign", ["noise", "scaled", "nan", "poison"])
def test_nothing_is_said_where_counts_make_no_sense(sign: str) -> None:
    inputs = paged.materialize(BATCH).inputs
    outputs = kernel(BATCH, inputs)
    noise = torch.rand(outputs["out"].shape, generator=torch.Generator().manual_seed(1))
    change = {
        "noise": lambda x: x * (1 + 0.2 * noise),
        "scaled": lambda x: x * 0.93,
        "nan": lambda x: x * float("nan"),
        # A slot of poison, 0.75 in every channel, has been counted as well.
        "poison": lambda x: x * 0.98 + 0.75 / 41,
    }[sign]
    assert paged.explain(BATCH, inputs, {"out": change(outputs["out"])}) is None


def test_nothing_is_said_of_other_inputs() -> None:
    for inputs in ("generic", "integer", "dyadic", "needle"):
        other = case((2, 30), **AXES | {"inputs": inputs}, sm_scale=paged.LN_2)
        tensors = paged.materialize(other).inputs
        assert paged.explain(other, tensors, kernel(other, tensors, Flaw(out=torch.zeros_like))) is None
    assert paged.explain(BATCH, {}, {}) is None


@st.composite
def mistakes(draw: st.DrawFn) -> tuple[Case[Any], int, int, int]:
    """A case of any size, the first of some slots in a row, how many, and how often they are counted."""
    head_dim = draw(st.sampled_from(paged.HEAD_DIMS))
    kv_len = draw(st.one_of(st.integers(2, 300), st.integers(300, 9000)))
    length = draw(st.sampled_from([1, 1, 1, 16, 64, 128]))
    assume(length < kv_len)
    one = case(
        (draw(st.integers(0, 2)), draw(st.integers(0, 100))),
        (1, kv_len),
        **AXES | {"head_dim": head_dim, "kv_heads": 1, "dtype": draw(st.sampled_from(paged.DTYPES))},
    )
    return one, draw(st.integers(0, kv_len - length)), length, draw(st.sampled_from([0, 2, 3]))


@pytest.mark.parametrize("lse", [True, False])
def test_what_is_said_is_true(lse: bool) -> None:
    outcomes: list[str | None] = []

    @draws(150)
    @given(mistakes())
    def prop(mistake: tuple[Case[Any], int, int, int]) -> None:
        one, first, length, times = mistake
        text = said(one, only(1, lambda t: t[:, first : first + length].mul_(times)), lse=lse)
        outcomes.append(text)
        if text is None:
            return
        what = "not counted" if times == 0 else "counted twice" if times == 2 else "counted 3 times"
        where = f"slot {first}" if length == 1 else f"slots {first} to {first + length - 1}"
        # Where several tokens could be meant, the right one is among them.
        assert re.search(rf"request 1: (.* or )?{where}( or .*)? ?{what}", text), (text, where, what)
        assert text.count("request") == 1 + text.count("of request")

    prop()
    # A test of nothing but silence would not fail.
    assert sum(text is not None for text in outcomes) > 0.6 * len(outcomes)


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[Case[Any], int, int]:
    """A case of two requests with whole pages, and two pages of it, the first one of request 0."""
    counts = draw(st.tuples(st.integers(1, 40), st.one_of(st.integers(1, 40), st.integers(300, 600))))
    size = draw(st.sampled_from(paged.PAGE_SIZES))
    axes = {"head_dim": draw(st.sampled_from(paged.HEAD_DIMS)), "dtype": draw(st.sampled_from(paged.DTYPES))}
    one = case(*((1, count * size) for count in counts), **AXES | axes | {"kv_heads": 1, "page_size": size})
    page, other = draw(st.integers(0, counts[0] - 1)), draw(st.integers(0, sum(counts) - 1))
    assume(page != other)
    return one, page, other


def test_what_is_said_of_a_wrong_page_is_true() -> None:
    outcomes: list[str | None] = []

    @draws(200)
    @given(exchanges())
    def prop(exchange: tuple[Case[Any], int, int]) -> None:
        one, page, other = exchange
        size, count = one.axes.page_size, one.axes.pages(one.axes.requests[0])

        def slots(number: int) -> str:
            return f"slot {number}" if size == 1 else f"slots {number * size} to {number * size + size - 1}"

        def wrong(table: torch.Tensor) -> torch.Tensor:
            return torch.where(torch.arange(len(table)) == page, table[other], table)

        text = said(one, RIGHT, table=wrong)
        outcomes.append(text)
        if text is not None:
            lost = re.search(rf"request 0: (.* or )?{slots(page)}( or .*)? not counted", text)
            instead = (
                f"{slots(other)} counted twice" if other < count else f"{slots(other - count)} of request 1 counted"
            )
            gained = re.search(rf"request 0: (.* or )?{instead}", text)
            assert lost, (text, page, other)
            assert gained or text.count(";") == 0, (text, page, other)

    prop()
    assert sum(text is not None for text in outcomes) > 0.6 * len(outcomes)


def test_several_slots_are_named_where_it_may_be_any_of_them() -> None:
    # 33 · 31 tokens are told apart.
    one = case((1, 1500), **AXES | {"head_dim": 64, "kv_heads": 1, "dtype": "float16"})
    text = said(one, only(0, lambda t: t[:, 7].zero_()))
    assert text == "request 0: slot 7 or slot 1030 not counted in 2 of 2 heads"
    assert said(one, only(0, lambda t: t[:, 700].zero_())) == "request 0: slot 700 not counted in 2 of 2 heads"


def test_bf16_outputs_stop_counting_at_128_tokens_of_a_class() -> None:
    def dropped(kv_len: int) -> str | None:
        one = case((1, kv_len), **AXES | {"head_dim": 64, "kv_heads": 1, "group": 1})
        return said(one, only(0, lambda t: t[:, 7].zero_()))

    assert dropped(900) == "request 0: slot 7 not counted in 1 of 1 heads"
    assert dropped(128 * 33 + 500) is None


def flawed(flaw: Flaw) -> Kernel:
    """A kernel for the worker."""

    def launch(call: Call) -> dict[str, torch.Tensor]:
        return kernel(call.case, call.inputs, flaw)

    def numerics(one: Case[Any], device: Device) -> Numerics:
        fmt = FORMATS[one.axes.dtype]
        return Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=fmt, out=fmt)

    return Kernel(name="flawed", operator=paged.paged_prefill, launch=launch, numerics=numerics)


@pytest.mark.parametrize("dtype", paged.DTYPES)
def test_the_worker_adds_the_cause_to_its_finding(dtype: str) -> None:
    one, wrong, expected = PLANTED["doubled"]
    one = of_dtype(one, dtype)
    outcome = execute(flawed(wrong["flaw"]), one, Rig(CPU))
    assert outcome.finding is not None
    assert outcome.finding.kind == "Mismatch"
    assert outcome.finding.details[-1] == expected
    assert execute(flawed(RIGHT), one, Rig(CPU)).status is Status.PASSED


def test_a_finding_without_a_known_cause_stays_as_it_is() -> None:
    outcome = execute(flawed(Flaw(out=lambda out: out * 0.93)), BATCH, Rig(CPU))
    assert outcome.finding is not None
    assert not any(line.startswith("request") for line in outcome.finding.details)


WINDOW = case((33, 33), (20, 90), causal=True, window_left=20, **AXES)


def longer_window(times: torch.Tensor) -> None:
    for row in times:
        first = int(row.nonzero()[0])
        row[max(first - 1, 0)] = 1


def shorter_window(times: torch.Tensor) -> None:
    for row in times:
        row[int(row.nonzero()[0])] = 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            longer_window,
            "request 1: the last slot before the window counted (slot 49 for token 0, and so on) in 4 of 4 heads",
        ),
        (
            shorter_window,
            "request 1: the first slot of the window not counted (slot 50 for token 0, and so on) in 4 of 4 heads",
        ),
        (lambda t: t[:, 65].zero_(), "request 1: slot 65 not counted in 4 of 4 heads and 15 of 20 tokens"),
        (lambda t: t[:, 64:68].mul_(2), "request 1: slots 64 to 67 counted twice in 4 of 4 heads and 15 of 20 tokens"),
        (lambda t: t[:, 3].fill_(1), "request 1: slot 3 counted, though masked in 4 of 4 heads"),
    ],
)
def test_the_edges_of_a_window_are_named(change: Callable[[torch.Tensor], object], sentence: str) -> None:
    text = said(WINDOW, only(1, change))
    assert text is not None
    assert sentence in text


@pytest.mark.parametrize("axes", [{"mask": "tree", "causal": False}, {"v_scale": 2.0}])
def test_nothing_is_said_where_a_row_does_not_count_keys_that_follow_each_other(axes: dict[str, Any]) -> None:
    one = replace(CAUSAL, axes=replace(CAUSAL.axes, **axes))
    assert said(one, only(1, lambda t: t[:, 5].zero_())) is None


def test_nothing_is_said_of_rows_whose_weights_a_bias_makes() -> None:
    outputs = kernel(BATCH, paged.materialize(BATCH).inputs, only(1, lambda t: t[:, 5].zero_()))
    assert paged.explain(BATCH, {}, outputs) is not None
    assert paged.explain(replace(BATCH, axes=replace(BATCH.axes, alibi=True)), {}, outputs) is None


def test_values_of_another_dimension_name_tokens_too() -> None:
    one = replace(BATCH, axes=replace(BATCH.axes, head_dim=192, head_dim_vo=128, layout="HND", softcap=30.0))
    lost = only(1, lambda t: t[:, 228].zero_())
    assert said(one, lost) == "request 1: slot 228 not counted in 4 of 4 heads"
