"""FlashInfer's ``BatchMLAPagedAttentionWrapper``, backends fa2 and fa3: decode and incremental prefill, absorbed.

Lines are those of release 0.6.18.post1, under ``data/include/flashinfer/attention`` where no folder is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from kerneltest.model import FORMATS, WGMMA_16BIT, Call, Case, Device, Kernel, Numerics, Unsupported

from ..attention.flashinfer import CONTRACT as OF_ATTENTION
from ..attention.flashinfer import named
from ._axes import Mla
from .mla_paged_attention import mla_paged_attention

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16")
# What the documentation recommends. MLAPlan (scheduler.cuh:1842) takes 2 * 64 rows of partial outputs for each SM.
WORKSPACE = 128 << 20


def planner(backend: str) -> Callable[[Call], Any]:
    """A ``plan`` that makes a wrapper on a workspace of arbitrary contents, or plans an earlier one anew."""

    def plan(call: Call) -> Any:
        import torch

        axes, x = call.case.axes, call.inputs
        workspace = call.workspace(WORKSPACE)
        wrapper = call.plan
        if wrapper is None:
            wrapper = _wrapper(call, workspace, backend)
        # There is no public way to give a wrapper another workspace.
        wrapper._float_workspace_buffer = workspace
        dtype = getattr(torch, axes.dtype)
        try:
            wrapper.plan(
                **_metadata(x["qo_indptr"], x["kv_indptr"], x["kv_indices"], x["kv_len"], return_lse=axes.return_lse),
                num_heads=axes.heads,
                head_dim_ckv=axes.rank,
                head_dim_kpe=axes.dims.rope_dim,
                page_size=axes.page_size,
                causal=axes.causal,
                sm_scale=axes.scale,
                q_data_type=dtype,
                kv_data_type=dtype,
            )
        except ValueError as refusal:
            # How 0.7 says what a backend cannot do (mla/_batch_mla/_backends/_capabilities.py:24). Other errors of its
            # kind are about arguments.
            if type(refusal).__name__ == "_BackendPlanUnsupportedError":
                raise Unsupported(str(refusal)) from refusal
            raise
        return wrapper

    return plan


def _metadata(
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_len: torch.Tensor,
    *,
    return_lse: bool,
) -> dict[str, Any]:
    """Arguments of ``plan()`` that hold lengths and pages: from 0.7 on an object, which makes flat ones deprecated.

    With it ``plan()`` has to know whether ``run()`` will ask for a log-sum-exp (mla/_batch_mla/_contracts.py:141).
    """
    tensors = {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr, "kv_indices": kv_indices, "kv_len_arr": kv_len}
    if not _structured():
        return tensors
    from flashinfer.mla import MLAPlanMetadata

    lse_mode = "base2" if return_lse else "none"
    options = {"query_layout": "split", "kv_cache_layout": "split", "lse_mode": lse_mode}
    return {"metadata": MLAPlanMetadata.csr(**tensors), **options}


def _wrapper(call: Call, workspace: torch.Tensor, backend: str) -> Any:
    """A wrapper; one whose launch will be captured owns the buffers that a graph reads, as large as they are now."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    if not call.captured:
        return BatchMLAPagedAttentionWrapper(workspace, backend=backend)
    x = call.inputs
    return BatchMLAPagedAttentionWrapper(
        workspace,
        use_cuda_graph=True,
        qo_indptr=x["qo_indptr"].clone(),
        kv_indptr=x["kv_indptr"].clone(),
        kv_indices=x["kv_indices"].clone(),
        kv_len_arr=x["kv_len"].clone(),
        backend=backend,
    )


def launch(call: Call) -> dict[str, torch.Tensor]:
    """Run the planned wrapper into the caller's own buffers."""
    x = call.inputs
    if _structured():
        tensors: dict[str, Any] = {
            "query": (x["q_nope"], x["q_pe"]),
            "kv_cache": (x["ckv_pages"], x["kpe_pages"]),
        }
    else:
        tensors = {
            "q_nope": x["q_nope"],
            "q_pe": x["q_pe"],
            "ckv_cache": x["ckv_pages"],
            "kpe_cache": x["kpe_pages"],
        }
    with_lse = call.case.axes.return_lse
    return named(with_lse, call.plan.run(**tensors, **call.outputs, return_lse=with_lse))


