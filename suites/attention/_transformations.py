"""How a case of paged attention is transformed for each relation, and what the answers then say of the original.

Most variants leave the cache where it is and look at it through another page table. What they no longer reference is
dead, and poisoned like everything dead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kerneltest.model import (
    FORMATS,
    FP32,
    Bounded,
    Case,
    Inapplicable,
    Materials,
    Numerics,
    Related,
    Variant,
)

from . import _masks
from ._axes import PagedPrefill, Request, common_pages
from ._tensors import as_laid_out, by_slot, dead_bytes, indptr, outputs

Answer = Mapping[str, Bounded]
# Even, so that a kernel that multiplies q and k by the root of the scale each still divides by a power of two.
POWER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A request as a view: rows of the original ``q``, the pages that hold its ``keys`` keys, and its mask, if any."""

    rows: torch.Tensor
    pages: torch.Tensor
    keys: int
    mask: torch.Tensor | None = None


def parts(case: Case[PagedPrefill], inputs: Mapping[str, torch.Tensor]) -> list[Part]:
    """The requests of a case, in order."""
    row = page = 0
    found = []
    for request, mask in zip(case.axes.requests, _masks.masks(case.axes, inputs), strict=True):
        count = case.axes.pages(request)
        rows = torch.arange(row, row + request.qo_len)
        pages = inputs["kv_indices"][page : page + count]
        found.append(Part(rows=rows, pages=pages, keys=request.kv_len, mask=mask))
        row, page = row + request.qo_len, page + count
    return found


def view(
    case: Case[PagedPrefill], inputs: Mapping[str, torch.Tensor], requests: Sequence[Part], *, masked: bool = True
) -> Variant:
    """The case with these requests instead, over the cache in ``inputs``; not ``masked``: every query sees every key.

    Requests may share pages.
    """
    sizes = tuple(Request(qo_len=len(part.rows), kv_len=part.keys) for part in requests)
    axes = replace(case.axes, requests=sizes, causal=case.axes.causal and masked)
    case = replace(case, axes=axes, relation="")
    last = [(part.keys - 1) % axes.page_size + 1 if part.keys else 0 for part in requests]
    changed = {
        **inputs,
        "q": inputs["q"][torch.cat([part.rows for part in requests])],
        "qo_indptr": indptr([len(part.rows) for part in requests]),
        "kv_indptr": indptr([len(part.pages) for part in requests]),
        "kv_indices": torch.cat([part.pages for part in requests]).to(torch.int32),
        "kv_last_page_len": torch.tensor(last, dtype=torch.int32),
    }
    if axes.mask != "none":
        masks = [part.mask for part in requests if part.mask is not None]
        changed |= _masks.tensors(axes, masks, _random(case))
    dead = dead_bytes(axes, len(inputs["k_pages"]), [part.pages for part in requests], [part.keys for part in requests])
    return Variant(case=case, materials=Materials(inputs=changed, dead=dead, outputs=outputs(axes)))


