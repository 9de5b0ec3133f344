"""The fixed cases whose draws are counted over many launches and runs, and the distributions that they must follow.

All rows of a case are one distribution, and its borders are clear: every declared rule keeps the same tokens. The seeds
of heavy tails are chosen for their gaps: 6, 10, 14 and 18 nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from kerneltest.model import AccModel, Case, Size

from ._axes import MOST_CELLS, Rows
from ._semantics import Semantics

if TYPE_CHECKING:
    import torch

# Elements that the draws of a case may read, on a CPU; rows of a case where that allows it, on a CPU and on a GPU.
CPU_CELLS = 4_000_000
CPU_ROWS, CUDA_ROWS = 1024, 8192
SMALL_VOCABULARY = 1024
# A GPU's cases have more rows than this, a CPU's fewer.
GPU_SIZE = 100
# (inputs, vocabulary, seed): what is drawn from.
BASES: tuple[tuple[str, int, int], ...] = (
    ("generic", 2, 1),
    ("uniform", 17, 2),
    ("ties", 32, 3),
    ("dyadic", 64, 8),
    ("zipf", 1000, 4),
    ("heavy_tail", 1000, 5),
    ("heavy_tail", 5000, 2),
    ("zipf", 32_000, 5),
    ("heavy_tail", 32_000, 0),
    ("zipf", 128_256, 6),
    ("heavy_tail", 128_256, 14),
)
# Mass that filters may disagree about for no other reason than rounding.
CLEAR = 1e-4
# Half of the cases pick their one row by indices, the others have as many equal rows as draws.
INDICES: tuple[Literal["", "int32", "int64"], ...] = ("", "int32", "", "int64")
# A block scan, or better.
SUMS = AccModel(24, "rne", 1024, extra=64)


def portfolio(operator: str, *filters: Mapping[str, Any]) -> Callable[[Size], tuple[Case[Rows], ...]]:
    """Cases of an operator: each base with each of the ``filters`` whose parameters fit its vocabulary and values.

    A filter may name in ``"on"`` the inputs that its border is clear on; a ``top_k`` of 0 is the whole vocabulary.
    """

    def cases(size: Size) -> tuple[Case[Rows], ...]:
        found: list[Case[Rows]] = []
        for inputs, vocabulary, seed in BASES:
            if vocabulary > size.vocabulary:
                continue
            for chosen in filters or ({},):
                parameters = dict(chosen)
                if inputs not in parameters.pop("on", (inputs,)) or parameters.get("top_k", 1) > vocabulary:
                    continue
                if "top_k" in parameters:
                    parameters["top_k"] = parameters["top_k"] or vocabulary
                draws = rows_of(size, vocabulary)
                indices = INDICES[len(found) % len(INDICES)]
                more: dict[str, Any] = {"rows": draws, "shared": True}
                if indices:
                    more = {"rows": 1, "indices": indices, "outputs": draws}
                axes = Rows(vocabulary=vocabulary, **more, **parameters)
                found.append(Case(operator=operator, axes=axes, inputs=inputs, seed=seed))
        return tuple(found)

    return cases


def rows_of(size: Size, vocabulary: int) -> int:
    """Draws of one launch."""
    gpu = size.rows > GPU_SIZE
    most = CUDA_ROWS if gpu and vocabulary <= SMALL_VOCABULARY else CPU_ROWS
    return max(1, min(most, (MOST_CELLS if gpu else CPU_CELLS) // vocabulary))


def probabilities(case: Case[Rows], inputs: Mapping[str, torch.Tensor], device: str, *, logits: bool) -> torch.Tensor:
    """The exact distribution that every draw of the case follows, float64 [V].

    Raises ValueError if the border depends on what is done with equal tokens, or on how sums are rounded.
    """
    from . import _certify

    axes = replace(case.axes, rows=1, per_row=False)
    name = "logits" if logits else "probs"
    terms = _certify.reference(replace(case, axes=axes), {name: inputs[name][:1]}, device)
    # Exact probabilities, so that no kernel's own softmax comes into it.
    terms = replace(terms, values=terms.probs)
    kept, indexed = (
        _certify.support_of(
            replace(case, axes=axes),
            terms,
            Semantics(mass=SUMS, row_sum=SUMS, nucleus_ties=ties, top_k_ties=ties),
            logits=False,
        )
        for ties in ("kept", "index")
    )
    unclear = (kept.possible & ~kept.sure) | (indexed.possible ^ kept.possible) | (indexed.sure ^ kept.sure)
    if float(terms.probs[unclear].sum()) > CLEAR:
        raise ValueError(f"which tokens are left depends on the rule at the border: {case}")
    left = terms.probs.where(kept.possible, 0.0)[0]
    return left / left.sum()
