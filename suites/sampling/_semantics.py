"""What a kernel declares of its filters: what happens at a border, and in how many roundings a mass is added up.

Libraries differ in all of it, and so do releases of one library. None of it is a tolerance: it says which tokens are
right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from kerneltest.model import FP32, SUM_FP32, AccModel, Case, Fmt

if TYPE_CHECKING:
    import torch

    from kerneltest.oracle.softmax import SoftmaxNumerics

    from ._certify import Terms

Ties = Literal["kept", "index", "reverse", "any"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inverse:
    """The promise that a draw is the first token whose running sum, in the order of the vocabulary, is above a number.

    ``numbers(case, terms)``: the random number of each draw of the first launch, float64 [draws] where the terms lie.
    ``scaled``: it is multiplied, in float32, by the sum of all that is drawn from.
    """

    numbers: Callable[[Case[Any], Terms], torch.Tensor]
    scaled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Semantics:
    """The declared meaning and arithmetic of a sampler, a renormalisation, a mask or a selection.

    ``mass``: how probabilities are added up to be compared with p. ``radix``: they are found by radix selection over
    histograms instead, added by float atomics or as integers. ``through_self``: the mass before a token is the running
    sum minus its own. ``strict``: a token stays while that mass is less than p; otherwise, while it is no more.
    ``relative``: p is a share of the row's sum; otherwise it is p itself. ``blur``: how close, as a share, two values
    may be for the search of the border to take them for one. ``nucleus_ties`` and ``top_k_ties``: what becomes of
    tokens with the value of the last that is kept (see :mod:`kerneltest.oracle.support`). ``row_sum``: how the kept are
    added up to be divided by. ``flushes``: subnormal numbers are taken for zeros. ``softmax``: the arithmetic of a
    kernel that makes probabilities of logits itself. ``out``: the format of probabilities that are put out.
    ``inverse``: the random numbers of a kernel that draws by inverse transform, and promises which it uses.

    Raises ValueError for a slack below 1.
    """

    mass: AccModel = SUM_FP32
    radix: Literal["", "atomic", "integer"] = ""
    through_self: bool = False
    strict: bool = True
    relative: bool = False
    blur: float = 0.0
    nucleus_ties: Ties = "kept"
    top_k_ties: Ties = "kept"
    row_sum: AccModel = SUM_FP32
    flushes: bool = False
    softmax: SoftmaxNumerics | None = None
    out: Fmt = FP32
    inverse: Inverse | None = None
    batch_invariant: bool = True
    slack: float = 1.0

    def __post_init__(self) -> None:
        if self.slack < 1:
            raise ValueError(f"slack must be at least 1, got {self.slack}")

    @property
    def plain(self) -> Semantics:
        """The same rules with plain sums in fp32."""
        return replace(self, mass=SUM_FP32, radix="", row_sum=SUM_FP32, slack=1.0)
