"""Chain speculative sampling in torch, request by request in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kerneltest.model import Call, Case, Device, Kernel

from ._chain import Chain
from ._checks import check_chain
from ._semantics import Semantics
from .speculative import chain_speculative_sampling

if TYPE_CHECKING:
    import torch


def launch(call: Call) -> dict[str, torch.Tensor]:
    """Accept from the left while u p < q, then draw from what is left of the target."""
    import torch

    from . import _torch_filters as f

    check_chain(call)
    x, random = call.inputs, f.generator(call)
    draft, target, chain = x["draft_probs"], x["target_probs"], x["draft_token_ids"].long()
    rows, n = chain.shape
    p, q = (probs[:, :n].gather(-1, chain.unsqueeze(-1)).squeeze(-1) for probs in (draft, target))
    accept = torch.rand(rows, n, generator=random, device=p.device) * p < q
    emitted = accept.long().cumprod(-1).sum(-1, keepdim=True)
    row = torch.arange(rows, device=p.device).unsqueeze(-1)
    against = torch.nn.functional.pad(draft, (0, 0, 0, 1))  # nothing is held against the token behind the chain
    left = (target[row, emitted] - against[row, emitted]).clamp(min=0).squeeze(1)
    last = f.draw(torch.where(left.sum(-1, keepdim=True) > 0, left, target[:, -1]), random).unsqueeze(-1)
    place = torch.arange(n + 1, device=p.device)
    tokens = torch.nn.functional.pad(chain, (0, 1)).where(place < emitted, last).where(place <= emitted, -1)
    return {
        "output_token_ids": tokens.int(),
        "output_accepted_token_num": accept.sum(-1).int(),
        "output_emitted_draft_token_num": emitted.squeeze(-1).int(),
    }


def semantics(case: Case[Chain], device: Device) -> Semantics:
    """Nothing is left open: whatever u is, and however u p is rounded, the outputs must follow from some u."""
    return Semantics()


speculative = Kernel(
    name="torch.chain_speculative_sampling",
    operator=chain_speculative_sampling,
    launch=launch,
    numerics=semantics,
)
