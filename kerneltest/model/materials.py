"""The tensors of a case: what goes in, what of it means nothing, and what must come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kerneltest.model.poison import Place

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadBytes:
    """Elements of an input that must not matter. ``mask`` is boolean, over the tensor's leading dimensions."""

    place: Place
    tensor: str
    mask: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """Shape and dtype (torch's name, such as ``bfloat16``) that an output must have."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """The tensors of a case on the host, built from its seed alone. Metadata (such as page tables) counts as input."""

    inputs: Mapping[str, torch.Tensor]
    dead: tuple[DeadBytes, ...]
    outputs: Mapping[str, OutputSpec]
