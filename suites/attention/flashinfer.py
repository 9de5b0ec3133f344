"""FlashInfer's ``BatchPrefillWithPagedKVCacheWrapper``, backends fa2 and fa3, from release 0.2.5 on."""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import cache
from typing import TYPE_CHECKING, Any

from kerneltest.model import (
    FORMATS,
    FP32,
    WGMMA_16BIT,
    Call,
    Case,
    Device,
    Kernel,
    LaunchContract,
    Numerics,
    Unsupported,
)

from ._alibi import error_of_powers
from .paged_prefill import PagedPrefill, paged_prefill

if TYPE_CHECKING:
    import torch

WRAPPER = "BatchPrefillWithPagedKVCacheWrapper"
DTYPES = ("bfloat16", "float16")
# The size that FlashInfer's documentation recommends. It is not always enough: see workspace_bytes.
RECOMMENDED_WORKSPACE = 128 << 20
LARGEST_WORKSPACE = 2 << 30
# What fa2's planner (PrefillPlan in scheduler.cuh) reckons with: blocks on an SM, and query rows of a block at most.
BLOCKS_PER_SM = 2
MAX_ROWS_OF_A_BLOCK = 128
# Up to 0.6.18 math.cuh calls 5e4 infinity, so that a row without keys has lse = -5e4 + log2(something small). It does
# the work of -Inf in every merge (2^-49000 is 0); from 0.7 on it is -Inf itself.
NO_KEY_LSE = -49_000.0
# The value of ``pos_encoding_mode`` for it; the library makes the slopes itself, from the number of query heads.
ALIBI = "ALIBI"
FA3_ALIBI = "fa3 has no encoding of positions (utils.py, is_fa3_backend_supported)"  # line 459 of 0.6.18.post1


def planner(backend: str) -> Callable[[Call], Any]:
    """A ``plan`` that makes a wrapper on a workspace of arbitrary contents, or plans an earlier one anew."""

    def plan(call: Call) -> Any:
        import torch

        axes, x = call.case.axes, call.inputs
        workspace = call.workspace(workspace_bytes(call.case, call.device))
        wrapper = call.plan
        if wrapper is None or wrapper._kv_layout != axes.layout:  # which a wrapper has for good
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
            kv_data_type=getattr(torch, axes.kv_format),
            **plan_options(axes),
            **{parameter: x[tensor] for parameter, tensor in mask_options(axes).items()},
        )
        if call.captured and axes.v_dim != axes.head_dim and hasattr(wrapper, "prewarm_paged_kv_stride_variant"):
            # From 0.7 on K and V of different strides have a module of their own, which is loaded at the first run.
            wrapper.prewarm_paged_kv_stride_variant()
        return wrapper

    return plan


def mask_options(axes: PagedPrefill) -> dict[str, str]:
    """The parameter of ``plan`` that takes a mask, and the input that it is given: the library packs its bits itself,
    unless they are packed already.
    """
    if axes.mask == "none":
        return {}
    return {"packed_custom_mask": "packed_mask"} if axes.packed_mask else {"custom_mask": "custom_mask"}


def plan_options(axes: PagedPrefill) -> dict[str, Any]:
    """What else ``plan`` is told beside the plain arguments, for the options of a case that are set."""
    options: dict[str, Any] = {}
    if axes.window_left >= 0:
        options["window_left"] = axes.window_left
    if axes.softcap:
        options["logits_soft_cap"] = axes.softcap
    if axes.alibi:
        options["pos_encoding_mode"] = ALIBI
    if axes.v_dim != axes.head_dim:
        options["head_dim_vo"] = axes.v_dim
    if axes.fixed_split_size:
        options["fixed_split_size"] = axes.fixed_split_size
    if axes.disable_split_kv:
        options["disable_split_kv"] = True
    return options


def _wrapper(call: Call, workspace: torch.Tensor, backend: str) -> Any:
    """A wrapper; one whose launch will be captured owns the indices that a graph reads, as large as they are now."""
    import torch
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    x, layout = call.inputs, call.case.axes.layout
    if not call.captured:
        return BatchPrefillWithPagedKVCacheWrapper(workspace, layout, backend=backend)
    mask = {}
    if call.case.axes.mask != "none":
        # A byte more for each request: that is where the next one begins.
        size = call.case.axes.mask_bits // 8 + len(call.case.axes.requests)
        mask["custom_mask_buf"] = torch.empty(size, dtype=torch.uint8, device=workspace.device)
        mask["mask_indptr_buf"] = torch.empty_like(x["qo_indptr"])
    return BatchPrefillWithPagedKVCacheWrapper(
        workspace,
        layout,
        use_cuda_graph=True,
        qo_indptr_buf=x["qo_indptr"].clone(),
        paged_kv_indptr_buf=x["kv_indptr"].clone(),
        paged_kv_indices_buf=x["kv_indices"].clone(),
        paged_kv_last_page_len_buf=x["kv_last_page_len"].clone(),
        backend=backend,
        **mask,
    )


