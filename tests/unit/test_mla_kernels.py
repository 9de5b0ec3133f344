"""What can be known of MLA's kernels without a GPU: what they refuse, what they call, what they say of wrong calls."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mla_cases import CPU, OPERATORS, axes, case, module

from kerneltest.model import Call, Case, Device, Guard, Kernel, Pattern, Place, Unsupported
from kerneltest.worker.memory import Memory
from kerneltest.worker.staging import Staged

adapter, torch_gather, torch_layer = module("flashinfer"), module("torch_gather"), module("torch_layer")
H200 = Device(kind="cuda", ordinal=0, name="NVIDIA H200", sm=(9, 0), units=132)


@pytest.mark.parametrize(
    ("requests", "settings", "reason"),
    [
        (((1, 9),), {"dtype": "float32"}, "FlashInfer's MLA has no float32 kernels"),
        (
            ((1, 9),),
            {"dims": axes.SMALL},
            "FlashInfer's MLA needs a latent of a multiple of 128 channels, and a rotated key of one of 64",
        ),
        (((3, 2),), {"causal": True}, "causal with fewer keys than queries is no incremental prefill"),
        (((3, 2),), {}, None),
        (((3, 0), (1, 5)), {"causal": True}, None),
        (((1, 5),), {"heads": 5}, None),
    ],
)
def test_what_flashinfer_does_not_promise_is_refused_with_a_reason(
    requests: tuple[tuple[int, int], ...], settings: dict[str, Any], reason: str | None
) -> None:
    assert adapter.unsupported(case(*requests, **{"dims": axes.DEEPSEEK, **settings}), H200) == reason


def test_a_batch_without_keys_is_not_captured() -> None:
    assert adapter.refuses("graph", case((1, 0)), H200) == "a batch without any key leaves no page index to capture"
    assert adapter.refuses("graph", case((1, 0), (1, 1)), H200) is None


class _BackendPlanUnsupportedError(ValueError):
    """Called as the library calls its own."""


class Wrapper:
    """Takes what the wrapper of a release takes, and remembers it."""

    def __init__(self, float_workspace_buffer: torch.Tensor, **options: Any) -> None:
        self._float_workspace_buffer, self.options = float_workspace_buffer, options
        self.planned: dict[str, Any] = {}
        self.ran: dict[str, Any] = {}

    def plan(self, **arguments: Any) -> None:
        if arguments["num_heads"] == 5:
            raise _BackendPlanUnsupportedError("fa2 MLA causal tile boundary is unsupported")
        if arguments["num_heads"] == 8:
            raise ValueError("kv_len_arr metadata must be nonnegative.")
        self.planned = arguments

    def run(self, **arguments: Any) -> Any:
        self.ran = arguments
        return (arguments["out"], arguments["lse"]) if arguments["return_lse"] else arguments["out"]


@pytest.fixture(params=["0.6", "0.7"])
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    mla = types.ModuleType("flashinfer.mla")
    mla.BatchMLAPagedAttentionWrapper = Wrapper  # type: ignore[attr-defined]
    if request.param == "0.7":
        mla.MLAPlanMetadata = types.SimpleNamespace(csr=lambda **tensors: tensors)  # type: ignore[attr-defined]
    package = types.ModuleType("flashinfer")
    package.mla = mla  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.mla", mla)
    adapter._structured.cache_clear()
    yield request.param  # type: ignore[misc]
    adapter._structured.cache_clear()


def call_of(one: Case[Any], **more: Any) -> Call:
    made = OPERATORS[one.operator].materialize(one)
    outputs = {n: torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for n, s in made.outputs.items()}

    def workspace(nbytes: int, *, zeroed: bool = False) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    return Call(case=one, device=CPU, inputs=made.inputs, outputs=outputs, workspace=workspace, **more)


def test_flashinfer_is_called_in_the_words_of_its_release(release: str) -> None:
    call = call_of(case((1, 20), (2, 3), dims=axes.DEEPSEEK, heads=16, causal=True))
    plan = adapter.planner("fa3")(call)
    assert plan.options == {"backend": "fa3"}
    metadata = plan.planned.pop("metadata") if release == "0.7" else plan.planned
    assert torch.equal(metadata["kv_len_arr"], torch.tensor([20, 3], dtype=torch.int32))
    assert torch.equal(metadata["qo_indptr"], torch.tensor([0, 1, 3], dtype=torch.int32))
    assert {name: plan.planned[name] for name in ("num_heads", "head_dim_ckv", "head_dim_kpe", "page_size")} == {
        "num_heads": 16,
        "head_dim_ckv": 512,
        "head_dim_kpe": 64,
        "page_size": 16,
    }
    assert plan.planned["sm_scale"] == 1 / math.sqrt(192)
    assert plan.planned["causal"] is True
    assert plan.planned["q_data_type"] == plan.planned["kv_data_type"] == torch.bfloat16
    assert plan.planned.get("lse_mode") == ("base2" if release == "0.7" else None)
    answer = adapter.launch(replace(call, plan=plan))
    assert answer["out"] is call.outputs["out"]
    assert answer["lse"] is call.outputs["lse"]
    tensors = ("query", "kv_cache") if release == "0.7" else ("q_nope", "q_pe", "ckv_cache", "kpe_cache")
    assert set(plan.ran) == {*tensors, "out", "lse", "return_lse"}


def test_flashinfer_is_told_that_nobody_asks_for_a_log_sum_exp(release: str) -> None:
    call = call_of(case((1, 20), dims=axes.DEEPSEEK, return_lse=False))
    plan = adapter.planner("fa2")(call)
    assert plan.planned.get("lse_mode") == ("none" if release == "0.7" else None)
    assert adapter.launch(replace(call, plan=plan)).keys() == call.outputs.keys() == {"out"}
    assert plan.ran["return_lse"] is False
    assert "lse" not in plan.ran


@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_answers_the_same_without_a_log_sum_exp(operator: str) -> None:
    file = torch_gather if operator == "mla_paged_attention" else torch_layer
    for kernel in (one for one in vars(file).values() if isinstance(one, Kernel)):
        answers = []
        for asked in (True, False):
            call = call_of(case((3, 20), (1, 0), operator=operator, causal=True, return_lse=asked))
            answers.append(kernel.launch(call))
        both, alone = answers
        assert (both.keys(), alone.keys()) == ({"out", "lse"}, {"out"})
        assert torch.equal(both["out"], alone["out"])


@pytest.mark.usefixtures("release")
def test_flashinfer_owns_what_a_graph_reads() -> None:
    call = call_of(case((1, 20), dims=axes.DEEPSEEK), captured=True)
    plan = adapter.planner("fa2")(call)
    assert plan.options["use_cuda_graph"] is True
    for name, ours in {"qo_indptr": "qo_indptr", "kv_indices": "kv_indices", "kv_len_arr": "kv_len"}.items():
        assert torch.equal(plan.options[name], call.inputs[ours])
        assert plan.options[name].data_ptr() != call.inputs[ours].data_ptr()
    again = adapter.planner("fa2")(replace(call, plan=plan))
    assert again is plan


@pytest.mark.usefixtures("release")
def test_what_a_release_says_it_cannot_plan_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="causal tile boundary"):
        adapter.planner("fa2")(call_of(case((1, 2), dims=axes.DEEPSEEK, heads=5)))
    with pytest.raises(ValueError, match="nonnegative"):
        adapter.planner("fa2")(call_of(case((1, 2), dims=axes.DEEPSEEK, heads=8)))


def test_declared_numerics_are_those_of_the_source() -> None:
    one = case((1, 9), dims=axes.DEEPSEEK)
    fa2, fa3 = adapter.fa2_numerics(one, H200), adapter.fa3_numerics(one, H200)
    assert (fa2.l_from, fa3.l_from) == ("rounded_p", "fp32")
    assert fa2.lse_base == fa3.lse_base == "2"
    assert adapter.specialisation(one) == "bfloat16-512-64"


@pytest.mark.parametrize("kernel", [torch_gather.gather, torch_layer.standard, torch_layer.absorbed])
def test_wrong_calls_are_told_what_is_wrong(kernel: Any) -> None:
    name = kernel.operator.name
    one = case((2, 20), operator=name)
    call = call_of(one)

    def fails(kind: type[Exception], words: str, *, outputs: dict[str, Any] | None = None, **inputs: Any) -> None:
        wrong = replace(call, inputs={**call.inputs, **inputs}, outputs={**call.outputs, **(outputs or {})})
        with pytest.raises(kind, match=words):
            kernel.launch(wrong)

    x = call.inputs
    fails(TypeError, "q_pe must be torch.bfloat16, got torch.float32", q_pe=x["q_pe"].float())
    fails(ValueError, r"kpe_pages must have shape \[2, 16, 16\], got \[1, 16, 16\]", kpe_pages=x["kpe_pages"][:1])
    fails(ValueError, "kv_indices must be from 0 to 1, got 0 to 7", kv_indices=torch.tensor([0, 7], dtype=torch.int32))
    fails(ValueError, r"lse must have shape \[2, 2\], got \[0, 2\]", outputs={"lse": call.outputs["lse"][:0]})
    louder = replace(call, case=replace(one, axes=replace(one.axes, sm_scale=float("nan"))))
    with pytest.raises(ValueError, match="sm_scale must be finite, got nan"):
        kernel.launch(louder)


def test_pages_that_are_far_away_are_equally_far_in_both_caches() -> None:
    """One page table indexes latents and rotated keys, whose pages are not equally large."""
    memory = Memory(CPU)
    if memory.guards is not None:
        pytest.skip(memory.guards)
    one = case((1, 20), (1, 3), dims=axes.DEEPSEEK)
    kernel, fills = torch_gather.gather, dict.fromkeys(Place, Pattern.ZERO)
    with memory.arena(Guard.NONE) as arena:
        made = kernel.operator.materialize(one)
        staged = Staged(kernel, one, made, CPU, arena, fills, far=True)
        inputs = staged.inputs
        assert len(inputs["ckv_pages"]) == len(inputs["kpe_pages"])
        table = inputs["kv_indices"].long()
        for name in ("ckv_pages", "kpe_pages"):
            # The first page is full; of others some slots are dead, and filled.
            assert torch.equal(inputs[name][table[0]], made.inputs[name][int(made.inputs["kv_indices"][0])])
            assert int(table.min()) * inputs[name][0].numel() > 2**32


INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from mla_cases import CPU, axes, case, launched, module, paged
from kerneltest.oracle.compare import compare
from dataclasses import replace
kernel, inner = module("triton_decode").triton_decode, module("_triton_decode")
for one in (
    case((1, 130), (3, 20), (1, 0), causal=True, heads=3, shuffled=True, spare_pages=1),
    case((2, 70), dims=axes.DEEPSEEK, page_size=1, dtype="float16"),
):
    inputs = dict(paged.materialize(one).inputs)
    terms = paged.reference(one, inputs, "cpu")
    budgets = paged.budget(one, terms, kernel.numerics(one, CPU), paged.mla_paged_attention.strategy(one.inputs))
    outputs = launched(kernel, one, inputs)
    for name, budget in budgets.items():
        result = compare(outputs[name], budget)
        assert result.ok, (name, result)
tensors = {
    **inputs,
    "out": outputs["out"],
    "lse": outputs["lse"],
    "workspace": torch.empty(inner.workspace_bytes(2, 2, 512), dtype=torch.uint8),
}
settings = {"causal": False, "sm_scale": 0.1, "max_qo_len": 2}
for change, words in {
    "workspace": "workspace must have",
    "ckv_pages": "the last dimension of ckv_pages must be contiguous",
    "q_pe": "rope must be a power of two, 16 or more, got 8",
    "kv_len": "kv_len must be torch.int32, got torch.int64",
    "q_nope": "q_nope must be one of torch.bfloat16, torch.float16, torch.float32, got torch.int16",
}.items():
    value = tensors[change]
    wrong = {
        "workspace": value[:-1],
        "ckv_pages": value.repeat_interleave(2, -1)[..., ::2],
        "q_pe": value[..., :8],
        "kv_len": value.long(),
        "q_nope": value.to(torch.int16),
    }[change]
    try:
        inner.mla_decode(**{**tensors, change: wrong}, **settings)
    except (ValueError, TypeError) as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(change)
try:
    inner.mla_decode(**tensors, **{**settings, "sm_scale": float("inf")})
except ValueError as error:
    assert "sm_scale must be finite" in str(error)
print("right")
"""


def test_the_triton_kernel_interpreted() -> None:
    # Whether Triton interprets is decided when it is imported: a process of its own.
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.stdout == "right\n", done.stderr
