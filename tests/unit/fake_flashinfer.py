"""FlashInfer's functions on rows of a vocabulary, with the signatures of 0.6.18.post1 and what they say they compute.

In plain torch, on a CPU: for the adapters to be called as they will be, without the library and without a GPU.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from kerneltest.oracle.philox import curand_uniform

IndexOf = torch.Tensor | None


def _column(value: Any, rows: int, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        assert value.shape == (rows,), "a parameter is one for each row of the probabilities"
        return value.to(dtype).unsqueeze(-1)
    return torch.full((rows, 1), value, dtype=dtype)


def _above(probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tokens are above each, and their mass as float32."""
    value = probs.double().sort(dim=-1, descending=True).values
    count = torch.searchsorted(-value, -probs.double(), right=False)
    mass = torch.nn.functional.pad(value.cumsum(-1), (1, 0)).gather(-1, count)
    return count, mass.float()


def _draw(weights: torch.Tensor, indices: IndexOf, seed: Any, offset: Any) -> torch.Tensor:
    assert isinstance(seed, torch.Tensor) == isinstance(offset, torch.Tensor)
    assert indices is None or indices.dtype in (torch.int32, torch.int64)
    random = torch.Generator().manual_seed(int(seed) * 7919 + int(offset))
    rows = weights if indices is None else weights[indices.long()]
    dtype = torch.int32 if indices is None else indices.dtype
    return torch.multinomial(rows.float(), 1, generator=random).squeeze(-1).to(dtype)


def _invert(weights: torch.Tensor, share: bool, indices: IndexOf, seed: Any, offset: Any) -> torch.Tensor:
    """The first token whose running sum is above the random number of its place in the batch."""
    rows = weights if indices is None else weights[indices.long()]
    numbers = curand_uniform(int(seed), np.arange(len(rows), dtype=np.uint64), int(offset))
    sums = rows.double().cumsum(-1)
    at = torch.from_numpy(numbers).unsqueeze(-1) * (sums[:, -1:] if share else 1.0)
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    drawn = torch.minimum(torch.searchsorted(sums, at, right=True), last).squeeze(-1)
    return drawn.to(torch.int32 if indices is None else indices.dtype)


def softmax(logits: Any, temperature: Any = None, enable_pdl: Any = None) -> torch.Tensor:
    assert enable_pdl is False
    return (logits.float() / _column(temperature, len(logits), torch.float32)).softmax(-1)


def sampling_from_probs(
    probs: Any, indices: Any = None, deterministic: bool = True, generator: Any = None, check_nan: bool = False,
    seed: Any = None, offset: Any = None, return_valid: bool = False,
) -> torch.Tensor:  # fmt: skip
    return _invert(probs, False, indices, seed, offset)


def sampling_from_logits(
    logits: Any, indices: Any = None, deterministic: bool = True, generator: Any = None, check_nan: bool = False,
    seed: Any = None, offset: Any = None,
) -> torch.Tensor:  # fmt: skip
    return _draw(logits.float().softmax(-1), indices, seed, offset)


def top_p_sampling_from_probs(
    probs: Any, top_p: Any, indices: Any = None, deterministic: bool = True, generator: Any = None,
    check_nan: bool = False, seed: Any = None, offset: Any = None, return_valid: bool = False,
) -> torch.Tensor:  # fmt: skip
    kept = _above(probs)[1] < _column(top_p, len(probs), torch.float32)
    return _draw(probs.where(kept, 0.0), indices, seed, offset)


def top_k_sampling_from_probs(
    probs: Any, top_k: Any, indices: Any = None, deterministic: bool = True, generator: Any = None,
    check_nan: bool = False, seed: Any = None, offset: Any = None, return_valid: bool = False,
) -> torch.Tensor:  # fmt: skip
    kept = _above(probs)[0] < _column(top_k, len(probs), torch.int64)
    return _draw(probs.where(kept, 0.0), indices, seed, offset)


def min_p_sampling_from_probs(
    probs: Any, min_p: Any, indices: Any = None, deterministic: bool = True, generator: Any = None,
    check_nan: bool = False, seed: Any = None, offset: Any = None, return_valid: bool = False,
) -> torch.Tensor:  # fmt: skip
    kept = probs >= probs.amax(-1, keepdim=True) * _column(min_p, len(probs), torch.float32)
    return _invert(probs.where(kept, 0.0), True, indices, seed, offset)


def _top_k_first_fast_path_applicable(x: Any, top_k: Any, indices: Any) -> bool:
    return indices is None and isinstance(top_k, int) and 0 < top_k <= 256 and x.size(-1) >= 65536


