"""The error budget of attention with an online softmax, from the terms that a reference supplies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

from kerneltest.model import FP32, AccModel, ErrorBudget, Noise, Numerics
from kerneltest.model.numerics import DIVISION, FLUSHED, LOGARITHM, TYPICAL_ROUNDING, WORST_ROUNDING
from kerneltest.oracle.attention_terms import AttentionTerms
from kerneltest.oracle.rounding import Z

# How many units roundoff a row may be away from a single value for rounding to take it back there. From 3 on, rows of
# 512 channels that were rounded twice stayed within two standard deviations; half of the rest is the √2 below.
ROUNDED_BACK = 6


def attention_budget(
    terms: AttentionTerms,
    numerics: Numerics,
    *,
    head_dim: int,
    tier: Literal["exact", "hard", "generic"] = "hard",
    softcap: float = 0.0,
) -> dict[str, ErrorBudget]:
    """The budgets of ``out`` and, where the kernel returns one, ``lse`` (in the base that it returns).

    With u = 2^-24, γ an accumulator's bound, T the number of rescales, n the number of keys of a row, m the
    largest score, B1 = Σ p|v| and o the output:

    * a score is off by ε_j = (γ_qk(d) + u_dq) A_j + 4u (|s_j| + |m|) + tanh_rel min(A_j, softcap), where
      |s_j| <= A_j and |m| <= max A; that moves the output by Σ p_j ε_j (|v_j| + |o|);
    * a weight passes its own exponential and up to T rescales: ω (B1 + |o|), ω = (1 + T) exp_rel + 2uT;
    * sums and division: γ_pv(n) B1 + (γ_l(n) + 2^-22) |o|, and u_dq B1 where V is dequantised with rounding;
    * rounding p to its format: u_P B1 (exact worst case), and η_P exp(m - lse) Σ|v| below its normal range.
      When the denominator sums the rounded p as well, o moves by Σ p_j δ_j (v_j - o): u_P |o| on top;
    * rounding partial outputs to a format narrower than fp32: u_part Σ_s w_s |o_s| <= u_part B1,
      and η_part below its normal range, as often as they are rounded;
    * flushing subnormal numbers to zero: 2^-126 for each key and for the output.

    A bias b_j of the scores (ALiBi: slope · (j - i), exact but for the slope) adds to ε_j, see :class:`_BiasErrors`.

    The log-sum-exp is off by Σ p_j ε_j + ω + γ_l(n) + 4u |lse| + 2^-21, and u_P where it sums the rounded p.

    ``exact`` inputs make every p a number that needs no rounding. On ``generic`` ones the rounding of p is noise of
    standard deviation 0.425 u_P (Σ p²v²)^½, see :func:`_noise`, and the log-sum-exp is judged by noise alone.
    """
    row = _RowErrors(terms, numerics, head_dim, softcap)
    o, u_dq = terms.out.abs(), numerics.dequant.u if numerics.dequant else 0.0
    # All factors of Σ p|v| and of |o| together first: rows are fewer than channels, and each operation is a pass.
    of_abs_out = row.largest + row.weight + row.gamma_pv + u_dq
    of_out = row.score_row + row.weight + row.gamma_l + DIVISION
    of_peak_out = FLUSHED if tier == "exact" else FLUSHED + numerics.p.eta
    systematic = row.score_out + FLUSHED * (terms.keys + 1).unsqueeze(-1)
    systematic.addcmul_(of_abs_out.unsqueeze(-1), terms.abs_out)
    systematic.addcmul_(of_out.unsqueeze(-1), o)
    systematic.add_(terms.peak_out, alpha=of_peak_out)
    hard = systematic
    if tier != "exact":
        hard = torch.add(hard, terms.abs_out, alpha=numerics.p.u)
        if numerics.l_from == "rounded_p":
            # Both sums are off by u_P at most, so their quotient by u_P / (1 - u_P).
            hard = (hard + numerics.p.u * o) / (1 - numerics.p.u)
    if numerics.partial.t < FP32.t:
        times = numerics.partial_roundings
        hard = hard + ((1 + numerics.partial.u) ** times - 1) * terms.abs_out + times * numerics.partial.eta
    slack, noise = numerics.slack, None
    scores, weight, gamma_l = row.score_row, row.weight, row.gamma_l
    if tier == "generic":
        noisy = _RowNoise(terms, numerics, row, head_dim, softcap)
        scores, weight, gamma_l = noisy.score_sum, noisy.weight, noisy.gamma_l
        if terms.spread:
            noise = _noise(terms, numerics, noisy, systematic)
    budgets = {"out": ErrorBudget(ref=terms.out, hard=slack * hard, out=numerics.out, noise=noise)}
    if numerics.lse_base is not None:
        nats = scores + weight + gamma_l + 4 * FP32.u * terms.lse.abs().nan_to_num(posinf=0.0) + LOGARITHM
        if numerics.l_from == "rounded_p" and tier != "exact":
            rounding = torch.full_like(nats, numerics.p.u)
            if tier == "generic":
                rounding = rounding.clamp(max=Z * WORST_ROUNDING * numerics.p.u * terms.square_row.sqrt())
            nats = nats + rounding
        unit = slack if numerics.lse_base == "e" else slack / math.log(2.0)
        scaled = terms.lse if numerics.lse_base == "e" else terms.lse / math.log(2.0)
        budgets["lse"] = ErrorBudget(ref=scaled, hard=nats * unit, out=FP32, minus_inf=numerics.lse_no_key)
    return budgets


class _RowErrors:
    """The errors that belong to a row, not to an output channel: of scores, weights and sums."""

    def __init__(self, terms: AttentionTerms, numerics: Numerics, head_dim: int, softcap: float) -> None:
        u = FP32.u
        relative = numerics.qk.gamma(head_dim) + (numerics.dequant.u if numerics.dequant else 0.0) + 4 * u
        alive = (terms.keys > 0).double()
        rescales = torch.ceil(terms.keys / numerics.tile)
        before_cap_out, before_cap_row = terms.dot_out, terms.dot_row  # Σ p |s| |v| and Σ p |s| at most
        self.bias: _BiasErrors | None = None
        # A part of Σ p ε |v| that is a factor of Σ p|v| is kept apart from the rest of it.
        self.largest = 4 * u * terms.dot_max
        if terms.bias_row is not None and terms.bias_out is not None:
            self.bias = _BiasErrors(terms, numerics, softcap, rescales, terms.dot_max)
            relative += self.bias.of_dot
            self.largest = self.bias.largest
            before_cap_out, before_cap_row = before_cap_out + terms.bias_out, before_cap_row + terms.bias_row
        self.score_out = relative * terms.dot_out
        self.score_row = relative * terms.dot_row + self.largest * alive
        self.score_max = relative * terms.dot_max + self.largest
        if self.bias:
            self.score_out = self.score_out + self.bias.out
            self.score_row = self.score_row + self.bias.row
        if softcap:
            rel = numerics.tanh_rel
            self.score_out = self.score_out + rel * torch.minimum(before_cap_out, softcap * terms.abs_out)
            self.score_row = self.score_row + rel * torch.minimum(before_cap_row, softcap * alive)
            self.score_max = self.score_max + rel * (softcap if self.bias else terms.dot_max.clamp(max=softcap))
        self.weight = (1 + rescales) * numerics.exp_rel + 2 * u * rescales
        self.lengths = _Lengths(terms.keys)
        self.gamma_pv = self.lengths.each(numerics.pv.gamma)
        self.gamma_l = self.lengths.each(numerics.row_sum.gamma)


class _BiasErrors:
    """What a bias b_j that is added to the scaled scores, in fp32, does to the errors of the scores.

    * The bias is off by its slope and one product: (slope_rel + u) |b_j|. The score is a sum now, which is rounded,
      and the scale and log2 e are no longer one factor: 2u A_j + u |b_j|. With a soft-cap there are three roundings
      before it, of a reciprocal (two) and a product, and one more after it: 4u (A_j + |b_j|).
    * 4u |s_j| <= 4u (A_j + |b_j|), of which 4u A_j is there without a bias.
    * 4u |m| with |m| <= |lse| + ln n, because m <= lse <= m + ln n. While keys go by, the running maximum lies between
      s_j and m: it is no larger than both together.
    * Scores grow with their bias, along the keys, and with them the running maximum: it is renewed in each tile. Where
      a rescale is 2^(m log2 e - m' log2 e) with one of the products rounded and the other not (a fused multiply-add,
      as of FlashInfer's prefill.cuh:1622), that is u |m| each time, however close the two are: T u (|s_j| + |m|).

    ``of_dot`` is the factor of A_j; ``out`` and ``row`` are Σ p ε |v| and Σ p ε of what |b_j| is a factor of;
    ``largest`` is what ε has of the rest, for whatever key. ``dot_max``: the largest |s_j - b_j|, or more;
    ``rescales``: T, or where those roundings are noise, how many of them all together amount to.
    """

    def __init__(
        self, terms: AttentionTerms, numerics: Numerics, softcap: float, rescales: torch.Tensor, dot_max: torch.Tensor
    ) -> None:
        assert terms.bias_row is not None
        assert terms.bias_out is not None
        u, capped = FP32.u, 4 * FP32.u if softcap else 0.0
        of_bias = numerics.slope_rel + (6 + rescales) * u + capped
        peak = terms.lse.abs().nan_to_num(posinf=0.0) + terms.keys.clamp(min=1).log()
        self.of_dot = 2 * u + capped
        self.out = of_bias.unsqueeze(-1) * terms.bias_out
        self.row = of_bias * terms.bias_row
        self.largest = (4 + rescales) * u * peak + rescales * u * dot_max


class _RowNoise:
    """The same on independent random inputs, whose partial sums stay small and whose errors mostly have no direction.

    The partial sums of q·k are a random walk that ends at s: in root mean square (s² / 3 + N² / 6)^½ with
    N² = Σ q²k²; with (s² + 2N²)^½ for it, a walk and its errors exceed Z deviations with a probability of 4e-17.
    The running maximum of n random tiles is renewed about ln n times, not n times, and a rescale by 1 costs nothing;
    with a bias, which grows along the keys, it is n times.
    """

    def __init__(
        self, terms: AttentionTerms, numerics: Numerics, row: _RowErrors, head_dim: int, softcap: float
    ) -> None:
        u, qk = FP32.u, numerics.qk
        s, n = terms.score_max.square(), terms.norm_max.square()
        dequant = numerics.dequant.u if numerics.dequant else 0.0
        directed = qk.bias(head_dim) * (s + n).sqrt() + 8 * u * terms.score_max
        tiles = torch.ceil(terms.keys / numerics.tile)
        rescales = torch.minimum(tiles, 12 + 4 * torch.log(tiles + 1))
        self.bias: _BiasErrors | None = None
        if row.bias:
            # Its roundings of the running maximum are of as many different numbers: noise, too.
            rescales, rounded = tiles, torch.minimum(tiles, Z * WORST_ROUNDING * tiles.sqrt())
            self.bias = _BiasErrors(terms, numerics, softcap, rounded, terms.score_max)
            directed = directed + self.bias.of_dot * terms.score_max + self.bias.largest
        if softcap:
            directed = directed + numerics.tanh_rel * (softcap if row.bias else terms.score_max)
        # One standard deviation of a score's error; what has a direction, of scores and of weights.
        self.score = qk.deviation(head_dim) * (s + 2 * n).sqrt() + dequant * terms.norm_max
        self.weight = (1 + rescales) * numerics.exp_rel + 2 * u * rescales
        self.directed = torch.minimum(directed, row.score_max) + self.weight
        of_bias = self.bias.row if self.bias else 0.0
        self.score_sum = torch.minimum(row.score_row, directed + of_bias + Z * self.score * terms.square_row.sqrt())
        self.gamma_l = row.lengths.each(lambda n: _noise_gamma(numerics.row_sum, n))
        self.bias_pv = row.lengths.each(numerics.pv.bias)
        self.deviation_pv = row.lengths.each(numerics.pv.deviation)


def _noise(terms: AttentionTerms, numerics: Numerics, row: _RowNoise, bound: torch.Tensor) -> Noise:
    """Errors on independent random inputs, where V has nothing to do with the weights' errors.

    A weight that is off by ω_j moves the output by Σ p_j ω_j (v_j - o), a sum of terms of random sign: at most
    Z ω (Σ p²(v - o)²)^½. Along a filter w, whatever the signs, Cauchy and Schwarz allow ω n^½ (Σ p² ((v - o)·w)²)^½.
    Partial sums of P·V stay within |o| + 8 (Σ p²v²)^½, not Σ p|v|. ``bound``: what ``det`` can never exceed.
    """
    o, b2, s2 = terms.out.abs(), terms.square_out.sqrt(), terms.square_row.sqrt()
    centred = numerics.l_from == "rounded_p"
    away = b2 + o * s2.unsqueeze(-1)
    others = (
        row.bias_pv.unsqueeze(-1) * (o + 8 * b2)
        + (row.gamma_l + DIVISION).unsqueeze(-1) * o
        + (FLUSHED + numerics.p.eta) * terms.peak_out
        + FLUSHED * (terms.keys.unsqueeze(-1) + 1)
    )
    if row.bias:
        # A bias is no random number, and what it costs no noise.
        others = others + row.bias.out + row.bias.row.unsqueeze(-1) * o
    # Noise that no other element shares: of P·V's sums, V's dequantisation and partial outputs.
    own = (row.deviation_pv.unsqueeze(-1) * (o + 3 * b2)).square()
    if numerics.dequant:
        own = own + (TYPICAL_ROUNDING * numerics.dequant.u) ** 2 * terms.square_out
    if numerics.partial.t < FP32.t:
        each = (TYPICAL_ROUNDING * numerics.partial.u) ** 2 * (o.square() + terms.square_out)
        own = own + numerics.partial_roundings * each
        others = others + numerics.partial_roundings * numerics.partial.eta
    # Noise of weights, of which every channel has some: of rounding P, and of scores.
    u_p, score = TYPICAL_ROUNDING * numerics.p.u, row.score
    shared = (u_p * (away if centred else b2)).square() + (score.unsqueeze(-1) * away).square()
    slack, spread = numerics.slack, terms.spread
    assert spread is not None, "the caller checks it"

    def along(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rounded, whole = spread(weight, centred), (terms.out * weight).sum(-1).abs()
        moved = rounded if centred else rounded + whole * s2
        variance = (u_p * rounded).square() + (score * moved).square() + (weight.square() * own).sum(-1)
        bias = row.directed * terms.keys.sqrt() * moved + (others * weight.abs()).sum(-1)
        bias = bias + _rounded_back(moved, whole, numerics.out.u)
        return slack * variance.sqrt(), slack * bias

    return Noise(
        det=slack * torch.minimum(Z * row.directed.unsqueeze(-1) * away + others, bound),
        sigma=slack * (shared + own).sqrt(),
        # The effective number of terms in a sum of noise of variances p².
        freedom=torch.where(terms.fourth_row > 0, terms.square_row.square() / terms.fourth_row, 1.0),
        along=along,
    )


def _rounded_back(moved: torch.Tensor, whole: torch.Tensor, u: float) -> torch.Tensor:
    """What rounding outputs may amount to along a filter where one value v makes up nearly all of a row.

    Values are numbers of the output's format, or a coarser one, so that v + δ is rounded back to v as long as |δ| is
    less than half a unit. Then the error is -δ in every channel, along v and not at random; of larger δ the channels'
    mantissas make noise. Partial outputs that are rounded before add nothing: each is nearer to v than the whole.
    ``whole`` is o·w, and ``moved``, (Σ p² ((v - o)·w)²)^½ or more, between ε and √2 ε of it for a row of which a share
    of ε is not v. Of rows of many independent values it is about d^-½ or more, which is not that little.
    """
    return torch.where(moved < ROUNDED_BACK * u * whole, torch.minimum(moved, u * whole), 0.0)


class _Lengths:
    """The different numbers of keys, found once: a device is waited for when they come to the host."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys
        lengths, self.where = torch.unique(keys, return_inverse=True)
        self.lengths: list[float] = lengths.tolist()

    def each(self, bound: Callable[[float], float]) -> torch.Tensor:
        """The bound for each row's number of keys."""
        return self.keys.new_tensor([bound(n) for n in self.lengths])[self.where]


def _noise_gamma(acc: AccModel, keys: float) -> float:
    """The accumulator's bound as a share of a random walk's largest partial sum."""
    return min(acc.gamma(keys), acc.bias(keys) + Z * acc.deviation(keys))
