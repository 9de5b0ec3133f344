"""ALiBi in the adapters of FlashInfer beside that of paged prefill: said where it is asked for, or refused."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_cases import Request

from kerneltest import discovery
from kerneltest.model import FP32, Call, Case, Device, Kernel

PACKAGE = f"{discovery.PACKAGE}.attention"
ragged = importlib.import_module(f"{PACKAGE}.flashinfer_ragged")
decode = importlib.import_module(f"{PACKAGE}.flashinfer_decode")
paged = importlib.import_module(f"{PACKAGE}.flashinfer")
DenseAttention = importlib.import_module(f"{PACKAGE}._dense").DenseAttention
PagedDecode = importlib.import_module(f"{PACKAGE}.paged_decode").PagedDecode
H200 = Device(kind="cuda", ordinal=0, name="NVIDIA H200", sm=(9, 0), units=132)
FA2 = {
    "ragged": ragged.ragged_fa2,
    "single prefill": ragged.single_fa2,
    "paged decode": decode.paged_cuda_cores,
    "paged decode, tensor cores": decode.paged_tensor_cores,
    "single decode": decode.single_cuda_cores,
    "single decode, tensor cores": decode.single_tensor_cores,
}
Said = list[dict[str, Any]]


def of(kernel: Kernel, **options: Any) -> Case[Any]:
    """A case of the kernel's operator with four query heads, and one query where there can be no more."""
    name = kernel.operator.name
    plain = {"dtype": "bfloat16", "head_dim": 64, "kv_heads": 2, "group": 2, "causal": False}
    one = Request(qo_len=1 if "decode" in name else 3, kv_len=9)
    if name == "paged_decode":
        pages = {"page_size": 4, "shuffled": False, "spare_pages": 0}
        axes = PagedDecode(requests=(one, one), **plain, **pages, **options)
    else:
        axes = DenseAttention(requests=(one,), **plain, **options)
    return Case(operator=name, axes=axes, inputs="generic", seed=0)


def library(monkeypatch: pytest.MonkeyPatch, *, knows: bool) -> Said:
    """A release of which the functions and ``plan`` have ``pos_encoding_mode`` or not; returns what they are given."""
    said: Said = []

    class Wrapper:
        def __init__(self, workspace: torch.Tensor, layout: str, **options: Any) -> None:
            self._float_workspace_buffer, self._kv_layout = workspace, layout

        def run(self, *args: Any, out: Any = None, lse: Any = None, return_lse: bool = False) -> tuple[Any, Any]:
            return out, lse

    def function(*args: Any, return_lse: bool = False, **options: Any) -> tuple[Any, Any]:
        said.append(options)
        return args[0], torch.zeros(args[0].shape[:-1])

    if knows:

        def plan(self: Any, *args: Any, pos_encoding_mode: str = "NONE", **options: Any) -> None:
            said.append(options | {"pos_encoding_mode": pos_encoding_mode})

        def single(*args: Any, pos_encoding_mode: str = "NONE", **options: Any) -> tuple[Any, Any]:
            return function(*args, pos_encoding_mode=pos_encoding_mode, **options)

    else:

        def plan(self: Any, *args: Any, causal: bool = False) -> None:  # type: ignore[misc]
            pass

        def single(q: Any, k: Any, v: Any, causal: bool = False) -> tuple[Any, Any]:  # type: ignore[misc]
            return q, None

    Wrapper.plan = plan  # type: ignore[attr-defined]
    module = ModuleType("flashinfer")
    for name in ("BatchPrefillWithRaggedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper"):
        setattr(module, name, Wrapper)
    for name in ("single_prefill_with_kv_cache", "single_decode_with_kv_cache"):
        setattr(module, name, single)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    paged.takes.cache_clear()
    return said


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    yield
    paged.takes.cache_clear()


def launch(kernel: Kernel, case: Case[Any]) -> None:
    materials = kernel.operator.materialize(case)
    outputs = {n: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for n, spec in materials.outputs.items()}
    call = Call(
        case=case,
        device=H200,
        inputs=materials.inputs,
        outputs=outputs,
        workspace=lambda nbytes, zeroed=False: torch.empty(nbytes, dtype=torch.uint8),
    )
    kernel.launch(replace(call, plan=kernel.plan(call)) if kernel.plan else call)


@pytest.mark.parametrize("name", FA2)
def test_it_is_said_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kernel, said = FA2[name], library(monkeypatch, knows=True)
    for alibi in (True, False):
        asked = of(kernel, alibi=alibi)
        assert kernel.unsupported(asked, H200) is None
        launch(kernel, asked)
    assert [options["pos_encoding_mode"] for options in said] == ["ALIBI", "NONE"]


@pytest.mark.parametrize("kernel", [*FA2.values(), ragged.ragged_fa3, ragged.single_fa3], ids=lambda one: one.name)
def test_a_call_without_a_log_sum_exp_is_nothing_special(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    library(monkeypatch, knows=True)
    assert kernel.unsupported(of(kernel, return_lse=False), H200) is None


@pytest.mark.parametrize("name", FA2)
def test_a_release_without_it_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kernel = FA2[name]
    library(monkeypatch, knows=False)
    reason = kernel.unsupported(of(kernel, alibi=True), H200)
    assert reason is not None
    assert reason.endswith("has no parameter pos_encoding_mode")
    assert kernel.unsupported(of(kernel), H200) is None


def test_a_plan_that_takes_any_parameter_by_name_is_given_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of decode does, from the releases on that have deprecated some."""
    said = library(monkeypatch, knows=False)

    def plan(self: Any, *args: Any, **options: Any) -> None:
        said.append(options)

    monkeypatch.setattr(sys.modules["flashinfer"].BatchDecodeWithPagedKVCacheWrapper, "plan", plan)
    for kernel in (decode.paged_cuda_cores, decode.paged_tensor_cores):
        asked = of(kernel, alibi=True)
        assert kernel.unsupported(asked, H200) is None
        launch(kernel, asked)
    assert [options["pos_encoding_mode"] for options in said] == ["ALIBI", "ALIBI"]


@pytest.mark.parametrize("kernel", [ragged.ragged_fa3, ragged.single_fa3])
def test_fa3_has_none(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    library(monkeypatch, knows=True)
    reason = kernel.unsupported(of(kernel, alibi=True), H200)
    assert reason == "fa3 has no encoding of positions (utils.py, is_fa3_backend_supported)"
    assert kernel.unsupported(of(kernel), H200) is None


@pytest.mark.parametrize("name", FA2)
def test_it_is_a_module_of_its_own_with_slopes_of_its_own(name: str) -> None:
    kernel = FA2[name]
    plain, biased = of(kernel), of(kernel, alibi=True)
    assert kernel.specialisation is not None
    assert kernel.specialisation(plain) != kernel.specialisation(biased)
    # Powers of four heads, in fp32.
    assert kernel.numerics(biased, H200).slope_rel == pytest.approx(12 * FP32.u)
