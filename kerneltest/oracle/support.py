"""Support certificates: which tokens a filter keeps for sure, which it may keep, and what a kernel made of that.

A filter decides on a token by the mass of those before it, or by how many those are. Counts and values are exact. A
mass is a sum that a kernel rounds in an order of its own: tokens whose exact mass lies within the error of that sum of
the border are ambiguous, and either answer is right. All else has one answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from kerneltest.model import FP32, Rejection
from kerneltest.model.numerics import FLUSHED

# What becomes of tokens with the value of the last that is kept. "kept": all of them stay, as if they were one.
# "index": as many stay as are needed, those with the lowest index; "reverse": with the highest. "any": as many.
Ties = Literal["kept", "index", "reverse", "any"]
# Sums of multiples of 2^-24 that are at most 1 need no rounding in float32, in whatever order.
EXACT_UNIT = 2.0**-24
# The leading bits of a float32 that a radix histogram of 2048 buckets tells apart: sign, exponent, two of the fraction.
BUCKET_SHIFT = 21
BUCKETS = 2048
# A token that must come up so often on average stays away with a probability of exp(-64) = 2e-28.
EXPECTED = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """``sure``: what must be kept; ``possible``: what may be, sure tokens included. Both bool [rows, V]."""

    sure: torch.Tensor
    possible: torch.Tensor

    def __and__(self, other: Support) -> Support:
        """Both filters on the same numbers."""
        return Support(sure=self.sure & other.sure, possible=self.possible & other.possible)


@dataclass(frozen=True, slots=True, kw_only=True)
class MassAbove:
    """The exact mass of the tokens before each, float64 [rows, V]: between ``low`` and ``high``.

    Where they differ, the order of equal or nearly equal tokens is not declared.
    """

    low: torch.Tensor
    high: torch.Tensor


def mass_above(probs: torch.Tensor, *, ties: Ties = "kept", blur: float = 0.0) -> MassAbove:
    """The mass before each token of ``probs``, float64 [rows, V], in descending order.

    ``blur``: how far apart two values must be, as a share of the larger, for the kernel to tell them apart; it may have
    rounded them since. Equal ones stay equal, and in the order of their index.
    """
    order = torch.sort(probs, dim=-1, descending=True, stable=True)
    value = order.values
    total = torch.nn.functional.pad(value.cumsum(-1), (1, 0))
    above, up_to = (_up_to(value, total, value, equal=equal) for equal in (False, True))
    clearly, perhaps = above, up_to
    if blur > 0:
        clearly = _up_to(value, total, value * (1 + blur), equal=False)
        perhaps = _up_to(value, total, value * (1 - blur), equal=True)
    # Equal tokens that come first and last in the order of their index.
    first, last = total[:, :-1] - above, up_to - total[:, 1:]
    match ties:
        case "kept":
            low, high = clearly, perhaps - (up_to - above)
        case "any":
            low, high = clearly, perhaps - value
        case "index":
            low, high = clearly + first, perhaps - value - last
        case "reverse":
            low, high = clearly + last, perhaps - value - first
    # Differences of sums that have no error of their own where the kernel's have none either.
    if blur == 0 and ties != "any":
        high = low
    return MassAbove(low=_back(low, order.indices), high=_back(high, order.indices))


def _up_to(value: torch.Tensor, total: torch.Tensor, least: torch.Tensor, *, equal: bool) -> torch.Tensor:
    """The mass of what is above ``least``, or equal to it as well; ``value`` descends, ``total`` is its running sum."""
    count = torch.searchsorted(-value, -least.contiguous(), right=equal)
    return total.gather(-1, count)


def _back(value: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value).scatter_(-1, order, value)


def sums_are_exact(probs: torch.Tensor) -> torch.Tensor:
    """Whether no sum of a row's probabilities needs rounding in float32, bool [rows, 1]."""
    units = probs.double() / EXACT_UNIT
    return (units == units.round()).all(-1, keepdim=True) & (probs.double().sum(-1, keepdim=True) <= 1)


def nucleus(above: MassAbove, p: torch.Tensor, *, error: torch.Tensor, p_error: torch.Tensor, strict: bool) -> Support:
    """The tokens before which there is less mass than ``p`` [rows, 1]; not ``strict``: no more than that.

    ``error`` [rows, V] bounds how far the kernel's sum is off, ``p_error`` [rows, 1] how far its threshold is.
    """
    below = torch.lt if strict else torch.le
    return Support(sure=below(above.high + error, p - p_error), possible=below(above.low - error, p + p_error))


