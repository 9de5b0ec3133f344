"""FlashInfer's ``append_paged_kv_cache`` and ``append_paged_mla_kv_cache`` (module ``page``).

Lines are those of release 0.6.18.post1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call, Case, Device, Kernel, LaunchContract

from ._page_append_axes import PageAppend
from .page_append import Exact, mla_page_append, page_append

if TYPE_CHECKING:
    import torch


def append(call: Call) -> Mapping[str, torch.Tensor]:
    """In place, on a copy of the cache in the output buffers; the library says too which token goes where."""
    import flashinfer

    x, outputs = call.inputs, call.outputs
    k, v = outputs["k_cache"].copy_(x["k_pages"]), outputs["v_cache"].copy_(x["v_pages"])
    batch_indices, positions = _where(call)
    flashinfer.append_paged_kv_cache(
        x["append_k"],
        x["append_v"],
        batch_indices,
        positions,
        (k, v),
        x["kv_indices"],
        x["kv_indptr"],
        x["kv_last_page_len"],
        kv_layout=call.case.axes.layout,
    )
    return {"k_cache": k, "v_cache": v}


def append_mla(call: Call) -> Mapping[str, torch.Tensor]:
    """In place, as :func:`append`."""
    import flashinfer

    x, outputs = call.inputs, call.outputs
    ckv, kpe = outputs["ckv_cache"].copy_(x["ckv_pages"]), outputs["kpe_cache"].copy_(x["kpe_pages"])
    batch_indices, positions = _where(call)
    flashinfer.append_paged_mla_kv_cache(
        x["append_ckv"],
        x["append_kpe"],
        batch_indices,
        positions,
        ckv,
        kpe,
        x["kv_indices"],
        x["kv_indptr"],
        x["kv_last_page_len"],
    )
    return {"ckv_cache": ckv, "kpe_cache": kpe}


def _where(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The request and the position of each new token (page.py:240), by way of the lengths afterwards (page.py:303)."""
    import flashinfer

    x = call.inputs
    lengths = flashinfer.get_seq_lens(x["kv_indptr"], x["kv_last_page_len"], call.case.axes.page_size)
    new = sum(request.new for request in call.case.axes.requests)
    indices, positions = flashinfer.get_batch_indices_positions(x["append_indptr"], lengths, new)
    return indices, positions


def numerics(case: Case[PageAppend], device: Device) -> Exact:
    """Words are copied (AppendPagedKVCacheKernel, page.cuh:395)."""
    return Exact()


def specialisation(case: Case[Any]) -> str:
    """One module has them all."""
    return "page"


# page.cu:27 and :413 look at shapes, devices and strides. The lengths are the device's from the start (page.py:303).
CONTRACT = LaunchContract(
    captured="values",
    trusts=dict.fromkeys(
        ("index out of range", "indptr", "value out of range"),
        "what the tables on the device hold is not read back, which would mean to wait for it",
    ),
)
append_kv = Kernel(
    name="flashinfer.page_append",
    operator=page_append,
    launch=append,
    numerics=numerics,
    specialisation=specialisation,
    contract=replace(CONTRACT, overwrites=("k_pages", "v_pages")),
    devices=("cuda",),
    library="flashinfer",
    min_sm=(8, 0),
)
append_latent = Kernel(
    name="flashinfer.mla_page_append",
    operator=mla_page_append,
    launch=append_mla,
    numerics=numerics,
    specialisation=specialisation,
    contract=replace(CONTRACT, overwrites=("ckv_pages", "kpe_pages")),
    devices=("cuda",),
    library="flashinfer",
    min_sm=(8, 0),
)
