"""From a case and a kernel's declared semantics to the tokens that are right, and to what is wrong with its answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from kerneltest.model import FP32, Case, ErrorBudget, Rejection
from kerneltest.model.numerics import DIVISION, FLUSHED
from kerneltest.oracle import support as certificates
from kerneltest.oracle.inversion import check_inverse
from kerneltest.oracle.rounding import interval
from kerneltest.oracle.softmax import renorm_budget, softmax_budget
from kerneltest.oracle.support import Support, check_draws, check_kept, mass_above
from kerneltest.oracle.verdict import judge

from ._axes import Rows
from ._semantics import Inverse, Semantics

# Values that a renormalisation multiplies by one number keep their order, but two that are closer than this may meet.
MERGED = 2.0**-22
# Softmax of fp32 logits: below this share of the row, relative errors are those of numbers that may be flushed.
NEGLIGIBLE = 1e-30
FLOAT64 = 2.0**-53


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a case is judged from, on the device of the reference.

    ``values`` are the probabilities or logits as given, ``probs`` the probabilities in float64, both [rows, V];
    ``top_k`` int64, ``top_p`` and ``min_p`` float32, all [rows, 1], where there are such; ``source`` int64 [draws]: the
    row of each draw; ``seed`` and ``offset``: the state of a generator on the device, as the kernel is given it.
    """

    values: torch.Tensor
    probs: torch.Tensor
    source: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None
    seed: int
    offset: int


def reference(case: Case[Rows], inputs: Mapping[str, torch.Tensor], device: str) -> Terms:
    """The terms of a case from its host tensors."""
    axes = case.axes
    given = inputs.get("probs", inputs.get("logits"))
    assert given is not None
    values = given.to(device)
    probs = values.double().softmax(-1) if "logits" in inputs else values.double()

    def parameter(name: str) -> torch.Tensor | None:
        scalar = getattr(axes, name)
        if scalar is None:
            return None
        dtype = torch.int64 if name == "top_k" else torch.float32
        rows = inputs[name] if axes.per_row else torch.full((axes.rows,), scalar, dtype=dtype)
        return rows.to(device, dtype).unsqueeze(-1)

    def state(name: str, usual: int) -> int:
        given = inputs.get(name) if axes.device_seed else None
        return usual if given is None or not given.numel() else int(given.flatten()[0])

    source = inputs.get("indices", torch.arange(axes.rows)).long().to(device)
    return Terms(
        values=values,
        probs=probs,
        source=source,
        top_k=parameter("top_k"),
        top_p=parameter("top_p"),
        min_p=parameter("min_p"),
        seed=state("seed", case.seed),
        offset=state("offset", 0),
    )


def support_of(case: Case[Rows], terms: Terms, semantics: Semantics, *, logits: bool) -> Support:
    """The tokens that the filters of a case leave.

    Zero probabilities are left in where a filter says so: no draw may be one of them, and a renormalisation cannot
    show them.
    """
    axes, probs = case.axes, terms.probs
    everything = torch.ones_like(probs, dtype=torch.bool)
    support = Support(sure=everything, possible=everything)
    if terms.min_p is not None:
        support &= certificates.min_p(terms.values, terms.min_p, flushes=semantics.flushes)
    one_by_one = axes.order == "top_k_first"
    blur, error = semantics.blur, 0.0
    if logits and axes.parameters and not one_by_one:
        blur, error = _of_own_probabilities(terms.values, semantics)
    if terms.top_k is not None:
        # What is cut before there are probabilities is cut by the logits, which are exact.
        exact = not logits or one_by_one
        support &= certificates.top_k(
            terms.values.double() if exact else probs,
            terms.top_k,
            ties=semantics.top_k_ties,
            blur=0.0 if exact else blur,
            flushes=semantics.flushes,
        )
    if terms.top_p is None:
        return support
    if one_by_one and terms.top_k is not None:
        # Of equals at the border more may stay than do; whichever do, they have the values of the k largest.
        descending = probs.sort(-1, descending=True).values
        within = torch.arange(probs.shape[-1], device=probs.device) < terms.top_k
        total = torch.where(within, descending, 0.0)
        left = torch.where(support.possible, probs, 0.0)
        total = (left if semantics.top_k_ties == "kept" else total).sum(-1, keepdim=True)
        probs = left / total
        if logits:
            blur, error = _of_own_probabilities(terms.values.masked_fill(~support.possible, -torch.inf), semantics)
        else:
            blur, error = max(blur, MERGED), semantics.row_sum.gamma(probs.shape[-1]) + DIVISION
    return support & _nucleus(probs, terms.top_p, semantics, blur, error)


def _of_own_probabilities(logits: torch.Tensor, semantics: Semantics) -> tuple[float, float]:
    """How close two probabilities must be for a kernel's own softmax to confuse them, and how far each is off."""
    if semantics.softmax is None:
        raise ValueError("the kernel declares no softmax, but is given logits")
    budget = softmax_budget(logits, 1.0, semantics.softmax)
    counts = budget.ref > NEGLIGIBLE
    error = float(torch.where(counts, budget.hard / budget.ref, 0.0).max()) + FP32.u
    return max(semantics.blur, 2 * error / (1 - error)), error


