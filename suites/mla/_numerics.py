"""The declared arithmetic of a whole MLA layer: attention, and the projections around it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kerneltest.model import FP32, IEEE_FP32, AccModel, Fmt, Numerics


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaNumerics:
    """How a kernel of ``mla_attention`` computes.

    ``form``: "decompressed" if keys and values are made of the latents before anything else, "absorbed" if the queries
    are brought into the space of the latents, and the output back. ``attention``: of what lies between the projections,
    whose sums have an accumulator ``project``. Formats that a projection's result is rounded to: of ``key`` and
    ``value`` in the decompressed form, of ``query`` and ``latent`` (the output before W_UV) in the absorbed one. A
    result that stays in fp32 has that.

    Raises ValueError for a format that the form has no use for.
    """

    form: Literal["decompressed", "absorbed"]
    attention: Numerics
    project: AccModel = IEEE_FP32
    key: Fmt = FP32
    value: Fmt = FP32
    query: Fmt = FP32
    latent: Fmt = FP32

    def __post_init__(self) -> None:
        if self.form not in ("decompressed", "absorbed"):
            raise ValueError(f"form must be 'decompressed' or 'absorbed', got {self.form!r}")
        foreign = ("query", "latent") if self.form == "decompressed" else ("key", "value")
        for name in foreign:
            if getattr(self, name) is not FP32:
                raise ValueError(f"the {self.form} form has no {name} to round to {getattr(self, name).name}")
        if self.attention.dequant is not None:
            raise ValueError("a quantised cache has no budget here")

    @property
    def slack(self) -> float:
        return self.attention.slack

    @property
    def batch_invariant(self) -> bool:
        return self.attention.batch_invariant

    @property
    def lse_base(self) -> Literal["e", "2"] | None:
        return self.attention.lse_base

    @property
    def plain(self) -> MlaNumerics:
        """The same kernel in nothing but fp32."""
        return replace(
            self,
            attention=self.attention.plain,
            project=IEEE_FP32,
            key=FP32,
            value=FP32,
            query=FP32,
            latent=FP32,
        )
