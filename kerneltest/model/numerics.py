"""What a kernel declares about its arithmetic. The error budget is computed from this and the reference alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Fmt:
    """A binary floating-point format with ``t`` significant bits and normal exponents ``emin`` to ``emax``.

    ``nan_on_top``: the largest significand of the largest exponent is NaN, as in E4M3 without infinities.
    """

    name: str
    t: int
    emin: int
    emax: int
    nan_on_top: bool = False

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
        return (2.0 - (2 if self.nan_on_top else 1) * 2.0 ** (1 - self.t)) * 2.0**self.emax


FP32 = Fmt("float32", 24, -126, 127)
FP16 = Fmt("float16", 11, -14, 15)
BF16 = Fmt("bfloat16", 8, -126, 127)
# Micikevicius et al., FP8 formats for deep learning, arXiv 2209.05433, table 1.
E4M3 = Fmt("float8_e4m3fn", 4, -6, 8, nan_on_top=True)
E5M2 = Fmt("float8_e5m2", 3, -14, 15)
# By torch's name of the dtype.
FORMATS = {fmt.name: fmt for fmt in (BF16, FP16, FP32, E4M3, E5M2)}


@dataclass(frozen=True, slots=True)
class AccModel:
    """An accumulator: significant bits, rounding, and how many products enter it in one step.

    Tensor cores add ``k_step`` products and the accumulator at once: all of them are aligned to the largest and cut off
    ``align`` bits below the accumulator's last, then their sum is cut to ``bits`` (Khattak and Mikaitis, arXiv
    2512.07004; None: nothing is lost in alignment). Where ``promote`` is given, the accumulator is added to one in fp32
    and cleared after that many products. ``extra`` counts the roundings that no step does: a product that is rounded
    before it is added, a factor in an epilogue.
    """

    bits: int
    rounding: Literal["rz", "rne"]
    k_step: int
    promote: int | None = None
    extra: int = 2
    align: int | None = None

    def __post_init__(self) -> None:
        if self.rounding not in ("rz", "rne"):
            raise ValueError(f"rounding must be 'rz' or 'rne', got {self.rounding!r}")
        if not 2 <= self.bits <= 53:
            raise ValueError(f"bits must be 2 to 53, got {self.bits}")
        if self.k_step < 1 or self.extra < 0:
            raise ValueError(f"k_step must be at least 1 and extra at least 0, got {self.k_step} and {self.extra}")
        if self.promote is not None and self.promote < self.k_step:
            raise ValueError(f"promote must be at least k_step, got {self.promote} and {self.k_step}")
        if self.align is not None and self.align < 0:
            raise ValueError(f"align must be at least 0, got {self.align}")

    @property
    def u(self) -> float:
        """Relative error of one rounding."""
        return 2.0 ** -(self.bits - 1 if self.rounding == "rz" else self.bits)

    def gamma(self, k: float) -> float:
        """Bound on the error of a dot product of length ``k``, as a share of Σ|a||b|.

        (ceil(k / k_step) (1 + (k_step + 1) 2^-align) + extra) u; with promotion one such chunk of ``promote`` products,
        and (ceil(k / promote) + extra) 2^-24.
        """
        cut = 0.0 if self.align is None else (self.k_step + 1) * 2.0**-self.align
        if self.promote is None or k <= self.promote:
            return (math.ceil(k / self.k_step) * (1 + cut) + self.extra) * self.u
        return (
            math.ceil(self.promote / self.k_step) * (1 + cut) * self.u
            + (math.ceil(k / self.promote) + self.extra) * FP32.u
        )

    def bias(self, k: float) -> float:
        """The part of :meth:`gamma` that has one direction on independent random products: cutting the sums."""
        if self.rounding == "rne":
            return 0.0
        steps = math.ceil(k / self.k_step) if self.promote is None else math.ceil(min(k, self.promote) / self.k_step)
        return (steps + self.extra) * self.u

    def deviation(self, k: float) -> float:
        """The standard deviation of the rest, as a share of the largest partial sum; WORST_ROUNDING for each error.

        Errors without a common direction grow with the root of their number (Higham and Mary, SIAM J. Sci. Comput. 41,
        2019).
        """
        length = k if self.promote is None else min(k, self.promote)
        steps = math.ceil(length / self.k_step)
        errors = 0.0 if self.align is None else steps * (self.k_step + 1) * 4.0**-self.align
        if self.rounding == "rne":
            errors += steps + self.extra
        promotions = 0 if self.promote is None else math.ceil(k / self.promote) + self.extra
        return WORST_ROUNDING * math.hypot(math.sqrt(errors) * self.u, math.sqrt(promotions) * FP32.u)


# Rounding x = m 2^e to nearest is off by something uniform in ±u |x| / m. Its standard deviation in units of u |x| is
# 0.425 when mantissas m are log-uniform, and 1/√3 at most; with that as its proxy it is sub-Gaussian whatever m is.
TYPICAL_ROUNDING = 0.425
WORST_ROUNDING = 1 / math.sqrt(3.0)

# Measured on an H200 by benchmarks/calibrate.py: wgmma and mma.sync, bf16 and fp16 alike.
WGMMA_16BIT = AccModel(24, "rz", 16, align=2)
# The same for fp8: 14 bits of the accumulator, and none below them.
WGMMA_8BIT = AccModel(14, "rz", 32, align=0)
# Plain fp32 fused multiply-adds: CUDA cores, and a CPU in whatever order its library adds.
IEEE_FP32 = AccModel(24, "rne", 1)
# A sum of numbers that are in fp32 already: n of them take n additions at most, in whatever order.
SUM_FP32 = AccModel(24, "rne", 1, extra=0)


# Relative error of ex2.approx.ftz.f32 as the PTX manual documents it; library exponentials are better.
EX2_APPROX = 2.0**-22
# Relative error of tanh.approx.f32, as the PTX manual documents it; an H200 was seen to stay below 2^-16.
TANH_APPROX = 2.0**-11
# Relative error of a division, or of a reciprocal and a product; absolute error of a logarithm, in nats.
DIVISION = 2.0**-22
LOGARITHM = 2.0**-21
# Below this fp32 has no normal numbers: arithmetic that flushes them to zero is off by as much.
FLUSHED = 2.0**FP32.emin


class Arithmetic(Protocol):
    """What any operator's declared arithmetic has; the rest of it is between the operator's budget and its kernels.

    ``slack`` multiplies the error budget, ``batch_invariant`` promises that a request's bits do not depend on the
    others of its batch, ``plain`` is the same kernel in nothing but fp32.
    """

    @property
    def slack(self) -> float: ...

    @property
    def batch_invariant(self) -> bool: ...

    @property
    def plain(self) -> Arithmetic: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """The declared arithmetic of an attention kernel; a change of it is reviewed like a change of an API.

    ``p`` is the format that the unnormalised softmax weights are rounded to before P·V, ``l_from`` says whether the
    denominator sums them before or after that rounding, ``row_sum`` how. ``partial`` is the format of partial outputs
    where the keys are split, ``partial_roundings`` how often they are rounded to it on their way into the sum.
    ``dequant`` is the format that a quantised, scaled K or V is rounded to before it is
    multiplied (None: exact). ``unscaled``: the format that an output is rounded to before the scale of V multiplies it
    (None: it stays fp32). ``tile`` is the smallest number of keys between two rescales of the accumulator,
    ``exp_rel`` the relative error of its exponential, ``tanh_rel`` that of the soft-cap's tanh,
    ``slope_rel`` that of ALiBi's slopes as the kernel has them. ``lse_base`` is the
    base of the returned log-sum-exp (None: the kernel returns none); a row that sees no key may return
    ``lse_no_key`` or less: a finite stand-in for -Inf. ``batch_invariant`` promises that a request's bits do not depend
    on the others of its batch. ``slack`` multiplies the budget; above 1 it is shown in every report.

    Raises ValueError for arithmetic that cannot be.
    """

    qk: AccModel
    pv: AccModel
    p: Fmt
    out: Fmt
    l_from: Literal["fp32", "rounded_p"] = "fp32"
    row_sum: AccModel = SUM_FP32
    partial: Fmt = FP32
    partial_roundings: int = 1
    dequant: Fmt | None = None
    unscaled: Fmt | None = None
    tile: int = 16
    exp_rel: float = EX2_APPROX
    tanh_rel: float = TANH_APPROX
    slope_rel: float = FP32.u
    lse_base: Literal["e", "2"] | None = "e"
    lse_no_key: float = float("-inf")
    batch_invariant: bool = False
    slack: float = 1.0

    @property
    def plain(self) -> Numerics:
        """The same kernel in nothing but fp32: no declaration can be asked to be tighter than that."""
        return replace(
            self,
            qk=IEEE_FP32,
            pv=IEEE_FP32,
            p=FP32,
            l_from="fp32",
            row_sum=SUM_FP32,
            partial=FP32,
            dequant=None,
            unscaled=None,
            exp_rel=EX2_APPROX,
            tanh_rel=TANH_APPROX,
            slope_rel=FP32.u,
            slack=1.0,
        )

    def __post_init__(self) -> None:
        if self.lse_base not in ("e", "2", None):
            raise ValueError(f"lse_base must be 'e', '2' or None, got {self.lse_base!r}")
        if self.l_from not in ("fp32", "rounded_p"):
            raise ValueError(f"l_from must be 'fp32' or 'rounded_p', got {self.l_from!r}")
        if self.p.t < self.out.t:
            raise ValueError(f"p is {self.p.name}, narrower than the output's {self.out.name}")
        if self.partial.t < self.out.t:
            raise ValueError(f"partial is {self.partial.name}, narrower than the output's {self.out.name}")
        if self.partial_roundings < 1:
            raise ValueError(f"partial_roundings must be at least 1, got {self.partial_roundings}")
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1, got {self.tile}")
        if not (0 <= self.exp_rel < 1 and 0 <= self.tanh_rel < 1):
            raise ValueError(f"exp_rel and tanh_rel must lie in [0, 1), got {self.exp_rel} and {self.tanh_rel}")
        if not 0 <= self.slope_rel < 1:
            raise ValueError(f"slope_rel must lie in [0, 1), got {self.slope_rel}")
        if not 1 <= self.slack < math.inf:
            raise ValueError(f"slack must be at least 1 and finite, got {self.slack}")
