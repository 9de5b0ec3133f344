"""The metamorphic relations of paged attention: which there are, and which cases they say something of.

One that is often named is missing: garbage in unused slots and pages must not matter. Every case checks that already,
because all of its launches differ in that garbage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from kerneltest.model import Case, Materials, Related, Relation

from ._axes import common_pages

if TYPE_CHECKING:
    from ._axes import PagedPrefill


# Pairs of a query and a key in a batch with a mask, at most: a byte each.
LARGEST_MASK = 1 << 24


def _transform(name: str, case: Case[PagedPrefill], materials: Materials) -> tuple[Related, ...]:
    from ._transformations import TRANSFORMATIONS

    return TRANSFORMATIONS[name](case, materials)


def _relation(
    name: str,
    change: str,
    promise: Literal["deterministic", "batch_invariant"] | None,
    applies: Callable[[PagedPrefill], bool],
    *needs: str,
) -> Relation:
    def applies_to(case: Case[PagedPrefill]) -> bool:
        return _sees_something(case.axes) and applies(case.axes)

    transform = partial(_transform, name)
    return Relation(
        name=name, change=change, promise=promise, applies=applies_to, transform=transform, needs=tuple(needs)
    )


def _sees_something(axes: PagedPrefill) -> bool:
    return any(request.qo_len and request.kv_len for request in axes.requests)


def _always(_axes: PagedPrefill) -> bool:
    return True


def _several_pages(axes: PagedPrefill) -> bool:
    return sum(axes.pages(request) for request in axes.requests) + axes.spare_pages > 1


def _alike_heads(axes: PagedPrefill) -> bool:
    """Several KV heads, and none whose query heads have slopes of their own, as with ALiBi."""
    return axes.kv_heads > 1 and not axes.alibi


def _several_requests(axes: PagedPrefill) -> bool:
    return len(axes.requests) > 1


def _keys_have_no_order(axes: PagedPrefill) -> bool:
    """Whether it does not matter which key comes where; a mask can go with the keys."""
    return not axes.causal and axes.window_left < 0 and not axes.alibi


def _several_keys(axes: PagedPrefill) -> bool:
    return _keys_have_no_order(axes) and any(request.qo_len and request.kv_len > 1 for request in axes.requests)


def _can_be_decoded(axes: PagedPrefill) -> bool:
    """The own place of a query that is alone is the last key: a window has to end there, too.

    With ALiBi it is the first of its request, from which it counts: its log-sum-exp is another.
    """
    return (
        any(request.qo_len > 1 and request.kv_len for request in axes.requests)
        and (axes.causal or axes.window_left < 0)
        and not axes.alibi
    )


def _has_no_mask(axes: PagedPrefill) -> bool:
    return axes.mask == "none" and axes.mask_bits <= LARGEST_MASK


def _can_be_split(axes: PagedPrefill) -> bool:
    return axes.return_lse and any(request.qo_len and common_pages(axes, request) for request in axes.requests)


RELATIONS = (
    _relation("page_permutation", "the physical pages in another order", "deterministic", _several_pages),
    _relation("value_sign", "-V", "deterministic", _always),
    _relation("value_scale", "4 V", "deterministic", _always),
    _relation("score_scale", "4 Q and a quarter of the scale", "deterministic", _always),
    _relation("head_permutation", "the KV heads and their groups in another order", "deterministic", _alike_heads),
    _relation("batch_order", "the requests in another order", "batch_invariant", _several_requests),
    _relation("batch_size", "each request in a batch of its own", "batch_invariant", _several_requests),
    _relation("repeat", "the very same inputs once more", "deterministic", _always),
    _relation("split", "the keys in two parts, merged by their log-sum-exps", None, _can_be_split, "lse"),
    _relation("decode", "some of the queries alone, as decode requests", None, _can_be_decoded),
    _relation("as_mask", "the causal mask and the window as a mask of bits", None, _has_no_mask),
    _relation("key_permutation", "the keys of each request in another order", None, _several_keys),
    _relation("duplicate_keys", "every key twice", None, _keys_have_no_order),
)
