"""The operator ``chain_speculative_sampling``: a target model checks a chain of tokens that a draft model has drawn.

Leviathan et al. (arXiv 2211.17192). From the left, a token is accepted with probability min(1, q / p), q and p what the
target and the draft say of it: iff u p < q for a uniform u. At the first that is not, a token is drawn from what q
exceeds p by, and the rest is -1; after a chain that is accepted as a whole, one is drawn from the target. ``emitted``
counts the tokens of the chain that are put out, ``accepted`` goes on behind the first rejection with random numbers of
its own: the tokens that would be accepted each by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Case, Draws, Materials, Operator, OutputSpec, Rejection, Size

from ._axes import CELLS, MOST_CELLS, SWITCHES, strategies
from ._chain import Chain
from ._operators import no_budget
from ._portfolio import rows_of

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st

    from ._semantics import Semantics

NAME = "chain_speculative_sampling"
INPUTS = strategies("generic", "close", "equal", "disjoint", "masked", "peaked", "zipf", "dyadic")
LONGEST = 8


def cases(size: Size) -> st.SearchStrategy[Case[Chain]]:
    """Draw cases up to ``size``; the simplest is one token of two."""
    from hypothesis import strategies as st

    from kerneltest.strategies import edges

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case[Chain]:
        vocabulary = draw(edges(size.vocabulary, *SWITCHES, minimum=2))
        tokens = draw(st.integers(1, LONGEST))
        cells = min(draw(st.sampled_from(CELLS)), size.rows * size.vocabulary, MOST_CELLS) // (2 * tokens + 1)
        rows = draw(edges(max(1, min(size.rows, cells // vocabulary)), 16, 128, minimum=1))
        axes = Chain(
            rows=rows,
            tokens=tokens,
            vocabulary=vocabulary,
            shared=draw(st.booleans()),
            device_seed=draw(st.booleans()),
        )
        inputs = draw(st.sampled_from([strategy.name for strategy in INPUTS]))
        return Case(operator=NAME, axes=axes, inputs=inputs, seed=draw(st.integers(0, 2**32 - 1)))

    return draw_case()


def materialize(case: Case[Chain]) -> Materials:
    """Host tensors: ``draft_probs`` [rows, tokens, V], ``target_probs`` [rows, tokens + 1, V] in float32,
    ``draft_token_ids`` int32 [rows, tokens], drawn from the draft; ``seed`` and ``offset`` int64 [1].
    """
    from ._speculation import materials

    axes = case.axes
    counts = OutputSpec(shape=(axes.rows,), dtype="int32")
    outputs = {
        "output_token_ids": OutputSpec(shape=(axes.rows, axes.tokens + 1), dtype="int32"),
        "output_accepted_token_num": counts,
        "output_emitted_draft_token_num": counts,
    }
    return Materials(inputs=materials(case), dead=(), outputs=outputs)


def reference(case: Case[Chain], inputs: Mapping[str, torch.Tensor], device: str) -> Any:
    """The probabilities of the chain's tokens, and all others, on the device."""
    from ._speculation import terms

    return terms(inputs, device)


def certify(
    case: Case[Chain], terms: Any, semantics: Semantics, outputs: Mapping[str, torch.Tensor]
) -> Iterable[Rejection]:
    """Whether some random numbers make these outputs; see :func:`._speculation.certify`."""
    from ._speculation import certify as certified

    return certified(terms, outputs)


def locate(case: Case[Chain], output: str, index: tuple[int, ...]) -> str:
    """An index in words."""
    return f"request {index[0]}" + (f", place {index[1]}" if len(index) > 1 else "")


def simpler(case: Case[Chain]) -> Iterator[Case[Chain]]:
    """The case with fewer rows or tokens, or a choice at its simplest."""
    axes = case.axes
    changes: list[dict[str, Any]] = [{"shared": False}, {"device_seed": False}]
    changes += [{"rows": rows} for rows in (1, axes.rows // 2)] + [{"tokens": n} for n in (1, axes.tokens - 1)]
    changes += [{"vocabulary": v} for v in (2, axes.vocabulary // 2, axes.vocabulary - 1)]
    for change in changes:
        ((name, value),) = change.items()
        if value < getattr(axes, name) and (value >= 1 or value is False) and (name != "vocabulary" or value > 1):
            yield replace(case, axes=replace(axes, **change))
    if case.inputs != INPUTS[0].name:
        yield replace(case, inputs=INPUTS[0].name)
    if case.seed:
        yield replace(case, seed=0)


def portfolio(size: Size) -> tuple[Case[Chain], ...]:
    """Equal requests, many of them, whose draft and target differ by much, by little, and not at all."""
    bases = (
        ("generic", 2, 1),
        ("close", 32, 3),
        ("masked", 1000, 2),
        ("zipf", 1000, 1),
        ("close", 4000, 4),
        ("generic", 32_000, 3),
        ("close", 128_256, 2),
    )
    return tuple(
        Case(
            operator=NAME,
            axes=Chain(
                rows=max(1, rows_of(size, vocabulary * (2 * tokens + 1))),
                tokens=tokens,
                vocabulary=vocabulary,
                shared=True,
            ),
            inputs=inputs,
            seed=11 + number,
        )
        for number, (inputs, vocabulary, tokens) in enumerate(bases)
        if vocabulary <= size.vocabulary
    )


def probabilities(case: Case[Chain], inputs: Mapping[str, torch.Tensor], device: str) -> torch.Tensor:
    """The distribution of how many tokens are emitted and which comes next, float64 [V (tokens + 1)]."""
    from ._speculation import distribution

    return distribution({name: value[:1] for name, value in inputs.items()}, device)


def categories(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The token behind the emitted ones, and how many those are, as one number: token (tokens + 1) + emitted."""
    tokens, emitted = outputs["output_token_ids"].long(), outputs["output_emitted_draft_token_num"].long()
    return tokens.gather(-1, emitted.unsqueeze(-1)).squeeze(-1) * tokens.shape[-1] + emitted


chain_speculative_sampling = Operator(
    name=NAME,
    axes=Chain,
    inputs=INPUTS,
    cases=cases,
    materialize=materialize,
    reference=reference,
    budget=no_budget,
    locate=locate,
    simpler=simpler,
    addresses={"draft_token_ids": ("draft_probs", -1)},
    certified=("output_token_ids", "output_accepted_token_num", "output_emitted_draft_token_num"),
    certify=certify,
    draws=Draws(cases=portfolio, probabilities=probabilities, categories=categories),
)
