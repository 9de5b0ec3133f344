"""What can be known of FlashInfer's adapter without FlashInfer: the workspace it asks for, the cases it refuses."""

from __future__ import annotations

import importlib

import pytest
from attention_cases import case

from kerneltest import discovery
from kerneltest.model import Device

adapter = importlib.import_module(f"{discovery.PACKAGE}.attention.flashinfer")
H200 = Device(kind="cuda", ordinal=0, name="NVIDIA H200", sm=(9, 0), units=132)


@pytest.mark.parametrize(
    ("requests", "head_dim", "kv_heads", "rows"),
    [
        # Cases that ran out of the recommended 128 MiB on an H200; ``rows`` is what a block of theirs holds.
        (((193, 897), (177, 129)), 128, 2, 128),
        (((241, 897), (241, 897)), 128, 1, 128),
        (((121, 129), (121, 129), (249, 129)), 256, 2, 64),
    ],
)
def test_workspace_holds_every_plan_that_splits(
    requests: tuple[tuple[int, int], ...], head_dim: int, kv_heads: int, rows: int
) -> None:
    large = case(*requests, head_dim=head_dim, kv_heads=kv_heads, group=8)
    blocks = 2 * H200.units // kv_heads  # the most that the planner allows in a batch that it splits
    partial_outputs = large.axes.q_heads * blocks * rows * head_dim * 4
    sums = large.axes.q_heads * blocks * rows * 4
    assert partial_outputs + sums > 128 << 20
    assert adapter.workspace_bytes(large, H200) >= partial_outputs + sums


def test_workspace_is_the_recommended_one_where_that_is_enough() -> None:
    assert adapter.workspace_bytes(case((1, 1), head_dim=64, kv_heads=1, group=1), H200) == 128 << 20


@pytest.mark.parametrize(
    ("requests", "axes", "reason"),
    [
        (((2, 1),), {"causal": True}, "causal with fewer keys than queries is outside of FlashInfer's contract"),
        (((3, 3), (1, 0)), {"causal": True}, "causal with fewer keys than queries is outside of FlashInfer's contract"),
        (((1, 1),), {"dtype": "float32"}, "FlashInfer's prefill has no float32 kernels"),
    ],
)
def test_what_the_library_does_not_promise_is_refused_with_a_reason(
    requests: tuple[tuple[int, int], ...], axes: dict[str, object], reason: str
) -> None:
    assert adapter.unsupported(case(*requests, **axes), H200) == reason
