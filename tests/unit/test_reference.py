"""The float64 reference against a second one in NumPy loops, and against 50 digits of mpmath."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from attention_cases import alibi, axes_of, case, draws, paged, reference, shown, tensors
from hypothesis import given

from kerneltest.model import Case, Size
from kerneltest.oracle.attention_terms import BIASED, TENSORS, Attended, AttentionTerms, attention_terms

small = paged.cases(Size(batch=3, qo_len=5, kv_len=20, heads=4))
ROWS = ("lse", "dot_row", "dot_max", "norm_max", "score_max", "keys", "square_row", "fourth_row")
CHANNELS = ("out", "abs_out", "dot_out", "peak_out", "square_out")


def terms_of(case: Case[Any], inputs: Mapping[str, torch.Tensor]) -> AttentionTerms:
    return paged.reference(case, inputs, "cpu")


def brute_force(case: Case[Any], inputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """One query and one head at a time, one key at a time where a page is looked up."""
    axes = case.axes
    scale, cap = axes.scale * axes.k_scale, axes.softcap
    q, k_pages, v_pages = (inputs[name].double().numpy() for name in ("q", "k_pages", "v_pages"))
    q, v_pages = q[:, : axes.q_heads], v_pages * axes.v_scale
    if axes.layout == "HND":
        k_pages, v_pages = k_pages.swapaxes(1, 2), v_pages.swapaxes(1, 2)
    qo, kv, pages, last = (
        inputs[name].numpy() for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")
    )
    (rows, heads, _), dim = q.shape, v_pages.shape[-1]
    page_size, kv_heads = k_pages.shape[1:3]
    result = {name: np.zeros((rows, heads)) for name in ROWS}
    result |= {name: np.zeros((rows, heads, dim)) for name in CHANNELS}
    if axes.alibi:
        result |= {"bias_row": np.zeros((rows, heads)), "bias_out": np.zeros((rows, heads, dim))}
    result["lse"] -= np.inf
    visible = list(shown(case, inputs))
    for r in range(len(last)):
        mine = pages[kv[r] : kv[r + 1]]
        length = (len(mine) - 1) * page_size + last[r] if len(mine) else 0
        slots = [(mine[j // page_size], j % page_size) for j in range(length)]
        added = alibi(case, axes.requests[r]).numpy() if axes.alibi else None
        for i, row in enumerate(range(qo[r], qo[r + 1])):
            seen = [slot for slot, here in zip(slots, visible[r][i].tolist(), strict=True) if here]
            for head in range(heads) if seen else ():
                kv_head = head // (heads // kv_heads)
                k = np.array([k_pages[page, slot, kv_head] for page, slot in seen])
                v = np.array([v_pages[page, slot, kv_head] for page, slot in seen])
                v_abs = np.abs(v)
                s = np.array([math.fsum(q[row, head] * key) for key in k]) * scale
                if added is not None:
                    bias = added[head, i, visible[r][i].numpy()]
                    s = s + bias
                s = np.array([cap * math.tanh(x / cap) for x in s]) if cap else s
                A = np.array([math.fsum(np.abs(q[row, head] * key)) for key in k]) * scale
                m = s.max()
                total = math.fsum(np.exp(s - m))
                p = np.exp(s - m) / total
                at = row, head
                result["keys"][at] = len(seen)
                result["lse"][at] = m + math.log(total)
                result["out"][at] = p @ v
                result["abs_out"][at] = p @ v_abs
                result["dot_row"][at] = p @ A
                result["dot_out"][at] = (p * A) @ v_abs
                result["square_out"][at] = p**2 @ v**2
                result["square_row"][at] = (p**2).sum()
                result["fourth_row"][at] = (p**4).sum()
                if added is not None:
                    result["bias_row"][at] = p @ np.abs(bias)
                    result["bias_out"][at] = (p * np.abs(bias)) @ v_abs
                # These two are over all keys of the request, seen or not.
                every_k, every_v = (
                    np.array([x[page, slot, kv_head] for page, slot in slots]) for x in (k_pages, v_pages)
                )
                result["dot_max"][at] = (np.abs(every_k) @ np.abs(q[row, head])).max() * scale
                largest = np.abs(every_k @ q[row, head]).max() * scale
                result["score_max"][at] = cap * math.tanh(largest / cap) if cap and added is None else largest
                result["norm_max"][at] = ((every_k**4).sum(1).max() * (q[row, head] ** 4).sum()) ** 0.25 * scale
                result["peak_out"][at] = np.abs(every_v).sum(0) / total
    return result


def assert_equal_to(terms: AttentionTerms, expected: Mapping[str, np.ndarray], tolerance: float) -> None:
    for name, value in expected.items():
        ours = getattr(terms, name).numpy()
        assert ours.dtype == np.float64
        assert ours.shape == value.shape
        # Terms are sums of what is not negative; out and lse cancel, and are measured by what cancels in them.
        size = {
            "out": expected["abs_out"],
            "score_max": expected["dot_max"],
            "lse": np.maximum(1, expected["dot_row"] + expected.get("bias_row", 0)),
        }.get(name, value)
        finite = np.isfinite(value)
        assert np.array_equal(ours[~finite], value[~finite]), name
        assert (np.abs(ours[finite] - value[finite]) <= tolerance * size[finite]).all(), name


@draws(150)
@given(small)
def test_every_term_agrees_with_numpy(case: Case[Any]) -> None:
    inputs = paged.materialize(case).inputs
    assert_equal_to(terms_of(case, inputs), brute_force(case, inputs), 1e-12)


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window_left": 1},
    "no more than itself": {"window_left": 0, "causal": True},
    "soft-cap": {"softcap": 0.5},
    "mask": {"mask": "random"},
    "tree": {"mask": "tree", "packed_mask": True},
    "tree and window": {"mask": "tree", "window_left": 3},
    "eight bits": {"kv_dtype": "float8_e5m2", "k_scale": 0.375, "v_scale": 1.6875},
    "memory": {"layout": "HND", "strided_q": True},
    "another head dimension": {"head_dim_vo": 48},
    "ALiBi": {"alibi": True},
    "ALiBi of six heads, causal": {"alibi": True, "group": 3, "causal": True},
    "ALiBi and soft-cap": {"alibi": True, "softcap": 2.0},
    "ALiBi, tree and window": {"alibi": True, "mask": "tree", "window_left": 3},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_agrees_with_numpy(options: str) -> None:
    one = case((3, 9), (6, 4), (2, 0), (5, 5), shuffled=True, **{"kv_heads": 2, "group": 2} | OPTIONS[options])
    inputs = paged.materialize(one).inputs
    assert_equal_to(terms_of(one, inputs), brute_force(one, inputs), 1e-12)
    # And it changes something.
    without = replace(one, axes=axes_of.without_options(one.axes))
    if OPTIONS[options].keys() & {"window_left", "softcap", "mask", "alibi"}:
        lse = terms_of(without, {name: x for name, x in inputs.items() if name != "custom_mask"}).lse
        assert not torch.allclose(terms_of(one, inputs).lse, lse)


@draws(100)
@given(small)
def test_dead_slots_cannot_matter(case: Case[Any]) -> None:
    materials = paged.materialize(case)
    expected = terms_of(case, materials.inputs)
    for poison in (math.nan, math.inf, -3e38):
        inputs = {name: tensor.clone() for name, tensor in materials.inputs.items()}
        for dead in materials.dead:
            live = inputs[dead.tensor]
            # By way of fp32: torch fills nothing of 8 bits.
            filled = live.float()
            filled[dead.mask] = poison
            inputs[dead.tensor] = filled.to(live.dtype)
        terms = terms_of(case, inputs)
        for name in TENSORS:
            assert torch.equal(getattr(terms, name), getattr(expected, name)), name


def test_rows_without_keys() -> None:
    # Causal and longer than its keys: the first three of five queries see nothing. The second request has no keys.
    cases = case((5, 2), (2, 0), (1, 1), causal=True, group=2)
    terms = terms_of(cases, paged.materialize(cases).inputs)
    blind, seeing = [0, 1, 2, 5, 6], [3, 4, 7]
    assert terms.keys[:, 0].tolist() == [0, 0, 0, 1, 2, 0, 0, 1]
    assert torch.equal(terms.lse[blind], torch.full((5, 2), -math.inf, dtype=torch.float64))
    assert terms.lse[seeing].isfinite().all()
    for name in TENSORS:
        value = getattr(terms, name)
        assert not value.isnan().any(), name
        if name != "lse":
            assert (value[blind] == 0).all(), name
            assert (value[seeing] != 0).all(), name


@pytest.mark.parametrize("causal", [False, True])
def test_small_chunks_give_the_same_terms(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    whole = case((37, 41), (0, 9), (23, 5), causal=causal, kv_heads=2, group=2, shuffled=True, spare_pages=2)
    inputs = paged.materialize(whole).inputs
    expected = terms_of(whole, inputs)
    filters = torch.randn_like(expected.out)
    counts: list[int] = []

    def counted(x: Attended) -> AttentionTerms:
        counts.append(x.q.shape[0] * x.q.shape[2])
        return attention_terms(x)

    monkeypatch.setattr(reference, "attention_terms", counted)
    masked = replace(whole, axes=replace(whole.axes, causal=False, mask="random", window_left=20))
    biased = replace(whole, axes=replace(whole.axes, alibi=True))
    expected_of_biased = terms_of(biased, inputs)
    everything = (*TENSORS, *BIASED)
    bits = paged.materialize(masked).inputs
    unchunked = terms_of(masked, bits)
    bytes_of_a_row = reference.LIVE_ARRAYS * 8 * 4 * 41
    for chunk_bytes, chunks in ((1, [1] * 60), (7 * bytes_of_a_row, [23] + [7] * 5 + [2])):
        counts.clear()
        monkeypatch.setitem(reference.CHUNK_BYTES, "cpu", chunk_bytes)
        terms = terms_of(whole, inputs)
        assert_equal_to(terms, {name: getattr(expected, name).numpy() for name in TENSORS}, 1e-14)
        assert sorted(counts) == sorted(chunks)
        assert_equal_to(terms_of(masked, bits), {name: getattr(unchunked, name).numpy() for name in TENSORS}, 1e-14)
        ours = {name: getattr(expected_of_biased, name).numpy() for name in everything}
        assert_equal_to(terms_of(biased, inputs), ours, 1e-14)
        for centred in (False, True):
            assert torch.allclose(terms.spread(filters, centred), expected.spread(filters, centred), rtol=1e-12)


@draws(60)
@given(small)
def test_spread_agrees_with_numpy(case: Case[Any]) -> None:
    # From the terms' own weights, recovered one key at a time: the output of a one-hot V is the weight itself.
    materials = paged.materialize(case)
    inputs = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in materials.inputs.items()
    }
    values = tensors.by_slot(case.axes, inputs["v_pages"])
    terms = terms_of(case, inputs)
    filters = torch.randn(terms.out.shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64)
    longest = max(request.kv_len for request in case.axes.requests)
    for centred in (False, True):
        expected = torch.zeros_like(terms.lse)
        for slot in range(longest):
            only, there = dict(inputs), torch.zeros_like(values)
            page, offset = divmod(slot, case.axes.page_size)
            first = inputs["kv_indptr"][:-1].long()
            mine = [r for r, request in enumerate(case.axes.requests) if slot < request.kv_len]
            pages = inputs["kv_indices"].long()[first[mine] + page]
            there[pages, offset] = 1.0
            only["v_pages"] = tensors.as_laid_out(case.axes, there)
            weight = terms_of(case, only).out[..., 0] / case.axes.v_scale
            only["v_pages"] = tensors.as_laid_out(case.axes, there * values)
            moved = terms_of(case, only).out - (weight.unsqueeze(-1) * terms.out if centred else 0)
            expected += (moved * filters).sum(-1).square()
        # v - o cancels where one key has all the weight: what float64 leaves of it is a share of v.
        cancelled = 1e-15 * (terms.abs_out * filters.abs()).sum(-1)
        assert bool(
            (
                (terms.spread(filters, centred) - expected.sqrt()).abs() <= 1e-10 * expected.sqrt() + 1e-12 + cancelled
            ).all()
        )


def test_fifty_digits() -> None:
    long = case((3, 150), dtype="float32", head_dim=64, page_size=16, shuffled=True, seed=3)
    inputs = dict(paged.materialize(long).inputs)
    # Scores of about ±5, ±25 and ±75: from a flat softmax to one that is all peak.
    inputs["q"] = inputs["q"] * torch.tensor([2.0, 10.0, 30.0]).view(3, 1, 1)
    terms = terms_of(long, inputs)
    pages = inputs["kv_indices"].tolist()
    slots = [(pages[j // 16], j % 16) for j in range(150)]
    with mpmath.workdps(50):
        for row in range(3):
            q = [mpmath.mpf(x) for x in inputs["q"][row, 0].tolist()]
            keys = [inputs["k_pages"][page, slot, 0].tolist() for page, slot in slots]
            # The scale is the double that the operator hands to kernels and reference.
            s = [mpmath.fdot(q, key) * mpmath.mpf(long.axes.scale) for key in keys]
            weights = [mpmath.exp(x) for x in s]
            total = mpmath.fsum(weights)
            lse = mpmath.log(total)
            assert abs(float(lse - terms.lse[row, 0].item())) <= 1e-13 * float(abs(lse))
            for d in range(64):
                v = [inputs["v_pages"][page, slot, 0, d].item() for page, slot in slots]
                out, size = mpmath.fdot(weights, v) / total, mpmath.fdot(weights, map(abs, v)) / total
                assert abs(float(out - terms.out[row, 0, d].item())) <= 1e-13 * float(size)
                assert abs(float(size / terms.abs_out[row, 0, d].item() - 1)) <= 1e-13


# VmHWM and not ru_maxrss, which a child inherits from whoever started it.
MEMORY = """
from pathlib import Path
from attention_cases import case, paged

def peak():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024

def run(tokens):
    long = case((tokens, tokens), causal=True, head_dim=64, page_size=64)
    return paged.reference(long, paged.materialize(long).inputs, "cpu")

run(64)
before = peak()
terms = run(8192)
assert terms.keys[-1, 0] == 8192 and terms.out.isfinite().all()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_long_prompt_is_bounded(request: pytest.FixtureRequest) -> None:
    # All 8192 × 8192 weights at once, in six float64 arrays, would be 3 GiB.
    child = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=request.path.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert 0 < float(child.stdout) < 1024
