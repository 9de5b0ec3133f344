"""FlashInfer's ``BlockSparseAttentionWrapper``, backends fa2 and fa3.

Lines are those of release 0.6.18.post1, ``sparse.py`` where no file is named. A block column is a page, a block row a
request: on tensor cores it runs the modules of paged prefill, on CUDA cores, where a KV head has fewer than four rows
of a block, that of paged decode (:828).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call, Case, Device, Kernel, LaunchContract, Numerics

from . import flashinfer as paged
from ._block_sparse_axes import BlockSparse, paged_case
from .block_sparse import block_sparse
from .flashinfer_decode import GROUPS, cuda_core_numerics
from .flashinfer_ragged import ROUNDINGS_OF_PARTIAL_OUTPUTS

if TYPE_CHECKING:
    import torch

# Rows of a block, times query heads of a KV head, from which on tensor cores are used.
ROWS_FOR_TENSOR_CORES = 4


def planner(backend: str) -> Callable[[Call], Any]:
    """A ``plan`` that makes a wrapper on a workspace of arbitrary contents, or plans an earlier one anew."""

    def plan(call: Call) -> Any:
        import torch
        from flashinfer import BlockSparseAttentionWrapper

        axes, x = call.case.axes, call.inputs
        workspace = call.workspace(paged.workspace_bytes(paged_case(call.case), call.device))
        wrapper = call.plan
        if wrapper is None:
            wrapper = BlockSparseAttentionWrapper(workspace, backend=backend)
        elif wrapper._float_workspace_buffer.data_ptr() != workspace.data_ptr():
            wrapper.reset_workspace_buffer(workspace, torch.empty_like(wrapper._int_workspace_buffer))
        dtype = getattr(torch, axes.dtype)
        wrapper.plan(
            x["indptr"],
            x["indices"],
            axes.rows,
            axes.columns,
            axes.block_rows,
            axes.block_columns,
            axes.q_heads,
            axes.kv_heads,
            axes.head_dim,
            mask=x.get("mask"),
            sm_scale=axes.scale,
            q_data_type=dtype,
            kv_data_type=dtype,
            o_data_type=dtype,  # by default fp16, whatever the queries are (:429)
        )
        return wrapper

    return plan


def launch(call: Call) -> Mapping[str, torch.Tensor]:
    """Run the planned wrapper into the caller's own buffers."""
    x, outputs = call.inputs, call.outputs
    options: dict[str, Any] = {"enable_pdl": True} if call.pdl else {}
    out, lse = call.plan.run(x["q"], x["k"], x["v"], out=outputs["out"], lse=outputs["lse"], return_lse=True, **options)
    return {"out": out, "lse": lse}


def on_cuda_cores(axes: BlockSparse) -> bool:
    """Whether plan() takes the module of decode."""
    return axes.block_rows * axes.group < ROWS_FOR_TENSOR_CORES and not axes.masked


def numerics(backend: str) -> Callable[[Case[BlockSparse], Device], Numerics]:
    """Those of decode on CUDA cores, or of paged prefill."""

    def declared(case: Case[BlockSparse], device: Device) -> Numerics:
        inner = paged_case(case)
        if on_cuda_cores(case.axes):
            return cuda_core_numerics(replace(inner, operator="paged_decode"), device)
        if backend == "fa3":
            return paged.fa3_numerics(inner, device)
        return replace(paged.fa2_numerics(inner, device), partial_roundings=ROUNDINGS_OF_PARTIAL_OUTPUTS)

    return declared


def unsupported(backend: str) -> Callable[[Case[BlockSparse], Device], str | None]:
    def reason(case: Case[BlockSparse], device: Device) -> str | None:
        axes = case.axes
        if axes.dtype not in paged.DTYPES:
            return f"FlashInfer's block-sparse attention has no {axes.dtype} kernels"
        if axes.masked and backend == "fa3":
            return "fa3 has no custom mask (is_fa3_backend_supported, utils.py:457)"
        if on_cuda_cores(axes) and axes.group not in GROUPS:
            return f"FlashInfer's decode on CUDA cores has no groups of {axes.group} query heads"
        return None

    return reason


def specialisation(case: Case[BlockSparse]) -> str:
    """What a module is compiled for at first use."""
    axes = case.axes
    return f"{axes.dtype}-d{axes.head_dim}-{'decode' if on_cuda_cores(axes) else 'prefill'}"


def _kernel(backend: str) -> Kernel:
    return Kernel(
        name=f"flashinfer.block_sparse[{backend}]",
        operator=block_sparse,
        plan=planner(backend),
        launch=launch,
        numerics=numerics(backend),
        unsupported=unsupported(backend),
        inexact={"value_scale": "partial outputs of split keys in fp16 may be subnormal, and then have fewer digits"},
        specialisation=specialisation,
        # A graph keeps the plan, and the plan the blocks and the mask of one case: other values have others.
        contract=LaunchContract(replans=True, shares_workspace=True, pdl=True),
        devices=("cuda",),
        library="flashinfer",
        min_sm=(9, 0) if backend == "fa3" else (8, 0),
    )


fa2 = _kernel("fa2")
fa3 = _kernel("fa3")
