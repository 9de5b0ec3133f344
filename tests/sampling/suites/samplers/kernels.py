"""Samplers, filters and selections with one planted bug each, beside their healthy twins.

A launch is written once and asks ``bug`` where it is to go wrong, so that a twin differs in nothing else. Each twin
declares the semantics that it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kerneltest.model import FORMATS, Call, Case, Device, Kernel, Operator

from ..sampling import torch_inverse, torch_sort
from ..sampling._semantics import Semantics
from ..sampling.filtered import (
    min_p_sampling,
    top_k_sampling,
    top_k_top_p_sampling,
    top_k_top_p_sampling_from_logits,
    top_p_sampling,
)
from ..sampling.renorm import top_k_mask_logits, top_k_renorm, top_p_renorm
from ..sampling.softmax import softmax
from ..sampling.speculative import chain_speculative_sampling
from ..sampling.top_k import top_k
from ..sampling.torch_multinomial import softmax_numerics
from ..sampling.unfiltered import sampling_from_logits, sampling_from_probs

if TYPE_CHECKING:
    import torch

Outputs = Mapping[str, "torch.Tensor"]
VECTOR = 4
LAUNCHES = itertools.count()


def sampled(call: Call, weights: torch.Tensor) -> Outputs:
    from ..sampling import _torch_filters as f

    return f.tokens(call, f.draw(f.chosen(call, weights), f.generator(call)))


def number(call: Call, name: str, *, first: bool = False) -> torch.Tensor:
    """A parameter [rows, 1]; ``first``: that of row 0 for all."""
    import torch

    from ..sampling import _torch_filters as f

    own = f.parameter(call, name, torch.int64 if name == "top_k" else torch.float32)
    return own[:1].expand_as(own) if first else own


def whole_vectors(values: torch.Tensor) -> torch.Tensor:
    """Which elements lie in a whole vector."""
    import torch

    vocabulary = values.shape[-1]
    return (torch.arange(vocabulary) < vocabulary // VECTOR * VECTOR).expand_as(values)


def ranks(values: torch.Tensor) -> torch.Tensor:
    """How many are above each."""
    import torch

    ascending = values.sort(dim=-1).values.contiguous()
    return values.shape[-1] - torch.searchsorted(ascending, values.contiguous(), right=True)


def tempered(call: Call, *, bug: str = "") -> Outputs:
    t = number(call, "temperature", first=bug == "row 0")
    return {"probs": (call.inputs["logits"].float() / (t * t if bug == "squared" else t)).softmax(-1)}


def unfiltered(call: Call, *, bug: str = "") -> Outputs:
    """From probabilities: shifted by one token, without the last vector, from the wrong row, or the same each time."""
    from ..sampling import _torch_filters as f

    probs, axes = call.inputs["probs"], call.case.axes
    if bug == "lane" and axes.vocabulary >= VECTOR:
        probs = probs.masked_fill(~whole_vectors(probs), 0.0).clamp(min=1e-30)
    rows = f.chosen(call, probs)
    if bug == "indices" and axes.indices:
        rows = probs[call.inputs["indices"].long() * 0]
    drawn = f.draw(rows, f.generator(replace(call, draw=0) if bug == "seed" else call))
    return f.tokens(call, drawn + 1 if bug == "off by one" else drawn)


def inverted(call: Call, *, bug: str = "") -> Outputs:
    """Declared: by inverse transform, in the order of the vocabulary. Each bug draws from the right distribution."""
    if bug == "reversed":
        flipped = replace(call, inputs={**call.inputs, "probs": call.inputs["probs"].flip(-1)})
        return {"tokens": call.case.axes.vocabulary - 1 - torch_inverse.launch(flipped)["tokens"]}
    return torch_inverse.launch(replace(call, draw=call.draw + 1) if bug == "next numbers" else call)


def from_logits(call: Call, *, bug: str = "") -> Outputs:
    """The mask is a large negative number, which a shift of the row brings back."""
    logits = call.inputs["logits"].float()
    if bug:
        logits = logits.clamp(min=-5.0)
    return sampled(call, logits.softmax(-1))


def nucleus(call: Call, *, bug: str = "") -> Outputs:
    """Declared: absolute, strict, ties kept."""
    import torch

    probs, p = call.inputs["probs"], number(call, "top_p", first=bug == "row 0")
    if bug == "relative":
        p = p * probs.sum(-1, keepdim=True)
    value, order = probs.sort(dim=-1, descending=True, stable=True)
    before = value.double().cumsum(-1) - value.double()
    if bug != "trimmed":
        # All of a tie have what is before its first.
        first = torch.ones_like(value, dtype=torch.bool)
        first[:, 1:] = value[:, 1:] != value[:, :-1]
        before = torch.where(first, before, 0.0).cummax(-1).values
    kept = before <= p.double() if bug == "inclusive" else before < p.double()
    left = torch.zeros_like(probs).scatter(-1, order, value.where(kept, 0.0))
    if "renorm" in call.case.operator:
        if bug == "lane":
            left = left.where(whole_vectors(left) | (left.amax(-1, keepdim=True) == left), 0.0)
        return {"renorm_probs": left if bug == "not renormalised" else _over_their_sum(left)}
    return sampled(call, left)


def _over_their_sum(left: torch.Tensor) -> torch.Tensor:
    from ..sampling import _torch_filters as f

    return f.renormalised(left)


def largest(call: Call, *, bug: str = "") -> Outputs:
    """Declared: ties kept."""
    import torch

    probs, k = call.inputs["probs"], number(call, "top_k", first=bug == "row 0")
    if bug == "off by one":
        k = k + 1
    kept = ranks(probs.float()) < k
    if bug == "trimmed":
        from ..sampling import _torch_filters as f

        kept = f.top_k(probs, k)
    left = torch.where(kept, probs, 0.0)
    return {"renorm_probs": _over_their_sum(left)} if "renorm" in call.case.operator else sampled(call, left)


def likely(call: Call, *, bug: str = "") -> Outputs:
    probs = call.inputs["probs"]
    most = probs.amax(-1, keepdim=True)
    reach = probs.sum(-1, keepdim=True) if bug else most
    return sampled(call, probs.where((probs >= reach * number(call, "min_p")) | (probs == most), 0.0))


def both(call: Call, *, bug: str = "") -> Outputs:
    """The second filter looks at what the first left, but not renormalised."""
    axes = call.case.axes
    case = replace(call.case, axes=replace(axes, order="joint")) if bug else call.case
    return sampled(call, torch_sort.both_left(replace(call, case=case)))


def masked(call: Call, *, bug: str = "") -> Outputs:
    import torch

    logits, k = call.inputs["logits"], number(call, "top_k", first=bug == "row 0")
    kept = ranks(logits.float()) < (k + 1 if bug == "off by one" else k)
    return {"masked_logits": logits.where(kept, -3e4 if bug == "finite" else -torch.inf)}


def selected(call: Call, *, bug: str = "") -> Outputs:
    outputs = torch_sort.select(call)
    values, indices = outputs["values"], outputs["indices"]
    if bug == "off by one":
        indices = (indices + 1) % call.case.axes.vocabulary
    if bug == "unsorted":
        values, indices = values.flip(-1).contiguous(), indices.flip(-1).contiguous()
    return {"values": values, "indices": indices}


def jittering(call: Call) -> Outputs:
    """Right, but in another order at some launches: nobody asked for one."""
    return selected(call, bug="unsorted" if not call.case.axes.sorted and next(LAUNCHES) % 5 < 2 else "")


def speculated(call: Call, *, bug: str = "") -> Outputs:
    import torch

    from ..sampling import _torch_filters as f
    from ..sampling.torch_speculative import launch

    outputs = launch(call)
    emitted = outputs["output_emitted_draft_token_num"].long().unsqueeze(-1)
    if bug == "accepted":
        outputs["output_accepted_token_num"] = outputs["output_accepted_token_num"] + 1
    if bug == "residual":
        # From the target itself, not from what it exceeds the draft by.
        target = call.inputs["target_probs"][torch.arange(len(emitted)).unsqueeze(-1), emitted].squeeze(1)
        last = f.draw(target, f.generator(call)).int().unsqueeze(-1)
        outputs["output_token_ids"] = outputs["output_token_ids"].scatter(-1, emitted, last)
    return outputs


def keeps_ties(case: Case[Any], device: Device) -> Semantics:
    """Strict, absolute, all of a tie, sums in double; what is put out is rounded to the format."""
    return Semantics(mass=torch_sort.IN_DOUBLE, row_sum=torch_sort.IN_DOUBLE, out=FORMATS[case.axes.dtype])


def plain(case: Case[Any], device: Device) -> Semantics:
    return Semantics()


FAMILIES: dict[str, tuple[Operator, Callable[..., Outputs], Any, tuple[str, ...]]] = {
    "softmax": (softmax, tempered, softmax_numerics, ("squared", "row 0")),
    "from_probs": (sampling_from_probs, unfiltered, plain, ("off by one", "lane", "indices", "seed")),
    "inverse": (sampling_from_probs, inverted, torch_inverse.semantics, ("next numbers", "reversed")),
    "from_logits": (sampling_from_logits, from_logits, plain, ("finite",)),
    "top_p": (top_p_sampling, nucleus, keeps_ties, ("relative", "inclusive", "row 0")),
    "top_k": (top_k_sampling, largest, keeps_ties, ("off by one", "row 0")),
    "min_p": (min_p_sampling, likely, keeps_ties, ("of the sum",)),
    "top_k_top_p": (top_k_top_p_sampling, both, torch_sort.semantics, ("joint",)),
    "top_k_top_p_logits": (top_k_top_p_sampling_from_logits, both, torch_sort.semantics, ("joint",)),
    "top_p_renorm": (top_p_renorm, nucleus, keeps_ties, ("trimmed", "relative", "lane", "not renormalised")),
    "top_k_renorm": (top_k_renorm, largest, keeps_ties, ("trimmed", "row 0")),
    "mask": (top_k_mask_logits, masked, keeps_ties, ("finite", "off by one", "row 0")),
    "select": (top_k, selected, torch_sort.semantics, ("off by one", "unsorted")),
    "chain": (chain_speculative_sampling, speculated, plain, ("accepted", "residual")),
}


def _kernels() -> dict[str, Kernel]:
    found = {}
    for family, (operator, launch, numerics, bugs) in FAMILIES.items():
        for bug in ("", *bugs):
            name = f"{family}[{bug or 'twin'}]"
            found[name] = Kernel(
                name=name,
                # An operator of its own: beside each other, they would only repeat each other's failures.
                operator=replace(operator),
                launch=partial(launch, bug=bug),
                numerics=numerics,
                unsupported=torch_sort.no_reverse if family == "select" else lambda _case, _device: None,
                devices=("cpu",),
            )
    return found


globals().update(_kernels())
jitter_twin, jitter = (
    Kernel(
        name=f"jitter[{name}]",
        operator=replace(top_k),
        launch=jittering,
        numerics=torch_sort.semantics,
        unsupported=torch_sort.no_reverse,
        devices=("cpu",),
        deterministic=promised,
    )
    for name, promised in (("twin", False), ("promised", True))
)
