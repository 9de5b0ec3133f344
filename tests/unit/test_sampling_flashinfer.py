"""FlashInfer's adapters for samplers and filters, on functions that only have the library's signatures and words."""

from __future__ import annotations

import dataclasses
from typing import Any

import fake_flashinfer
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from sampling_cases import H200, case, module

from kerneltest.model import Call, Device, Kernel, Size
from kerneltest.oracle.verdict import judge
from kerneltest.worker.staging import wrong_form

SIZE = Size(batch=1, qo_len=1, kv_len=1, heads=1, rows=4, vocabulary=2100)
CPU = Device(kind="cpu", ordinal=0, name="a CPU", sm=(0, 0), units=1)


def kernels() -> dict[str, Kernel]:
    files = (module("flashinfer_samplers"), module("flashinfer_filters"))
    return {one.name: one for file in files for one in vars(file).values() if isinstance(one, Kernel)}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    adapters = module("_flashinfer")
    adapters.parameters.cache_clear()
    yield fake_flashinfer.install(monkeypatch)
    adapters.parameters.cache_clear()


def call(kernel: Kernel, one: Any, draw: int = 0) -> Call:
    inputs = kernel.operator.materialize(one).inputs
    return Call(case=one, device=CPU, inputs=inputs, outputs={}, workspace=None, draw=draw)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", kernels())
def test_adapter_is_understood_and_its_semantics_are_those_of_the_library(name: str, library: Any) -> None:
    kernel, ran = kernels()[name], []

    @settings(max_examples=25, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(kernel.operator.cases(SIZE))
    def check(one: Any) -> None:
        if kernel.unsupported(one, H200):
            return
        ran.append(one)
        operator, materials = kernel.operator, kernel.operator.materialize(one)
        outputs = kernel.launch(call(kernel, one))
        assert wrong_form(outputs, materials.outputs, CPU) is None
        numerics = kernel.numerics(one, H200)
        terms = operator.reference(one, materials.inputs, "cpu")
        assert list(operator.certify(one, terms, numerics, outputs)) == []
        for output, budget in operator.budget(one, terms, numerics, operator.strategy(one.inputs)).items():
            assert judge(outputs[output], budget).ok

    check()
    assert len(ran) >= 10


@pytest.mark.parametrize("state", [{"seed": -1}, {"offset": -1}, {"seed": 1 << 40}, {"offset": 4}])
def test_a_seed_on_the_device_is_the_one_that_is_replayed(state: dict[str, int], library: Any) -> None:
    kernel = kernels()["flashinfer.sampling_from_probs[fast]"]
    one = case("sampling_from_probs", rows=8, device_seed=True)
    usual = call(kernel, one)
    given = dataclasses.replace(usual, inputs={**usual.inputs, **{n: torch.tensor([x]) for n, x in state.items()}})
    outputs, semantics = kernel.launch(given), kernel.numerics(one, H200)

    def certified(inputs: Any) -> bool:
        return not list(kernel.operator.certify(one, kernel.operator.reference(one, inputs, "cpu"), semantics, outputs))

    assert certified(given.inputs)
    assert not certified(usual.inputs)


def test_a_parameter_that_a_later_release_has_is_used_then(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def top_k_renorm_probs(probs: Any, top_k: Any, is_deterministic: bool = False) -> torch.Tensor:
        asked.append(is_deterministic)
        return fake_flashinfer.top_k_renorm_probs(probs, top_k)

    monkeypatch.setattr(library, "top_k_renorm_probs", top_k_renorm_probs)
    kernel, one = kernels()["flashinfer.top_k_renorm"], case("top_k_renorm", top_k=3)
    kernel.launch(call(kernel, one))
    assert asked == [True]


def test_release_without_a_function_is_refused_with_a_reason(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(library, "softmax")
    kernel = kernels()["flashinfer.softmax"]
    reason = "this release has no flashinfer.sampling.softmax"
    assert kernel.unsupported(case("softmax", temperature=1.0), H200) == reason


@pytest.mark.parametrize("device_seed", [False, True])
def test_launches_of_equal_number_draw_alike_and_others_do_not(library: Any, device_seed: bool) -> None:
    kernel = kernels()["flashinfer.sampling_from_probs"]
    one = case("sampling_from_probs", "uniform", rows=64, vocabulary=1000, shared=True, device_seed=device_seed)
    first, again, next_one = (kernel.launch(call(kernel, one, draw))["tokens"] for draw in (0, 0, 1))
    assert torch.equal(first, again)
    assert int((first == next_one).sum()) < 5


def test_graph_is_captured_only_with_a_seed_on_the_device() -> None:
    kernel = kernels()["flashinfer.top_p_sampling"]
    refused = [kernel.contract.refuses("graph", case(top_p=0.5, device_seed=seed), H200) for seed in (False, True)]
    assert refused == ["a seed on the host is captured with the launch", None]


@pytest.mark.parametrize(
    ("axes", "ties"),
    [
        ({}, "any"),
        ({"per_row": True}, "kept"),
        ({"top_k": 257}, "kept"),
        ({"vocabulary": 65_535}, "kept"),
        ({"indices": "int32", "outputs": 3}, "kept"),
        ({"order": "joint"}, "kept"),
    ],
)
def test_one_filter_after_the_other_cuts_ties_where_the_library_takes_the_short_way(
    library: Any, axes: dict[str, Any], ties: str
) -> None:
    one = case(**{"vocabulary": 65_536, "top_k": 256, "top_p": 0.5, "order": "top_k_first"} | axes)
    assert kernels()["flashinfer.top_k_top_p_sampling"].numerics(one, H200).top_k_ties == ties


def test_renormalisation_by_top_p_is_another_algorithm_from_2048_tokens_on() -> None:
    kernel = kernels()["flashinfer.top_p_renorm"]
    few, many = (kernel.numerics(case(vocabulary=n, top_p=0.5), H200) for n in (2047, 2048))
    assert (few.relative, few.radix, few.blur > 0) == (False, "", True)
    assert (many.relative, many.radix, many.blur) == (True, "atomic", 0.0)
    deterministic = kernels()["flashinfer.top_p_renorm[deterministic]"]
    assert deterministic.numerics(case(vocabulary=2048, top_p=0.5), H200).radix == "integer"
    assert (kernel.deterministic, deterministic.deterministic) == (False, True)
