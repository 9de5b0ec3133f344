"""The verdict on one output: tier after tier, from what no tolerance can excuse to what chance cannot explain.

T0: finite where the reference is. T1: inside the hard interval. The rest on generic inputs alone: T2, inside the
interval that rounding noise leaves with any likelihood; T3, the energy of the errors; T4, errors that all push one way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch

from kerneltest.model import ErrorBudget, Noise
from kerneltest.oracle.compare import Comparison, Index, compare, variance
from kerneltest.oracle.rounding import half_ulp


class Tier(Enum):
    """Where an output failed."""

    FINITE = "T0, non-finite values"
    HARD = "T1, the hard interval"
    STATISTICAL = "T2, the statistical interval"
    ENERGY = "T3, the energy of a row's errors"
    BIAS = "T4, errors of one direction"


# Standard deviations: of one row's matched filter, and of a token's or a whole case's.
Z_ROW = 8.5
Z_CASE = 7.5
# T3 rejects what has a probability of exp(-27.6) = 1e-12 in a whole output.
LOG_ODDS = 27.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``failed`` is the first tier that rejects the output, or None.

    ``energy``: mean of error² / expected error² over the output, the fingerprint of an arithmetic (None: not generic);
    ``z_row`` and ``z_case``: the statistics of T4. ``where``: the row or token that T3 or T4 is about, () for the case.
    """

    comparison: Comparison
    failed: Tier | None
    energy: float | None = None
    worst_energy: float = 0.0
    z_row: float = 0.0
    z_case: float = 0.0
    where: Index | None = None

    @property
    def ok(self) -> bool:
        return self.failed is None

    @property
    def used(self) -> float:
        return self.comparison.used


def judge(actual: torch.Tensor, budget: ErrorBudget) -> Verdict:
    """Judge ``actual`` (any float dtype, any device) against ``budget`` of the same shape.

    Raises ValueError on another shape.
    """
    seen = compare(actual, budget)
    if not seen.ok:
        return Verdict(comparison=seen, failed=Tier.FINITE if seen.nonfinite else Tier.HARD)
    if budget.noise is None or seen.row_energy is None or seen.total == 0:
        return Verdict(comparison=seen, failed=None)
    return _judge_noise(actual, budget, budget.noise, seen, seen.row_energy)


def _judge_noise(
    actual: torch.Tensor, budget: ErrorBudget, noise: Noise, seen: Comparison, row_energy: torch.Tensor
) -> Verdict:
    # Independent errors in a row: no more than its channels, no more than the roundings behind them.
    freedom = 1 / (1 / budget.ref.shape[-1] + 1 / noise.freedom)
    odds = LOG_ODDS + math.log(3 * row_energy.numel())
    energy = _Groups.of(row_energy * freedom, freedom)
    z, allowed = _matched_filter(actual, budget, noise)
    excess = [(total / count) / energy_limit(count, odds) for total, count in energy]
    pull = [
        (total.abs() - free).clamp(min=0) / math.sqrt(z.numel() / total.numel()) / limit
        for (total, free), limit in zip(_Groups.of(z, allowed), (Z_ROW, Z_CASE, Z_CASE), strict=True)
    ]
    failed, where = None, None
    if seen.unlikely:
        failed = Tier.STATISTICAL
    for tier, shares in ((Tier.ENERGY, excess), (Tier.BIAS, pull)):
        for share in shares:
            if failed is None and bool((share > 1).any()):
                failed, where = tier, _argmax(share)
    return Verdict(
        comparison=seen,
        failed=failed,
        energy=float(energy.case[0] / energy.case[1]),
        worst_energy=float(row_energy.max()),
        z_row=Z_ROW * float(pull[0].max()),
        z_case=Z_CASE * float(pull[2]),
        where=where,
    )


class _Groups(NamedTuple):
    """A pair of sums over each row, over all rows of a first index (a token's heads), and over the case.

    A bug in one request is diluted in the case, and one of few bits in a row is too small to tell.
    """

    row: tuple[torch.Tensor, torch.Tensor]
    token: tuple[torch.Tensor, torch.Tensor]
    case: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, one: torch.Tensor, other: torch.Tensor) -> _Groups:
        token = [x.reshape(x.shape[0], -1).sum(-1) if x.dim() else x for x in (one, other)]
        return cls((one, other), (token[0], token[1]), (one.sum(), other.sum()))


def energy_limit(freedom: torch.Tensor, odds: float) -> torch.Tensor:
    """What the mean of ``freedom`` squared standard normals exceeds with a probability of exp(-odds) at most.

    1 + 2 (odds / freedom)^½ + 2 odds / freedom: Laurent and Massart, Annals of Statistics 28 (2000), lemma 1.
    """
    return 1 + 2 * (odds / freedom).sqrt() + 2 * odds / freedom


def _matched_filter(actual: torch.Tensor, budget: ErrorBudget, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors along the output itself, for each row: what a lost or gained share of it looks like.

    In standard deviations, and what the systematic errors may amount to of them at worst.
    """
    spread_of = variance(budget, noise)
    weight = torch.where(spread_of > 0, budget.ref / spread_of, 0.0)
    # Only ratios count; a row's largest weight is 1, so that no square overflows.
    weight = weight / weight.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    value = actual.double().to(budget.ref.device)
    # An infinite value that got this far is right: its interval reaches beyond the format's range.
    error = torch.where(value.isfinite(), value - budget.ref, 0.0)
    deviation, allowed = noise.along(weight)
    rounding = (weight.square() * half_ulp(budget).square() / 3).sum(-1)
    scale = (deviation.square() + rounding).sqrt()
    scale = torch.where(scale > 0, scale, torch.inf)
    return (error * weight).sum(-1) / scale, allowed / scale


def _argmax(value: torch.Tensor) -> Index:
    return tuple(int(i) for i in torch.unravel_index(value.argmax(), value.shape))
