"""The attention suite, loaded the way a run loads it, and short ways to make cases of it."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from hypothesis import HealthCheck, settings

from kerneltest import discovery
from kerneltest.model import Case

# Small tensors only: on a busy machine threads would wait for each other most of the time.
torch.set_num_threads(1)
discovery.use_roots([discovery.builtin_root()])
paged = importlib.import_module(f"{discovery.PACKAGE}.attention.paged_prefill")
reference = importlib.import_module(f"{discovery.PACKAGE}.attention._reference")
axes_of = importlib.import_module(f"{discovery.PACKAGE}.attention._axes")
tensors = importlib.import_module(f"{discovery.PACKAGE}.attention._tensors")
masks = importlib.import_module(f"{discovery.PACKAGE}.attention._masks")
PagedPrefill, Request = paged.PagedPrefill, paged.Request

DEFAULTS = {
    "dtype": "bfloat16",
    "head_dim": 64,
    "kv_heads": 1,
    "group": 1,
    "page_size": 4,
    "causal": False,
    "shuffled": False,
    "spare_pages": 0,
}


def block_sparse_axes(**axes: Any) -> Any:
    """A matrix of one block, and what is said of it."""
    plain = {"rows": 1, "columns": 1, "block_rows": 1, "block_columns": 1, "masked": False}
    sparse = importlib.import_module(f"{discovery.PACKAGE}.attention._block_sparse_axes")
    return sparse.BlockSparse(**{"dtype": "float32", "head_dim": 64, "kv_heads": 1, "group": 1, **plain, **axes})


def case(*lengths: tuple[int, int], inputs: str = "generic", seed: int = 0, **axes: Any) -> Case[Any]:
    """A case with a request for each (qo_len, kv_len); what is not said is plain."""
    requests = tuple(Request(qo_len=qo_len, kv_len=kv_len) for qo_len, kv_len in lengths)
    return Case(
        operator="paged_prefill", axes=PagedPrefill(requests=requests, **DEFAULTS | axes), inputs=inputs, seed=seed
    )


def without_options(case: Case[Any]) -> Case[Any]:
    """The case with all that has a default at it, but for the scale that its inputs may need."""
    plain = {
        field.name: field.default
        for field in dataclasses.fields(case.axes)
        if field.default is not dataclasses.MISSING and field.name != "sm_scale"
    }
    return dataclasses.replace(case, axes=dataclasses.replace(case.axes, **plain), relation="")


def draws(count: int) -> settings:
    """``count`` examples, the same ones in every run."""
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


def gathered(
    case: Case[Any], inputs: Mapping[str, torch.Tensor]
) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each request with its q, k and v in float32 [q_heads, tokens, d], keys cut at kv_len and repeated for a group.

    K and V are multiplied by their scales.
    """
    axes = case.axes
    rows, pages = inputs["qo_indptr"].tolist(), inputs["kv_indptr"].tolist()
    for number, request in enumerate(axes.requests):
        table = inputs["kv_indices"][pages[number] : pages[number + 1]].long()
        k, v = (
            cache.float()[table].transpose(1, 1 if axes.layout == "NHD" else 2).flatten(0, 1)[: request.kv_len] * scale
            for cache, scale in ((inputs["k_pages"], axes.k_scale), (inputs["v_pages"], axes.v_scale))
        )
        q = inputs["q"][rows[number] : rows[number + 1], : axes.q_heads].float()
        k, v = (x.repeat_interleave(axes.group, 1).transpose(0, 1) for x in (k, v))
        yield request, q.transpose(0, 1), k, v


def slopes(heads: int) -> list[float]:
    """ALiBi's, as its paper says them: a geometric sequence; between two of them where heads are no power of two."""
    below = 2 ** int(math.log2(heads))
    sequence = [(2.0 ** (-8 / below)) ** (head + 1) for head in range(below)]
    return sequence if below == heads else sequence + slopes(2 * below)[::2][: heads - below]


def alibi(case: Case[Any], request: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What it adds to the scores of a request, [q_heads, qo_len, kv_len], found pair by pair; in this dtype."""
    rows = [[float(j - i) for j in range(request.kv_len)] for i in range(request.qo_len)]
    distance = torch.tensor(rows, dtype=dtype).view(request.qo_len, request.kv_len)
    return torch.stack([slope * distance for slope in torch.tensor(slopes(case.axes.q_heads), dtype=dtype)])


def shown(case: Case[Any], inputs: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Which keys the queries of each request see, bool [qo_len, kv_len], found pair by pair."""
    axes, first = case.axes, 0
    for request in axes.requests:
        found = torch.zeros(request.qo_len, request.kv_len, dtype=torch.bool)
        for i in range(request.qo_len):
            own = i + request.kv_len - request.qo_len
            for j in range(request.kv_len):
                found[i, j] = not (axes.causal and j > own) and (axes.window_left < 0 or j >= own - axes.window_left)
        if axes.mask != "none":
            found &= inputs["custom_mask"][first : first + found.numel()].view(found.shape)
            first += found.numel()
        yield found