def unsupported(case: Case[Mla], device: Device) -> str | None:
    """What no release has a kernel for, and what is outside of the wrapper's contract."""
    if case.axes.dtype not in DTYPES:
        return f"FlashInfer's MLA has no {case.axes.dtype} kernels"
    if case.axes.rank % 128 or case.axes.dims.rope_dim % 64:
        # load_q and write_o move 128 bytes of a row at a time (mla.cuh:155 and :865); 0.7 says so in plan().
        return "FlashInfer's MLA needs a latent of a multiple of 128 channels, and a rotated key of one of 64"
    if case.axes.causal and any(0 < request.kv_len < request.qo_len for request in case.axes.requests):
        # An incremental prefill has its own keys in the cache. mla.cuh:1076 computes the first tile to be masked in
        # unsigned numbers, which wrap around where there are fewer. A request of no keys has code of its own, :1057.
        return "causal with fewer keys than queries is no incremental prefill"
    return None


def refuses(step: str, case: Case[Mla], device: Device) -> str | None:
    """A captured wrapper needs an index buffer of at least one page, and the plan counts the SMs of the whole device.

    It makes a block for each (scheduler.cuh:1617), and they are launched cooperatively (mla.cuh:1278,
    mla_hopper.cuh:1311): the driver refuses more than are there.
    """
    if step == "few_sms":
        return "a block for each SM of the device is launched cooperatively, which no smaller context allows"
    if step == "graph" and not any(case.axes.pages(request) for request in case.axes.requests):
        return "a batch without any key leaves no page index to capture"
    return None


def fa2_numerics(case: Case[Mla], device: Device) -> Numerics:
    """P is cast to 16 bits before P·V *and* before the sum of the denominator (mla.cuh:643 and :644).

    Partial outputs of split keys are stored in the output's format (:882); the log-sum-exp is in base 2 (:946).
    """
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
    )


def fa3_numerics(case: Case[Mla], device: Device) -> Numerics:
    """The denominator sums P in fp32 (mla_hopper.cuh:615); P is cast to 16 bits for P·V alone (:778).

    Partial outputs and the log-sum-exp are as fa2's (:677 and :752).
    """
    fmt = FORMATS[case.axes.dtype]
    return Numerics(qk=WGMMA_16BIT, pv=WGMMA_16BIT, p=fmt, out=fmt, partial=fmt, lse_base="2")


def specialisation(case: Case[Mla]) -> str:
    """What a module is compiled for at first use; both masks are in it."""
    return f"{case.axes.dtype}-{case.axes.rank}-{case.axes.dims.rope_dim}"


@cache
def _structured() -> bool:
    """Whether this release takes metadata and split tensors as one argument each."""
    from flashinfer import mla

    return hasattr(mla, "MLAPlanMetadata")


# A graph keeps the grid that it was captured with, and MLAPlan chooses that by the mean number of queries
# (scheduler.cuh:1612): one that is captured must be replayed for the same queries, as operator.captures has it.
# As with prefill, of kv_indices the device alone reads what it needs (mla.cuh:340).
CONTRACT = replace(OF_ATTENTION, pdl=False, refuses=refuses)
INEXACT = {
    "latent_scale": "partial outputs of split keys in fp16 may be subnormal, and then have fewer digits",
    "head_permutation": "where a query's heads lie in two tiles, each splits its keys at other places",
}


def _kernel(backend: str) -> Kernel:
    return Kernel(
        name=f"flashinfer.mla_paged_attention[{backend}]",
        operator=mla_paged_attention,
        plan=planner(backend),
        launch=launch,
        numerics=fa3_numerics if backend == "fa3" else fa2_numerics,
        unsupported=unsupported,
        inexact=INEXACT,
        specialisation=specialisation,
        contract=CONTRACT,
        devices=("cuda",),
        library="flashinfer",
        min_sm=(9, 0) if backend == "fa3" else (8, 0),
    )


fa2 = _kernel("fa2")
fa3 = _kernel("fa3")
