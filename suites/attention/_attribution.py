"""Which token was lost, counted twice or let in by mistake: read from the outputs of ``count`` inputs.

There out · l counts the keys that a row has seen, class by class: tokens with the same number modulo one of two coprime
moduli. What differs from the counts that the row should have is solved for the tokens behind it. Where that leaves room
for doubt, nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from kerneltest.model import FORMATS, Case

from ._axes import PagedPrefill
from ._inputs import first_tokens, moduli, total_tokens
from ._masks import limits

# Rows that are looked at, sentences that are said, and tokens named where it must be one of several.
MOST_ROWS = 256
MOST_SENTENCES = 3
MOST_PLACES = 3
# A token is counted up to this many times too often; up to so many tokens that do not follow each other are told apart.
MOST_TIMES = 3
MOST_APART = 8
# Error of out · l that comes from the kernel's arithmetic, beside that of rounding the output.
ARITHMETIC = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A query head's row of one token. It must see the keys of its request from ``first`` on, as far as ``visible``,
    which it does not see: ``expected`` [d] of each class. ``out`` [d] and ``lse`` are the kernel's, float64.
    """

    request: int
    token: int
    head: int
    kv_head: int
    first: int
    visible: int
    expected: torch.Tensor
    out: torch.Tensor
    lse: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """``length`` tokens that follow each other from slot ``first`` of a request on, in one KV head."""

    request: int
    kv_head: int
    first: int
    length: int

    def __str__(self) -> str:
        return f"slot {self.first}" if self.length == 1 else f"slots {self.first} to {self.first + self.length - 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What a row did to the tokens ``where``, in words. ``edge`` is true of other rows as well, if it is about the end
    of what a row sees.
    """

    where: str
    what: str
    edge: str = ""


def explain(
    case: Case[PagedPrefill], _inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> str | None:
    """Sentences such as "request 3: slot 1027 counted twice in 4 of 4 heads", or None if nothing can be said.

    ``outputs``: ``out`` [total_qo, q_heads, d] and, if the kernel has one, ``lse`` [total_qo, q_heads], on the host.
    """
    axes = case.axes
    if case.inputs != "count" or "out" not in outputs or len(moduli(axes.v_dim)) < 2:
        return None
    if axes.mask != "none" or axes.v_scale != 1.0 or axes.alibi:
        return None  # the keys that a row sees do not follow each other, or an output is no count
    numbering = _Numbering(axes)
    known: dict[object, tuple[Difference, ...]] = {}
    found: list[tuple[Row, Difference]] = []
    rows = list(islice(_suspicious(numbering, outputs), MOST_ROWS))
    for row in rows:
        # Heads of a group, and all rows where nothing is masked, are often alike.
        key = (row.request, row.kv_head, row.first, row.visible, row.lse, tuple(row.out.tolist()))
        if key not in known:
            known[key] = tuple(_differences(numbering, row))
        found += [(row, difference) for difference in known[key]]
    return _sentences(axes, found, complete=len(rows) < MOST_ROWS)


class _Numbering:
    """The numbers of a case's tokens, and the classes that they fall into."""

    def __init__(self, axes: PagedPrefill) -> None:
        self.axes, self.moduli = axes, list(moduli(axes.v_dim))
        self.first, self.total = first_tokens(axes), total_tokens(axes)
        self._pages: dict[tuple[int, int], torch.Tensor] = {}

    def numbers(self, request: int, kv_head: int) -> torch.Tensor:
        """Of all keys of a request, [kv_len]."""
        return self.first[request] + kv_head * self.total + torch.arange(self.axes.requests[request].kv_len)

    def classes(self, numbers: torch.Tensor) -> torch.Tensor:
        """[tokens, d]: a one in each block."""
        return torch.cat([torch.nn.functional.one_hot(numbers % m, m) for m in self.moduli], -1)

    def pages(self, request: int, kv_head: int) -> torch.Tensor:
        """How many tokens of each class every full page of a request holds, [pages, d]."""
        key, size = (request, kv_head), self.axes.page_size
        if key not in self._pages:
            numbers = self.numbers(request, kv_head)
            full = numbers[: len(numbers) // size * size]
            self._pages[key] = self.classes(full).view(-1, size, sum(self.moduli)).sum(1)
        return self._pages[key]

    def sums(self, counts: torch.Tensor) -> list[int]:
        """Of each block of ``counts`` [d]: the same number of tokens, if they are counts of tokens."""
        return [int(block.sum()) for block in torch.split(counts, self.moduli)]

    def runs(
        self, counts: torch.Tensor, length: int, places: Iterable[tuple[int, int]], within: slice = slice(None)
    ) -> list[Run]:
        """The runs of ``length`` tokens that have these ``counts`` [d] of each class; see :func:`_tokens`."""
        begins = []
        for modulus, block in zip(self.moduli, torch.split(counts, self.moduli), strict=True):
            run = torch.bincount(torch.arange(length) % modulus, minlength=modulus)
            shift = (torch.arange(modulus) - torch.arange(modulus).unsqueeze(-1)) % modulus
            begins.append((run[shift] == block).all(-1))
        if not all(bool(some.any()) for some in begins):
            return []
        found = []
        for request, kv_head in places:
            first = self.numbers(request, kv_head)[within]
            first = first[: max(0, len(first) - length + 1)]
            possible = torch.stack([some[first % m] for some, m in zip(begins, self.moduli, strict=True)]).all(0)
            found += [
                Run(request=request, kv_head=kv_head, first=(within.start or 0) + slot, length=length)
                for slot in possible.nonzero().flatten().tolist()
            ]
        return found


def _suspicious(numbering: _Numbering, outputs: Mapping[str, torch.Tensor]) -> Iterator[Row]:
    """The finite rows with an output further from what it should be than rounding and a quarter of a token."""
    axes, first = numbering.axes, 0
    lse = outputs.get("lse")
    for number, request in enumerate(axes.requests):
        rows = slice(first, first + request.qo_len)
        first = rows.stop
        begin, end = limits(axes, request)
        for kv_head in range(axes.kv_heads if request.kv_len else 0):
            upto = torch.nn.functional.pad(
                numbering.classes(numbering.numbers(number, kv_head)).cumsum(0), (0, 0, 1, 0)
            )
            expected = upto[end] - upto[begin]
            heads = slice(kv_head * axes.group, (kv_head + 1) * axes.group)
            out = outputs["out"][rows, heads].double()
            length = (end - begin).clamp(min=1).double().view(-1, 1, 1)
            right = expected.unsqueeze(1) / length
            least = torch.maximum(FORMATS[axes.dtype].u * right, 0.25 / length)
            off = ((out - right).abs() > least).any(-1) & out.isfinite().all(-1) & (end > begin).unsqueeze(-1)
            for token, head in off.nonzero().tolist():
                yield Row(
                    request=number,
                    token=token,
                    head=heads.start + head,
                    kv_head=kv_head,
                    first=int(begin[token]),
                    visible=int(end[token]),
                    expected=expected[token],
                    out=out[token, head],
                    lse=None if lse is None else float(lse[rows.start + token, heads.start + head]),
                )


def _differences(numbering: _Numbering, row: Row) -> Iterable[Difference]:
    """What the row did, if only one thing explains its counts."""
    counts = _counts(numbering, row)
    if counts is None:
        return ()
    requests, heads = range(len(numbering.axes.requests)), range(numbering.axes.kv_heads)
    own = (row.request, row.kv_head)
    others = [(request, head) for request in requests for head in heads if (request, head) != own]
    lost, gained = (row.expected - counts).clamp(min=0), (counts - row.expected).clamp(min=0)
    # What a row must not see it cannot lose.
    seen = slice(row.first, row.visible)
    losses = [_lost(row, runs) for _, runs in _tokens(numbering, lost, [own], times=1, within=seen)]
    if not bool(gained.any()):
        return losses
    if not bool(lost.any()):
        # More than there should be are its own, counted again or unmasked, rather than anybody's.
        solved = _tokens(numbering, gained, [own]) or _tokens(numbering, gained, others)
        return [_gained(row, runs, times) for times, runs in solved]
    if row.first:
        return ()  # the first page of a window is a part of one, and exchanges are told page by page
    # As many others in the place of some may be anybody's, and what is in neither may have been in both.
    gains = [_gained(row, runs, times) for times, runs in _tokens(numbering, gained, [own, *others])]
    solutions = set(_exchanges(numbering, row, counts - row.expected, [own, *others]))
    if losses:
        solutions.add((*losses, *gains))
    return solutions.pop() if len(solutions) == 1 else ()


def _exchanges(
    numbering: _Numbering, row: Row, change: torch.Tensor, places: Sequence[tuple[int, int]]
) -> Iterator[tuple[Difference, ...]]:
    """Which page of the row's own, in whose place another was read, makes this ``change`` [d] of the counts."""
    size = numbering.axes.page_size
    # Of the page where the row's keys end, those that it sees.
    whole, rest = divmod(row.visible, size)
    numbers = numbering.numbers(row.request, row.kv_head)[whole * size : row.visible]
    last = numbering.classes(numbers).sum(0, keepdim=True)[: min(rest, 1)]
    pages = torch.cat([numbering.pages(row.request, row.kv_head)[:whole], last])
    for page in ((change + pages) >= 0).all(-1).nonzero().flatten().tolist():
        length = size if page < whole else rest
        own = Run(request=row.request, kv_head=row.kv_head, first=page * size, length=length)
        runs = numbering.runs(change + pages[page], length, places)
        instead = [run for run in runs if run.first % size == 0 and run != own]
        if instead:
            yield _lost(row, [own]), *([_gained(row, instead, 1)] if len(instead) <= MOST_PLACES else [])


def _counts(numbering: _Numbering, row: Row) -> torch.Tensor | None:
    """How many keys of each class the row has counted, [d]; None unless there is one plainest answer.

    The denominator l is tried from the log-sum-exp in either base, as the right one or almost, and as what makes a
    small integer of the largest output; then as the number of keys that this amounts to.
    """
    n, unit = row.visible - row.first, FORMATS[numbering.axes.dtype].u
    guesses = [float(n + off) for off in (0, -1, 1, -2, 2) if n + off > 0]
    if row.lse is not None and abs(row.lse) < 64:
        guesses += [math.exp(row.lse), 2.0**row.lse]
    top = int(row.out.argmax())
    guesses += [
        c / float(row.out[top]) for off in (-2, -1, 0, 1, 2) if (c := int(row.expected[top]) + off) > 0 < row.out[top]
    ]
    best: dict[int, list[torch.Tensor]] = {}
    for guess in guesses:
        counts = (row.out * guess).round()
        # A bf16 output holds no more than 8 digits: beyond that, the nearest integer is anybody's guess.
        if float(counts.max()) * unit >= 0.5 or len(set(numbering.sums(counts))) > 1:
            continue
        allowed = (2 * unit * counts + ARITHMETIC).clamp(max=0.5)
        for total in (guess, float(numbering.sums(counts)[0])):
            if bool(((row.out * total - counts).abs() <= allowed).all()) and bool((counts > 0).any() | ~row.out.any()):
                changed = int((counts - row.expected).abs().sum())
                best.setdefault(changed, []).append(counts.long())
    if not best:
        return None
    plainest = best[min(best)]
    return plainest[0] if all(torch.equal(plainest[0], other) for other in plainest) else None


def _tokens(
    numbering: _Numbering,
    counts: torch.Tensor,
    places: Iterable[tuple[int, int]],
    *,
    times: int = MOST_TIMES,
    within: slice = slice(None),
) -> list[tuple[int, list[Run]]]:
    """The tokens that have these ``counts`` [d], each with how often; several runs where it may be any of them.

    One run, or single tokens that only one choice explains; nothing if neither does, or too many runs do, or the blocks
    do not agree. ``places``: requests and KV heads to look in, the tokens ``within`` each.
    """
    sums, places = numbering.sums(counts), list(places)
    count = sums[0]
    if count == 0 or len(set(sums)) > 1:
        return []
    for each in range(1, times + 1):
        if count % each or bool((counts % each).any()):
            continue
        runs = numbering.runs(counts // each, count // each, places, within)
        if runs:
            return [(each, runs)] if len(runs) <= MOST_PLACES else []
    if count > MOST_APART:
        return []
    single = []
    for request, kv_head in places:
        classes = numbering.classes(numbering.numbers(request, kv_head)[within])
        fits = (classes <= counts).all(-1).nonzero().flatten().tolist()
        begin = within.start or 0
        single += [(Run(request=request, kv_head=kv_head, first=begin + at, length=1), classes[at]) for at in fits]
    if len(single) != count or not torch.equal(sum((one for _, one in single), torch.zeros_like(counts)), counts):
        return []
    return [(1, [run]) for run, _ in single]


def _slot(row: Row, slot: int) -> Run:
    return Run(request=row.request, kv_head=row.kv_head, first=slot, length=1)


def _lost(row: Row, runs: Sequence[Run]) -> Difference:
    where = " or ".join(map(str, runs))
    edge = ""
    if runs == [_slot(row, row.visible - 1)]:
        edge = "the last visible slot not counted"
    elif row.first and runs == [_slot(row, row.first)]:
        edge = "the first slot of the window not counted"
    return Difference(where=where, what=f"{where} not counted", edge=edge)


def _gained(row: Row, runs: Sequence[Run], times: int) -> Difference:
    def worded(run: Run) -> str:
        if run.request != row.request:
            return f"{run} of request {run.request} counted"
        if run.kv_head != row.kv_head:
            return f"{run} of KV head {run.kv_head} counted"
        if not row.first <= run.first < row.visible:
            return f"{run} counted, though masked"
        return f"{run} counted {'twice' if times == 1 else f'{times + 1} times'}"

    edge = ""
    if runs == [_slot(row, row.visible)]:
        edge = "the first masked slot counted"
    elif row.first and runs == [_slot(row, row.first - 1)]:
        edge = "the last slot before the window counted"
    return Difference(where=str(runs[0]), what=" or ".join(map(worded, runs)), edge=edge)


def _sentences(axes: PagedPrefill, found: Iterable[tuple[Row, Difference]], *, complete: bool) -> str | None:
    """Equal differences in one sentence, the most frequent first; in how many places, if it is ``complete``."""
    groups: dict[tuple[int, str], list[tuple[Row, Difference]]] = {}
    for row, difference in found:
        groups.setdefault((row.request, difference.edge or difference.what), []).append((row, difference))
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    said = [_sentence(axes, request, words, rows, complete) for (request, words), rows in ordered[:MOST_SENTENCES]]
    if len(ordered) > MOST_SENTENCES:
        said.append(f"and {len(ordered) - MOST_SENTENCES} more differences")
    return "; ".join(said) or None


def _sentence(
    axes: PagedPrefill, request: int, words: str, group: Sequence[tuple[Row, Difference]], complete: bool
) -> str:
    if len({difference.what for _, difference in group}) == 1:
        words = group[0][1].what
    else:
        row, difference = group[0]
        words = f"{words} ({difference.where} for token {row.token}, and so on)"
    if not complete:
        return f"request {request}: {words}"
    heads, tokens = ({getattr(row, name) for row, _ in group} for name in ("head", "token"))
    text = f"request {request}: {words} in {len(heads)} of {axes.q_heads} heads"
    of = axes.requests[request].qo_len
    return text if len(tokens) == of else f"{text} and {len(tokens)} of {of} tokens"
