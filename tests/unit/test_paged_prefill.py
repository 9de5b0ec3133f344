"""The operator ``paged_prefill``: tensors that follow from the case, right page tables, draws that go everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_cases import PagedPrefill, Request, case, draws, paged
from hypothesis import find, given, settings

from kerneltest.model import Case, Materials, OutputSpec, Place, Size

SMALL = Size(batch=4, qo_len=9, kv_len=70, heads=8)
WIDE = Size(batch=3, qo_len=130, kv_len=300, heads=16)
small = paged.cases(SMALL)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@draws(60)
@given(small)
def test_tensors_are_a_function_of_the_case(case: Case[Any]) -> None:
    torch.manual_seed(1)
    first = paged.materialize(case)
    torch.manual_seed(2)
    torch.rand(7)
    second = paged.materialize(case)
    assert first.inputs.keys() == second.inputs.keys()
    for name, tensor in first.inputs.items():
        assert tensor.dtype == second.inputs[name].dtype
        assert tensor.shape == second.inputs[name].shape
        assert bits(tensor) == bits(second.inputs[name]), name
    assert [(d.place, d.tensor, bits(d.mask)) for d in first.dead] == [
        (d.place, d.tensor, bits(d.mask)) for d in second.dead
    ]


def test_another_seed_gives_other_tensors() -> None:
    one, other = (paged.materialize(case((3, 50), shuffled=True, seed=seed)).inputs for seed in (0, 1))
    for name in ("q", "k_pages", "v_pages", "kv_indices"):
        assert not torch.equal(one[name], other[name])


@draws(100)
@given(small)
def test_shapes_and_dtypes(case: Case[Any]) -> None:
    axes, materials = case.axes, paged.materialize(case)
    rows, heads = sum(r.qo_len for r in axes.requests), axes.kv_heads * axes.group
    total = sum(len(range(0, r.kv_len, axes.page_size)) for r in axes.requests)
    dtype = getattr(torch, axes.dtype)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in materials.inputs.items()}
    cache = (max(total + axes.spare_pages, 1), axes.page_size, axes.kv_heads, axes.head_dim)
    batch = len(axes.requests)
    assert shapes == {
        "q": ((rows, heads, axes.head_dim), dtype),
        "k_pages": (cache, dtype),
        "v_pages": (cache, dtype),
        "qo_indptr": ((batch + 1,), torch.int32),
        "kv_indptr": ((batch + 1,), torch.int32),
        "kv_indices": ((total,), torch.int32),
        "kv_last_page_len": ((batch,), torch.int32),
    }
    assert materials.outputs == {
        "out": OutputSpec(shape=(rows, heads, axes.head_dim), dtype=axes.dtype),
        "lse": OutputSpec(shape=(rows, heads), dtype="float32"),
    }
    for name in ("q", "k_pages", "v_pages"):
        assert materials.inputs[name].isfinite().all()


def page_table(materials: Materials) -> list[list[int]]:
    """The pages of each request."""
    indptr, indices = (materials.inputs[name].tolist() for name in ("kv_indptr", "kv_indices"))
    assert indptr[0] == 0
    assert indptr[-1] == len(indices)
    return [indices[begin:end] for begin, end in pairwise(indptr)]


def live_slots(case: Case[Any], materials: Materials) -> dict[tuple[int, int], tuple[int, int]]:
    """(page, slot) -> (request, key), by walking every request key by key."""
    size = case.axes.page_size
    return {
        (pages[key // size], key % size): (number, key)
        for number, (request, pages) in enumerate(zip(case.axes.requests, page_table(materials), strict=True))
        for key in range(request.kv_len)
    }


@draws(200)
@given(small)
def test_page_tables_are_consistent(case: Case[Any]) -> None:
    axes, materials = case.axes, paged.materialize(case)
    x, table = materials.inputs, page_table(materials)
    used = [page for pages in table for page in pages]
    total = x["k_pages"].shape[0]
    assert len(set(used)) == len(used)
    assert set(used) <= set(range(total))
    spare = total - len(used)
    assert spare == axes.spare_pages or (spare == total == 1 and axes.spare_pages == 0)
    assert x["qo_indptr"].tolist() == [sum(r.qo_len for r in axes.requests[:n]) for n in range(len(axes.requests) + 1)]
    for request, pages, last in zip(axes.requests, table, x["kv_last_page_len"].tolist(), strict=True):
        if request.kv_len == 0:
            assert (pages, last) == ([], 0)
        else:
            assert (len(pages) - 1) * axes.page_size + last == request.kv_len
            assert 1 <= last <= axes.page_size
    if not axes.shuffled:
        assert used == list(range(len(used)))


@draws(200)
@given(small)
def test_dead_bytes_are_exactly_what_no_key_lies_in(case: Case[Any]) -> None:
    materials = paged.materialize(case)
    live = live_slots(case, materials)
    assert len(live) == sum(r.kv_len for r in case.axes.requests)
    used = {page for pages in page_table(materials) for page in pages}
    expected: dict[Place, set[tuple[int, int]]] = {Place.UNUSED_SLOTS: set(), Place.UNREFERENCED_PAGES: set()}
    for page in range(materials.inputs["k_pages"].shape[0]):
        for slot in range(case.axes.page_size):
            if (page, slot) not in live:
                expected[Place.UNUSED_SLOTS if page in used else Place.UNREFERENCED_PAGES].add((page, slot))
    found: dict[tuple[Place, str], set[tuple[int, int]]] = {}
    for dead in materials.dead:
        assert dead.mask.dtype == torch.bool
        mask = dead.mask.expand(materials.inputs[dead.tensor].shape[:2])
        assert (dead.place, dead.tensor) not in found
        found[dead.place, dead.tensor] = {(page, slot) for page, slot in mask.nonzero().tolist()}
    assert found == {
        (place, tensor): slots for place, slots in expected.items() if slots for tensor in ("k_pages", "v_pages")
    }


def test_shuffled_pages_are_permuted() -> None:
    lengths = [(1, 40), (1, 40)]
    plain, shuffled = (page_table(paged.materialize(case(*lengths, shuffled=s, spare_pages=3))) for s in (False, True))
    assert plain == [list(range(10)), list(range(10, 20))]
    pages = shuffled[0] + shuffled[1]
    assert sorted(pages) != pages
    # Spare pages lie between the others, and neither request keeps its pages together.
    assert set(range(23)) - set(pages) != {20, 21, 22}
    assert all(sorted(part) != list(range(min(part), max(part) + 1)) for part in shuffled)


def test_what_the_budget_of_each_strategy_rests_on() -> None:
    assert {strategy.name: strategy.tier for strategy in paged.INPUTS} == {
        "generic": "generic",
        "count": "exact",
        "dyadic": "exact",
        "poison": "generic",
        "needle": "hard",
        "integer": "exact",
        "scaled": "generic",
        "outlier": "generic",
        "large_logits": "hard",
        "special": "hard",
    }
    assert all(len(set(strategy.patterns)) >= 2 for strategy in paged.INPUTS)
    with pytest.raises(ValueError, match="no input strategy 'normal'; valid: generic, count, dyadic, poison, needle"):
        paged.paged_prefill.strategy("normal")


def test_locate_speaks_of_requests_and_tokens() -> None:
    batch = case((2, 3), (0, 5), (3, 0), (0, 0), (1, 1), kv_heads=2, group=2)
    rows = {0: (0, 0), 1: (0, 1), 2: (2, 0), 3: (2, 1), 4: (2, 2), 5: (4, 0)}
    for row, (request, token) in rows.items():
        assert paged.locate(batch, "out", (row, 3, 17)) == f"request {request}, token {token}, head 3, dim 17"
        assert paged.locate(batch, "lse", (row, 2)) == f"request {request}, token {token}, head 2"
    with pytest.raises(IndexError, match="lse has no row 6"):
        paged.locate(batch, "lse", (6, 0))


@pytest.fixture(scope="module")
def drawn() -> list[Case[Any]]:
    """2500 draws, the same in every run."""
    seen: list[Case[Any]] = []

    @draws(2500)
    @given(paged.cases(WIDE))
    def collect(case: Case[Any]) -> None:
        seen.append(case)

    collect()
    assert len(seen) >= 2500
    return seen


def test_draws_respect_the_limits(drawn: list[Case[Any]]) -> None:
    for one in drawn:
        axes = one.axes
        assert type(axes) is PagedPrefill
        assert one.operator == "paged_prefill"
        assert 1 <= len(axes.requests) <= WIDE.batch
        assert all(0 <= r.qo_len <= WIDE.qo_len and 0 <= r.kv_len <= WIDE.kv_len for r in axes.requests)
        assert axes.q_heads == axes.kv_heads * axes.group <= WIDE.heads
        assert axes.total_qo >= 1
        assert 0 <= axes.spare_pages <= 3
        assert 0 <= one.seed < 2**32
        assert one.inputs in paged.WEIGHTS


@pytest.mark.parametrize("limit", [1, 2, 3, 64])
def test_the_smallest_limits_can_be_drawn_from(limit: int) -> None:
    @draws(50)
    @given(paged.cases(Size(batch=1, qo_len=limit, kv_len=limit, heads=1)))
    def prop(case: Case[Any]) -> None:
        (request,) = case.axes.requests
        assert 1 <= request.qo_len <= limit
        assert request.kv_len <= limit
        assert case.axes.q_heads == 1

    prop()


def somewhere(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda axes: any(test(request) for request in axes.requests)


REACHED: Mapping[str, Callable[[Any], bool]] = {
    "no keys": somewhere(lambda r: r.kv_len == 0 and r.qo_len > 0),
    "no queries": somewhere(lambda r: r.qo_len == 0 and r.kv_len > 0),
    "nothing": somewhere(lambda r: r == Request(qo_len=0, kv_len=0)),
    "empty before the others": lambda a: a.requests[0].qo_len == 0,
    "empty after the others": lambda a: len(a.requests) > 1 and a.requests[-1].qo_len == 0,
    "one request": lambda a: len(a.requests) == 1,
    "a full batch": lambda a: len(a.requests) == WIDE.batch,
    "whole prompt": somewhere(lambda r: r.qo_len == r.kv_len > 64),
    "append": somewhere(lambda r: 1 < r.qo_len < r.kv_len),
    "decode": somewhere(lambda r: r.qo_len == 1 and r.kv_len > 1),
    "causal rows without keys": lambda a: a.causal and somewhere(lambda r: 0 < r.kv_len < r.qo_len)(a),
    "longest": somewhere(lambda r: r.kv_len > 280),
    "most queries": somewhere(lambda r: r.qo_len > 120),
    "tile edge": somewhere(lambda r: r.qo_len in (63, 65) or r.kv_len in (127, 129)),
    "contiguous": lambda a: not a.shuffled,
    "shuffled": lambda a: a.shuffled,
    "most heads": lambda a: a.q_heads == WIDE.heads,
    **{f"causal {c}": lambda a, c=c: a.causal is c for c in (False, True)},
    **{f"{n} spare pages": lambda a, n=n: a.spare_pages == n for n in range(4)},
    **{f"dtype {d}": lambda a, d=d: a.dtype == d for d in ("bfloat16", "float16", "float32")},
    **{f"head_dim {d}": lambda a, d=d: a.head_dim == d for d in (64, 128, 256)},
    **{f"group {g}": lambda a, g=g: a.group == g for g in (1, 2, 4, 7, 8)},
    **{f"{h} KV heads": lambda a, h=h: a.kv_heads == h for h in (1, 2, 4)},
    **{f"page size {p}": lambda a, p=p: a.page_size == p for p in (1, 4, 16, 64)},
    **{
        f"a page of {p} and {off:+} keys": lambda a, p=p, off=off: (
            a.page_size == p and any(r.kv_len == p + off for r in a.requests)
        )
        for p in (1, 4, 16, 64)
        for off in (-1, 0, 1)
    },
}


@pytest.mark.parametrize("name", REACHED)
def test_draws_reach(name: str, drawn: list[Case[Any]]) -> None:
    assert any(REACHED[name](case.axes) for case in drawn)


@pytest.mark.parametrize("inputs", paged.WEIGHTS)
def test_draws_reach_every_kind_of_input(inputs: str, drawn: list[Case[Any]]) -> None:
    share = paged.WEIGHTS[inputs] / sum(paged.WEIGHTS.values())
    assert sum(case.inputs == inputs for case in drawn) > len(drawn) * share / 3


def test_draws_often_reach_rows_without_keys(drawn: list[Case[Any]]) -> None:
    for name in ("no keys", "causal rows without keys"):
        assert sum(REACHED[name](case.axes) for case in drawn) > len(drawn) / 20, name


def test_the_simplest_case() -> None:
    quiet = settings(database=None, derandomize=True, max_examples=500)
    simplest = find(paged.cases(WIDE), lambda case: True, settings=quiet)
    assert simplest.axes.requests == (Request(qo_len=1, kv_len=1),)
    assert (simplest.inputs, simplest.seed, simplest.axes.spare_pages) == ("generic", 0, 0)
    assert (simplest.axes.kv_heads, simplest.axes.group, simplest.axes.page_size) == (1, 1, 1)
    assert not simplest.axes.causal
    assert not simplest.axes.shuffled