def rewritten(case: Case[PagedPrefill], inputs: Mapping[str, torch.Tensor], keys: Sequence[torch.Tensor]) -> Variant:
    """The case over a new cache: ``keys`` [kv_len] of each request says which of its old keys comes where.

    A mask goes with the keys.
    """
    axes, page_size, old = case.axes, case.axes.page_size, parts(case, inputs)
    first, requests, slots = 0, [], []
    for part, order in zip(old, keys, strict=True):
        count = -(-len(order) // page_size)
        within = part.pages.long()[order // page_size] * page_size + order % page_size
        # The rest of the last page is dead, so it does not matter what it repeats.
        slots.append(torch.nn.functional.pad(within, (0, count * page_size - len(order))))
        mask = None if part.mask is None else part.mask[:, order]
        requests.append(replace(part, pages=torch.arange(first, first + count), keys=len(order), mask=mask))
        first += count
    moved = {}
    for name in ("k_pages", "v_pages"):
        old_slots = by_slot(axes, inputs[name]).flatten(0, 1)
        moved[name] = as_laid_out(axes, old_slots[torch.cat(slots)].view(-1, page_size, *old_slots.shape[1:]))
    return view(case, {**inputs, **moved}, requests)


def page_permutation(case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    x = materials.inputs
    order = _another_order(len(x["k_pages"]), case)
    moved = {
        "k_pages": x["k_pages"][order],
        "v_pages": x["v_pages"][order],
        "kv_indices": order.argsort()[x["kv_indices"].long()],
    }
    return (Related(variants=(_with(case, materials, **moved),), back=_same),)


def value_sign(case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    def back(answers: Sequence[Answer], _numerics: Numerics) -> Answer:
        return _on_out(answers[0], lambda out: replace(out, value=-out.value))

    return (
        Related(
            variants=(_with(case, materials, v_pages=_exactly(materials.inputs["v_pages"], torch.neg)),), back=back
        ),
    )


def value_scale(case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    fmt, keys = FORMATS[case.axes.dtype], max(request.kv_len for request in case.axes.requests)

    def back(answers: Sequence[Answer], _numerics: Numerics) -> Answer:
        def divided(out: Bounded) -> Bounded:
            value = out.value / 2**POWER
            # Below the normal range there are fewer digits: what was rounded to them once need not come back. Products
            # below that of fp32 may be flushed to zero.
            lost = torch.where(value.abs() <= 2.0**fmt.emin, 2 * fmt.eta, 0.0) + (keys + 1) * 2.0**FP32.emin
            return Bounded(value=value, error=out.error / 2**POWER + lost)

        return _on_out(answers[0], divided)

    scaled = _scaled(materials.inputs["v_pages"], keys)
    return (Related(variants=(_with(case, materials, v_pages=scaled),), back=back),)


def score_scale(case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    largest = float(materials.inputs["k_pages"].float().abs().max()) * case.axes.head_dim
    q = _scaled(materials.inputs["q"], largest)
    variant = _with(case, materials, q=q)
    axes = replace(variant.case.axes, sm_scale=case.axes.scale / 2**POWER)
    return (Related(variants=(replace(variant, case=replace(variant.case, axes=axes)),), back=_same),)


def head_permutation(case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    x, axes = materials.inputs, case.axes
    order = _another_order(axes.kv_heads, case)
    q_order = (order[:, None] * axes.group + torch.arange(axes.group)).flatten()
    home = q_order.argsort()

    def back(answers: Sequence[Answer], _numerics: Numerics) -> Answer:
        return {
            name: Bounded(value=given.value[:, home], error=given.error[:, home]) for name, given in answers[0].items()
        }

    moved = {"q": torch.cat([x["q"][:, q_order], x["q"][:, axes.q_heads :]], 1)}
    for name in ("k_pages", "v_pages"):
        moved[name] = as_laid_out(axes, by_slot(axes, x[name])[:, :, order])
    return (Related(variants=(_with(case, materials, **moved),), back=back),)


def batch_order(case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    old = parts(case, materials.inputs)
    return (_picked(case, materials, [old[number] for number in _another_order(len(old), case).tolist()]),)


def batch_size(case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    return tuple(_picked(case, materials, [part]) for part in parts(case, materials.inputs) if len(part.rows))


def repeat(case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    return (Related(variants=(Variant(case=case, materials=materials),), back=_same),) * 3


def split(case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    """Keys that every query sees, without a mask, and those after them, masked as before.

    A causal mask is aligned at the bottom right, which stays where it is when keys at the front are taken off.
    """
    page_size, random = case.axes.page_size, _random(case)
    heads, tails = [], []
    for request, part in zip(case.axes.requests, parts(case, materials.inputs), strict=True):
        limit = common_pages(case.axes, request)
        if limit == 0 or request.qo_len == 0:
            continue
        cut = int(torch.randint(1, limit + 1, (), generator=random))
        heads.append(replace(part, pages=part.pages[:cut], keys=cut * page_size))
        tails.append(replace(part, pages=part.pages[cut:], keys=part.keys - cut * page_size))
    both = (view(case, materials.inputs, heads, masked=False), view(case, materials.inputs, tails))
    rows, total = torch.cat([part.rows for part in heads]), case.axes.total_qo

    def back(answers: Sequence[Answer], numerics: Numerics) -> Answer:
        merged = merge(answers[0], answers[1], math.log(2.0) if numerics.lse_base == "2" else 1.0)
        return {name: _placed(given, rows, total) for name, given in merged.items()}

    return (Related(variants=both, back=back),)


def merge(one: Answer, other: Answer, unit: float) -> Answer:
    """Attention over the keys of both, from that over either; ``unit``: of the log-sum-exps, in nats.

    With w = 1 / (1 + exp(l_2 - l_1)) the output is w o_1 + (1 - w) o_2. If both l are off by e together, w is off by
    w (1 - w) (exp(e) - 1) at most. The new log-sum-exp is off by no more than the worse of the two.
    """
    lse = torch.stack([one["lse"].value, other["lse"].value]) * unit
    off = torch.stack([one["lse"].error, other["lse"].error]) * unit
    total = torch.logsumexp(lse, 0)
    share = torch.where(total == -torch.inf, 0.0, (lse - total).exp()).unsqueeze(-1)
    result = {"lse": Bounded(value=total / unit, error=off.amax(0) / unit)}
    if "out" in one:
        a, b = one["out"], other["out"]
        apart = (a.value - b.value).abs() + a.error + b.error
        result["out"] = Bounded(
            value=share[0] * a.value + share[1] * b.value,
            error=share[0] * a.error + share[1] * b.error + share.prod(0) * off.sum(0).expm1().unsqueeze(-1) * apart,
        )
    return result


def decode(case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    """A query that sees n keys is a decode request of n keys: the first of each prefill, the last, and one more."""
    random, page_size = _random(case), case.axes.page_size
    alone = []
    for part in parts(case, materials.inputs):
        last = len(part.rows) - 1
        if last < 1:
            continue
        for row in sorted({0, int(torch.randint(1, max(last, 2), (), generator=random)), last}):
            seen = part.keys - last + row if case.axes.causal else part.keys
            if seen > 0:
                pages = part.pages[: -(-seen // page_size)]
                mask = None if part.mask is None else part.mask[row : row + 1]
                alone.append(Part(rows=part.rows[row : row + 1], pages=pages, keys=seen, mask=mask))
    if not alone:
        raise Inapplicable("no query of a prefill sees a key")
    return (_picked(case, materials, alone),)


def as_mask(case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    """The mask that the causal one and the window are together, said bit by bit, packed or not."""
    axes, old = case.axes, parts(case, materials.inputs)
    drawn = replace(axes, mask="random", packed_mask=case.seed % 2 == 1, causal=False, window_left=-1)
    masked = [replace(part, mask=_masks.shown(axes, request)) for part, request in zip(old, axes.requests, strict=True)]
    return (Related(variants=(view(replace(case, axes=drawn), materials.inputs, masked),), back=_same),)


def key_permutation(case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    orders = [_another_order(request.kv_len, case) for request in case.axes.requests]
    return (Related(variants=(rewritten(case, materials.inputs, orders),), back=_same),)


def duplicate_keys(case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    twice = [torch.arange(request.kv_len).repeat(2) for request in case.axes.requests]

    def back(answers: Sequence[Answer], numerics: Numerics) -> Answer:
        answer = dict(answers[0])
        if "lse" in answer:
            one_bit = 1.0 if numerics.lse_base == "2" else math.log(2.0)
            answer["lse"] = replace(answer["lse"], value=answer["lse"].value - one_bit)
        return answer

    return (Related(variants=(rewritten(case, materials.inputs, twice),), back=back),)


def _same(answers: Sequence[Answer], _numerics: Numerics) -> Answer:
    return answers[0]


def _on_out(answer: Answer, change: Callable[[Bounded], Bounded]) -> Answer:
    return {name: change(given) if name == "out" else given for name, given in answer.items()}


def _with(case: Case[PagedPrefill], materials: Materials, **inputs: torch.Tensor) -> Variant:
    changed = {**materials.inputs, **inputs}
    return view(case, changed, parts(case, changed))


def _picked(case: Case[PagedPrefill], materials: Materials, requests: Sequence[Part]) -> Related:
    """Requests made of rows of the original: their answers are those of the same rows there."""
    rows, total = torch.cat([part.rows for part in requests]), case.axes.total_qo

    def back(answers: Sequence[Answer], _numerics: Numerics) -> Answer:
        return {name: _placed(given, rows, total) for name, given in answers[0].items()}

    return Related(variants=(view(case, materials.inputs, requests),), back=back)


def _placed(given: Bounded, rows: torch.Tensor, total: int) -> Bounded:
    """Rows in their place among ``total``; of the others nothing is known."""
    shape = (total, *given.value.shape[1:])
    value, error = given.value.new_zeros(shape), given.error.new_full(shape, torch.inf)
    value[rows], error[rows] = given.value, given.error
    return Bounded(value=value, error=error)


def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """4 times the tensor; neither that nor its products with ``factor`` may overflow, rounding errors included."""
    fmt = FORMATS[str(tensor.dtype).removeprefix("torch.")]
    largest = float(tensor.float().abs().max()) * 2 ** (POWER + 1)
    if largest > fmt.max or largest * factor > FP32.max:
        raise Inapplicable("the values are too large to be multiplied by 4")
    return _exactly(tensor, lambda x: x * 2**POWER)


def _exactly(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A change of values to others of the same format, made in fp32: torch has few operations on eight bits."""
    return change(tensor.float()).to(tensor.dtype)


def _another_order(count: int, case: Case[PagedPrefill]) -> torch.Tensor:
    """A random permutation that moves something, if there is anything to move."""
    order = torch.randperm(count, generator=_random(case))
    return order.flip(0) if torch.equal(order, torch.arange(count)) else order


def _random(case: Case[PagedPrefill]) -> torch.Generator:
    return torch.Generator().manual_seed(case.seed)


TRANSFORMATIONS: Mapping[str, Callable[[Case[PagedPrefill], Materials], tuple[Related, ...]]] = {
    function.__name__: function
    for function in (
        page_permutation,
        value_sign,
        value_scale,
        score_scale,
        head_permutation,
        batch_order,
        batch_size,
        repeat,
        split,
        decode,
        as_mask,
        key_permutation,
        duplicate_keys,
    )
}
