"""The sampling suite, loaded the way a run loads it, and short ways to make cases of it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from attention_cases import draws

from kerneltest import discovery
from kerneltest.model import Case, Device

__all__ = ["CPU", "H200", "case", "draws", "module"]
torch.set_num_threads(1)
CPU = Device(kind="cpu", ordinal=0, name="a CPU", sm=(0, 0), units=1)
H200 = Device(kind="cuda", ordinal=0, name="NVIDIA H200", sm=(9, 0), units=132)


def module(name: str) -> Any:
    """A file of the suite."""
    return importlib.import_module(f"{discovery.PACKAGE}.sampling.{name}")


def case(operator: str = "", inputs: str = "generic", seed: int = 0, **axes: Any) -> Case[Any]:
    """A case on rows of a vocabulary."""
    return Case(
        operator=operator, axes=module("_axes").Rows(**{"rows": 1, "vocabulary": 16} | axes), inputs=inputs, seed=seed
    )
