"""The hard error budget of attention with an online softmax, and the terms that a reference must supply for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kerneltest.model import FP32, ErrorBudget, Numerics

# Relative error of the division (or reciprocal and product) at the end, and absolute error of the logarithm.
DIVISION = 2.0**-22
LOGARITHM = 2.0**-21


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTerms:
    """Float64 values of the reference, with p = softmax(s), s = scale * q·k, A = scale * Σ|q||k|, m = max s.

    Shapes: [rows, heads, d_v] for those with ``_out``, [rows, heads] for the others. All of them are sums
    over the visible keys of a row; a row that sees none has out = 0, lse = -Inf, the rest 0.
    """

    out: torch.Tensor
    lse: torch.Tensor  # nats
    abs_out: torch.Tensor  # Σ p |v|
    dot_out: torch.Tensor  # Σ p A |v|
    dot_row: torch.Tensor  # Σ p A
    score_out: torch.Tensor  # Σ p (|s| + |m|) |v|
    score_row: torch.Tensor  # Σ p (|s| + |m|)
    peak_out: torch.Tensor  # exp(m - lse) Σ |v|
    keys: torch.Tensor  # visible keys of a row


def attention_budget(
    terms: AttentionTerms, numerics: Numerics, *, head_dim: int, exact_p: bool = False
) -> dict[str, ErrorBudget]:
    """The hard budgets of ``out`` and, where the kernel returns one, ``lse`` (in the base that it returns).

    With u = 2^-24, γ the accumulator's bound, T the number of rescales and n the number of keys of a row:

    * a score is off by ε_j = γ_qk(d) A_j + 4u (|s_j| + |m|), which moves the output by Σ p_j ε_j (|v_j| + |o|);
    * exp2, T rescales, both sums and the division: η (Σ p|v| + |o|), where
      η = (1 + T) exp_rel + 2uT + 2^-22 + 2γ_pv(n), because a weight passes its own exponential and up to T factors;
    * rounding p to its format: u_P Σ p|v| (exact worst case), and η_P exp(m - lse) Σ|v| below its normal range.
      When the denominator sums the rounded p as well, o moves by Σ p_j δ_j (v_j - o): u_P |o| on top;
    * rounding partial outputs to a format narrower than fp32: u_part Σ_s w_s |o_s| <= u_part Σ p|v|,
      and η_part below its normal range.

    ``exact_p`` leaves out the rounding of p: the inputs make every p a number that needs none.
    """
    u, o = FP32.u, terms.out.abs()
    gamma_qk = numerics.qk.gamma(head_dim)
    eps_out = gamma_qk * terms.dot_out + 4 * u * terms.score_out
    eps_row = gamma_qk * terms.dot_row + 4 * u * terms.score_row
    keys = terms.keys.double()
    gamma_pv = (torch.ceil(keys / numerics.pv.k_step) + numerics.pv.EXTRA_STEPS) * numerics.pv.u
    rescales = torch.ceil(keys / numerics.tile)
    eta = (1 + rescales) * numerics.exp_rel + 2 * u * rescales + DIVISION + 2 * gamma_pv
    hard = eps_out + o * eps_row.unsqueeze(-1) + eta.unsqueeze(-1) * (terms.abs_out + o)
    if not exact_p:
        hard = hard + numerics.p.u * terms.abs_out + numerics.p.eta * terms.peak_out
        if numerics.l_from == "rounded_p":
            # Both sums are off by u_P at most, so their quotient by u_P / (1 - u_P).
            hard = (hard + numerics.p.u * o) / (1 - numerics.p.u)
    if numerics.partial.t < FP32.t:
        hard = hard + numerics.partial.u * terms.abs_out + numerics.partial.eta
    budgets = {"out": ErrorBudget(ref=terms.out, hard=hard, out=numerics.out)}
    if numerics.lse_base is not None:
        lse = terms.lse.abs().nan_to_num(posinf=0.0)
        nats = eps_row + eta + 4 * u * lse + LOGARITHM
        if numerics.l_from == "rounded_p" and not exact_p:
            nats = nats + numerics.p.u
        unit = 1.0 if numerics.lse_base == "e" else 1.0 / math.log(2.0)
        budgets["lse"] = ErrorBudget(ref=terms.lse * unit, hard=nats * unit, out=FP32, minus_inf=numerics.lse_no_key)
    return budgets
