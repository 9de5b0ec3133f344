"""Torch's kernels of paged prefill put to other uses: keys without pages are pages of one token, a decode a prefill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call, Case, Device, Kernel, LaunchContract, Operator
from kerneltest.model.numerics import Arithmetic

from . import torch_eager, torch_sdpa
from ._checks import check_paged, require_within
from ._dense import check_dense, paged_case, pages
from .paged_decode import paged_decode
from .ragged_prefill import ragged_prefill
from .single_decode import single_decode
from .single_prefill import single_prefill

if TYPE_CHECKING:
    import torch

TRUSTED = dict.fromkeys(
    ("index out of range", "indptr", "value out of range"),
    "values in the device's memory are not read back, which would mean to wait for it",
)


def through_pages(kernel: Kernel, operator: Operator) -> Kernel:
    """A kernel of paged prefill on keys without pages: tensors are viewed as pages of one token, in order."""

    def launch(call: Call) -> Mapping[str, torch.Tensor]:
        check_dense(call)
        outputs = {name: _with_rows(value, name) for name, value in call.outputs.items()}
        inner = replace(call, case=paged_case(call.case), inputs=pages(call.case, call.inputs), outputs=outputs)
        found = kernel.launch(inner)
        return {name: value.view(call.outputs[name].shape) for name, value in found.items()}

    def numerics(case: Case[Any], device: Device) -> Arithmetic:
        return kernel.numerics(paged_case(case), device)

    def unsupported(case: Case[Any], device: Device) -> str | None:
        return kernel.unsupported(paged_case(case), device)

    names = {relation.name for relation in operator.relations}
    return Kernel(
        name=kernel.name.replace("paged_prefill", operator.name),
        operator=operator,
        launch=launch,
        numerics=numerics,
        unsupported=unsupported,
        inexact={name: reason for name, reason in kernel.inexact.items() if name in names},
        contract=LaunchContract(trusts=TRUSTED),
        returns=kernel.returns,
    )


def _with_rows(value: torch.Tensor, name: str) -> torch.Tensor:
    """An output of a single query, with a dimension for it."""
    return value if value.dim() == (2 if name == "lse" else 3) else value.unsqueeze(0)


def decode(call: Call) -> Mapping[str, torch.Tensor]:
    """A decode is a prefill of one query for each request."""
    check_paged(call, *call.inputs, *call.outputs)
    require_within("kv_indices", call.inputs["kv_indices"], call.inputs["k_pages"].shape[0])
    return torch_eager.launch(call)


ragged_eager = through_pages(torch_eager.eager, ragged_prefill)
ragged_sdpa = through_pages(torch_sdpa.sdpa, ragged_prefill)
single_prefill_eager = through_pages(torch_eager.eager, single_prefill)
single_prefill_sdpa = through_pages(torch_sdpa.sdpa, single_prefill)
single_decode_eager = through_pages(torch_eager.eager, single_decode)
paged_decode_eager = Kernel(
    name="torch.paged_decode[eager]",
    operator=paged_decode,
    launch=decode,
    numerics=torch_eager.numerics,
    inexact=torch_eager.eager.inexact,
    contract=LaunchContract(trusts=TRUSTED),
)
