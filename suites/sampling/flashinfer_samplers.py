"""FlashInfer's samplers, from release 0.6.18 on: lines are those of 0.6.18.post1.

All keep every token of a tie, whatever p or k says, and look at p itself, not at a share of the sum. A token of value x
stays iff Σ_{p_j > x} p_j < p (sampling.cuh:1083), iff #{p_j > x} < k (:957), iff x >= p max (:1132, :1147); with both
filters at once, iff two of these hold (:1310). "top_k_first" is :func:`top_k_renorm_probs` or
:func:`top_k_mask_logits`, and then top-p; with a scalar k up to 256, a vocabulary from 65,536 on and no indices it is a
radix top-k of exactly k instead (sampling.py:1341-1420), which cuts a tie anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kerneltest.model import AccModel, Call, Case, Device, Operator

from ._axes import Rows
from ._chain import Chain
from ._flashinfer import (
    BLOCK,
    BLOCKS,
    RANDOM,
    first_numbers,
    kernel,
    missing,
    needs_probabilities,
    parameter,
    stream,
)
from ._semantics import Inverse, Semantics
from .filtered import (
    min_p_sampling,
    top_k_sampling,
    top_k_top_p_sampling,
    top_k_top_p_sampling_from_logits,
    top_p_sampling,
)
from .speculative import chain_speculative_sampling
from .unfiltered import sampling_from_logits, sampling_from_probs

if TYPE_CHECKING:
    import torch

MODULE = "flashinfer.sampling"
# torch's softmax on CUDA (SoftMax.cuh): blocks of 512 threads or more, a tree of 10 levels; a warp up to 1024 elements.
TORCH_SOFTMAX = AccModel(24, "rne", 512, extra=64)
# The sum of the k values of the short way, k up to 256.
FEW = AccModel(24, "rne", 1 << 30, extra=256)


def launcher(function: str, source: str, *names: str, deterministic: bool) -> Callable[[Call], dict[str, torch.Tensor]]:
    """A launch of ``function(source, *names, indices=..., ...)``."""

    def launch(call: Call) -> dict[str, torch.Tensor]:
        from flashinfer import sampling

        axes = call.case.axes
        more = {"filter_apply_order": axes.order} if axes.order else {}
        tokens = getattr(sampling, function)(
            call.inputs[source],
            *(parameter(call, name) for name in names),
            indices=call.inputs["indices"] if axes.indices else None,
            deterministic=deterministic,
            **stream(call),
            **more,
        )
        return {"tokens": tokens}

    return launch


def refusal(function: str) -> Callable[[Case[Rows], Device], str | None]:
    """What the imported release does not offer, and what no release asks for."""

    def unsupported(case: Case[Rows], device: Device) -> str | None:
        return needs_probabilities(case) or missing(MODULE, function, "indices", "deterministic", "seed", "offset")

    return unsupported


def semantics(case: Case[Rows], device: Device) -> Semantics:
    """Strict, absolute, ties kept; sums of a block."""
    return Semantics(mass=BLOCK, flushes=True)


def inverse(case: Case[Rows], device: Device) -> Semantics:
    """No filter, and one random number for each row: the first running sum above it (sampling.cuh:810, :614)."""
    return Semantics(mass=BLOCK, flushes=True, inverse=Inverse(numbers=first_numbers))


def inverse_of_share(case: Case[Rows], device: Device) -> Semantics:
    """The same of what the filter leaves, the number times its sum (sampling.cuh:1166)."""
    return Semantics(mass=BLOCK, flushes=True, inverse=Inverse(numbers=first_numbers, scaled=True))


def both(case: Case[Rows], device: Device) -> Semantics:
    """The same, and for one filter after the other how the first puts out what it leaves."""
    from kerneltest.oracle.softmax import SoftmaxNumerics

    softmax = SoftmaxNumerics(row_sum=TORCH_SOFTMAX)
    if case.axes.order == "top_k_first" and takes_the_short_way(case):
        return Semantics(mass=BLOCK, row_sum=FEW, top_k_ties="any", softmax=softmax, flushes=True)
    return Semantics(mass=BLOCK, row_sum=BLOCKS, softmax=softmax, flushes=True)


def takes_the_short_way(case: Case[Rows]) -> bool:
    """Whether the imported release selects exactly k first; asked of its own function, if it has one."""
    import torch
    from flashinfer import sampling

    axes = case.axes
    applicable = getattr(sampling, "_top_k_first_fast_path_applicable", None)
    if applicable is None or axes.per_row:
        return False
    x = torch.empty(1, axes.vocabulary, device="meta")
    return bool(applicable(x, axes.top_k, torch.empty(0) if axes.indices else None))


def launch_chain(call: Call) -> dict[str, torch.Tensor]:
    """Counts are allocated by the library, and set to 0 by it."""
    from flashinfer import sampling

    x = call.inputs
    tokens, accepted, emitted = sampling.chain_speculative_sampling(
        x["draft_probs"], x["draft_token_ids"], x["target_probs"], deterministic=True, **stream(call)
    )
    return {
        "output_token_ids": tokens,
        "output_accepted_token_num": accepted,
        "output_emitted_draft_token_num": emitted,
    }


def no_chain(case: Case[Chain], device: Device) -> str | None:
    """What the imported release does not offer."""
    return missing(MODULE, "chain_speculative_sampling", "deterministic", "seed", "offset")


def chain_semantics(case: Case[Chain], device: Device) -> Semantics:
    """Nothing is left open: u p < q (sampling.cuh:1897) follows from some u, or it does not."""
    return Semantics()


def _sampler(
    operator: Operator,
    function: str,
    *names: str,
    source: str = "probs",
    fast: bool = False,
    numerics: Callable[[Case[Rows], Device], Semantics] = semantics,
) -> Any:
    return kernel(
        f"{operator.name}[fast]" if fast else operator.name,
        operator,
        launcher(function, source, *names, deterministic=not fast),
        numerics=both if len(names) == 2 else numerics,
        unsupported=refusal(function),
        deterministic=not fast,
        contract=RANDOM,
    )


from_probs = _sampler(sampling_from_probs, "sampling_from_probs", numerics=inverse)
from_probs_fast = _sampler(sampling_from_probs, "sampling_from_probs", fast=True, numerics=inverse)
from_logits = _sampler(sampling_from_logits, "sampling_from_logits", source="logits")
top_p = _sampler(top_p_sampling, "top_p_sampling_from_probs", "top_p")
top_p_fast = _sampler(top_p_sampling, "top_p_sampling_from_probs", "top_p", fast=True)
top_k = _sampler(top_k_sampling, "top_k_sampling_from_probs", "top_k")
min_p = _sampler(min_p_sampling, "min_p_sampling_from_probs", "min_p", numerics=inverse_of_share)
top_k_top_p = _sampler(top_k_top_p_sampling, "top_k_top_p_sampling_from_probs", "top_k", "top_p")
top_k_top_p_logits = _sampler(
    top_k_top_p_sampling_from_logits, "top_k_top_p_sampling_from_logits", "top_k", "top_p", source="logits"
)
chain = kernel(
    "chain_speculative_sampling",
    chain_speculative_sampling,
    launch_chain,
    numerics=chain_semantics,
    unsupported=no_chain,
    contract=RANDOM,
)
