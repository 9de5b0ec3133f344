"""FlashInfer's softmax, renormalisations, logit mask and plain top-k; lines are those of 0.6.18.post1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kerneltest.model import FORMATS, AccModel, Call, Case, Device

from ._axes import Rows
from ._flashinfer import (
    BLOCK,
    BLOCKS,
    OF_LOGITS,
    OF_PROBABILITIES,
    PLAIN,
    kernel,
    missing,
    needs_probabilities,
    parameter,
)
from ._semantics import Semantics
from .renorm import top_k_mask_logits, top_k_renorm, top_p_renorm
from .softmax import softmax
from .top_k import top_k

if TYPE_CHECKING:
    import torch

    from kerneltest.oracle.softmax import SoftmaxNumerics

MODULE = "flashinfer.sampling"
# From this vocabulary on, top_p_renorm_probs is a radix selection (NUM_BUCKETS in air_top_p.cuh; renorm.cu).
RADIX_FROM = 2048
# The search among fewer tokens ends when the two values left are neighbours (nextafterf, sampling.cuh:1822), and then
# keeps both: it does not tell apart what is one unit in the last place apart.
NEIGHBOURS = 2.0**-22
# With an Inf above it, its upper border stays Inf, and the search does not end (the same line): the device hangs.
NO_END = "the search of top_p_renorm_probs for its border does not end with Inf (sampling.cuh:1822)"
# Ties by index are made by one of its algorithms alone, which has room for so many (FILTERED_TOPK_MAX_K,
# topk.cuh:2507).
MOST_BY_INDEX = 2048
TIE_BREAK = {"any": 0, "index": 1, "reverse": 2}
# rcp.approx.ftz.f32, as the PTX manual documents it.
RCP_APPROX = 2.0**-23
# Path A of OnlineSoftmax (sampling.cuh:1330): slices of 8192, whose maxima and sums a block joins.
SLICED_FROM, SLICE = 24_576, 8192


def launch_softmax(call: Call) -> dict[str, torch.Tensor]:
    """The only one of them with a switch for programmatic dependent launch."""
    from flashinfer import sampling

    return {
        "probs": sampling.softmax(
            call.inputs["logits"], temperature=parameter(call, "temperature"), enable_pdl=call.pdl
        )
    }


def softmax_numerics(case: Case[Rows], device: Device) -> SoftmaxNumerics:
    """Online: at each step of a block its sum is rescaled once (sampling.cuh:371), and again where slices are joined.

    A thread adds up to 4 exponentials to each other and that to its sum: at most 2 ceil(V / 1024) + 3 additions.
    """
    from kerneltest.oracle.softmax import SoftmaxNumerics

    vocabulary = case.axes.vocabulary
    steps = -(-vocabulary // (1024 * math.gcd(4, vocabulary)))
    # Slices of a row are joined in twos: by one thread, by 5 levels of a warp, by 31 warps one by one.
    joins = -(-vocabulary // SLICE) // 1024 + 1 + 5 + 31 if vocabulary >= SLICED_FROM else 0
    return SoftmaxNumerics(
        row_sum=AccModel(24, "rne", 512, extra=3 + 5 + 31 + joins),
        rescales=steps + 2 * joins,
        inverse_rel=RCP_APPROX,
    )


def launch_top_p(call: Call, *, deterministic: bool) -> dict[str, torch.Tensor]:
    """Top-p, renormalised; by default with float atomics in any order."""
    from flashinfer import sampling

    probs = sampling.top_p_renorm_probs(call.inputs["probs"], parameter(call, "top_p"), is_deterministic=deterministic)
    return {"renorm_probs": probs}


def top_p_semantics(case: Case[Rows], device: Device, *, deterministic: bool) -> Semantics:
    """A search for the border below 2048 tokens, which compares with p; a radix selection above, with p times the sum.

    The latter keeps whatever is not less than the first value with which the mass reaches p Σ (air_top_p.cuh:366, 381,
    442), that is all before which there is less: the same strict rule. Both keep ties.
    """
    if case.axes.vocabulary < RADIX_FROM:
        return Semantics(mass=BLOCK, blur=NEIGHBOURS, row_sum=BLOCK, flushes=True)
    return Semantics(
        radix="integer" if deterministic else "atomic", relative=True, mass=BLOCK, row_sum=BLOCK, flushes=True
    )


def launch_top_k(call: Call) -> dict[str, torch.Tensor]:
    """Top-k, renormalised; its sums have an order in releases with a parameter for it, and elsewhere any."""
    from flashinfer import sampling

    unordered = missing(MODULE, "top_k_renorm_probs", "is_deterministic")
    more = {} if unordered else {"is_deterministic": True}
    return {"renorm_probs": sampling.top_k_renorm_probs(call.inputs["probs"], parameter(call, "top_k"), **more)}


def top_k_semantics(case: Case[Rows], device: Device) -> Semantics:
    """Whatever is not less than the k-th value (topk.cuh:1652, 1971)."""
    return Semantics(row_sum=BLOCKS, flushes=True, out=FORMATS[case.axes.dtype])


def launch_mask(call: Call) -> dict[str, torch.Tensor]:
    """All but the k largest become -Inf."""
    from flashinfer import sampling

    return {"masked_logits": sampling.top_k_mask_logits(call.inputs["logits"], parameter(call, "top_k"))}


def launch_selection(call: Call, *, deterministic: bool) -> dict[str, torch.Tensor]:
    """Values and int64 indices."""
    import flashinfer

    axes = call.case.axes
    values, indices = flashinfer.top_k(
        call.inputs["logits"],
        axes.top_k,
        sorted=axes.sorted,
        deterministic=deterministic,
        tie_break=TIE_BREAK[axes.tie],
    )
    return {"values": values, "indices": indices}


def selection_semantics(case: Case[Rows], device: Device) -> Semantics:
    """Exactly k; which of equals, only if asked for."""
    return Semantics(top_k_ties="any")


def refusal(function: str, *names: str) -> Callable[[Case[Rows], Device], str | None]:
    """What the imported release does not offer, and what no release asks for."""

    def unsupported(case: Case[Rows], device: Device) -> str | None:
        return needs_probabilities(case) or missing(MODULE, function, *names)

    return unsupported


def no_selection(case: Case[Rows], device: Device) -> str | None:
    """What the imported release does not offer, and what it says it has no room for."""
    axes = case.axes
    if axes.tie != "any" and axes.top_k is not None and axes.top_k > MOST_BY_INDEX:
        return f"ties by index are taken up to k = {MOST_BY_INDEX}"
    return missing("flashinfer", "top_k", "sorted", "deterministic", "tie_break")


def _top_p(name: str, *, deterministic: bool) -> Any:
    return kernel(
        name,
        top_p_renorm,
        partial(launch_top_p, deterministic=deterministic),
        numerics=partial(top_p_semantics, deterministic=deterministic),
        unsupported=refusal("top_p_renorm_probs", "is_deterministic"),
        deterministic=deterministic,
        contract=replace(OF_PROBABILITIES, needs_finite=NO_END),
    )


def _selection(name: str, *, deterministic: bool) -> Any:
    return kernel(
        name,
        top_k,
        partial(launch_selection, deterministic=deterministic),
        numerics=selection_semantics,
        unsupported=no_selection,
        deterministic=deterministic,
        specialisation=lambda _case: "topk",
    )


softmax_kernel = kernel(
    "softmax",
    softmax,
    launch_softmax,
    numerics=softmax_numerics,
    unsupported=refusal("softmax", "temperature", "enable_pdl"),
    contract=replace(PLAIN, pdl=True),
)
top_p_default = _top_p("top_p_renorm", deterministic=False)
top_p_deterministic = _top_p("top_p_renorm[deterministic]", deterministic=True)
top_k_default = kernel(
    "top_k_renorm",
    top_k_renorm,
    launch_top_k,
    numerics=top_k_semantics,
    unsupported=refusal("top_k_renorm_probs", "top_k"),
    deterministic=False,
    contract=OF_PROBABILITIES,
)
mask = kernel(
    "top_k_mask_logits",
    top_k_mask_logits,
    launch_mask,
    numerics=top_k_semantics,
    unsupported=refusal("top_k_mask_logits", "top_k"),
    contract=OF_LOGITS,
)
selection = _selection("top_k", deterministic=False)
selection_deterministic = _selection("top_k[deterministic]", deterministic=True)