def top_k(values: torch.Tensor, k: torch.Tensor, *, ties: Ties, blur: float = 0.0, flushes: bool = False) -> Support:
    """The ``k`` [rows, 1] largest of float64 ``values`` [rows, V]; -Inf is a value like any other.

    ``blur``: as in :func:`mass_above`, for values that are not negative. ``flushes``: the kernel
    compares subnormal numbers as zeros, so that it may keep more of them.
    """
    support = _top_k(values, k, ties)
    if blur > 0:
        support = _top_k_blurred(values, k, ties, blur)
    if flushes and bool((tiny := (values != 0) & (values.abs() < FLUSHED)).any()):
        blind = _top_k(torch.where(tiny, 0.0, values), k, ties)
        support = Support(sure=support.sure, possible=support.possible | blind.possible)
    return support


def _top_k(values: torch.Tensor, k: torch.Tensor, ties: Ties) -> Support:
    order = torch.sort(values, dim=-1, descending=True, stable=True)
    ascending = -order.values
    above = torch.searchsorted(ascending, ascending, right=False)
    up_to = torch.searchsorted(ascending, ascending, right=True)
    match ties:
        case "kept":
            sure = possible = above < k
        case "any":
            sure, possible = up_to <= k, above < k
        case "index":
            sure = possible = torch.arange(values.shape[-1], device=values.device).expand_as(above) < k
        case "reverse":
            position = torch.arange(values.shape[-1], device=values.device)
            sure = possible = above + (up_to - 1 - position) < k
    return Support(sure=_back(sure, order.indices), possible=_back(possible, order.indices))


def _top_k_blurred(values: torch.Tensor, k: torch.Tensor, ties: Ties, blur: float) -> Support:
    """The same for values that may have changed places with their neighbours; those that are equal stay equal."""
    order = torch.sort(values, dim=-1, descending=True, stable=True)
    ascending = -order.values
    clearly = torch.searchsorted(ascending, ascending * (1 + blur), right=False)
    perhaps = torch.searchsorted(ascending, ascending * (1 - blur), right=True)
    above = torch.searchsorted(ascending, ascending, right=False)
    up_to = torch.searchsorted(ascending, ascending, right=True)
    position = torch.arange(values.shape[-1], device=values.device)
    # Of its equals, itself included: how many go before it at least, and how many do not for certain.
    match ties:
        case "kept":
            before, behind = torch.zeros_like(above), up_to - above
        case "any":
            before, behind = torch.zeros_like(above), torch.ones_like(above)
        case "index":
            before, behind = position - above, up_to - position
        case "reverse":
            before, behind = up_to - 1 - position, position - above + 1
    return Support(sure=_back(perhaps - behind < k, order.indices), possible=_back(clearly + before < k, order.indices))


def min_p(probs: torch.Tensor, share: torch.Tensor, *, flushes: bool = False) -> Support:
    """The tokens of at least ``share`` [rows, 1] of the largest: float32 ``probs`` [rows, V], the product in float32.

    ``flushes``: the product, and what is compared with it, may be taken for zero where it is subnormal.
    """
    least = probs.float().amax(-1, keepdim=True) * share.float()
    sure = probs.float() >= least
    possible = sure | ((probs < FLUSHED) & (least < FLUSHED)) if flushes else sure
    return Support(sure=sure, possible=possible)


def histogram_error(probs: torch.Tensor, *, atomic: bool) -> torch.Tensor:
    """How far a mass is off that was found by radix selection over histograms: float32 ``probs``, float64 [rows, V].

    Three passes over 11, 11 and 10 bits, as in TensorRT-LLM's AIR top-p. ``atomic``: a bucket is a sum of floats in any
    order, which its n tokens may round n times; otherwise one of integers, cut to 24 bits once. The first pass goes
    down a list of 64 warp sums (each a tree of 5 levels) and then of buckets, not empty, until it has enough: no mass
    passes more roundings than there are buckets in use, plus 64 + 5. The others do the same in the border's bucket.
    """
    u = FP32.u
    bits = probs.float().contiguous().view(torch.int32) >> BUCKET_SHIFT
    bucket = bits.clamp(0, BUCKETS - 1).long()
    shape = (probs.shape[0], BUCKETS)
    count = torch.zeros(shape, dtype=torch.float64, device=probs.device)
    mass = torch.zeros_like(count)
    value = probs.double()
    count.scatter_add_(-1, bucket, torch.ones_like(value))
    mass.scatter_add_(-1, bucket, value)
    chain = 64 + 5
    total, used = mass.sum(-1, keepdim=True), (count > 0).sum(-1, keepdim=True)
    rounded = (count if atomic else torch.full_like(count, 2.0)) * mass
    # Inside a bucket there are no more buckets in use than tokens, and each pass sums them up anew; twice u: the
    # difference that is left to be found in it, and the product of the sum and p.
    inside = (chain + count.clamp(max=BUCKETS)) * mass + rounded
    first = (chain + used + 4) * total + rounded.sum(-1, keepdim=True)
    return u * (first + 2 * inside.gather(-1, bucket))


