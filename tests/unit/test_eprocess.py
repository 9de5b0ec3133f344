"""The e-process: by hand, by enumeration, and what `detectable` promises."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch

from kerneltest.oracle.eprocess import (
    ALPHA,
    FLOOR,
    KAPPAS,
    TOP,
    Partition,
    coincidence,
    detectable,
    log_e,
    mixture,
    partitions,
)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def zipf(size: int) -> torch.Tensor:
    weights = 1 / torch.arange(1, size + 1, dtype=torch.float64)
    return weights / weights.sum()


def named(found: tuple[Partition, ...]) -> dict[str, Partition]:
    return {one.name: one for one in found}


def by_hand(probabilities: list[float], counts: list[int], kappa: float) -> float:
    """E of one κ, draw by draw: each is predicted by what came before it."""
    value, before = 1.0, [0] * len(counts)
    for one, total in enumerate(counts):
        for _ in range(total):
            predicted = (kappa * probabilities[one] + before[one]) / (kappa + sum(before))
            value *= predicted / probabilities[one]
            before[one] += 1
    return value


@pytest.mark.parametrize(
    ("probabilities", "counts"),
    [([0.5, 0.5], [3, 1]), ([0.2, 0.8], [5, 2]), ([0.1, 0.3, 0.6], [4, 0, 3]), ([0.25] * 4, [0, 0, 0, 0])],
)
def test_e_is_the_product_of_predictions(probabilities: list[float], counts: list[int]) -> None:
    expected = sum(by_hand(probabilities, counts, kappa) for kappa in KAPPAS) / len(KAPPAS)
    assert float(log_e(vector(*probabilities), torch.tensor(counts))) == pytest.approx(math.log(expected), abs=1e-7)


def test_a_beta_binomial_by_hand() -> None:
    # Two fair bins, three draws, all the same: κ/2 (κ/2 + 1) (κ/2 + 2) / (κ (κ + 1) (κ + 2)) / 0.5^3, over all κ.
    ratios = [8 * (k / 2) * (k / 2 + 1) * (k / 2 + 2) / (k * (k + 1) * (k + 2)) for k in KAPPAS]
    expected = math.log(sum(ratios) / 8)
    assert float(log_e(vector(0.5, 0.5), torch.tensor([3, 0]))) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("draws", [1, 2, 5, 7])
@pytest.mark.parametrize("p", [(0.5, 0.5), (0.05, 0.95), (0.1, 0.2, 0.7)])
def test_the_mean_of_e_is_1_by_enumeration(p: tuple[float, ...], draws: int) -> None:
    mean = 0.0
    for sequence in itertools.product(range(len(p)), repeat=draws):
        counts = torch.tensor([sequence.count(one) for one in range(len(p))])
        mean += math.prod(p[one] for one in sequence) * math.exp(float(log_e(vector(*p), counts)))
    assert mean == pytest.approx(1.0, abs=1e-6)


def test_the_mean_over_partitions_is_1_as_well() -> None:
    p = vector(0.1, 0.2, 0.3, 0.15, 0.25)
    found, mean = partitions(p), 0.0
    assert len(found) >= 4
    for sequence in itertools.product(range(5), repeat=4):
        counts = torch.bincount(torch.tensor(sequence), minlength=5)
        e = mixture([log_e(way.probabilities, way.count(counts)) for way in found])
        mean += math.prod(float(p[one]) for one in sequence) * math.exp(float(e))
    assert mean == pytest.approx(1.0, abs=1e-6)


def test_is_a_batch_of_counts_at_once() -> None:
    p, counts = vector(0.3, 0.7), torch.tensor([[3, 4], [0, 0], [100, 1]])
    together = log_e(p, counts)
    assert together.tolist() == [float(log_e(p, one)) for one in counts]


def test_keeps_its_digits_after_ten_billion_draws() -> None:
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    p, x = [0.125, 0.375, 0.5], [1_250_070_000, 3_750_010_000, 4_999_920_000]
    exact = []
    for kappa in KAPPAS:
        log = mpmath.loggamma(kappa) - mpmath.loggamma(kappa + sum(x))
        log += sum(mpmath.loggamma(kappa * a + b) - mpmath.loggamma(kappa * a) for a, b in zip(p, x, strict=True))
        exact.append(mpmath.exp(log - sum(b * mpmath.log(a) for a, b in zip(p, x, strict=True))))
    expected = float(mpmath.log(sum(exact) / len(exact)))
    assert float(log_e(vector(*p), torch.tensor(x))) == pytest.approx(expected, abs=1e-3)


def test_nothing_drawn_says_nothing() -> None:
    assert float(log_e(vector(0.5, 0.5), torch.tensor([0, 0]))) == pytest.approx(0.0, abs=1e-9)
    assert float(mixture([])) == 0.0


def test_the_partitions_of_a_large_vocabulary() -> None:
    size = 9001
    found = named(partitions(zipf(size).flip(0)))
    assert list(found) == [
        "id mod 4",
        "id mod 32",
        "chunks of 4096",
        "rank by powers of 2",
        "first and last id",
        "last vector",
        f"the {TOP} most probable ids",
    ]
    assert [len(found[name].labels) for name in found] == [4, 32, 3, 14, 3, 3, TOP + 1]
    ids = torch.arange(size)
    assert torch.equal(found["id mod 4"].bins, ids % 4)
    assert torch.equal(found["chunks of 4096"].bins, ids // 4096)
    assert found["chunks of 4096"].labels[-1] == "ids 8192 to 9000"
    ranks = found["rank by powers of 2"]
    assert ranks.bins[-4:].tolist() == [2, 1, 1, 0]
    assert ranks.labels[:3] == ("ranks 1 to 1", "ranks 2 to 3", "ranks 4 to 7")
    assert found["first and last id"].bins[[0, 1, -2, -1]].tolist() == [0, 1, 1, 2]
    last = found["last vector"]
    assert last.bins[-34:].tolist() == [0, 0, *[1] * 31, 2]
    top = found[f"the {TOP} most probable ids"]
    assert top.labels[0] == "id 9000"
    assert top.labels[-1] == "all other ids"
    assert int((top.bins == TOP).sum()) == size - TOP
    for one in found.values():
        assert float(one.probabilities.sum()) == pytest.approx(1.0, abs=1e-12)
        assert torch.equal(one.count(torch.ones(size, dtype=torch.int64)).sum(), torch.tensor(size))


def test_a_small_vocabulary_is_seen_id_by_id_and_no_partition_comes_twice() -> None:
    found = named(partitions(zipf(256)))
    assert len(found["single ids"].labels) == 256
    assert found["single ids"].labels[7] == "id 7"
    for size in (2, 3, 4, 5, 8, 33):
        bins = [tuple(one.bins.tolist()) for one in partitions(zipf(size))]
        assert len(set(bins)) == len(bins)


def test_rare_bins_are_pooled() -> None:
    rare = FLOOR / 3
    p = torch.full((40,), rare, dtype=torch.float64)
    p[10] = 1 - 39 * rare
    lanes = named(partitions(p))["id mod 32"]
    assert lanes.labels == ("ids 10 mod 32", "all rare bins together")
    assert lanes.bins[[9, 10, 11]].tolist() == [1, 0, 1]
    assert "single ids" not in named(partitions(p))  # it would be the same


def test_what_is_rare_even_together_joins_another_bin() -> None:
    p = vector(0.7, 0.3 - 2 * FLOOR / 9, FLOOR / 9, FLOOR / 9)
    single = named(partitions(p))["id mod 4"]
    assert single.labels == ("ids 0 mod 4", "ids 1 mod 4")
    assert single.bins.tolist() == [0, 1, 1, 1]


def test_impossible_categories_have_no_bin_of_their_own() -> None:
    found = partitions(vector(0.0, 0.25, 0.75, 0.0))
    assert all(float(one.probabilities.min()) >= FLOOR for one in found)


def test_a_degenerate_distribution_has_no_partition() -> None:
    assert partitions(vector(0.0, 1.0, 0.0)) == ()
    assert partitions(vector(1.0)) == ()
    assert partitions(vector(1 - FLOOR / 2, FLOOR / 2)) == ()


def test_small_bins_stop_to_count_before_fp32_shows() -> None:
    uniform = named(partitions(torch.full((128256,), 1 / 128256, dtype=torch.float64)))
    assert 1e7 < uniform[f"the {TOP} most probable ids"].most < 1e9
    assert uniform["chunks of 4096"].most > 1e10  # two boundaries a bin
    assert uniform["id mod 32"].most < uniform["id mod 4"].most
    # A right sampler whose boundaries are rounded to 24 bits, at the very end: E has not moved.
    top = uniform[f"the {TOP} most probable ids"]
    step = 2.0**-24
    ends = (torch.arange(1, 128257, dtype=torch.float64) / 128256 / step).round() * step
    real = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.float64))
    shares = torch.zeros(len(top.labels), dtype=torch.float64).index_add_(0, top.bins, real)
    assert float(log_e(top.probabilities, (shares * int(top.most)).round().to(torch.int64))) < 2.0


def test_two_equal_launches_are_told_from_chance() -> None:
    assert coincidence(vector(0.5, 0.5), 10) == pytest.approx(-10 * math.log(2))
    assert coincidence(vector(0.0, 1.0), 10**6) == 0.0


def rejected(p: torch.Tensor, distance: float, draws: int) -> tuple[int, int]:
    """How many of how many samplers are rejected that are off by this distance, half of the bins up and half down."""
    generator, random = torch.Generator().manual_seed(1), numpy.random.default_rng(1)
    found = total = 0
    for direction in range(12):
        inside = torch.rand(len(p), generator=generator) < 0.5
        inside[int(p.argmax())] = direction % 2 == 0
        share = float(p[inside].sum())
        if not 0 < share < 1 - distance:
            continue
        q = torch.where(inside, p * (1 + distance / share), p * (1 - distance / (1 - share))).numpy()
        counts = torch.from_numpy(random.multinomial(draws, q / q.sum(), size=20))
        total += len(counts)
        found += int((log_e(p, counts) - math.log(8) >= -math.log(ALPHA)).sum())
    assert total >= 60
    return found, total


@pytest.mark.parametrize("p", [vector(0.5, 0.5), vector(0.9, 0.06, 0.04), zipf(64), zipf(256)])
@pytest.mark.parametrize("draws", [50_000, 4_000_000])
def test_what_is_called_detectable_is_rejected(p: torch.Tensor, draws: int) -> None:
    distance = detectable(p, draws, among=8)
    assert 0 < distance < 0.5
    found, total = rejected(p, distance, draws)
    assert found == total
    # And not for want of ambition.
    found, total = rejected(p, 0.5 * distance, draws)
    assert found < total


def test_more_draws_see_more_and_none_see_nothing() -> None:
    p = zipf(200)
    distances = [detectable(p, draws) for draws in (0, 10, 10_000, 1_000_000, 100_000_000)]
    assert distances[:2] == [1.0, 1.0]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.002
    assert detectable(p, 10**6, among=8) > detectable(p, 10**6)
    assert detectable(p, 10**6, alpha=1e-3) < detectable(p, 10**6, alpha=1e-12)
