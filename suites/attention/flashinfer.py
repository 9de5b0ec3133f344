"""FlashInfer's ``BatchPrefillWithPagedKVCacheWrapper``, backends fa2 and fa3, from release 0.2.5 on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from kerneltest.model import FORMATS, WGMMA_16BIT, Call, Case, Device, Kernel, LaunchContract, Numerics, Unsupported

from ._axes import lacking
from .paged_prefill import PagedPrefill, paged_prefill

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16")
# The size that FlashInfer's documentation recommends. It is not always enough: see workspace_bytes.
RECOMMENDED_WORKSPACE = 128 << 20
# What fa2's planner (PrefillPlan in scheduler.cuh) reckons with: blocks on an SM, and query rows of a block at most.
BLOCKS_PER_SM = 2
MAX_ROWS_OF_A_BLOCK = 128
# Up to 0.6.18 math.cuh calls 5e4 infinity, so that a row without keys has lse = -5e4 + log2(something small). It does
# the work of -Inf in every merge (2^-49000 is 0); from 0.7 on it is -Inf itself.
NO_KEY_LSE = -49_000.0


def planner(backend: str) -> Callable[[Call], Any]:
    """A ``plan`` that makes a wrapper on a workspace of arbitrary contents, or plans an earlier one anew."""

    def plan(call: Call) -> Any:
        import torch

        axes, x = call.case.axes, call.inputs
        workspace = call.workspace(workspace_bytes(call.case, call.device))
        wrapper = call.plan
        if wrapper is None:
            wrapper = _wrapper(call, workspace, backend)
        elif wrapper._float_workspace_buffer.data_ptr() != workspace.data_ptr():
            wrapper.reset_workspace_buffer(workspace, torch.empty_like(wrapper._int_workspace_buffer))
        wrapper.plan(
            x["qo_indptr"],
            x["kv_indptr"],
            x["kv_indices"],
            x["kv_last_page_len"],
            axes.q_heads,
            axes.kv_heads,
            axes.head_dim,
            axes.page_size,
            causal=axes.causal,
            sm_scale=axes.scale,
            q_data_type=getattr(torch, axes.dtype),
            kv_data_type=getattr(torch, axes.dtype),
        )
        return wrapper

    return plan


def _wrapper(call: Call, workspace: torch.Tensor, backend: str) -> Any:
    """A wrapper; one whose launch will be captured owns the indices that a graph reads, as large as they are now."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    if not call.captured:
        return BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
    x = call.inputs
    return BatchPrefillWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        qo_indptr_buf=x["qo_indptr"].clone(),
        paged_kv_indptr_buf=x["kv_indptr"].clone(),
        paged_kv_indices_buf=x["kv_indices"].clone(),
        paged_kv_last_page_len_buf=x["kv_last_page_len"].clone(),
        backend=backend,
    )


def workspace_bytes(case: Case[PagedPrefill], device: Device) -> int:
    """What a caller must provide so that no plan of this case can run out of workspace, which FlashInfer refuses.

    If the planner splits the keys, it keeps an output of ``head_dim`` and its sum in fp32 for every row of every block,
    for all query heads of a KV head, with ``BLOCKS_PER_SM`` blocks on each SM at most.
    """
    rows = BLOCKS_PER_SM * device.units * MAX_ROWS_OF_A_BLOCK * case.axes.group
    alignment = 1 << 10
    return max(RECOMMENDED_WORKSPACE, rows * (case.axes.head_dim + 1) * 4 + alignment)


def launch(call: Call) -> dict[str, torch.Tensor]:
    """Run the planned wrapper into the caller's own buffers."""
    x, outputs = call.inputs, call.outputs
    options = {"out": outputs["out"], "lse": outputs["lse"], "return_lse": True}
    if call.pdl:
        if "enable_pdl" not in _run_parameters():
            raise Unsupported("this release's run() has no parameter enable_pdl")
        options["enable_pdl"] = True
    out, lse = call.plan.run(x["q"], (x["k_pages"], x["v_pages"]), **options)
    return {"out": out, "lse": lse}