def check_draws(
    tokens: torch.Tensor, rows: torch.Tensor, support: Support, probs: torch.Tensor, *, output: str = "tokens"
) -> Iterator[Rejection]:
    """What is wrong with drawn ``tokens`` [n], the n-th of which came from row ``rows[n]`` of the support.

    ``probs`` [rows, V] are what they are drawn in proportion to. A token must be in range and possible, and one that is
    sure must be among them if it is expected :data:`EXPECTED` times: in draws that follow each other independently.
    """
    tokens, rows = tokens.long().to(probs.device), rows.to(probs.device)
    vocabulary = probs.shape[-1]
    outside = (tokens < 0) | (tokens >= vocabulary)
    if bool(outside.any()):
        n = int(outside.nonzero()[0])
        what = f"{int(outside.sum())} of {len(tokens)} tokens lie outside of the vocabulary of {vocabulary}"
        yield Rejection(kind="WrongSupport", output=output, what=what, details=(f"draw {n} is {int(tokens[n])}",))
        return
    excluded = ~support.possible[rows, tokens]
    if bool(excluded.any()):
        n = int(excluded.nonzero()[0])
        yield Rejection(
            kind="WrongSupport",
            output=output,
            what=f"{int(excluded.sum())} of {len(tokens)} draws are tokens that the filter excludes",
            details=(f"draw {n}: {describe(probs, int(rows[n]), int(tokens[n]))}",),
        )
    n_rows = probs.shape[0]
    drawn = torch.bincount(rows * vocabulary + tokens, minlength=n_rows * vocabulary).view(n_rows, vocabulary)
    mass = torch.where(support.possible, probs.double(), 0.0)
    draws = torch.bincount(rows, minlength=n_rows).unsqueeze(-1)
    missing = support.sure & (drawn == 0) & (draws * mass >= EXPECTED * mass.sum(-1, keepdim=True))
    if bool(missing.any()):
        row, token = (int(i) for i in missing.nonzero()[0])
        yield Rejection(
            kind="WrongSupport",
            output=output,
            what=f"{int(missing.sum())} tokens that must have been drawn {EXPECTED:g} times or more never were",
            details=(f"in {int(draws[row])} draws from row {row}: {describe(probs, row, token)}",),
        )


def check_kept(
    kept: torch.Tensor, support: Support, values: torch.Tensor, *, output: str, excused: torch.Tensor | None = None
) -> Iterator[Rejection]:
    """What is wrong with the set that a kernel ``kept``, bool [rows, V] like the support.

    ``values`` [rows, V] are what it was chosen by. ``excused``: tokens whose absence says nothing, such as those that
    underflow.
    """
    lost = support.sure & ~kept
    if excused is not None:
        lost &= ~excused
    for wrong, what in (
        (lost, "are missing that the filter keeps"),
        (kept & ~support.possible, "are kept that the filter excludes"),
    ):
        if bool(wrong.any()):
            row, token = (int(i) for i in wrong.nonzero()[0])
            yield Rejection(
                kind="WrongSupport",
                output=output,
                what=f"{int(wrong.sum())} tokens in {int(wrong.any(-1).sum())} of {len(wrong)} rows {what}",
                details=(f"first: {describe(values, row, token)}",),
            )


def describe(values: torch.Tensor, row: int, token: int) -> str:
    """A token in words: its value, and how much there is above it."""
    own, others = values[row, token].double(), values[row].double()
    above = others > own
    said = f"row {row}, token {token} of value {float(own):.9g}: {int(above.sum())} are above it"
    if bool((others >= 0).all()):
        said += f" with a mass of {float(others[above].sum()):.9g}"
    ties = int((others == own).sum()) - 1
    return f"{said}, {ties} equal to it" if ties else said