def _nucleus(probs: torch.Tensor, p: torch.Tensor, semantics: Semantics, blur: float, given: float) -> Support:
    """Top-p on float64 ``probs`` that are off by a share of ``given`` when they come to the filter."""
    u, vocabulary = FP32.u, probs.shape[-1]
    above = mass_above(probs, ties=semantics.nucleus_ties, blur=blur)
    if semantics.radix:
        error = certificates.histogram_error(probs, atomic=semantics.radix == "atomic")
        summed = torch.zeros_like(error[:, :1])
    else:
        gamma = semantics.mass.gamma(vocabulary)
        error = gamma * above.high
        if semantics.through_self:
            error = gamma * (above.high + probs) + u * above.high
        summed = gamma * probs.sum(-1, keepdim=True)
    # The reference adds up in float64, and is off by that.
    error = error + vocabulary * FLOAT64 * (above.high + probs)
    if given:
        error, summed = error * (1 + given) + given * (above.high + probs), summed * (1 + given) + given
    else:
        exact = certificates.sums_are_exact(probs)
        error, summed = error.masked_fill(exact, 0.0), summed.masked_fill(exact, 0.0)
    threshold, p_error = p.double(), torch.zeros_like(summed)
    if semantics.relative:
        total = probs.sum(-1, keepdim=True)
        # The product with a sum of exactly 1 is exact.
        p_error = threshold * (summed + torch.where((total == 1) & (summed == 0), 0.0, u * total))
        threshold = threshold * total
    slack = semantics.slack
    return certificates.nucleus(above, threshold, error=slack * error, p_error=slack * p_error, strict=semantics.strict)


def certify_tokens(
    case: Case[Rows], terms: Terms, semantics: Semantics, outputs: Mapping[str, torch.Tensor], *, logits: bool
) -> Iterator[Rejection]:
    """Drawn tokens: in range, left by the filters, not of probability 0."""
    support = support_of(case, terms, semantics, logits=logits)
    there = terms.probs > 0 if not logits else terms.values > -torch.inf
    tokens, allowed = outputs["tokens"], Support(sure=support.sure & there, possible=support.possible & there)
    # A probability that may be flushed is one that is never expected to come up.
    wrong = list(check_draws(tokens, terms.source, allowed, terms.probs))
    yield from wrong
    if semantics.inverse is not None and not wrong:
        yield from _replayed(case, terms, semantics, semantics.inverse, tokens, allowed)


def _replayed(
    case: Case[Rows], terms: Terms, semantics: Semantics, inverse: Inverse, tokens: torch.Tensor, support: Support
) -> Iterator[Rejection]:
    """Each draw against its random number, if it is certain what the row leaves to draw from."""
    weights = torch.where(support.possible, terms.probs, 0.0)
    if semantics.flushes:
        weights = torch.where(weights <= FLUSHED, 0.0, weights)
    total = weights.sum(-1)
    clear = (support.sure == support.possible).all(-1) & (total > 0)
    numbers = inverse.numbers(case, terms)
    gamma = semantics.slack * semantics.mass.gamma(weights.shape[-1])
    error = torch.zeros_like(numbers)
    if inverse.scaled:
        numbers = numbers * total[terms.source]
        error = (gamma + FP32.u) * numbers
    # The numbers belong to places in the batch: draws of a row that is not clear keep theirs, and may be anything.
    error = error.masked_fill(~clear[terms.source], torch.inf)
    yield from check_inverse(tokens, terms.source, weights, numbers, gamma=gamma, error=error)


def certify_renorm(
    case: Case[Rows], terms: Terms, semantics: Semantics, outputs: Mapping[str, torch.Tensor]
) -> Iterator[Rejection]:
    """Renormalised probabilities: the right tokens, and each of them its share of the kernel's own set."""
    name = "renorm_probs"
    out = outputs[name].to(terms.probs.device)
    if bad := _not_probabilities(out, name):
        yield bad
        return
    support = support_of(case, terms, semantics, logits=False)
    there, kept = terms.probs > 0, out > 0
    total = torch.where(kept, terms.probs, 0.0).sum(-1, keepdim=True)
    # What is left out may have been too small to show, here or where it was read.
    excused = (terms.probs <= FLUSHED) | (terms.probs <= (2 * semantics.out.eta + 2 * FLUSHED) * total)
    possible = Support(sure=support.sure & there, possible=support.possible & there)
    yield from check_kept(kept, possible, terms.values, output=name, excused=excused)
    if not bool((total > 0).all()):
        row = int((total.squeeze(-1) <= 0).nonzero()[0])
        yield Rejection(kind="WrongSupport", output=name, what=f"row {row} keeps nothing at all")
        return
    keep = kept | (support.sure & there & excused)
    budget = renorm_budget(terms.values.double(), keep, row_sum=semantics.row_sum, out=semantics.out)
    yield from _values(out, budget, name, case, semantics.slack)