def unsupported(case: Case[PagedPrefill], device: Device) -> str | None:
    """Told by what the imported release offers, not by its number."""
    if case.axes.dtype not in DTYPES:
        return f"FlashInfer's prefill has no {case.axes.dtype} kernels"
    if case.axes.causal and any(request.kv_len < request.qo_len for request in case.axes.requests):
        # prefill.cuh refuses this for a single request ("kv_len must be greater than or equal to qo_len"); the batch
        # wrapper does not check it, and what rows without any key then hold differs between backends and releases.
        return "causal with fewer keys than queries is outside of FlashInfer's contract"
    if reason := lacking(case.axes):
        return reason
    missing = {"out", "lse", "return_lse"} - _run_parameters()
    if missing:
        return f"this release's run() has no parameter {', '.join(sorted(missing))}"
    return None


def refuses(step: str, case: Case[PagedPrefill], device: Device) -> str | None:
    """A captured wrapper needs an index buffer of at least one page."""
    if step == "graph" and not any(case.axes.pages(request) for request in case.axes.requests):
        return "a batch without any key leaves no page index to capture"
    return None


def fa2_numerics(case: Case[PagedPrefill], device: Device) -> Numerics:
    """P is cast to 16 bits before P·V *and* before the sum of the denominator; so are partial outputs (tmp_v)."""
    fmt = FORMATS[case.axes.dtype]
    return Numerics(
        qk=WGMMA_16BIT,
        pv=WGMMA_16BIT,
        p=fmt,
        out=fmt,
        l_from="rounded_p",
        row_sum=WGMMA_16BIT,  # a product with ones
        partial=fmt,
        lse_base="2",
        lse_no_key=NO_KEY_LSE,
    )


def fa3_numerics(case: Case[PagedPrefill], device: Device) -> Numerics:
    """The denominator sums P in fp32; P is cast to 16 bits for P·V alone."""
    fmt = FORMATS[case.axes.dtype]
    return Numerics(qk=WGMMA_16BIT, pv=WGMMA_16BIT, p=fmt, out=fmt, lse_base="2", lse_no_key=NO_KEY_LSE)


def specialisation(case: Case[PagedPrefill]) -> str:
    """What a module is compiled for at first use."""
    return f"{case.axes.dtype}-d{case.axes.head_dim}"


@cache
def _run_parameters() -> frozenset[str]:
    import inspect

    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    return frozenset(inspect.signature(BatchPrefillWithPagedKVCacheWrapper.run).parameters)


# One workspace for several wrappers is what FlashInfer's documentation recommends; a graph is planned for the longest
# lengths, and so splits keys in another way than an eager launch.
CONTRACT = LaunchContract(
    replans=True, shares_workspace=True, captured="lengths", graph_bits=False, pdl=True, refuses=refuses
)
fa2 = Kernel(
    name="flashinfer.paged_prefill[fa2]",
    operator=paged_prefill,
    plan=planner("fa2"),
    launch=launch,
    numerics=fa2_numerics,
    unsupported=unsupported,
    # The plan depends on lengths alone, and every KV head has blocks of its own: neither pages nor heads change bits.
    inexact={"value_scale": "partial outputs of split keys in fp16 may be subnormal, and then have fewer digits"},
    specialisation=specialisation,
    contract=CONTRACT,
    devices=("cuda",),
    library="flashinfer",
    min_sm=(8, 0),
)
fa3 = Kernel(
    name="flashinfer.paged_prefill[fa3]",
    operator=paged_prefill,
    plan=planner("fa3"),
    launch=launch,
    numerics=fa3_numerics,
    unsupported=unsupported,
    specialisation=specialisation,
    contract=CONTRACT,
    devices=("cuda",),
    library="flashinfer",
    min_sm=(9, 0),
)
