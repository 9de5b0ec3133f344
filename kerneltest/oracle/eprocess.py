"""Whether draws follow a distribution: a Dirichlet-mixture e-process over partitions of the categories.

For a partition into bins of probability ``p_k`` with counts ``x_k``, ``n`` in all, and a concentration κ,

    log E = lnΓ(κ) - lnΓ(κ + n) + Σ_k [lnΓ(κ p_k + x_k) - lnΓ(κ p_k)] - Σ_k x_k ln p_k

is the likelihood ratio of draws whose probabilities come from Dirichlet(κ p) to draws that follow p (Lindon and Malek,
arXiv:2011.03567). Averaged over κ and partitions it is a martingale of mean 1 as long as the draws follow p, whatever
the number of looks: by Ville's inequality P(E ever reaches 1/alpha) <= alpha. Partitions depend on the probabilities
alone, never on what was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

KAPPAS = tuple(10.0**exponent for exponent in range(1, 9))
# A bin that is rarer is pooled with the others like it.
FLOOR = 2.0**-20
# Full resolution up to this many categories; of more, the most probable ones have a bin each.
SINGLE, TOP = 256, 200
CHUNK = 4096
# The limit of E, and the power with which `detectable` deviations reach it.
ALPHA = 1e-9
POWER = 0.999
# Where a right sampler of 24-bit uniform numbers may put the boundary between two categories: the standard deviation
# of a rounding to 2^-24 is 2^-25.8, and the rounding of fp32 prefix sums comes on top.
BOUNDARY = 2.0**-25


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Bins of categories: ``bins`` int64 [K] maps each category to one, of ``probabilities`` float64 [bins].

    ``labels``: a bin in words. ``most``: after how many draws it stops to count, since what fp32 does to a right
    sampler would begin to show.
    """

    name: str
    bins: torch.Tensor
    probabilities: torch.Tensor
    labels: tuple[str, ...]
    most: float

    def count(self, by_category: torch.Tensor) -> torch.Tensor:
        """Draws of each bin, int64 [..., bins], from those of each category, int64 [..., K]."""
        counts = by_category.new_zeros((*by_category.shape[:-1], len(self.labels)))
        return counts.index_add_(-1, self.bins, by_category)


def partitions(probabilities: torch.Tensor) -> tuple[Partition, ...]:
    """The partitions of K categories that a bug of a sampler is likely to show in; float64 [K] on the host, sum 1.

    Lanes of a vector and of a warp, tiles, ranks, the first and the last id, the tail that is no whole vector, and
    single categories. Fewer where the distribution leaves a partition but one bin, none if it is all in one category.
    """
    found: list[Partition] = []
    for name, bins, label in _ways(probabilities):
        made = _partition(name, bins, probabilities, label)
        if made is not None and not any(torch.equal(made.bins, other.bins) for other in found):
            found.append(made)
    return tuple(found)


