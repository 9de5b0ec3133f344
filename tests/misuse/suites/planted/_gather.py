"""The operator ``gather_sum``, as small as one can be that has data, indices, offsets and a parameter.

``out[b]`` is ``scale`` times the sum of the rows that ``indices`` names from ``indptr[b]`` to ``indptr[b + 1]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import (
    FP32,
    IEEE_FP32,
    Case,
    Device,
    ErrorBudget,
    InputStrategy,
    Materials,
    Numerics,
    Operator,
    OutputSpec,
    Size,
)

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherSum:
    lengths: tuple[int, ...]
    rows: int
    width: int
    scale: float = 1.0


def cases(size: Size) -> st.SearchStrategy[Case[GatherSum]]:
    from hypothesis import strategies as st

    axes = st.sampled_from(
        (
            GatherSum(lengths=(2,), rows=3, width=4),
            GatherSum(lengths=(2, 3), rows=5, width=8, scale=2.0),
        )
    )
    return st.builds(lambda axes: Case(operator="gather_sum", axes=axes, inputs="integers", seed=1), axes)


def materialize(case: Case[GatherSum]) -> Materials:
    """``rows`` [rows, width] float32, ``indices`` [sum of lengths] int32, ``indptr`` [batch + 1] int32."""
    import torch

    axes, random = case.axes, torch.Generator().manual_seed(case.seed)
    offsets = torch.tensor([0, *axes.lengths]).cumsum(0)
    return Materials(
        inputs={
            "rows": torch.randint(-8, 9, (axes.rows, axes.width), generator=random).float(),
            "indices": torch.randint(0, axes.rows, (int(offsets[-1]),), generator=random).int(),
            "indptr": offsets.int(),
        },
        dead=(),
        outputs={"out": OutputSpec(shape=(len(axes.lengths), axes.width), dtype="float32")},
    )


def summed(rows: torch.Tensor, indices: torch.Tensor, indptr: torch.Tensor, scale: float) -> Iterator[torch.Tensor]:
    """A row of the answer after the other, by plain indexing."""
    for begin, end in zip(indptr.tolist(), indptr.tolist()[1:], strict=False):
        yield rows[indices[begin:end].long()].sum(0) * scale


def reference(case: Case[GatherSum], inputs: Mapping[str, torch.Tensor], device: str) -> torch.Tensor:
    import torch

    x = inputs
    return torch.stack(list(summed(x["rows"].double(), x["indices"], x["indptr"], case.axes.scale)))


def budget(case: Any, terms: torch.Tensor, numerics: Numerics, strategy: InputStrategy) -> dict[str, ErrorBudget]:
    return {"out": ErrorBudget(ref=terms, hard=terms.new_zeros(terms.shape), out=FP32)}  # small integers are exact


def numerics(case: Case[GatherSum], device: Device) -> Numerics:
    return Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=FP32, out=FP32)


def locate(case: Case[GatherSum], output: str, index: tuple[int, ...]) -> str:
    return f"segment {index[0]}, element {index[1]}"


gather_sum = Operator(
    name="gather_sum",
    axes=GatherSum,
    inputs=(InputStrategy(name="integers", tier="exact"),),
    cases=cases,
    materialize=materialize,
    reference=reference,
    budget=budget,
    locate=locate,
    addresses={"indices": "rows"},
)
# One that cannot tell an index from any other integer.
plain_gather_sum = replace(gather_sum, addresses={})
