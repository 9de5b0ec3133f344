"""FlashInfer's ``BatchDecodeWithPagedKVCacheWrapper`` and ``single_decode_with_kv_cache``, on CUDA or tensor cores.

Lines are those of release 0.6.18.post1, ``data/include/flashinfer/attention/decode.cuh`` where no file is named. On
tensor cores both are fa2's prefill of one query: the batch in the module of paged prefill, the single one in that of
``single_prefill``. On CUDA cores each has a module of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import FORMATS, FP32, IEEE_FP32, Call, Case, Device, Kernel, LaunchContract, Numerics, Unsupported

from . import flashinfer as paged
from ._alibi import error_of_powers
from ._axes import lacking
from ._dense import DenseAttention, paged_case
from .flashinfer_ragged import ROUNDINGS_OF_PARTIAL_OUTPUTS, encoding
from .paged_decode import PagedDecode, paged_decode
from .single_decode import single_decode

if TYPE_CHECKING:
    import torch

WRAPPER = "BatchDecodeWithPagedKVCacheWrapper"
# DISPATCH_GQA_GROUP_SIZE (utils.cuh:142) knows no other groups, and raises for them.
GROUPS = (1, 2, 3, 4, 6, 8)
# No chunk of split keys is shorter: max(128 / page_size, 1) pages (scheduler.cuh:325), or 256 keys of one (:711).
SHORTEST_CHUNK = {"paged_decode": 128, "single_decode": 256}


def planner(*, tensor_cores: bool) -> Callable[[Call], Any]:
    """A ``plan`` that makes a wrapper, or plans an earlier one anew.

    The documentation wants a workspace that is zero at first use. Here it is arbitrary, as it is from the second use
    on: neither kernel keeps counters in it, as the backend trtllm-gen does.
    """

    def plan(call: Call) -> Any:
        import torch

        axes, x = call.case.axes, call.inputs
        workspace = call.workspace(paged.workspace_bytes(call.case, call.device))
        wrapper = call.plan
        if wrapper is None or wrapper._kv_layout != axes.layout:
            wrapper = _wrapper(call, workspace, tensor_cores=tensor_cores)
        elif wrapper._float_workspace_buffer.data_ptr() != workspace.data_ptr():
            wrapper.reset_workspace_buffer(workspace, torch.empty_like(wrapper._int_workspace_buffer))
        options = encoding(axes)
        if axes.fixed_split_size:
            options["fixed_split_size"] = axes.fixed_split_size
        if axes.disable_split_kv:
            options["disable_split_kv"] = True
        wrapper.plan(
            x["kv_indptr"],
            x["kv_indices"],
            x["kv_last_page_len"],
            axes.q_heads,
            axes.kv_heads,
            axes.head_dim,
            axes.page_size,
            window_left=axes.window_left,
            logits_soft_cap=axes.softcap,
            sm_scale=axes.scale,
            q_data_type=getattr(torch, axes.dtype),
            kv_data_type=getattr(torch, axes.kv_format),
            **options,
        )
        return wrapper

    return plan


def _wrapper(call: Call, workspace: torch.Tensor, *, tensor_cores: bool) -> Any:
    """A wrapper; one whose launch will be captured owns the page table that a graph reads, as large as it is now."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    options: dict[str, Any] = {"use_tensor_cores": tensor_cores}
    if tensor_cores:
        options["backend"] = "fa2"
    if call.captured:
        x = call.inputs
        options |= {
            "use_cuda_graph": True,
            "paged_kv_indptr_buffer": x["kv_indptr"].clone(),
            "paged_kv_indices_buffer": x["kv_indices"].clone(),
            "paged_kv_last_page_len_buffer": x["kv_last_page_len"].clone(),
        }
    return BatchDecodeWithPagedKVCacheWrapper(workspace, call.case.axes.layout, **options)


def launch(call: Call) -> Mapping[str, torch.Tensor]:
    """Run the planned wrapper into the caller's own buffers."""
    from ._tensors import queries

    axes, x, outputs = call.case.axes, call.inputs, call.outputs
    options: dict[str, Any] = {**outputs, "return_lse": axes.return_lse}
    if (axes.k_scale, axes.v_scale) != (1.0, 1.0):
        options |= {"k_scale": axes.k_scale, "v_scale": axes.v_scale}
    if call.pdl:
        if not paged.takes(WRAPPER, "run", "enable_pdl"):
            raise Unsupported("this release's run() has no parameter enable_pdl")
        options["enable_pdl"] = True
    return paged.named(axes.return_lse, call.plan.run(queries(axes, x), (x["k_pages"], x["v_pages"]), **options))


def single(*, tensor_cores: bool) -> Callable[[Call], Mapping[str, torch.Tensor]]:
    """A launch of the function for one request, which allocates everything itself."""

    def launch(call: Call) -> Mapping[str, torch.Tensor]:
        import flashinfer

        axes, x = call.case.axes, call.inputs
        answer = flashinfer.single_decode_with_kv_cache(
            x["q"],
            x["k"],
            x["v"],
            kv_layout=axes.layout,
            use_tensor_cores=tensor_cores,
            window_left=axes.window_left,
            logits_soft_cap=axes.softcap,
            sm_scale=axes.scale,
            return_lse=axes.return_lse,
            **encoding(axes),
        )
        return paged.named(axes.return_lse, answer)

    return launch


