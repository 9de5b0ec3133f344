"""What can be known of FlashInfer's adapter without FlashInfer: what it asks for, refuses, and passes on."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_cases import case, paged

from kerneltest import discovery
from kerneltest.model import BF16, FP32, Call, Case, Device

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


class Wrapper:
    """The wrapper of release 0.6.18, as far as the adapter may know it; keeps what it is given."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", **options: Any) -> None:
        self._float_workspace_buffer, self._kv_layout, self.made_with = float_workspace_buffer, kv_layout, options

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        pos_encoding_mode: str = "NONE",
    ) -> None:
        self.planned = {name: value for name, value in locals().items() if name != "self"}

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Any:
        self.ran = {name: value for name, value in locals().items() if name != "self"}
        return (out, lse) if return_lse else out


class Old(Wrapper):
    """A release whose plan() knew neither pieces of a fixed size nor how not to split at all."""

    def plan(self, qo_indptr: torch.Tensor, causal: bool = False, window_left: int = -1) -> None:  # type: ignore[override]
        pass


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    adapter.takes.cache_clear()
    return module


def call(of: Case[Any], **more: Any) -> Call:
    materials = paged.materialize(of)
    outputs = {
        name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for name, spec in materials.outputs.items()
    }

    def workspace(nbytes: int, *, zeroed: bool = False) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    return Call(case=of, device=H200, inputs=materials.inputs, outputs=outputs, workspace=workspace, **more)


def launched(of: Case[Any], kernel: Any = adapter.fa2, **more: Any) -> tuple[Wrapper, Call]:
    assert kernel.unsupported(of, H200) is None
    asked = call(of, **more)
    wrapper = kernel.plan(asked)
    kernel.launch(replace(asked, plan=wrapper))
    return wrapper, asked


PLAIN = {"head_dim": 128, "kv_heads": 2, "group": 2}
SAID = {
    "window_left": ({"window_left": 3}, {"window_left": 3}),
    "softcap": ({"softcap": 30.0}, {"logits_soft_cap": 30.0}),
    "alibi": ({"alibi": True}, {"pos_encoding_mode": "ALIBI"}),
    "head_dim_vo": ({"head_dim": 192, "head_dim_vo": 128}, {"head_dim_qk": 192, "head_dim_vo": 128}),
    "fixed_split_size": ({"fixed_split_size": 8}, {"fixed_split_size": 8}),
    "disable_split_kv": ({"disable_split_kv": True}, {"disable_split_kv": True}),
    "eight bits": (
        {"kv_dtype": "float8_e4m3fn"},
        {"q_data_type": torch.bfloat16, "kv_data_type": torch.float8_e4m3fn},
    ),
    "nothing": (
        {},
        {
            "window_left": -1,
            "logits_soft_cap": None,
            "pos_encoding_mode": "NONE",
            "head_dim_vo": None,
            "custom_mask": None,
            "packed_custom_mask": None,
            "fixed_split_size": None,
            "disable_split_kv": False,
            "kv_data_type": torch.bfloat16,
            "head_dim_qk": 128,
            "num_qo_heads": 4,
            "num_kv_heads": 2,
        },
    ),
}


@pytest.mark.parametrize("option", SAID)
def test_an_option_is_passed_on_to_plan(library: ModuleType, option: str) -> None:
    axes, expected = SAID[option]
    wrapper, _ = launched(case((3, 9), (2, 5), **PLAIN | axes))
    assert {name: wrapper.planned[name] for name in expected} == expected
    assert wrapper.planned["sm_scale"] == pytest.approx((axes.get("head_dim", 128)) ** -0.5)


@pytest.mark.parametrize("asked_for", [False, True])
def test_a_log_sum_exp_is_asked_for_where_the_case_has_one(library: ModuleType, asked_for: bool) -> None:
    of = case((3, 9), return_lse=asked_for, **PLAIN)
    wrapper, asked = launched(of)
    assert wrapper.ran["return_lse"] is asked_for
    assert wrapper.ran["out"] is asked.outputs["out"]
    assert wrapper.ran["lse"] is asked.outputs.get("lse")
    assert adapter.fa2.launch(replace(asked, plan=wrapper)).keys() == asked.outputs.keys()
    assert ("lse" in asked.outputs) == asked_for


@pytest.mark.parametrize("packed", [False, True])
def test_a_mask_is_passed_on_in_the_form_of_the_case(library: ModuleType, packed: bool) -> None:
    wrapper, asked = launched(case((3, 9), (2, 5), mask="tree", packed_mask=packed, **PLAIN))
    own, other = ("packed_custom_mask", "custom_mask") if packed else ("custom_mask", "packed_custom_mask")
    assert wrapper.planned[own] is asked.inputs["packed_mask" if packed else "custom_mask"]
    assert wrapper.planned[other] is None
    assert not wrapper.planned["causal"]


