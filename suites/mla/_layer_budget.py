"""The error budget of a whole MLA layer, for the form and the roundings that a kernel declares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

from kerneltest.model import FP32, ErrorBudget
from kerneltest.model.numerics import DIVISION, FLUSHED, LOGARITHM, WORST_ROUNDING
from kerneltest.oracle.rounding import Z

from ._axes import Dims
from ._layer_terms import LayerTerms
from ._numerics import MlaNumerics


def layer_budget(
    terms: LayerTerms, numerics: MlaNumerics, dims: Dims, tier: Literal["exact", "hard", "generic"]
) -> dict[str, ErrorBudget]:
    """The budgets of ``out`` and, where the kernel returns one, ``lse``.

    **Scores.** With |K|_j = |W_UK||c_j| and γ_p(n) of the projections' accumulator, a decompressed key is off by
    u_k |k_j| + (1 + u_k) γ_p(rank) |K|_j + η_k, an absorbed query by u_q |q'| + (1 + u_q) γ_p(nope) |W_UK|ᵀ|q| + η_q.
    Multiplied with the other side's magnitudes, and with γ_qk of a product of nope + rope or rank + rope terms, which
    sees the rounded operand, each score is off by no more than

        e_j = a_1 x_j + a_2 y_j + a_3 z_j + b + ω,

    where x, y, z are three of :attr:`LayerTerms.sizes`, b holds what does not depend on the key (η, and 8u max|s| for
    scale and maximum), and ω = (1 + T) exp_rel + 2uT is what exponentials and T rescales add to a weight, in nats.

    **Weights.** Weights w_j = exp(ε_j) with |ε_j| <= e_j move the output by Σ p_j (w_j - 1)(v_j - o) / Σ p_j w_j. There
    Σ p (v - o) = 0, |w_j - 1| <= g_j = exp(e_j) - 1 <= φ e_j with φ = (exp(E) - 1) / E, E = max e_j, and Jensen gives
    Σ p w >= exp(-Σ p e). By Cauchy and Schwarz, and Minkowski for the root of Σ p e²,

        |Δo| <= exp(Σ p e) φ (Σ p e²)^½ (Σ p (v - o)²)^½.

    A sum Σ p_j |f_j| with the perturbed weights is at most Σ p|f| + exp(Σ p e) (G_2 (Σ p f²)^½ + G_1 Σ p|f|), G_1 =
    φ Σ p e and G_2 = φ (Σ p e²)^½. The log-sum-exp moves by max(Σ p e, log(1 + G_1)) <= G_1.

    **Values.** Rounding P multiplies all channels of a key, latent or not, so that it costs u_P Σ p|v| in both forms.
    Decompressed values cost u_v Σ p|v| + (1 + u_v) γ_p(rank) Σ p|V| + η_v, their sum γ_pv(n) Σ p|v|. In the absorbed
    form the sum runs over latents: γ_pv(n) Σ p|V|; rounding its result costs u_z Σ_c |W_UV||z| + η_z Σ|W_UV|, and
    W_UV γ_p(rank) Σ_c |W_UV||z|, with |z| the latent output, its own error included.

    ``exact`` inputs make weights, decompressed keys and values, and absorbed queries numbers that need no rounding; the
    latent output is rounded all the same. On ``generic`` inputs each of these roundings is independent noise of no more
    than u/√3 of its operand, those of an accumulator have its ``deviation`` and ``bias``, and a sum of such noise stays
    within Z of its deviations: with a probability of 4e-16 an element is outside of the lesser of both bounds. What
    rows of a request share (keys and values are rounded once for all of them) makes their noise dependent, so that
    nothing is said of its energy or direction.
    """
    return _Budget(terms, numerics, dims, tier).budgets()


class _Budget:
    def __init__(self, terms: LayerTerms, numerics: MlaNumerics, dims: Dims, tier: str) -> None:
        self.terms, self.numerics, self.tier = terms, numerics, tier
        self.attention = numerics.attention
        self.absorbed = numerics.form == "absorbed"
        self.rank, self.nope = dims.kv_lora_rank, dims.nope_dim
        self.key_dim = dims.rope_dim + (dims.kv_lora_rank if self.absorbed else dims.nope_dim)
        self.project_score = numerics.project.gamma(dims.nope_dim if self.absorbed else self.rank)
        self.project_value = numerics.project.gamma(self.rank)

    def budgets(self) -> dict[str, ErrorBudget]:
        t, slack = self.terms, self.numerics.slack
        out, nats = self._bounds(noisy=False)
        if self.tier == "generic":
            likely_out, likely_nats = self._bounds(noisy=True)
            out, nats = torch.minimum(out, likely_out), torch.minimum(nats, likely_nats)
        found = {"out": ErrorBudget(ref=t.out, hard=slack * out, out=self.attention.out)}
        if self.attention.lse_base is not None:
            unit = 1.0 if self.attention.lse_base == "e" else 1 / math.log(2.0)
            found["lse"] = ErrorBudget(
                ref=t.lse * unit, hard=slack * unit * nats, out=FP32, minus_inf=self.attention.lse_no_key
            )
        return found

    def unless_exact(self, unit: float) -> float:
        """The rounding of an operand, unless the inputs are such that it needs none."""
        return 0.0 if self.tier == "exact" else unit

    def _bounds(self, *, noisy: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """On the errors of ``out`` before its last rounding, and of ``lse`` in nats."""
        t, a, n = self.terms, self.attention, self.numerics
        score = _Score(self, noisy=noisy)
        u_p, u_v, u_z = self.unless_exact(a.p.u), self.unless_exact(n.value.u), n.latent.u
        gamma_pv, gamma_l = (_each(t.keys, acc.gamma) for acc in (a.pv, a.row_sum))
        bias_pv, deviation_pv = (_each(t.keys, bound) for bound in (a.pv.bias, a.pv.deviation))
        of_all = (1 + gamma_l + DIVISION) * (1 + a.p.u)

        def column(row: torch.Tensor) -> torch.Tensor:
            return row.unsqueeze(-1)

        # Σ p|v| and Σ p|V| with the weights that the kernel has.
        v_sum = t.abs_out + score.moved(t.abs_out, t.second_out)
        wide_sum = t.wide_out + score.moved(t.wide_out, t.wide_second_out)
        # What a key's share of the output is rounded to, as noise: of P, or of V.
        share = Z * WORST_ROUNDING
        most = column(score.most)
        each = torch.minimum(v_sum, share * most * t.square_out.sqrt()) if noisy else v_sum
        bias, deviation = n.project.bias(self.rank), n.project.deviation(self.rank)
        # Where the denominator sums the rounded P, the quotient moves by Σ p δ (v - o).
        rounded = u_p * each
        if a.l_from == "rounded_p":
            rounded = rounded + u_p * t.out.abs()
        error = score.out + rounded
        error = error + (FLUSHED + (0.0 if self.tier == "exact" else a.p.eta)) * t.peak_out
        if self.absorbed:
            summed = column(gamma_pv) * wide_sum
            if noisy:
                # Partial sums of latents stay within |z| + 3 (Σ p²c²)^½; each channel's errors are its own.
                walk = (2 * t.latent_noise_out.square() + 18 * most * most * t.latent_square_out).sqrt()
                summed = torch.minimum(summed, column(bias_pv) * wide_sum + Z * column(deviation_pv) * walk)
            flushed = FLUSHED * (t.wide_peak_out + column(t.keys + 1) * t.weight_out)
            latent_error = (1 + a.p.u) * summed + flushed
            if a.partial.t < FP32.t:
                latent_error = latent_error + a.partial.u * wide_sum + a.partial.eta * t.weight_out
            # Σ |W_UV||z| of the z that the kernel has: its error is that of the sums over latents.
            reached = t.latent_out + score.moved(t.wide_out, t.wide_second_out) + a.p.u * wide_sum + latent_error
            noise_z = torch.minimum(share * t.latent_noise_out + reached - t.latent_out, reached) if noisy else reached
            error = error + latent_error + u_z * noise_z + n.latent.eta * t.weight_out
            projected = self.project_value * reached
            if noisy:
                walk = (t.out.square() + 2 * t.latent_noise_out.square()).sqrt() + reached - t.latent_out
                projected = torch.minimum(projected, bias * reached + Z * deviation * walk)
            error = error + (1 + n.latent.u) * projected + self.rank * FLUSHED
        else:
            made = self.project_value * wide_sum
            if noisy:
                made = torch.minimum(made, bias * wide_sum + Z * deviation * most * t.made_out.sqrt())
            made = (1 + n.value.u) * made
            error = error + u_v * each + made + self.unless_exact(n.value.eta) + self.rank * FLUSHED
            summed = column(gamma_pv) * ((1 + n.value.u) * v_sum + made)
            if noisy:
                reach = t.out.abs() + score.out + 3 * most * t.square_out.sqrt()
                summed = torch.minimum(
                    summed,
                    column(bias_pv) * (v_sum + made) + Z * column(deviation_pv) * (1 + n.value.u) * (reach + made),
                )
            error = error + (1 + a.p.u) * summed
            error = error + FLUSHED * column(t.keys + 1)
            if a.partial.t < FP32.t:
                error = error + a.partial.u * v_sum + a.partial.eta
        error = (error * column(of_all) + column(gamma_l + DIVISION) * t.out.abs()) / (
            1 - (u_p if a.l_from == "rounded_p" else 0.0)
        )
        alive = column((t.keys > 0).double())
        nats = score.nats + gamma_l + 4 * FP32.u * t.lse.abs().nan_to_num(posinf=0.0) + LOGARITHM
        if a.l_from == "rounded_p" and u_p:
            sums = torch.full_like(nats, u_p)
            noise = u_p * share * score.most * t.square_row.sqrt()
            nats = nats + (torch.minimum(sums, noise) if noisy else sums)
        return error * alive, nats


class _Score:
    """What errors of scores and weights do, see :func:`layer_budget`.

    ``nats`` bounds what they do to the log-sum-exp, ``out`` what they do to the output. ``noisy``: the rounding of the
    operand that a projection made is independent noise ε^n. Of a query, the same for all keys of a row; of a key, for
    itself alone, so that Σ p ε^n (v - o) has deviations of no more than those of the worst key times (Σ p² (v - o)²)^½.
    What is not linear in the noise is no more than ½ exp(E) ε².
    """

    def __init__(self, budget: _Budget, *, noisy: bool) -> None:
        t, a, n = budget.terms, budget.attention, budget.numerics
        absorbed = budget.absorbed
        tiles = torch.ceil(t.keys / a.tile)
        weight = (1 + tiles) * a.exp_rel + 2 * FP32.u * tiles
        gamma = a.qk.gamma(budget.key_dim)
        fmt = n.query if absorbed else n.key
        unit = (1 + gamma) * budget.unless_exact(fmt.u)
        # η of a rounded operand, and what a projection flushes, meet the other side.
        tiny = (1 + gamma) * (budget.unless_exact(fmt.eta) + (budget.rank + 1) * FLUSHED)
        flat = tiny * (t.latent_sum if absorbed else t.query_sum) + 8 * FP32.u * t.score_max + weight
        whole, part = ("absorbed", "query") if absorbed else ("decompressed", "key")
        # e_j = γ_qk (whole + what the operand is off by) + what it is off by: the rest, and the rounding.
        made = (1 + gamma) * budget.project_score * (1 + fmt.u)
        rest: dict[str, torch.Tensor] = {
            which: flat + gamma * getattr(t.sizes[whole], which) + made * getattr(t.sizes["projected"], which)
            for which in ("mean", "root", "largest")
        }
        rounding: dict[str, torch.Tensor] = {which: unit * getattr(t.sizes[part], which) for which in rest}
        mean, root, largest = (rest[which] + rounding[which] for which in rest)
        # (exp(E) - 1) / E
        growth = torch.where(largest > 0, largest.expm1() / largest.clamp(min=1e-300), 1.0)
        self._exp_mean = mean.exp()
        self.most = (largest + mean).exp()  # by which a weight can grow
        self._g1, self._g2 = growth * mean, growth * root
        self.nats = self._g1
        self.out = (self._exp_mean * self._g2).unsqueeze(-1) * t.spread_out
        if not noisy:
            return
        # What has a direction, linear as before; and the deviations of the rest, which has none.
        length = budget.nope if absorbed else budget.rank
        directed, made_noise = (1 + gamma) * (1 + fmt.u) * n.project.bias(length), n.project.deviation(length)
        straight: dict[str, torch.Tensor] = {
            which: flat
            + a.qk.bias(budget.key_dim) * getattr(t.sizes[whole], which)
            + directed * getattr(t.sizes["projected"], which)
            for which in rest
        }
        noise, walk = (t.query_noise, t.query_walk) if absorbed else (t.key_noise, t.key_walk)
        added = Z * a.qk.deviation(budget.key_dim) * (t.absorbed_walk if absorbed else t.score_walk)

        def noises(which: str) -> torch.Tensor:
            rounded: torch.Tensor = getattr(noise, which)
            made_up: torch.Tensor = getattr(walk, which)
            return Z * (WORST_ROUNDING * unit * rounded + (1 + gamma) * (1 + fmt.u) * made_noise * made_up)

        root = torch.minimum(root, straight["root"] + added + noises("each"))
        bent = 0.5 * largest.exp() * root
        self.nats = torch.minimum(self.nats, straight["mean"] + added + noises("row") + bent * root)
        if absorbed:
            moved = (growth * root).unsqueeze(-1) * t.spread_out
        else:
            worst = torch.minimum(largest, rest["largest"] + noises("largest"))
            away = t.square_out.sqrt() + t.out.abs() * t.square_row.sqrt().unsqueeze(-1)
            moved = noises("largest").unsqueeze(-1) * away
            moved = moved + (straight["root"] + added + bent * worst).unsqueeze(-1) * t.spread_out
        self.out = torch.minimum(self.out, self._exp_mean.unsqueeze(-1) * moved)

    def moved(self, mean_out: torch.Tensor, second_out: torch.Tensor) -> torch.Tensor:
        """By how much Σ p|f| may grow, from Σ p|f| and Σ p f²."""
        factor = self._exp_mean.unsqueeze(-1)
        return factor * (self._g2.unsqueeze(-1) * second_out.sqrt() + self._g1.unsqueeze(-1) * mean_out)


def _each(keys: torch.Tensor, bound: Callable[[float], float]) -> torch.Tensor:
    """A bound for each row's number of keys; a device is waited for once."""
    lengths, where = torch.unique(keys, return_inverse=True)
    return keys.new_tensor([bound(n) for n in lengths.tolist()])[where]
