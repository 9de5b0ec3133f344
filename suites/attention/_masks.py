"""Which keys a query sees: by its place, by a window to its left, and by a mask of bits that a case draws.

A mask is one of

* ``random``: rows of different density, some of which see nothing of whole tiles;
* ``tree``: the last qo_len keys are the nodes of a random tree, as in speculative decoding; a query sees its node, the
  ancestors of it, and all keys before the tree.

Wherever there is a key at all, the mask shows each query at least one that its window does not hide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ._axes import PagedPrefill, Request

# Of the bits of a row: half of them, a few, next to none, or all.
DENSITIES = (0.5, 1 / 16, 1 / 128, 1.0)


def limits(axes: PagedPrefill, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """The first key that window and place leave to each query, and the one behind the last: int64 [qo_len] each."""
    place = torch.arange(request.qo_len) + request.kv_len - request.qo_len
    end = place + 1 if axes.causal else torch.full_like(place, request.kv_len)
    first = place - axes.window_left if axes.window_left >= 0 else torch.zeros_like(place)
    end = end.clamp(0, request.kv_len)
    return torch.minimum(first.clamp(min=0), end), end


def shown(axes: PagedPrefill, request: Request) -> torch.Tensor:
    """What window and place leave to each query, bool [qo_len, kv_len]."""
    first, end = limits(axes, request)
    keys = torch.arange(request.kv_len)
    return (keys >= first.unsqueeze(-1)) & (keys < end.unsqueeze(-1))


def draw(axes: PagedPrefill, random: torch.Generator) -> list[torch.Tensor]:
    """The mask of each request, bool [qo_len, kv_len]."""
    kinds = {"random": _random, "tree": _tree}
    masks = [kinds[axes.mask](request, random) for request in axes.requests]
    for request, mask in zip(axes.requests, masks, strict=True):
        if request.kv_len:
            # The key at a query's own place, or the first one if there is none, is in every window.
            place = torch.arange(request.qo_len) + request.kv_len - request.qo_len
            blind = ~(mask & shown(axes, request)).any(-1)
            mask[blind, place.clamp(min=0)[blind]] = True
    return masks


def _random(request: Request, random: torch.Generator) -> torch.Tensor:
    kind = torch.randint(len(DENSITIES), (request.qo_len, 1), generator=random)
    return torch.rand(request.qo_len, request.kv_len, generator=random) < torch.tensor(DENSITIES)[kind]


def _tree(request: Request, random: torch.Generator) -> torch.Tensor:
    nodes = torch.zeros(request.qo_len, request.qo_len, dtype=torch.bool)
    for node in range(request.qo_len):
        if node:
            parent = int(torch.randint(-1, node, (), generator=random))
            if parent >= 0:
                nodes[node] = nodes[parent]
        nodes[node, node] = True
    before = torch.ones(request.qo_len, max(request.kv_len - request.qo_len, 0), dtype=torch.bool)
    return torch.cat([before, nodes], 1)[:, -request.kv_len :] if request.kv_len else before[:, :0]


def masks(axes: PagedPrefill, inputs: Mapping[str, torch.Tensor]) -> Sequence[torch.Tensor | None]:
    """The mask of each request, bool [qo_len, kv_len], where there is one."""
    if "custom_mask" not in inputs:
        return [None] * len(axes.requests)
    sizes = [request.qo_len * request.kv_len for request in axes.requests]
    parts = torch.split(inputs["custom_mask"], sizes)
    return [part.view(r.qo_len, r.kv_len) for part, r in zip(parts, axes.requests, strict=True)]


def tensors(axes: PagedPrefill, masks: Sequence[torch.Tensor], random: torch.Generator) -> dict[str, torch.Tensor]:
    """The inputs that hold these masks, one [qo_len, kv_len] for each request."""
    found = {"custom_mask": torch.cat([mask.flatten() for mask in masks])}
    if axes.packed_mask:
        found["packed_mask"], found["mask_indptr"] = pack(masks, random)
    return found


def pack(masks: Sequence[torch.Tensor], random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of each mask, the lowest of a byte first: uint8, and int32 [batch + 1] where each mask begins.

    Bits that no pair of query and key has, behind the end of a mask, are random.
    """
    packed, begins = [], [0]
    for mask in masks:
        bits = mask.flatten()
        rest = torch.randint(0, 2, (-bits.numel() % 8,), generator=random).bool()
        bits = torch.cat([bits, rest]).view(-1, 8)
        packed.append((bits * 2 ** torch.arange(8)).sum(-1).to(torch.uint8))
        begins.append(begins[-1] + len(bits))
    return torch.cat(packed), torch.tensor(begins, dtype=torch.int32)


def unpack(packed: torch.Tensor, begin: torch.Tensor, request: Request) -> torch.Tensor:
    """The mask [qo_len, kv_len] whose bits begin at byte ``begin``, int [].

    It stays on the device: a launch that waits for it could not be captured in a CUDA graph.
    """
    count = request.qo_len * request.kv_len
    some = packed[begin.long() + torch.arange(-(-count // 8), device=packed.device)]
    bits = (some.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    return bits.flatten()[:count].view(request.qo_len, request.kv_len).bool()