def test_what_a_graph_is_captured_with_has_room_for_a_mask(library: ModuleType) -> None:
    masked = case((3, 9), (2, 5), (1, 1), mask="random", **PLAIN)
    wrapper, asked = launched(masked, captured=True)
    assert wrapper.made_with["use_cuda_graph"]
    assert wrapper.made_with["custom_mask_buf"].numel() >= -(-27 // 8) + -(-10 // 8) + 1
    assert wrapper.made_with["mask_indptr_buf"].shape == asked.inputs["qo_indptr"].shape
    plain, _ = launched(case((3, 9), **PLAIN), captured=True)
    assert "custom_mask_buf" not in plain.made_with


def test_scales_are_passed_on_to_run_and_only_if_they_are_any(library: ModuleType) -> None:
    scaled, _ = launched(case((3, 9), kv_dtype="float8_e5m2", k_scale=0.375, v_scale=1.6875, **PLAIN))
    assert (scaled.ran["k_scale"], scaled.ran["v_scale"]) == (0.375, 1.6875)
    plain, _ = launched(case((3, 9), **PLAIN))
    assert (plain.ran["k_scale"], plain.ran["v_scale"]) == (None, None)


def test_queries_are_the_front_of_the_wider_tensor_not_a_copy(library: ModuleType) -> None:
    wrapper, asked = launched(case((3, 9), strided_q=True, **PLAIN))
    q = wrapper.ran["q"]
    assert q.shape == (3, 4, 128)
    assert q.data_ptr() == asked.inputs["q"].data_ptr()
    assert q.stride() == (8 * 128, 128, 1)


def test_a_wrapper_is_planned_anew_for_its_own_layout_alone(library: ModuleType) -> None:
    hnd, _ = launched(case((3, 9), layout="HND", **PLAIN))
    assert hnd._kv_layout == "HND"
    other, asked = launched(case((3, 9), **PLAIN), plan=hnd)
    assert other is not hnd
    assert other._kv_layout == "NHD"
    # On the workspace that it has already.
    asked = replace(asked, plan=other, workspace=lambda nbytes, zeroed=False: other._float_workspace_buffer)
    assert adapter.fa2.plan(asked) is other


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ({"alibi": True}, "fa3 has no encoding of positions (utils.py, is_fa3_backend_supported)"),
        ({"mask": "random"}, "fa3 has no custom mask (utils.py, is_fa3_backend_supported)"),
        ({"kv_dtype": "float8_e4m3fn"}, "fa3 has K and V of 8 bits for queries of 8 bits alone (utils.py,"),
        ({"head_dim": 192, "head_dim_vo": 128}, "fa3 wants pages of K and V with the same strides"),
        ({"fixed_split_size": 4}, "fixed_split_size is for fa2 alone"),
    ],
)
def test_what_fa3_has_not_is_refused(library: ModuleType, axes: dict[str, Any], reason: str) -> None:
    of = case((3, 9), **PLAIN | axes)
    refused = adapter.fa3.unsupported(of, H200)
    assert refused is not None
    assert refused.startswith(reason)
    assert adapter.fa2.unsupported(of, H200) is None


def test_what_fa3_has(library: ModuleType) -> None:
    for axes in (
        {"window_left": 3},
        {"softcap": 2.0},
        {"layout": "HND", "strided_q": True},
        {"disable_split_kv": True},
    ):
        launched(case((3, 9), **PLAIN | axes), adapter.fa3)


def test_a_parameter_that_a_release_has_not_is_named(library: ModuleType) -> None:
    library.BatchPrefillWithPagedKVCacheWrapper = Old  # type: ignore[attr-defined]
    of = case((3, 9), fixed_split_size=8, **PLAIN)
    assert adapter.fa2.unsupported(of, H200) == "this release's plan() has no parameter fixed_split_size"
    of = case((3, 9), alibi=True, **PLAIN)
    assert adapter.fa2.unsupported(of, H200) == "this release's plan() has no parameter pos_encoding_mode"
    assert adapter.fa2.unsupported(case((3, 9), **PLAIN), H200) is None


def test_pieces_of_a_fixed_size_have_the_workspace_that_the_planner_reserves() -> None:
    # scheduler.cuh, PrefillPlanImpl: num_qo_heads * blocks * rows of a block * (head_dim_vo + 1) * 4 bytes.
    of = case((300, 1000), (17, 900), head_dim=128, kv_heads=2, group=4, page_size=16, fixed_split_size=4)
    for rows in (16, 64, 128):
        blocks = sum(-(-request.qo_len * 4 // rows) * -(-of.axes.pages(request) // 4) for request in of.axes.requests)
        assert adapter.workspace_bytes(of, H200) >= 8 * blocks * rows * 129 * 4
    many = case((1100, 8300), head_dim=128, kv_heads=4, group=8, page_size=16, fixed_split_size=4)
    assert "pieces of keys need a workspace of" in str(adapter.unsupported(many, H200))


def test_what_is_declared_for_options() -> None:
    def of(**axes: Any) -> Any:
        return adapter.fa2.numerics(case((3, 9), **PLAIN | axes), H200)

    assert (of().partial, of().batch_invariant, of().unscaled, of().dequant) == (BF16, False, BF16, None)
    assert of(disable_split_kv=True).partial is FP32
    assert of(fixed_split_size=4).batch_invariant
    refuses = adapter.fa2.contract.refuses
    assert "not promised to work with graphs" in str(refuses("graph", case((3, 9), fixed_split_size=4), H200))
    assert refuses("replan", case((3, 9), fixed_split_size=4), H200) is None


def test_a_specialisation_is_what_a_module_is_compiled_for() -> None:
    def of(**axes: Any) -> str:
        return adapter.specialisation(case((3, 9), **PLAIN | axes))

    free = {"layout": "HND", "strided_q": True, "fixed_split_size": 4, "k_scale": 2.0, "page_size": 64}
    assert of() == of(**free) == of(mask="tree", packed_mask=True) == of(causal=True) == "bfloat16-d128"
    names = [
        of(),
        of(dtype="float16"),
        of(head_dim=64),
        of(head_dim=192, head_dim_vo=128),
        of(window_left=0),
        of(softcap=2.0),
        of(window_left=0, softcap=2.0),
        of(alibi=True),
        of(alibi=True, softcap=2.0),
        of(kv_dtype="float8_e4m3fn"),
        of(kv_dtype="float8_e5m2"),
    ]
    assert len(set(names)) == len(names)
    assert of(window_left=1) == of(window_left=100)
