"""The axes of merging attention states, and what a kernel declares of its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kerneltest.model import FP32, Fmt
from kerneltest.model.numerics import EX2_APPROX

DTYPES = (*["bfloat16"] * 3, "float16")
# What FlashInfer up to 0.6.18 writes in place of -Inf (math.cuh: ``inf = 5e4``).
STAND_IN = -5e4


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeStates:
    """Axes of a case: ``states`` of ``rows`` queries and ``heads``. ``masked``: only some rows are merged, in place."""

    rows: int
    states: int
    heads: int
    head_dim: int
    dtype: str
    masked: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "states", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(sorted(set(DTYPES)))}, got {self.dtype!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeNumerics:
    """The declared arithmetic of a merge in fp32, the result rounded once to ``out``.

    ``lse_base`` of the log-sum-exps that it takes and returns. ``exp_rel``: the relative error of its exponential.
    ``rounds``: how often merged states are merged again, their outputs rounded to ``partial`` in between. States whose
    log-sum-exp is ``lse_no_key`` or less stand for no keys: all of them together may return as much, or less.
    ``batch_invariant`` promises that the bits of a row do not depend on its place among the others.
    """

    out: Fmt
    lse_base: Literal["e", "2"]
    exp_rel: float = EX2_APPROX
    rounds: int = 0
    partial: Fmt = FP32
    lse_no_key: float = float("-inf")
    batch_invariant: bool = False
    slack: float = 1.0

    def __post_init__(self) -> None:
        if self.lse_base not in ("e", "2"):
            raise ValueError(f"lse_base must be 'e' or '2', got {self.lse_base!r}")
        if self.rounds < 0 or not 0 <= self.exp_rel < 1:
            raise ValueError(f"rounds must be at least 0, exp_rel in [0, 1), got {self.rounds} and {self.exp_rel}")

    @property
    def plain(self) -> MergeNumerics:
        """The same kernel in nothing but fp32, all states at once."""
        return replace(self, exp_rel=EX2_APPROX, rounds=0, partial=FP32, slack=1.0)