def certify_mask(
    case: Case[Rows], terms: Terms, semantics: Semantics, outputs: Mapping[str, torch.Tensor]
) -> Iterator[Rejection]:
    """Masked logits: those that stay bit by bit, all others exactly -Inf."""
    name = "masked_logits"
    out, logits = outputs[name].to(terms.values.device), terms.values
    if bool(out.isnan().any()):
        yield Rejection(kind="NonFinite", output=name, what=f"{int(out.isnan().sum())} elements are NaN")
        return
    kept = out > -torch.inf
    support = support_of(case, terms, semantics, logits=False)
    there = logits > -torch.inf
    # A logit of -Inf looks the same, kept or not.
    possible = Support(sure=support.sure & there, possible=support.possible & there)
    yield from check_kept(kept & (out == logits), possible, logits, output=name)
    bits = {2: torch.int16, 4: torch.int32}[out.element_size()]
    changed = kept & (out.view(bits) != logits.view(bits))
    if bool(changed.any()):
        row, token = (int(i) for i in changed.nonzero()[0])
        yield Rejection(
            kind="Mismatch",
            output=name,
            what=f"{int(changed.sum())} elements are neither -Inf nor the logit that was given",
            details=(f"row {row}, token {token}: {float(logits[row, token]):.9g} became {float(out[row, token]):.9g}",),
        )


def certify_selection(
    case: Case[Rows], terms: Terms, semantics: Semantics, outputs: Mapping[str, torch.Tensor]
) -> Iterator[Rejection]:
    """Values and indices of plain top-k: the k largest, distinct places, in the order and of the ties asked for."""
    axes = case.axes
    assert terms.top_k is not None
    values, indices = outputs["values"].to(terms.values.device), outputs["indices"].long().to(terms.values.device)
    outside = (indices < 0) | (indices >= axes.vocabulary)
    if bool(outside.any()):
        row, place = (int(i) for i in outside.nonzero()[0])
        what = f"{int(outside.sum())} indices lie outside of the {axes.vocabulary} that there are"
        details = (f"row {row}, place {place}: {int(indices[row, place])}",)
        yield Rejection(kind="WrongSupport", output="indices", what=what, details=details)
        return
    chosen = torch.zeros_like(terms.values, dtype=torch.int32).scatter_add_(
        -1, indices, torch.ones_like(indices, dtype=torch.int32)
    )
    if bool((chosen > 1).any()):
        row, token = (int(i) for i in (chosen > 1).nonzero()[0])
        what = f"{int((chosen > 1).sum())} indices come more than once"
        yield Rejection(kind="WrongSupport", output="indices", what=what, details=(f"row {row}: {token}",))
    ties = axes.tie if axes.tie != "any" else semantics.top_k_ties
    support = certificates.top_k(terms.values.double(), terms.top_k, ties=ties)
    yield from check_kept(chosen > 0, support, terms.values, output="indices")
    apart = values != terms.values.gather(-1, indices)
    if bool(apart.any()):
        row, place = (int(i) for i in apart.nonzero()[0])
        what = f"{int(apart.sum())} values are not those at their indices"
        here, there = float(values[row, place]), float(terms.values[row, indices[row, place]])
        details = (f"row {row}, place {place}: {here:.9g}, and {there:.9g} at index {int(indices[row, place])}",)
        yield Rejection(kind="Mismatch", output="values", what=what, details=details)
    rising = values[:, 1:] > values[:, :-1]
    if axes.sorted and bool(rising.any()):
        row, place = (int(i) for i in rising.nonzero()[0])
        what = f"{int(rising.any(-1).sum())} rows are not in descending order"
        yield Rejection(kind="Mismatch", output="values", what=what, details=(f"row {row} rises after place {place}",))


def _not_probabilities(out: torch.Tensor, name: str) -> Rejection | None:
    if not bool(out.isfinite().all()):
        count = int((~out.isfinite()).sum())
        return Rejection(kind="NonFinite", output=name, what=f"{count} of {out.numel()} probabilities are not finite")
    if bool((out < 0).any()):
        count = int((out < 0).sum())
        return Rejection(kind="Mismatch", output=name, what=f"{count} of {out.numel()} probabilities are negative")
    return None


def _values(out: torch.Tensor, budget: ErrorBudget, name: str, case: Case[Rows], slack: float) -> Iterator[Rejection]:
    if slack != 1:
        budget = ErrorBudget(ref=budget.ref, hard=slack * budget.hard, out=budget.out)
    verdict = judge(out, budget)
    if verdict.ok:
        return
    seen = verdict.comparison
    assert seen.worst is not None
    low, high = interval(budget)
    row, token = seen.worst
    yield Rejection(
        kind="Mismatch",
        output=name,
        what=f"{seen.outside} of {seen.total} elements lie outside of their error budget, given the tokens kept",
        details=(
            f"worst at row {row}, token {token}: {seen.actual:.9g}, allowed are {float(low[row, token]):.9g} to "
            f"{float(high[row, token]):.9g}",
        ),
    )