def log_e(probabilities: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The logarithm of E of one partition, float64 [...], averaged over κ; probabilities [bins], counts [..., bins]."""
    p, x = probabilities.to(torch.float64), counts.to(torch.float64)
    n, null = x.sum(-1, keepdim=True), (x * p.log()).sum(-1, keepdim=True)
    kappa = torch.tensor(KAPPAS, dtype=torch.float64)
    start = kappa[:, None] * p
    ratio = (torch.lgamma(start + x[..., None, :]) - torch.lgamma(start)).sum(-1)
    return torch.logsumexp(torch.lgamma(kappa) - torch.lgamma(kappa + n) + ratio - null, -1) - math.log(len(KAPPAS))


def mixture(logs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The logarithm of the mean of the E of several partitions; 0 of none."""
    if not logs:
        return torch.zeros((), dtype=torch.float64)
    return torch.logsumexp(torch.stack(list(logs)), 0) - math.log(len(logs))


def coincidence(probabilities: torch.Tensor, rows: int) -> float:
    """The logarithm of the probability that two independent series of so many draws are equal."""
    return rows * math.log(min(1.0, float(probabilities.square().sum())))


def detectable(
    probabilities: torch.Tensor, draws: int, alpha: float = ALPHA, power: float = POWER, *, among: int = 1
) -> float:
    """The smallest total variation distance between bins that is rejected for certain, up to ``1 - power``.

    Whatever the true probabilities q of the bins, if ``max_S (q_S - p_S)`` is at least this, then E, averaged over
    ``among`` partitions, reaches ``1/alpha`` in ``draws`` draws with probability ``power`` or more. 1.0: nothing is.

    That is a bound, not an estimate. By Hoeffding, the counts of S exceed ``n (p_S + t)``, with ``t`` the distance less
    ``sqrt(ln(1/(1 - power)) / 2n)``. For given counts of S and of the rest, log E is convex and separable in the
    counts of the bins, so its Lagrangian dual bounds it from below, for all S of the same probability together; what
    is left is the smallest value over that probability, and the best κ. benchmarks/sampling_power.py simulates it.
    """
    if draws <= 0:
        return 1.0
    needed = math.log(len(KAPPAS) * among) - math.log(alpha)
    luck = math.sqrt(-math.log1p(-power) / (2 * draws))
    # About what it takes; then the bracket around the smallest that is enough, to within 1 %.
    high = math.sqrt((needed + len(probabilities) / 4) / (2 * draws))
    while high < 1 and _least_log_e(probabilities, draws, high) < needed:
        high *= 1.5
    low = high / 1.5
    while high < 1 and low > luck / 100 and _least_log_e(probabilities, draws, low) >= needed:
        low, high = low / 1.5, low
    while high < 1 and high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _least_log_e(probabilities, draws, middle) >= needed else (middle, high)
    return min(1.0, high + luck)


def _ways(p: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, Callable[[int], str]]]:
    """Name, bin of each category, and the words for a bin."""
    ids, size = torch.arange(len(p)), len(p)
    for lanes in (4, 32):
        yield f"id mod {lanes}", ids % lanes, lambda one, lanes=lanes: f"ids {one} mod {lanes}"  # type: ignore[misc]
    yield f"chunks of {CHUNK}", ids // CHUNK, lambda one: f"ids {CHUNK * one} to {min(CHUNK * (one + 1), size) - 1}"
    by_rank = torch.argsort(p, descending=True, stable=True)
    rank = torch.empty_like(ids)
    rank[by_rank] = ids
    octave = (rank + 1).to(torch.float64).log2().floor().to(torch.int64)
    yield "rank by powers of 2", octave, lambda one: f"ranks {2**one} to {min(2 ** (one + 1) - 1, size)}"
    ends = torch.ones_like(ids)
    ends[0], ends[-1] = 0, 2
    yield "first and last id", ends, lambda one: ("the first id", "ids between", f"the last id, {size - 1}")[one]
    tail = (ids >= size - 32).to(torch.int64) + (ids >= size - size % 4).to(torch.int64)
    words = ("ids before the last 32", "the last 32 ids", "the ids behind the last whole vector of 4")
    yield "last vector", tail, lambda one: words[one]
    if size <= SINGLE:
        yield "single ids", ids, lambda one: f"id {one}"
    yield (
        f"the {TOP} most probable ids",
        rank.clamp(max=TOP),
        lambda one: f"id {int(by_rank[one])}" if one < TOP else "all other ids",
    )


def _partition(
    name: str, bins: torch.Tensor, probabilities: torch.Tensor, label: Callable[[int], str]
) -> Partition | None:
    """The partition with its rare bins pooled; None if that leaves one bin."""
    mass = torch.zeros(int(bins.max()) + 1, dtype=torch.float64).index_add_(0, bins, probabilities)
    kept = (mass >= FLOOR).nonzero().flatten()
    labels = [label(int(one)) for one in kept]
    rare = float(mass[mass < FLOOR].sum())
    target = len(kept)
    if rare >= FLOOR:
        labels.append("all rare bins together")
    elif len(kept) < len(mass):
        # Too little for a bin even together: what one draw in a million does there must not decide.
        target = int(mass[kept].argmin())
    if len(labels) < 2:
        return None
    renumbered = torch.full((len(mass),), target, dtype=torch.int64)
    renumbered[kept] = torch.arange(len(kept))
    bins = renumbered[bins]
    mass = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, bins, probabilities)
    turns = (bins[1:] != bins[:-1]).nonzero().flatten()
    boundaries = torch.bincount(bins[turns], minlength=len(labels)) + torch.bincount(
        bins[turns + 1], minlength=len(labels)
    )
    divergence = float((boundaries * BOUNDARY**2 / (2 * mass)).sum())
    return Partition(
        name=name, bins=bins, probabilities=mass, labels=tuple(labels), most=_blind(len(mass)) / divergence
    )


