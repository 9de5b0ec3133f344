"""The kernels of this repository under every option of paged prefill: right, or refused with a reason."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from attention_cases import axes_of, case, paged

from kerneltest import discovery
from kerneltest.model import Case, Device, Status
from kerneltest.worker.execute import execute
from kerneltest.worker.rig import Rig

# Whether Triton interprets is decided when it is imported: its kernel is tested in a process of its own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MODULES = {
    name: importlib.import_module(f"{discovery.PACKAGE}.attention.{name}")
    for name in ("torch_eager", "torch_sdpa", "triton_paged")
}
KERNELS = {
    "eager": MODULES["torch_eager"].eager,
    "sdpa": MODULES["torch_sdpa"].sdpa,
    "triton": MODULES["triton_paged"].triton_prefill,
}
CPU = Device(kind="cpu", ordinal=0, name="cpu", sm=(0, 0), units=1)
BATCH = ((3, 40), (5, 5), (0, 3), (20, 33))
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {"causal": True},
    "window": {"window_left": 5},
    "causal window": {"window_left": 16, "causal": True},
    "only itself": {"window_left": 0, "causal": True},
    "soft-cap": {"softcap": 2.0, "causal": True},
    "ALiBi": {"alibi": True, "causal": True},
    "ALiBi, soft-cap and window": {"alibi": True, "softcap": 2.0, "window_left": 7},
    "mask": {"mask": "random"},
    "tree in bits": {"mask": "tree", "packed_mask": True},
    "mask and window": {"mask": "random", "window_left": 7},
    "e4m3": {"kv_dtype": "float8_e4m3fn", "k_scale": 0.375, "v_scale": 1.6875},
    "e5m2": {"kv_dtype": "float8_e5m2", "k_scale": 1.6875, "v_scale": 0.6875},
    "scales of 16 bits": {"k_scale": 0.375, "v_scale": 1.6875},
    "HND": {"layout": "HND"},
    "strided": {"strided_q": True},
    "memory": {"layout": "HND", "strided_q": True, "window_left": 3, "causal": True},
    "another head dimension": {"head_dim_vo": 32},
    "pieces": {"fixed_split_size": 2},
    "unsplit": {"disable_split_kv": True},
    "everything": {
        "layout": "HND",
        "strided_q": True,
        "window_left": 9,
        "softcap": 2.0,
        "alibi": True,
        "mask": "random",
        "packed_mask": True,
        "kv_dtype": "float8_e4m3fn",
        "k_scale": 0.375,
        "v_scale": 1.6875,
        "head_dim_vo": 32,
        "fixed_split_size": 2,
    },
}
REFUSED = {
    "sdpa": {
        "ALiBi": "the kernel does not know ALiBi",
        "ALiBi, soft-cap and window": "the kernel does not know a soft-cap of the scores",
        "soft-cap": "the kernel does not know a soft-cap of the scores",
        "another head dimension": "on a CPU the flash kernel of scaled_dot_product_attention has one head dimension",
        "everything": "the kernel does not know a soft-cap of the scores",
    },
    "triton": {
        "ALiBi": "the kernel does not know ALiBi",
        "ALiBi, soft-cap and window": "the kernel does not know a soft-cap of the scores",
        "soft-cap": "the kernel does not know a soft-cap of the scores",
        "e4m3": "the kernel does not know K and V of another dtype",
        "e5m2": "the kernel does not know K and V of another dtype",
        "scales of 16 bits": "the kernel does not know scales of K and V",
        "another head dimension": "the kernel does not know a head dimension of its own for V",
        "everything": "the kernel does not know a soft-cap of the scores",
    },
}


def of(option: str, inputs: str = "generic") -> Case[Any]:
    return case(*BATCH, kv_heads=2, group=2, shuffled=True, spare_pages=1, inputs=inputs, **OPTIONS[option])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kernel", ["triton"] if INTERPRETED else ["eager", "sdpa"])
@pytest.mark.parametrize("inputs", ["generic", "needle"])
def test_an_option_is_heeded_or_refused(kernel: str, option: str, inputs: str) -> None:
    outcome = execute(KERNELS[kernel], of(option, inputs), Rig(CPU))
    reason = REFUSED.get(kernel, {}).get(option)
    if reason is None:
        assert (outcome.status, outcome.finding) == (Status.PASSED, None)
    else:
        assert outcome.status is Status.UNSUPPORTED
        assert outcome.reason is not None
        assert outcome.reason.startswith(reason)


@pytest.mark.skipif(INTERPRETED, reason="this is the other process")
def test_the_interpreted_kernel_heeds_or_refuses_them_as_well() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "heeded_or_refused", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"{2 * len(OPTIONS)} passed" in done.stdout


def test_a_kernel_that_knows_no_option_refuses_each_of_them() -> None:
    for option, axes in OPTIONS.items():
        asked = of(option)
        reason = axes_of.plain(asked, CPU)
        if axes.keys() <= {"causal"}:
            assert reason is None
        else:
            assert reason is not None
            assert reason.startswith("the kernel does not know ")
        without = axes_of.without_options(asked.axes)
        assert axes_of.lacking(without) is None
        assert without.requests == asked.axes.requests
    assert axes_of.lacking(of("memory").axes, *axes_of.OPTIONS) is None


def test_without_options_keeps_what_a_strategy_needs() -> None:
    dyadic = case((1, 4), inputs="dyadic", sm_scale=paged.LN_2, window_left=2)
    paged.materialize(replace(dyadic, axes=axes_of.without_options(dyadic.axes)))