def cuda_core_numerics(case: Case[Any], device: Device) -> Numerics:
    """Everything in fp32 (compute_qk, update_local_state): products and sums by fused multiply-adds, P not rounded.

    A weight is rescaled when its thread's maximum grows, and when threads are merged (sync_state, :173): as often as
    there are keys at most, by 1 otherwise, which is exact. Split keys leave partial outputs in the output's type
    (``tmp_v``, :742), which the merge rounds to it once more. ``v_scale`` multiplies an output that was rounded
    (decode.py:2296). lse = m + log2 d in base 2 (state.cuh:45).
    """
    axes, fmt = case.axes, FORMATS[case.axes.dtype]
    longest = max(request.kv_len for request in axes.requests)
    split = longest > SHORTEST_CHUNK[case.operator]
    return Numerics(
        qk=IEEE_FP32,
        pv=IEEE_FP32,
        p=FP32,
        out=fmt,
        partial=fmt if split else FP32,
        partial_roundings=ROUNDINGS_OF_PARTIAL_OUTPUTS,
        unscaled=_unscaled(axes),
        slope_rel=error_of_powers(axes.q_heads),
        tile=1,
        lse_base="2",
        lse_no_key=paged.NO_KEY_LSE,
    )


def tensor_core_numerics(case: Case[Any], device: Device) -> Numerics:
    """Those of fa2's prefill."""
    inner = case if isinstance(case.axes, PagedDecode) else paged_case(case)
    numerics = paged.fa2_numerics(inner, device)
    return replace(numerics, partial_roundings=ROUNDINGS_OF_PARTIAL_OUTPUTS, unscaled=_unscaled(case.axes))


def _unscaled(axes: PagedDecode | DenseAttention) -> Any:
    scaled = isinstance(axes, PagedDecode) and axes.v_scale != 1.0
    return FORMATS[axes.dtype] if scaled else None


def unsupported(*, tensor_cores: bool) -> Callable[[Case[Any], Device], str | None]:
    """Told by what the imported release offers, not by its number."""
    known = {"window_left", "softcap", "alibi", "kv_dtype", "scales", "layout", "strided_q"}
    known |= {"return_lse", "disable_split_kv"} | ({"fixed_split_size"} if tensor_cores else set())

    def reason(case: Case[Any], device: Device) -> str | None:
        axes = case.axes
        if axes.dtype not in paged.DTYPES:
            return f"FlashInfer's decode has no {axes.dtype} kernels"
        if not tensor_cores and axes.group not in GROUPS:
            return f"FlashInfer's decode on CUDA cores has no groups of {axes.group} query heads"
        asked = {"pos_encoding_mode"} if axes.alibi else set()
        if case.operator == "single_decode":
            return paged.lacking_parameters("single_decode_with_kv_cache", "", asked)
        for method, wanted in (("run", {"out", "lse", "return_lse"}), ("plan", asked)):
            if lacks := paged.lacking_parameters(WRAPPER, method, wanted):
                return lacks
        # Without tensor cores plan() takes disable_split_kv, and does not look at it.
        return lacking(axes, *known)

    return reason


def refuses(step: str, case: Case[Any], device: Device) -> str | None:
    """Beside what paged prefill refuses: a fixed split size, which is not meant for graphs (decode.py:1300)."""
    if step == "graph" and case.axes.fixed_split_size:
        return "a fixed split size is not promised to go with a CUDA graph"
    return paged.refuses(step, case, device)


def specialisation(case: Case[Any]) -> str:
    """What a module is compiled for at first use (jit/attention/modules.py, get_batch_decode_uri)."""
    axes = case.axes
    options = f"window-{axes.window_left >= 0}-cap-{axes.softcap > 0}-alibi-{axes.alibi}"
    return f"{axes.dtype}-{getattr(axes, 'kv_dtype', 'same')}-d{axes.head_dim}-{options}"


def _kernel(*, alone: bool, tensor_cores: bool) -> Kernel:
    return Kernel(
        name=f"flashinfer.{'single' if alone else 'paged'}_decode[{'tensor' if tensor_cores else 'cuda'} cores]",
        operator=single_decode if alone else paged_decode,
        plan=None if alone else planner(tensor_cores=tensor_cores),
        launch=single(tensor_cores=tensor_cores) if alone else launch,
        numerics=tensor_core_numerics if tensor_cores else cuda_core_numerics,
        unsupported=unsupported(tensor_cores=tensor_cores),
        inexact={"value_scale": "partial outputs of split keys in fp16 may be subnormal, and then have fewer digits"},
        specialisation=specialisation,
        contract=(LaunchContract(captured="values") if alone else replace(paged.CONTRACT, refuses=refuses)),
        devices=("cuda",),
        library="flashinfer",
        min_sm=(8, 0),
    )


paged_cuda_cores = _kernel(alone=False, tensor_cores=False)
paged_tensor_cores = _kernel(alone=False, tensor_cores=True)
single_cuda_cores = _kernel(alone=True, tensor_cores=False)
single_tensor_cores = _kernel(alone=True, tensor_cores=True)