def _blind(bins: int) -> float:
    """How many nats of divergence may pile up before false alarms become more than about ten times as likely.

    Near the limit 2 log E is about χ² of that many degrees of freedom, beyond c. A noncentrality of 2η makes that more
    probable by a factor of at most e^(η c / freedom), and Ville's bound is loose by more than ten (numerics, 4.4).
    """
    freedom, nats = bins - 1, math.log(64 / ALPHA)
    beyond = freedom + 2 * math.sqrt(freedom * nats) + 2 * nats
    return math.log(10) * freedom / beyond


def _least_log_e(probabilities: torch.Tensor, n: int, t: float) -> float:
    """A lower bound on max_κ log E of any counts of which some bins S hold n t more than their expected share.

    With f_k(x) = lnΓ(κ p_k + x) - x ln p_k and h_k(λ) = min_x f_k(x) - λ x, for any λ1, λ2 and s = p_S

        Σ f_k >= Σ_{S} h_k(λ1) + Σ_{not S} h_k(λ2) + λ1 n (s + t) + λ2 n (1 - s - t),

    and with D_k = h_k(λ1) - h_k(λ2) and any slope a, Σ_S D_k >= a s - Σ_k max(0, a p_k - D_k) for each such S. λ and a
    are those at which counts are proportional to p within S and outside.
    """
    p = probabilities
    s = _shares(float(p.max()), float(p.min()), t)
    if not len(s):
        return math.inf
    kappa = torch.tensor(KAPPAS, dtype=torch.float64)[:, None]
    constant = torch.lgamma(kappa) - torch.lgamma(kappa + n) - torch.lgamma(kappa * p).sum(-1, keepdim=True)
    inside = kappa + n * (1 + t / s)
    outside = kappa + n * (1 - t / (1 - s)).clamp(min=0.0)
    first, second = inside.log(), outside.log()
    slope = kappa * (first - second) - (inside - outside)
    within, beyond = _dual(p, kappa, inside), _dual(p, kappa, outside)
    lost = (slope[..., None] * p - (within - beyond)).clamp(min=0.0).sum(-1)
    bound = beyond.sum(-1) + slope * s - lost + first * n * (s + t) + second * n * (1 - s - t)
    return float((constant + bound).amax(0).min())


def _shares(most: float, least: float, t: float) -> torch.Tensor:
    """The probabilities that a set of bins with ``t`` to gain can have: with the largest bin in it, or without."""
    end = 1 - t
    steps = torch.linspace(0.0, 1.0, 13, dtype=torch.float64)
    ranges = [(least, min(1 - least, end))] if most <= 0.5 else [(least, min(1 - most, end)), (most, end)]
    return torch.cat([low + (high - low) * steps for low, high in ranges if 0 < low <= high < 1] or [steps[:0]])


def _dual(p: torch.Tensor, kappa: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """h_k(λ) = min over z > 0 of lnΓ(z) - (z - κ p_k)(ln p_k + λ), from below; [κ, λ, bins], ``multiplier`` is e^λ.

    lnΓ(w + 1/2) >= w ln w - w + ln(2π)/2 - 1/(24 w), so for large w = p_k e^λ the minimum is near that; elsewhere
    ψ(z) = ln w is solved by Newton's method.
    """
    w = multiplier[..., None] * p
    slope, start = w.log(), (kappa * p)[:, None, :]
    large = -w + 0.5 * math.log(2 * math.pi) - 1 / (24 * w) - 1 / (500 * w**3) - (0.5 - start) * slope
    small = w < 4
    if bool(small.any()):
        at, where = slope[small], start.expand_as(slope)[small]
        z = torch.where(at > -2.22, at.exp() + 0.5, -1 / (at + 0.5772156649))
        for _ in range(4):
            z = z - (torch.digamma(z) - at) / torch.polygamma(1, z)
        large[small] = torch.lgamma(z) - (z - where) * at
    return large
