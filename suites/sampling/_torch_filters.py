"""Filters and samplers in torch: sort, add up, mask, draw; as the seed text and most tutorials do it, on any device."""

from __future__ import annotations

import torch

from kerneltest.model import Call, Case

from ._axes import Rows


def generator(call: Call) -> torch.Generator:
    """Random numbers of the case and of the number of the launch."""
    return seeded(call.case, call.draw, call.inputs["seed"].device)


def seeded(case: Case[Rows], number: int, device: torch.device | str) -> torch.Generator:
    """The same for the launch of that number of a case."""
    return torch.Generator(device).manual_seed(case.seed * 1_000_003 + number)


def draw(weights: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """A column of each row [n, V], in proportion to weights that need not add up to 1; [n].

    By inverse transform, in float64: a running sum, a random number, and the first column that is above it.
    """
    sums = weights.double().cumsum(-1)
    total = sums[:, -1:].contiguous()
    numbers = uniform(len(sums), random).unsqueeze(-1)
    # The sum of all is reached first by the last column of any weight.
    last = torch.searchsorted(sums, total)
    return torch.minimum(torch.searchsorted(sums, numbers * total, right=True), last).squeeze(-1)


def uniform(count: int, random: torch.Generator) -> torch.Tensor:
    """The numbers that :func:`draw` takes from a generator for as many rows, float64 [count], on its device."""
    return torch.rand(count, dtype=torch.float64, device=random.device, generator=random)


def parameter(call: Call, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A parameter of each row [rows, 1]: the tensor of the inputs, or the scalar for all rows."""
    axes: Rows = call.case.axes
    if axes.per_row:
        return call.inputs[name].to(dtype).unsqueeze(-1)
    device = call.inputs["probs" if "probs" in call.inputs else "logits"].device
    return torch.full((axes.rows, 1), getattr(axes, name), dtype=dtype, device=device)


def chosen(call: Call, weights: torch.Tensor) -> torch.Tensor:
    """The rows that the draws come from: by the indices if there are any."""
    return weights[call.inputs["indices"].long()] if call.case.axes.indices else weights


def tokens(call: Call, drawn: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of a sampler."""
    return {"tokens": drawn.to(getattr(torch, call.case.axes.indices or "int32"))}


def top_p(probs: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """``probs`` [rows, V] with 0 wherever the tokens before have more than p; equals go by index."""
    in_order, order = probs.sort(dim=-1, descending=True, stable=True)
    before = in_order.cumsum(-1) - in_order
    return torch.zeros_like(probs).scatter(-1, order, in_order.masked_fill(before > p, 0.0))


def top_k(values: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Which are the k largest of each row [rows, V], bool; equals go by index."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    first = torch.arange(values.shape[-1], device=values.device) < k
    return torch.zeros_like(first).scatter(-1, order, first)


def min_p(probs: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """``probs`` [rows, V] with 0 below a share of the largest."""
    return probs.masked_fill(probs < probs.amax(-1, keepdim=True) * share, 0.0)


def renormalised(probs: torch.Tensor) -> torch.Tensor:
    """Each row over its sum, which is taken in float64."""
    return (probs.double() / probs.sum(-1, keepdim=True, dtype=torch.float64)).to(probs.dtype)


def top_k_top_p(call: Call, probs: torch.Tensor | None = None, logits: torch.Tensor | None = None) -> torch.Tensor:
    """What both filters leave of probabilities or logits, in the order that the case asks for."""
    k, p = parameter(call, "top_k", torch.int64), parameter(call, "top_p", torch.float32)
    if call.case.axes.order == "top_k_first":
        if logits is not None:
            return top_p(logits.masked_fill(~top_k(logits, k), -torch.inf).softmax(-1), p)
        assert probs is not None
        return top_p(renormalised(probs.masked_fill(~top_k(probs, k), 0.0)), p)
    if logits is not None:
        probs = logits.softmax(-1)
    assert probs is not None
    return top_p(probs, p).masked_fill(~top_k(probs, k), 0.0)
