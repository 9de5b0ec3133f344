"""What a kernel declares about its arithmetic. The error budget is computed from this and the reference alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, slots=True)
class Fmt:
    """A binary floating-point format with ``t`` significant bits and normal exponents ``emin`` to ``emax``."""

    name: str
    t: int
    emin: int
    emax: int

    @property
    def u(self) -> float:
        """Unit roundoff, 2^-t: the largest relative error of rounding to nearest."""
        return 2.0**-self.t

    @property
    def eta(self) -> float:
        """Half of the smallest subnormal: the largest absolute error of rounding below the normal range."""
        return 2.0 ** (self.emin - self.t)

    @property
    def max(self) -> float:
        """The largest finite value."""
        return (2.0 - 2.0 ** (1 - self.t)) * 2.0**self.emax


FP32 = Fmt("float32", 24, -126, 127)
FP16 = Fmt("float16", 11, -14, 15)
BF16 = Fmt("bfloat16", 8, -126, 127)
# By torch's name of the dtype.
FORMATS = {fmt.name: fmt for fmt in (BF16, FP16, FP32)}


@dataclass(frozen=True, slots=True)
class AccModel:
    """An accumulator: significant bits, rounding, and how many products enter it in one step.

    Tensor cores truncate and add ``k_step`` products at once; see Khattak and Mikaitis, arXiv 2512.07004.
    """

    bits: int
    rounding: Literal["rz", "rne"]
    k_step: int

    # Cross-lane and epilogue additions that no k-step counts.
    EXTRA_STEPS: ClassVar[int] = 16

    def gamma(self, k: int) -> float:
        """Bound on the error, as a share of Σ|a||b|, of a dot product of length ``k``: (ceil(k / k_step) + 16) * u."""
        return (-(-k // self.k_step) + self.EXTRA_STEPS) * self.u

    @property
    def u(self) -> float:
        """Relative error of one step."""
        return 2.0 ** -(self.bits - 1 if self.rounding == "rz" else self.bits)


WGMMA_16BIT = AccModel(24, "rz", 16)
# Plain fp32 fused multiply-adds: CUDA cores, and a CPU in whatever order its library adds.
IEEE_FP32 = AccModel(24, "rne", 1)


# Relative error of ex2.approx.ftz.f32 as the PTX manual documents it; library exponentials are better.
EX2_APPROX = 2.0**-22


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """The declared arithmetic of an attention kernel; a change of it is reviewed like a change of an API.

    ``p`` is the format that the unnormalised softmax weights are rounded to before P·V, ``l_from`` says whether the
    denominator sums them before or after that rounding. ``partial`` is the format of partial outputs where the keys
    are split. ``tile`` is the smallest number of keys between two rescales of the accumulator, ``exp_rel`` the
    relative error of its exponential. ``lse_base`` is the base of the returned log-sum-exp (None: the kernel
    returns none), and a row that sees no key may return ``lse_no_key`` or less: a finite stand-in for -Inf.
    """

    qk: AccModel
    pv: AccModel
    p: Fmt
    out: Fmt
    l_from: Literal["fp32", "rounded_p"] = "fp32"
    partial: Fmt = FP32
    tile: int = 16
    exp_rel: float = EX2_APPROX
    lse_base: Literal["e", "2"] | None = "e"
    lse_no_key: float = float("-inf")