def workspace_bytes(case: Case[PagedPrefill], device: Device) -> int:
    """What a caller must provide so that no plan of this case can run out of workspace, which FlashInfer refuses.

    If the planner splits the keys, it keeps an output of ``v_dim`` and its sum in fp32 for every row of every block,
    for all query heads of a KV head, with ``BLOCKS_PER_SM`` blocks on each SM at most. With pieces of a fixed size
    there are as many blocks as pieces, and each counts for all query heads.
    """
    axes = case.axes
    rows = BLOCKS_PER_SM * device.units * MAX_ROWS_OF_A_BLOCK * axes.group
    if axes.fixed_split_size:
        rows = axes.q_heads * sum(
            (request.qo_len * axes.group + MAX_ROWS_OF_A_BLOCK)
            * max(1, -(-axes.pages(request) // axes.fixed_split_size))
            for request in axes.requests
        )
    alignment = 1 << 10
    return max(RECOMMENDED_WORKSPACE, rows * (axes.v_dim + 1) * 4 + alignment)


def launch(call: Call) -> dict[str, torch.Tensor]:
    """Run the planned wrapper into the caller's own buffers."""
    from ._tensors import queries

    axes, x, outputs = call.case.axes, call.inputs, call.outputs
    options: dict[str, Any] = {**outputs, "return_lse": axes.return_lse}
    options |= {name: getattr(axes, name) for name in ("k_scale", "v_scale") if getattr(axes, name) != 1.0}
    if call.pdl:
        if not takes(WRAPPER, "run", "enable_pdl"):
            raise Unsupported("this release's run() has no parameter enable_pdl")
        options["enable_pdl"] = True
    return named(axes.return_lse, call.plan.run(queries(axes, x), (x["k_pages"], x["v_pages"]), **options))


def named(with_lse: bool, answer: Any) -> dict[str, torch.Tensor]:
    """What a call returns, by name: the output, or a pair with the log-sum-exp."""
    return dict(zip(("out", "lse"), answer, strict=True)) if with_lse else {"out": answer}


def unsupported(case: Case[PagedPrefill], device: Device) -> str | None:
    """Told by what the imported release offers, not by its number."""
    axes = case.axes
    if axes.dtype not in DTYPES:
        return f"FlashInfer's prefill has no {axes.dtype} kernels"
    if axes.causal and any(request.kv_len < request.qo_len for request in axes.requests):
        # prefill.cuh refuses this for a single request ("kv_len must be greater than or equal to qo_len"); the batch
        # wrapper does not check it, and what rows without any key then hold differs between backends and releases.
        return "causal with fewer keys than queries is outside of FlashInfer's contract"
    if (needed := workspace_bytes(case, device)) > LARGEST_WORKSPACE:
        return f"so many pieces of keys need a workspace of {needed >> 20} MiB"
    planned = plan_options(axes).keys() | mask_options(axes).keys()
    for method, wanted in (("run", {"out", "lse", "return_lse"}), ("plan", planned)):
        if lacks := lacking_parameters(WRAPPER, method, wanted):
            return lacks
    return None


def fa3_unsupported(case: Case[PagedPrefill], device: Device) -> str | None:
    """What utils.py (is_fa3_backend_supported) and batch_prefill_sm90.cu say that fa3 has not, in 0.6.18 and 0.7.2.

    ``backend="fa3"`` asks none of the first: a mask is not looked at, and K and V of 8 bits do not compile.
    """
    axes = case.axes
    if axes.mask != "none":
        return "fa3 has no custom mask (utils.py, is_fa3_backend_supported)"
    if axes.alibi:
        return FA3_ALIBI
    if axes.kv_dtype != "same":
        return "fa3 has K and V of 8 bits for queries of 8 bits alone (utils.py, is_fa3_backend_supported)"
    if axes.v_dim != axes.head_dim:
        return "fa3 wants pages of K and V with the same strides (batch_prefill_sm90.cu)"
    if axes.fixed_split_size:
        return "fixed_split_size is for fa2 alone (the documentation of plan)"
    return unsupported(case, device)


def refuses(step: str, case: Case[PagedPrefill], device: Device) -> str | None:
    """A captured wrapper needs an index buffer of at least one page, and cannot tell how many pieces there will be."""
    if step == "graph" and not any(case.axes.pages(request) for request in case.axes.requests):
        return "a batch without any key leaves no page index to capture"
    if step == "graph" and case.axes.fixed_split_size:
        return "pieces of a fixed size are not promised to work with graphs (the documentation of plan)"
    return None


def fa2_numerics(case: Case[PagedPrefill], device: Device) -> Numerics:
    """P is cast to 16 bits before P·V *and* before the sum of the denominator; so are partial outputs (tmp_v).

    Eight bits of K and V are widened to those of q exactly; k_scale is one of the scores, and v_scale multiplies what
    was rounded already (prefill.py, run). The soft-cap is tanh.approx (math.cuh). Bits that do not depend on the batch
    are what plan() promises for a fixed_split_size.
    """
    axes, fmt = case.axes, FORMATS[case.axes.dtype]
    return Numerics(
        qk=WGMMA_16BIT,
        pv=WGMMA_16BIT,
        p=fmt,
        out=fmt,
        l_from="rounded_p",
        row_sum=WGMMA_16BIT,  # a product with ones
        partial=FP32 if axes.disable_split_kv else fmt,
        unscaled=fmt,
        slope_rel=error_of_powers(axes.q_heads),
        lse_base="2",
        lse_no_key=NO_KEY_LSE,
        batch_invariant=axes.fixed_split_size > 0,
    )


def fa3_numerics(case: Case[PagedPrefill], device: Device) -> Numerics:
    """The denominator sums P in fp32; P is cast to 16 bits for P·V alone."""
    fmt = FORMATS[case.axes.dtype]
    return Numerics(qk=WGMMA_16BIT, pv=WGMMA_16BIT, p=fmt, out=fmt, unscaled=fmt, lse_base="2", lse_no_key=NO_KEY_LSE)


def specialisation(case: Case[PagedPrefill]) -> str:
    """What a module is compiled for at first use (jit/attention/modules.py, get_batch_prefill_uri).

    The kind of mask is no part of it: each module has all of them.
    """
    axes = case.axes
    name = f"{axes.dtype}-d{axes.head_dim}"
    if axes.v_dim != axes.head_dim:
        name += f"x{axes.v_dim}"
    if axes.kv_dtype != "same":
        name += f"-{axes.kv_dtype}"
    options = {"window": axes.window_left >= 0, "softcap": axes.softcap > 0, "alibi": axes.alibi}
    return name + "".join(f"-{option}" for option, asked in options.items() if asked)


def lacking_parameters(name: str, method: str, wanted: Set[str]) -> str | None:
    """Which of these parameters the imported release's function or method has not, or None."""
    missing = sorted(parameter for parameter in wanted if not takes(name, method, parameter))
    return f"this release's {method or name}() has no parameter {', '.join(missing)}" if missing else None


@cache
def takes(name: str, method: str, parameter: str) -> bool:
    """Whether a function of FlashInfer's, or a method of one of its classes, has the parameter.

    One that takes any by name, as the ``plan`` of decode does, says so itself if it knows it not.
    """
    import inspect

    import flashinfer

    named = getattr(flashinfer, name)
    given = inspect.signature(getattr(named, method) if method else named).parameters
    return parameter in given or any(one.kind is one.VAR_KEYWORD for one in given.values())


# One workspace for several wrappers is what FlashInfer's documentation recommends; a graph is planned for the longest
# lengths, and so splits keys in another way than an eager launch.
CONTRACT = LaunchContract(
    replans=True,
    shares_workspace=True,
    captured="lengths",
    graph_bits=False,
    pdl=True,
    refuses=refuses,
    # The plan looks at both indptr and at the last page's length; what is in the page table the device alone reads
    # (page.cuh:225, prefill.py:2411 of 0.6.18.post1).
    trusts={"index out of range": "the page table is copied to the device and never looked at by the host"},
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
    unsupported=fa3_unsupported,
    specialisation=specialisation,
    contract=CONTRACT,
    devices=("cuda",),
    library="flashinfer",
    min_sm=(9, 0),
)
