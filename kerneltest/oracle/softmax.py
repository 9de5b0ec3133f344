"""The error budgets of a softmax with a temperature, and of probabilities that are renormalised after a filter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kerneltest.model import FP32, SUM_FP32, AccModel, ErrorBudget, Fmt
from kerneltest.model.numerics import DIVISION, EX2_APPROX, FLUSHED

# Differences of running maxima telescope to at most 2 max |s|: they pass a difference and a product with log2 e. The
# maximum's own product with it, in the pass that sums and in the one that divides, no longer cancels.
RESCALE_ROUNDINGS = 2 * 2 + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxNumerics:
    """The declared arithmetic of a softmax.

    ``row_sum``: how a row is added up; its ``k_step`` is the number of lanes that add side by side, its ``extra`` the
    depth of the tree that joins them. ``exp_rel`` is the relative error of the exponential, ``rescales`` how often an
    online softmax may rescale its running sum (0: the maximum is known before the sum begins). ``inverse_rel``: the
    relative error of 1 / temperature.

    Raises ValueError for arithmetic that cannot be.
    """

    row_sum: AccModel
    out: Fmt = FP32
    exp_rel: float = EX2_APPROX
    rescales: int = 0
    inverse_rel: float = FP32.u
    batch_invariant: bool = True
    slack: float = 1.0

    @property
    def plain(self) -> SoftmaxNumerics:
        """The same softmax in nothing but fp32, from a known maximum."""
        return replace(self, row_sum=SUM_FP32, exp_rel=EX2_APPROX, rescales=0, inverse_rel=FP32.u, slack=1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.exp_rel < 1 or self.rescales < 0:
            raise ValueError(f"exp_rel must lie in [0, 1), rescales not below 0, got {self.exp_rel}, {self.rescales}")
        if not 0 <= self.inverse_rel < 1 or self.slack < 1:
            raise ValueError(
                f"inverse_rel must lie in [0, 1), slack be at least 1, got {self.inverse_rel}, {self.slack}"
            )


def softmax_budget(logits: torch.Tensor, temperature: torch.Tensor | float, numerics: SoftmaxNumerics) -> ErrorBudget:
    """The budget of softmax(logits / temperature): ``logits`` [..., V] in any float dtype, -Inf where masked.

    ``temperature`` is a number or broadcasts to [..., 1]; the reference takes it as the float32 that kernels get.

    With s = logits / temperature and m its maximum, an exponent s_j - m is off by
    ε_j = (u + inverse_rel) |s_j| + u |s_j - m| + 2u max(|s_j|, |s_j - m|): 1 / temperature and the product with it,
    the difference, log2 e and the product with it, before or after the difference. What m is off by is common to all
    and cancels. The logarithm of the denominator is off by log Σ p_j exp ε_j at most, whatever the size of ε, and by
    6u max |s| if the sum is rescaled. Two exponentials, the sum of the row, a division and the rescales are relative.
    The sum of all of these, L_j, moves p_j by p_j (exp L_j - 1). An exponential and a result below 2^-126 may be
    flushed to zero; a masked token has exactly 0.

    Raises ValueError for a temperature that is not positive, for NaN or +Inf, and for a row without a finite logit.
    """
    t = torch.as_tensor(temperature).float().double()
    if not bool((t > 0).all()):
        raise ValueError("temperature must be positive")
    s = logits.double() / t
    finite = s.isfinite()
    if bool((~finite & (s != -torch.inf)).any()) or not bool(finite.any(-1).all()):
        raise ValueError("logits must be finite or -Inf, and each row must have a finite one")
    u = FP32.u
    size, below = torch.where(finite, s.abs(), 0.0), torch.where(finite, s.amax(-1, keepdim=True) - s, 0.0)
    score = (u + numerics.inverse_rel) * size + u * (below + 2 * torch.maximum(size, below))
    log_p = s.log_softmax(-1)
    shift = score + torch.logsumexp(log_p + score, -1, keepdim=True)
    if numerics.rescales:
        shift = shift + RESCALE_ROUNDINGS * u * size.amax(-1, keepdim=True)
    relative = (
        2 * numerics.exp_rel
        + numerics.row_sum.gamma(s.shape[-1])
        + DIVISION
        + numerics.rescales * (numerics.exp_rel + u)
    )
    if relative >= 1:
        raise ValueError("the declared arithmetic is off by as much as the result")
    # A factor of 1 + x moves a logarithm by x / (1 - |x|) at most.
    total = (shift + relative / (1 - relative)).clamp(max=700.0)
    p = log_p.exp()
    hard = torch.where(finite, numerics.slack * (p * torch.expm1(total) + 2 * FLUSHED), 0.0)
    return ErrorBudget(ref=p, hard=hard, out=numerics.out)


def renorm_budget(probs: torch.Tensor, keep: torch.Tensor, *, row_sum: AccModel, out: Fmt = FP32) -> ErrorBudget:
    """The budget of probs / Σ kept probs where ``keep`` is true, 0 elsewhere: both [..., V], ``keep`` boolean.

    Relative: a sum and a division are off by (γ(V) + 2^-22) / (1 - γ(V)) of the result, down to 2^-126. There a
    probability, or the result, may be flushed to zero. What is not kept, and what is 0, must be exactly 0: reference
    and bound are 0, which leaves one number.

    Raises ValueError for shapes that differ, negative or non-finite probabilities, and a row that keeps nothing.
    """
    if probs.shape != keep.shape or keep.dtype != torch.bool:
        raise ValueError(f"probs are {tuple(probs.shape)}, keep is {tuple(keep.shape)} of {keep.dtype}")
    kept = torch.where(keep, probs.double(), 0.0)
    if not bool(((kept >= 0) & kept.isfinite()).all()):
        raise ValueError("probabilities must be finite and not negative")
    total = kept.sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        raise ValueError("a row keeps no probability, so nothing can be renormalised")
    gamma = row_sum.gamma(probs.shape[-1])
    if gamma >= 1:
        raise ValueError("the declared row_sum is off by as much as the sum")
    ref = kept / total
    flushed = FLUSHED * (1 + 1 / total)
    hard = torch.where(kept > 0, (gamma + DIVISION) / (1 - gamma) * ref + flushed, 0.0)
    return ErrorBudget(ref=ref, hard=hard, out=out)
