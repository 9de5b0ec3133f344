"""``torch.softmax``, and ``torch.multinomial`` as a control for drawing without a filter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kerneltest.model import SUM_FP32, Call, Case, Device, Kernel, LaunchContract

from ._axes import Rows
from ._checks import checked
from ._semantics import Semantics
from .softmax import softmax
from .unfiltered import sampling_from_logits, sampling_from_probs

if TYPE_CHECKING:
    import torch

    from kerneltest.oracle.softmax import SoftmaxNumerics


BY_MULTINOMIAL = LaunchContract(
    needs_finite="torch.multinomial asserts on the device that weights are finite (MultinomialKernel.cu)"
)


def launch_softmax(call: Call) -> dict[str, torch.Tensor]:
    """softmax(logits / T) in float32."""
    import torch

    from . import _torch_filters as f

    return {"probs": (call.inputs["logits"].float() / f.parameter(call, "temperature", torch.float32)).softmax(-1)}


def softmax_numerics(case: Case[Rows], device: Device) -> SoftmaxNumerics:
    """A maximum, then a sum in whatever order; the exponentials of the vector library and of CUDA are good to 2 ulp."""
    from kerneltest.oracle.softmax import SoftmaxNumerics

    return SoftmaxNumerics(row_sum=SUM_FP32)


def launch_sampling(call: Call) -> dict[str, torch.Tensor]:
    """One draw from each chosen row, of probabilities or of the softmax of logits."""
    import torch

    from . import _torch_filters as f

    x = call.inputs
    probs = x["probs"] if "probs" in x else x["logits"].float().softmax(-1)
    drawn = torch.multinomial(f.chosen(call, probs), 1, generator=f.generator(call))
    return f.tokens(call, drawn.squeeze(-1))


def semantics(case: Case[Rows], device: Device) -> Semantics:
    """No filter, and so no border."""
    return Semantics()


torch_softmax = Kernel(
    name="torch.softmax",
    operator=softmax,
    launch=checked(launch_softmax),
    numerics=softmax_numerics,
    # Seen on an H100 with 16385 columns: the same row came out with other bits in another place of the batch.
    inexact={"row_permutation": "on CUDA the sums of a row depend on the alignment of its first element"},
    contract=LaunchContract(captured="values"),
)
from_probs = Kernel(
    name="torch.sampling_from_probs[multinomial]",
    operator=sampling_from_probs,
    launch=checked(launch_sampling),
    numerics=semantics,
    contract=BY_MULTINOMIAL,
)
from_logits = Kernel(
    name="torch.sampling_from_logits[multinomial]",
    operator=sampling_from_logits,
    launch=checked(launch_sampling),
    numerics=semantics,
    contract=BY_MULTINOMIAL,
)
