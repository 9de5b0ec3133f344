"""The attention suite, loaded the way a run loads it, and short ways to make cases of it."""

from __future__ import annotations

import importlib
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


def case(*lengths: tuple[int, int], inputs: str = "generic", seed: int = 0, **axes: Any) -> Case[Any]:
    """A case with a request for each (qo_len, kv_len); what is not said is plain."""
    requests = tuple(Request(qo_len=qo_len, kv_len=kv_len) for qo_len, kv_len in lengths)
    return Case(
        operator="paged_prefill", axes=PagedPrefill(requests=requests, **DEFAULTS | axes), inputs=inputs, seed=seed
    )


def draws(count: int) -> settings:
    """``count`` examples, the same ones in every run."""
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


def gathered(
    case: Case[Any], inputs: Mapping[str, torch.Tensor]
) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each request with its q, k and v in float32 [q_heads, tokens, d], keys cut at kv_len and repeated for a group."""
    rows, pages = inputs["qo_indptr"].tolist(), inputs["kv_indptr"].tolist()
    for number, request in enumerate(case.axes.requests):
        table = inputs["kv_indices"][pages[number] : pages[number + 1]].long()
        k, v = (
            inputs[name][table].flatten(0, 1)[: request.kv_len].repeat_interleave(case.axes.group, 1).float()
            for name in ("k_pages", "v_pages")
        )
        q = inputs["q"][rows[number] : rows[number + 1]].float()
        yield request, q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
