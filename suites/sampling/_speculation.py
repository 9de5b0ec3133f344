"""Values, certificate and distribution of chain speculative sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from kerneltest.model import Case, Rejection

from ._chain import Chain
from ._inputs import LOGITS, probs_of


def materials(case: Case[Chain]) -> dict[str, torch.Tensor]:
    """All inputs from ``case.seed``; see :func:`.speculative.materialize`."""
    axes = case.axes
    random = torch.Generator().manual_seed(case.seed)
    rows = 1 if axes.shared else axes.rows
    draft, target = _pair(case.inputs, rows, axes.tokens, axes.vocabulary, random)
    tokens = torch.multinomial(draft.flatten(0, 1), 1, generator=random).view(rows, axes.tokens).int()
    return {
        "draft_probs": draft.expand(axes.rows, -1, -1).contiguous(),
        "draft_token_ids": tokens.expand(axes.rows, -1).contiguous(),
        "target_probs": target.expand(axes.rows, -1, -1).contiguous(),
        "seed": torch.tensor([case.seed]),
        "offset": torch.tensor([0]),
    }


def _pair(
    inputs: str, rows: int, tokens: int, vocabulary: int, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A draft [rows, tokens, V] and a target [rows, tokens + 1, V]."""
    flat, shape = rows * (tokens + 1), (rows, tokens + 1, vocabulary)
    if inputs in ("close", "equal", "disjoint"):
        logits = LOGITS["generic"](flat, vocabulary, random)
        other = logits if inputs == "equal" else logits + 0.3 * torch.randn(flat, vocabulary, generator=random)
        if inputs == "disjoint" and vocabulary > 1:
            # What the draft proposes, the target never takes.
            half = torch.rand(flat, vocabulary, generator=random) < 0.5
            half[:, 0], half[:, 1] = True, False
            logits, other = logits.masked_fill(half, -torch.inf), other.masked_fill(~half, -torch.inf)
        draft, target = (x.double().softmax(-1).float() for x in (logits, other))
    else:
        draft, target = (probs_of(inputs, flat, vocabulary, random) for _ in range(2))
    return draft.view(shape)[:, :tokens], target.view(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Both models' word on each token of the chain, float32 [rows, tokens], and all of it, on one device."""

    chain: torch.Tensor
    p: torch.Tensor
    q: torch.Tensor
    draft: torch.Tensor
    target: torch.Tensor

    @property
    def residual(self) -> torch.Tensor:
        """What is drawn from behind each number of emitted tokens, before it is normalised: [rows, tokens + 1, V]."""
        return torch.cat([(self.target[:, :-1] - self.draft).clamp(min=0), self.target[:, -1:]], dim=1)


def terms(inputs: Mapping[str, torch.Tensor], device: str) -> Terms:
    """The terms of a case from its host tensors."""
    draft, target = inputs["draft_probs"].to(device), inputs["target_probs"].to(device)
    chain = inputs["draft_token_ids"].long().to(device)
    p = draft.gather(-1, chain.unsqueeze(-1)).squeeze(-1)
    q = target[:, :-1].gather(-1, chain.unsqueeze(-1)).squeeze(-1)
    return Terms(chain=chain, p=p, q=q, draft=draft, target=target)


def certify(terms: Terms, outputs: Mapping[str, torch.Tensor]) -> Iterator[Rejection]:
    """Whether there are numbers u from 0 to 1 that make these outputs.

    u p is rounded, but not beyond p: a token is never accepted if q is 0, and never rejected if q > p.
    """
    device, n = terms.p.device, terms.p.shape[1]
    tokens, accepted, emitted = (
        outputs[f"output_{name}"].long().to(device)
        for name in ("token_ids", "accepted_token_num", "emitted_draft_token_num")
    )
    place = torch.arange(n + 1, device=device)
    yield from _first(
        (emitted < 0) | (emitted > n), emitted, "output_emitted_draft_token_num", f"are not between 0 and {n}"
    )
    end = emitted.clamp(0, n).unsqueeze(-1)
    before, behind = place < end, place > end
    never, always = terms.q <= 0, terms.q > terms.p
    rules = (
        (before[:, :n] & (tokens[:, :n] != terms.chain), "emitted tokens are not those of the draft"),
        (before[:, :n] & never, "tokens are accepted that the target never draws"),
        ((place[:n] == end) & always, "tokens are rejected that are more likely than the draft says"),
        (behind & (tokens != -1), "places behind the last token are not -1"),
    )
    for wrong, what in rules:
        yield from _first(wrong, tokens, "output_token_ids", what)
    last = tokens.gather(-1, end)
    vocabulary = terms.target.shape[-1]
    yield from _first((last < 0) | (last >= vocabulary), last, "output_token_ids", "last tokens are out of range")
    drawn_from = terms.residual.gather(1, end.unsqueeze(-1).expand(-1, 1, vocabulary)).squeeze(1)
    weight = drawn_from.gather(-1, last.clamp(0, vocabulary - 1))
    # Where both agree in all tokens nothing is left to draw from, and nothing is said.
    wrong = (weight <= 0) & (drawn_from > 0).any(-1, keepdim=True)
    yield from _first(wrong, last, "output_token_ids", "last tokens are none that the target exceeds the draft in")
    low = emitted + (~before[:, :n] & always).sum(-1)
    high = emitted + (~before[:, :n] & ~never).sum(-1)
    yield from _first(
        (accepted < low) | (accepted > high),
        accepted,
        "output_accepted_token_num",
        "counts of accepted tokens cannot be",
    )


def _first(wrong: torch.Tensor, values: torch.Tensor, output: str, what: str) -> Iterator[Rejection]:
    if not bool(wrong.any()):
        return
    where = tuple(int(i) for i in wrong.nonzero()[0])
    value = int(values[where[: values.dim()]])
    at = f"request {where[0]}" + (f", place {where[1]}" if len(where) > 1 else "")
    yield Rejection(
        kind="WrongSupport", output=output, what=f"{int(wrong.sum())} {what}", details=(f"first at {at}: {value}",)
    )


def distribution(inputs: Mapping[str, torch.Tensor], device: str) -> torch.Tensor:
    """The probability of each last token and number of emitted ones, float64 [V (tokens + 1)], of one request."""
    exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    one = terms(exact, device)
    accept = torch.nn.functional.pad((one.q / one.p).clamp(max=1.0)[0], (0, 1))
    reached = torch.cat([torch.ones_like(accept[:1]), accept[:-1].cumprod(0)])
    residual = one.residual[0]
    total = residual.sum(-1, keepdim=True)
    shares = torch.where(total > 0, residual / total, 0.0)
    return ((reached * (1 - accept)).unsqueeze(-1) * shares).T.flatten()
