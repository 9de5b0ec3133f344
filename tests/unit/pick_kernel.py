"""An operator that picks weighted rows, and a kernel of it that believes everything: what bad input is tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kerneltest.model import (
    FP32,
    IEEE_FP32,
    Case,
    Device,
    ErrorBudget,
    InputStrategy,
    Kernel,
    Materials,
    Numerics,
    Operator,
    OutputSpec,
)

CPU = Device(kind="cpu", ordinal=0, name="", sm=(0, 0), units=1)
CUDA = replace(CPU, kind="cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Rows of data, each multiplied by ``scale`` and by its own weight, and then picked in some order."""

    rows: int = 3
    width: int = 4
    scale: float = 1.0
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.rounds > 1:
            raise ValueError("no")


def materialize(case: Case[Axes]) -> Materials:
    axes = case.axes
    return Materials(
        inputs={
            "data": torch.arange(axes.rows * axes.width).reshape(axes.rows, axes.width).float(),
            "weight": torch.arange(1, axes.rows + 1).float(),
            "order": torch.arange(axes.rows).flip(0).int(),
            "offsets": torch.tensor([0, 1, axes.rows], dtype=torch.int32),
            "count": torch.tensor([7, 9], dtype=torch.int64),
            "mask": torch.ones(axes.rows, dtype=torch.bool),
            "nothing": torch.zeros(0, dtype=torch.int32),
        },
        dead=(),
        outputs={"out": OutputSpec(shape=(axes.rows, axes.width), dtype="float32")},
    )


def picked(x: Any, scale: float) -> torch.Tensor:
    return (x["data"] * x["weight"].unsqueeze(-1) * scale)[x["order"].long()]


def launch(call: Any) -> dict[str, torch.Tensor]:
    """Believes everything."""
    call.outputs["out"].copy_(picked(call.inputs, call.case.axes.scale))
    return dict(call.outputs)


def budget(case: Any, terms: torch.Tensor, numerics: Any, strategy: Any) -> dict[str, ErrorBudget]:
    return {"out": ErrorBudget(ref=terms, hard=torch.zeros_like(terms), out=FP32)}


def operator(**more: Any) -> Operator:
    from hypothesis import strategies as st

    settings: dict[str, Any] = {
        "name": "pick",
        "axes": Axes,
        "inputs": (InputStrategy(name="integers", tier="exact"),),
        "cases": lambda size: st.sampled_from((3, 4)).map(case),
        "materialize": materialize,
        "reference": lambda case, inputs, device: picked(
            {name: value.double() for name, value in inputs.items()}, case.axes.scale
        ),
        "budget": budget,
        "locate": lambda case, output, index: str(index),
        "addresses": {"order": "data"},
    }
    return Operator(**(settings | more))


def kernel(launch: Callable[[Any], Any] = launch, **more: Any) -> Kernel:
    numerics = Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=FP32, out=FP32)
    settings = {"numerics": lambda case, device: numerics, "operator": operator()}
    return Kernel(name="pick", launch=launch, **(settings | more))


def case(rows: int = 3) -> Case[Axes]:
    return Case(operator="pick", axes=Axes(rows=rows), inputs="integers", seed=0)
