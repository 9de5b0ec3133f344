"""The operator ``paged_prefill``: tensors that follow from the case, right page tables, draws that go everywhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import DEFAULTS, PagedPrefill, Request, axes_of, case, draws, masks, paged, tensors
from hypothesis import find, given, settings

from kerneltest.engine.chase import draw
from kerneltest.model import Case, Materials, OutputSpec, Place, Size
from kerneltest.model.codec import encode

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
    dtype, kv_dtype = getattr(torch, axes.dtype), getattr(torch, axes.kv_format)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in materials.inputs.items()}
    page = (axes.page_size, axes.kv_heads) if axes.layout == "NHD" else (axes.kv_heads, axes.page_size)
    cache, v_dim = (max(total + axes.spare_pages, 1), *page), axes.head_dim_vo or axes.head_dim
    batch = len(axes.requests)
    masked: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if axes.mask != "none":
        masked["custom_mask"] = ((sum(r.qo_len * r.kv_len for r in axes.requests),), torch.bool)
    if axes.packed_mask:
        masked["packed_mask"] = ((sum(-(-r.qo_len * r.kv_len // 8) for r in axes.requests),), torch.uint8)
        masked["mask_indptr"] = ((batch + 1,), torch.int32)
    assert shapes == masked | {
        "q": ((rows, heads + (2 * axes.kv_heads if axes.strided_q else 0), axes.head_dim), dtype),
        "k_pages": ((*cache, axes.head_dim), kv_dtype),
        "v_pages": ((*cache, v_dim), kv_dtype),
        "qo_indptr": ((batch + 1,), torch.int32),
        "kv_indptr": ((batch + 1,), torch.int32),
        "kv_indices": ((total,), torch.int32),
        "kv_last_page_len": ((batch,), torch.int32),
    }
    lse = {"lse": OutputSpec(shape=(rows, heads), dtype="float32")} if axes.return_lse else {}
    assert materials.outputs == lse | {"out": OutputSpec(shape=(rows, heads, v_dim), dtype=axes.dtype)}
    for name in ("q", "k_pages", "v_pages"):
        assert materials.inputs[name].float().isfinite().all()


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
    of_queries = [dead for dead in materials.dead if dead.tensor == "q"]
    assert len(of_queries) == (case.axes.strided_q and case.axes.total_qo > 0)
    for dead in of_queries:
        assert dead.place is Place.UNUSED_SLOTS
        assert not dead.mask[:, : case.axes.q_heads].any()
        assert dead.mask[:, case.axes.q_heads :].all()
    for dead in materials.dead:
        if dead.tensor == "q":
            continue
        assert dead.mask.dtype == torch.bool
        mask = dead.mask
        if case.axes.layout == "HND":
            assert mask.shape == materials.inputs[dead.tensor].shape[:3]
            assert torch.equal(mask.any(1), mask.all(1))
            mask = mask[:, 0]
        mask = mask.expand(materials.inputs["k_pages"].shape[0], case.axes.page_size)
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
    """2500 different cases, drawn as a hunt draws them."""
    seen: list[Case[Any]] = []
    draw(paged.cases(WIDE), seen.append, 2500, 1)
    different = list(dict.fromkeys(seen))
    assert len(different) == 2500
    return different


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


def asked_for(axes: Any) -> set[str]:
    return {name for name, (_, asked) in axes_of.OPTIONS.items() if asked(axes)}


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
    **{
        f"{name} alone": lambda a, name=name: asked_for(a) - {"scales"} == {name}
        for name in axes_of.OPTIONS
        if name != "scales"
    },
    "no option": lambda a: axes_of.lacking(a) is None,
    "both scales": lambda a: a.k_scale != 1.0 and a.v_scale != 1.0,
    "window and soft-cap": lambda a: a.window_left >= 0 and a.softcap > 0,
    "ALiBi and soft-cap": lambda a: a.alibi and a.softcap > 0,
    "a mask in bits, of several requests": lambda a: a.packed_mask and len(a.requests) > 1,
    **{f"mask {m}": lambda a, m=m: a.mask == m for m in ("none", "random", "tree")},
    **{f"K and V {d}": lambda a, d=d: a.kv_format == d for d in ("float8_e4m3fn", "float8_e5m2")},
    "192 and 128": lambda a: (a.head_dim, a.v_dim) == (192, 128),
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


def test_half_of_the_cases_have_no_option_that_changes_the_answer(drawn: list[Case[Any]]) -> None:
    free = {"layout", "strided_q"}
    plain = sum(axes_of.lacking(one.axes, *free) is None for one in drawn)
    assert 0.4 < plain / len(drawn) < 0.75


def test_few_modules_are_needed_and_the_common_one_most_often(drawn: list[Case[Any]]) -> None:
    # What makes a library that compiles for its options compile anew.
    modules = Counter(
        (a.dtype, a.head_dim, a.v_dim, a.kv_format, a.window_left >= 0, a.softcap > 0, a.alibi)
        for a in (one.axes for one in drawn)
        if a.dtype != "float32"
    )
    assert len(modules) <= 12
    common = ("bfloat16", 128, 128, "bfloat16", False, False, False)
    assert modules.most_common(1)[0][0] == common
    assert modules[common] > sum(modules.values()) / 3


def test_axes_of_older_cases_are_read_and_have_the_same_id() -> None:
    old = case((2, 3), causal=True)
    data = {name: value for name, value in encode(old)["axes"].items() if name in DEFAULTS or name == "requests"}
    read = Case.from_json({**encode(old), "axes": data}, PagedPrefill)
    assert read == old
    assert axes_of.without_options(read.axes) == read.axes
    assert "window_left" not in str(read)
    assert read.id == "87e3d988"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window_left": -2}, "window_left must be at least -1, got -2"),
        ({"softcap": -1.0}, "softcap must be at least 0, got -1.0"),
        ({"softcap": float("inf")}, "softcap must be finite, got inf"),
        ({"mask": "half"}, "mask must be one of none, random, tree, got 'half'"),
        ({"kv_dtype": "int8"}, "kv_dtype must be one of same, float8_e4m3fn, float8_e5m2, got 'int8'"),
        ({"layout": "DNH"}, "layout must be one of NHD, HND, got 'DNH'"),
        ({"mask": "tree", "causal": True}, "causal must be false"),
        ({"packed_mask": True}, "there is no mask to be packed"),
        ({"k_scale": 0.0}, "k_scale and v_scale must be positive, got 0.0 and 1.0"),
        ({"head_dim_vo": 0}, "head_dim_vo must be at least 1, got 0"),
        ({"fixed_split_size": 2, "disable_split_kv": True}, "not be split at all"),
    ],
)
def test_axes_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        case((1, 1), **wrong)


@draws(60)
@given(small)
def test_a_mask_shows_every_query_a_key_and_is_the_same_in_bits(case: Case[Any]) -> None:
    mask = case.axes.mask if case.axes.mask != "none" else "random"
    case = replace(case, axes=replace(case.axes, mask=mask, packed_mask=True, causal=False))
    inputs = paged.materialize(case).inputs
    begins = inputs["mask_indptr"].tolist()
    for number, (request, bits) in enumerate(zip(case.axes.requests, masks.masks(case.axes, inputs), strict=True)):
        first, end = masks.limits(case.axes, request)
        keys = torch.arange(request.kv_len)
        inside = (keys >= first.unsqueeze(-1)) & (keys < end.unsqueeze(-1))
        assert (bits & inside).any(-1).all() or request.kv_len == 0
        size = bits.numel()
        packed = inputs["packed_mask"][begins[number] : begins[number + 1]]
        assert len(packed) == -(-size // 8)
        expected = np.unpackbits(packed.numpy(), bitorder="little")[:size].astype(bool)
        assert np.array_equal(bits.flatten().numpy(), expected)
        assert torch.equal(masks.unpack(inputs["packed_mask"], inputs["mask_indptr"][number], request), bits)


def test_a_tree_shows_ancestors_and_everything_before_it() -> None:
    one = case((40, 100), mask="tree", seed=5)
    (mask,) = masks.masks(one.axes, paged.materialize(one).inputs)
    assert mask[:, :60].all()
    tree = mask[:, 60:]
    assert tree.diagonal().all()
    assert not tree.triu(1).any()
    for node in range(40):
        ancestors = tree[node].nonzero().flatten().tolist()
        # Whom an ancestor sees, its descendant sees.
        assert all(torch.equal(tree[other] & tree[node], tree[other]) for other in ancestors)
    assert 1 < tree.sum(-1).float().mean() < 20


def test_random_masks_hide_whole_tiles() -> None:
    one = case((64, 400), mask="random", seed=1)
    (mask,) = masks.masks(one.axes, paged.materialize(one).inputs)
    share = mask.float().mean(-1)
    assert (share == 1).any()
    assert (share < 0.02).any()
    assert not mask[:, :64].any(-1).all()


def test_strided_queries_are_no_copy() -> None:
    one = case((3, 5), kv_heads=2, group=3, strided_q=True)
    q = tensors.queries(one.axes, paged.materialize(one).inputs)
    assert q.shape == (3, 6, 64)
    assert q.stride() == (10 * 64, 64, 1)
    assert not q.is_contiguous()


@draws(80)
@given(small)
def test_simpler_steps_end_at_the_common_case_without_options(case: Case[Any]) -> None:
    seen = set()
    while case not in seen:
        seen.add(case)
        case = next(iter(paged.simpler(case)), case)
        paged.materialize(case)
    assert axes_of.lacking(case.axes) is None
    assert (case.axes.dtype, case.axes.head_dim) == ("bfloat16", 128)


def requests_of(case: Case[Any]) -> list[tuple[int, int]]:
    return [(request.qo_len, request.kv_len) for request in case.axes.requests]


def test_a_batch_is_halved_before_single_requests_go() -> None:
    batch = case((1, 1), (2, 2), (0, 3), (0, 4))
    tried = [requests_of(one) for one in paged.simpler(batch) if len(one.axes.requests) < 4]
    # Of the second half nobody asks anything.
    assert tried[0] == [(1, 1), (2, 2)]
    assert [(0, 3), (0, 4)] not in tried
    assert tried[1] == [(2, 2), (0, 3), (0, 4)]


def test_a_request_is_shortened_along_its_diagonal() -> None:
    tried = [requests_of(one)[0] for one in paged.simpler(case((10, 210)))]
    # As many keys before the first query as there were: half of the queries, or one less.
    assert (5, 205) in tried
    assert (9, 209) in tried
    assert {(10, 105), (10, 146), (10, 82), (10, 209), (5, 210)} <= set(tried)
