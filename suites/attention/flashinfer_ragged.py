"""FlashInfer's ``BatchPrefillWithRaggedKVCacheWrapper`` and ``single_prefill_with_kv_cache``, backends fa2 and fa3.

Lines are those of release 0.6.18.post1. The ragged wrapper shares its modules with the paged one; those of
``single_prefill`` are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call, Case, Device, Kernel, LaunchContract, Numerics, Unsupported

from . import flashinfer as paged
from ._dense import DenseAttention, paged_case
from .paged_prefill import PagedPrefill
from .ragged_prefill import ragged_prefill
from .single_prefill import single_prefill

if TYPE_CHECKING:
    import torch

WRAPPER = "BatchPrefillWithRaggedKVCacheWrapper"
# fa2's partial outputs are kept in the output's type (``tmp_v``), and what the threads of the merge have of them is
# rounded to it again before it is merged (threadblock_sync_state, attention/cascade.cuh:123).
ROUNDINGS_OF_PARTIAL_OUTPUTS = 2


def planner(backend: str) -> Callable[[Call], Any]:
    """A ``plan`` that makes a wrapper on a workspace of arbitrary contents, or plans an earlier one anew."""

    def plan(call: Call) -> Any:
        import torch

        axes, x = call.case.axes, call.inputs
        workspace = call.workspace(paged.workspace_bytes(paged_case(call.case), call.device))
        wrapper = call.plan
        if wrapper is None or wrapper._kv_layout != axes.layout:
            wrapper = _wrapper(call, workspace, backend)
        elif wrapper._float_workspace_buffer.data_ptr() != workspace.data_ptr():
            wrapper.reset_workspace_buffer(workspace, torch.empty_like(wrapper._int_workspace_buffer))
        wrapper.plan(
            x["qo_indptr"],
            x["kv_indptr"],
            axes.q_heads,
            axes.kv_heads,
            axes.head_dim,
            head_dim_vo=axes.v_dim,
            causal=axes.causal,
            sm_scale=axes.scale,
            window_left=axes.window_left,
            logits_soft_cap=axes.softcap,
            q_data_type=getattr(torch, axes.dtype),
            kv_data_type=getattr(torch, axes.dtype),
            **encoding(axes),
        )
        return wrapper

    return plan


def encoding(axes: PagedPrefill | DenseAttention) -> dict[str, Any]:
    """What is said of positions, where there is anything to say."""
    return {"pos_encoding_mode": paged.ALIBI} if axes.alibi else {}


def _wrapper(call: Call, workspace: torch.Tensor, backend: str) -> Any:
    """A wrapper; one whose launch will be captured owns the offsets that a graph reads."""
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    layout = call.case.axes.layout
    if not call.captured:
        return BatchPrefillWithRaggedKVCacheWrapper(workspace, layout, backend=backend)
    return BatchPrefillWithRaggedKVCacheWrapper(
        workspace,
        layout,
        use_cuda_graph=True,
        qo_indptr_buf=call.inputs["qo_indptr"].clone(),
        kv_indptr_buf=call.inputs["kv_indptr"].clone(),
        backend=backend,
    )


def launch(call: Call) -> Mapping[str, torch.Tensor]:
    """Run the planned wrapper into the caller's own buffers."""
    x, with_lse = call.inputs, call.case.axes.return_lse
    options: dict[str, Any] = {**call.outputs, "return_lse": with_lse}
    if call.pdl:
        if not paged.takes(WRAPPER, "run", "enable_pdl"):
            raise Unsupported("this release's run() has no parameter enable_pdl")
        options["enable_pdl"] = True
    return paged.named(with_lse, call.plan.run(x["q"], x["k"], x["v"], **options))


def single(backend: str) -> Callable[[Call], Mapping[str, torch.Tensor]]:
    """A launch of the function for one request, which allocates everything itself."""

    def launch(call: Call) -> Mapping[str, torch.Tensor]:
        import flashinfer

        axes, x = call.case.axes, call.inputs
        answer = flashinfer.single_prefill_with_kv_cache(
            x["q"],
            x["k"],
            x["v"],
            causal=axes.causal,
            kv_layout=axes.layout,
            sm_scale=axes.scale,
            window_left=axes.window_left,
            logits_soft_cap=axes.softcap,
            backend=backend,
            return_lse=axes.return_lse,
            **encoding(axes),
        )
        return paged.named(axes.return_lse, answer)

    return launch


def unsupported(case: Case[DenseAttention], device: Device) -> str | None:
    """Told by what the imported release offers, not by its number."""
    axes = case.axes
    if axes.dtype not in paged.DTYPES:
        return f"FlashInfer's prefill has no {axes.dtype} kernels"
    if axes.causal and any(request.kv_len < request.qo_len for request in axes.requests):
        # prefill.cuh:2526 refuses this for a single request; the batch wrapper does not check it.
        return "causal with fewer keys than queries is outside of FlashInfer's contract"
    asked = {"pos_encoding_mode"} if axes.alibi else set()
    if case.operator == "single_prefill":
        return paged.lacking_parameters("single_prefill_with_kv_cache", "", asked)
    for method, wanted in (("run", {"out", "lse", "return_lse"}), ("plan", asked)):
        if lacks := paged.lacking_parameters(WRAPPER, method, wanted):
            return lacks
    return None


def fa3_unsupported(case: Case[DenseAttention], device: Device) -> str | None:
    """Beside that, what fa3 has not."""
    return paged.FA3_ALIBI if case.axes.alibi else unsupported(case, device)


def fa2_numerics(case: Case[DenseAttention], device: Device) -> Numerics:
    """Those of paged prefill."""
    numerics = paged.fa2_numerics(paged_case(case), device)
    return replace(numerics, partial_roundings=ROUNDINGS_OF_PARTIAL_OUTPUTS)


def fa3_numerics(case: Case[DenseAttention], device: Device) -> Numerics:
    """Those of paged prefill; keys are never split."""
    return paged.fa3_numerics(paged_case(case), device)


def specialisation(case: Case[DenseAttention]) -> str:
    """What a module is compiled for at first use (jit/attention/modules.py, get_batch_prefill_uri)."""
    axes = case.axes
    options = f"window-{axes.window_left >= 0}-cap-{axes.softcap > 0}-alibi-{axes.alibi}"
    return f"{axes.dtype}-d{axes.head_dim}-d{axes.v_dim}-{options}"


def _kernel(backend: str, *, alone: bool) -> Kernel:
    least = (9, 0) if backend == "fa3" else (8, 0)
    # As with pages: the plan depends on lengths alone.
    inexact = {"value_scale": "partial outputs of split keys in fp16 may be subnormal, and then have fewer digits"}
    return Kernel(
        name=f"flashinfer.{'single' if alone else 'ragged'}_prefill[{backend}]",
        operator=single_prefill if alone else ragged_prefill,
        plan=None if alone else planner(backend),
        launch=single(backend) if alone else launch,
        numerics=fa3_numerics if backend == "fa3" else fa2_numerics,
        unsupported=fa3_unsupported if backend == "fa3" else unsupported,
        inexact=inexact if backend == "fa2" else {},
        specialisation=specialisation,
        contract=(
            LaunchContract(captured="values")
            if alone
            else LaunchContract(replans=True, shares_workspace=True, captured="lengths", graph_bits=False, pdl=True)
        ),
        devices=("cuda",),
        library="flashinfer",
        min_sm=least,
    )


ragged_fa2 = _kernel("fa2", alone=False)
ragged_fa3 = _kernel("fa3", alone=False)
single_fa2 = _kernel("fa2", alone=True)
single_fa3 = _kernel("fa3", alone=True)