def top_k_top_p_sampling_from_probs(
    probs: Any, top_k: Any, top_p: Any, indices: Any = None, filter_apply_order: str = "top_k_first",
    deterministic: bool = True, generator: Any = None, check_nan: bool = False, seed: Any = None, offset: Any = None,
    return_valid: bool = False,
) -> torch.Tensor:  # fmt: skip
    assert filter_apply_order in ("joint", "top_k_first")
    if filter_apply_order == "top_k_first":
        return top_p_sampling_from_probs(top_k_renorm_probs(probs, top_k), top_p, indices, seed=seed, offset=offset)
    count, mass = _above(probs)
    few = count < _column(top_k, len(probs), torch.int64)
    kept = few & (mass < _column(top_p, len(probs), torch.float32))
    return _draw(probs.where(kept, 0.0), indices, seed, offset)


def top_k_top_p_sampling_from_logits(
    logits: Any, top_k: Any, top_p: Any, indices: Any = None, filter_apply_order: str = "top_k_first",
    deterministic: bool = True, generator: Any = None, check_nan: bool = False, seed: Any = None, offset: Any = None,
) -> torch.Tensor:  # fmt: skip
    if filter_apply_order == "top_k_first":
        probs = top_k_mask_logits(logits, top_k).softmax(-1)
        return top_p_sampling_from_probs(probs, top_p, indices, seed=seed, offset=offset)
    return top_k_top_p_sampling_from_probs(
        logits.softmax(-1), top_k, top_p, indices, filter_apply_order, seed=seed, offset=offset
    )


def _renormalised(probs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    left = torch.where(kept, probs.float(), 0.0)
    return (left * (1 / left.sum(-1, keepdim=True))).to(probs.dtype)


def top_p_renorm_probs(probs: Any, top_p: Any, is_deterministic: bool = False) -> torch.Tensor:
    p = _column(top_p, len(probs), torch.float32)
    if probs.shape[-1] >= 2048:
        p = p * probs.sum(-1, keepdim=True)
    return _renormalised(probs, _above(probs)[1] < p)


def top_k_renorm_probs(probs: Any, top_k: Any) -> torch.Tensor:
    return _renormalised(probs, _above(probs)[0] < _column(top_k, len(probs), torch.int64))


def top_k_mask_logits(logits: Any, top_k: Any) -> torch.Tensor:
    return logits.where(_above(logits)[0] < _column(top_k, len(logits), torch.int64), -torch.inf)


def chain_speculative_sampling(
    draft_probs: Any, draft_token_ids: Any, target_probs: Any, maybe_output_accepted_token_num: Any = None,
    maybe_output_emitted_draft_token_num: Any = None, deterministic: bool = True, generator: Any = None,
    seed: Any = None, offset: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    rows, n = draft_token_ids.shape
    tokens, counts = torch.full((rows, n + 1), -1, dtype=torch.int32), torch.zeros(2, rows, dtype=torch.int32)
    random = torch.Generator().manual_seed(int(seed) * 7919 + int(offset))

    def accepts(row: int, place: int) -> bool:
        token = int(draft_token_ids[row, place])
        u = torch.rand((), generator=random)
        return bool(u * draft_probs[row, place, token] < target_probs[row, place, token])

    for row in range(rows):
        place = 0
        while place < n and accepts(row, place):
            tokens[row, place] = draft_token_ids[row, place]
            place += 1
        counts[0, row] = place + sum(accepts(row, later) for later in range(place, n))
        counts[1, row] = place
        left = target_probs[row, place] - (draft_probs[row, place] if place < n else 0)
        tokens[row, place] = int(torch.multinomial(left.clamp(min=0), 1, generator=random))
    return tokens, counts[0], counts[1]


def top_k(
    input: Any, k: int, sorted: bool = False, deterministic: bool = False, tie_break: int = 0,  # noqa: A002
    dsa_graph_safe: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    x = input.flip(-1) if tie_break == 2 else input
    values, indices = (both[:, :k].contiguous() for both in x.sort(dim=-1, descending=True, stable=True))
    return values, input.shape[-1] - 1 - indices if tie_break == 2 else indices


def install(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Make ``flashinfer`` and ``flashinfer.sampling`` importable for the length of a test; returns the latter."""
    package, sampling = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.sampling")
    functions = {name: value for name, value in globals().items() if isinstance(value, types.FunctionType)}
    vars(sampling).update(functions)
    vars(package).update(sampling=sampling, top_k=top_k, __path__=[])
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", sampling)
    return sampling
