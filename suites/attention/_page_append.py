"""Appending to a paged cache: the tensors of a case, the caches afterwards, and what is wrong with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from kerneltest.model import Case, Materials, OutputSpec, Rejection

from ._page_append_axes import CKV_DIM, KPE_DIM, PageAppend, locate, streams

# As integers, so that a NaN is equal to itself and -0 is not 0.
BITS = {1: torch.int8, 2: torch.int16}


def materials(case: Case[PageAppend]) -> Materials:
    """``append_*``, ``*_pages`` and the page table; see :mod:`.page_append`."""
    axes, random = case.axes, torch.Generator().manual_seed(case.seed)
    counts = [axes.pages(request) for request in axes.requests]
    used = sum(counts)
    total, new = used + axes.spare_pages, [request.new for request in axes.requests]
    order = torch.randperm(total, generator=random) if axes.shuffled else torch.arange(total)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, OutputSpec] = {}
    for name, inner in zip(streams(case), inner_shapes(case), strict=True):
        shape = (total, axes.page_size, *inner)
        if axes.layout == "HND":
            shape = (total, inner[0], axes.page_size, *inner[1:])
        inputs[f"append_{name}"] = _values(case, (sum(new), *inner), random)
        inputs[f"{name}_pages"] = _values(case, shape, random)
        outputs[f"{name}_cache"] = OutputSpec(shape=shape, dtype=axes.dtype)
    lengths = [request.before + request.new for request in axes.requests]
    last = [(n - 1) % axes.page_size + 1 if n else 0 for n in lengths]
    inputs |= {
        "append_indptr": _indptr(new),
        "kv_indptr": _indptr(counts),
        "kv_indices": order[:used].to(torch.int32),
        "kv_last_page_len": torch.tensor(last, dtype=torch.int32),
    }
    return Materials(inputs=inputs, dead=(), outputs=outputs)


def inner_shapes(case: Case[PageAppend]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of what a token has in either stream."""
    if case.operator == "mla_page_append":
        return (CKV_DIM,), (KPE_DIM,)
    return ((case.axes.kv_heads, case.axes.head_dim),) * 2


def _values(case: Case[PageAppend], shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    dtype = getattr(torch, case.axes.dtype)
    if case.inputs == "normal":
        return torch.randn(shape, generator=random).to(dtype)
    limits = torch.iinfo(BITS[dtype.itemsize])
    return torch.randint(limits.min, limits.max + 1, shape, generator=random, dtype=_bits(dtype)).view(dtype)


def _bits(dtype: torch.dtype) -> torch.dtype:
    """The integers of a dtype's width."""
    return BITS[dtype.itemsize]


def _indptr(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def targets(case: Case[PageAppend], inputs: Mapping[str, torch.Tensor]) -> list[tuple[int, int, int]]:
    """The request, the page and the slot of each new token, in order: by counting, one token after another."""
    indptr, indices = inputs["kv_indptr"].tolist(), inputs["kv_indices"].tolist()
    found = []
    for number, request in enumerate(case.axes.requests):
        for position in range(request.before, request.before + request.new):
            page, slot = divmod(position, case.axes.page_size)
            found.append((number, indices[indptr[number] + page], slot))
    return found


def appended(case: Case[PageAppend], inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The caches afterwards, and ``owner`` [pages, page_size]: the new token that a slot belongs to, or -1."""
    places = targets(case, inputs)
    result = {f"{name}_cache": inputs[f"{name}_pages"].clone() for name in streams(case)}
    owner = torch.full((len(inputs[f"{streams(case)[0]}_pages"]), case.axes.page_size), -1)
    for token, (_, page, slot) in enumerate(places):
        owner[page, slot] = token
        for name in streams(case):
            of_page = result[f"{name}_cache"][page]
            place = of_page[:, slot] if case.axes.layout == "HND" else of_page[slot]
            place.copy_(inputs[f"append_{name}"][token])
    return {**result, "owner": owner}


def rejections(
    case: Case[PageAppend], expected: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> Iterator[Rejection]:
    """The slots that differ, of each output: new tokens that did not arrive, and slots that nobody appended to."""
    owner = expected["owner"]
    for name, value in outputs.items():
        width = _bits(value.dtype)
        differs = value.view(width) != expected[name].view(width)
        if not bool(differs.any()):
            continue
        by_slot = differs.transpose(1, 2) if case.axes.layout == "HND" else differs
        wrong = by_slot.flatten(2).any(-1)
        lost, touched = wrong & (owner >= 0), wrong & (owner < 0)
        first = tuple(int(i) for i in differs.nonzero()[0])
        said = []
        if bool(lost.any()):
            said.append(f"{int(lost.sum())} of {int((owner >= 0).sum())} new tokens did not arrive as they are")
        if bool(touched.any()):
            said.append(
                f"{int(touched.sum())} of {int((owner < 0).sum())} slots were changed to which nothing is appended"
            )
        details = [f"first at {locate(case, name, first)}"]
        for mask, words in ((lost, "new token {0} of request {1} belongs"), (touched, "nothing is appended")):
            if bool(mask.any()):
                page, slot = (int(i) for i in mask.nonzero()[0])
                token = int(owner[page, slot])
                request, token = _whose(case, token) if token >= 0 else (-1, -1)
                details.append(f"{words.format(token, request)} to page {page}, slot {slot}")
        yield Rejection(kind="Mismatch", output=name, what="; ".join(said), details=tuple(details))


def _whose(case: Case[PageAppend], token: int) -> tuple[int, int]:
    """The request that a new token belongs to, and its number there."""
    for number, request in enumerate(case.axes.requests):
        if token < request.new:
            return number, token
        token -= request.new
    raise IndexError("no request has such a token")
