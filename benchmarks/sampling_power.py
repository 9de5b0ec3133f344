"""What the e-process sees of wrong samplers, and that it leaves right ones alone, by simulated counts.

    python benchmarks/sampling_power.py [--json FILE] [--seed N] [--quick]

Three tables. Biases: six wrong samplers of four distributions, by the cosine of five million draws with the
probabilities, as is usual, and by the e-process. Power: samplers that are off by a total variation distance of 0.005,
over many simulated nights of as many draws as the nightly profile takes, from no evidence. False alarms: right samplers
over a thousand nights, whose evidence is carried from night to night. Counts of a look are multinomial, and go through
the very code that a worker uses. Exits 1 if a power is below 0.999 or a right sampler is rejected.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A checkout is enough, also where kerneltest is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kerneltest
from kerneltest.engine.evidence import LIMIT
from kerneltest.engine.profile import PROFILES
from kerneltest.model import Evidence, Series
from kerneltest.oracle.eprocess import POWER, detectable, log_e, mixture, partitions
from kerneltest.worker.tally import FIRST_LOOK, Ledger

Vector = np.ndarray[Any, np.dtype[np.float64]]
DISTANCE = 0.005
COSINE, COSINE_DRAWS = 0.99, 5_000_000
# Nights in the table of powers: none missed of so many is a power of 0.999 with a confidence of 95 %.
NIGHTS = 3000
LIVES, NIGHTS_OF_A_LIFE, LOOKS = 10, 25, 30
BATCH = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Bias:
    """One wrong sampler of one distribution. ``draws`` and ``log10_e`` at the look that rejected it, or at the end."""

    distribution: str
    bias: str
    distance: float
    cosine: float
    rejected: bool
    draws: int
    log10_e: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """Rejections of one wrong sampler over nights of so many draws; ``detectable``: what the report would promise."""

    profile: str
    direction: str
    categories: int
    draws: int
    nights: int
    rejected: int
    least_log10_e: float
    detectable: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Right:
    """A right sampler over many nights, in lives that start with no evidence."""

    distribution: str
    lives: int
    nights: int
    looks: int
    draws_of_a_life: int
    rejected: int
    highest_log10_e: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tenth of the nights, to see that it runs")
    arguments = parser.parse_args()
    begun, random = time.perf_counter(), np.random.default_rng(arguments.seed)
    torch.set_num_threads(1)  # nothing here is large
    scale = 10 if arguments.quick else 1
    print(f"kerneltest {kerneltest.__version__}, torch {torch.__version__}, numpy {np.__version__}, ", end="")
    print(f"Python {platform.python_version()}, seed {arguments.seed}\n")
    found = biases(random)
    show_biases(found)
    strength = powers(random, NIGHTS // scale)
    show_powers(strength)
    right = rights(random, max(1, LIVES // scale))
    show_rights(right)
    print(f"\n{time.perf_counter() - begun:.0f} s")
    if arguments.json:
        tables = {"biases": found, "powers": strength, "right": right}
        report = {name: [asdict(row) for row in rows] for name, rows in tables.items()}
        arguments.json.write_text(json.dumps({"seed": arguments.seed, **report}, indent=1) + "\n")
    weak = [row for row in strength if row.rejected < POWER * row.nights]
    return int(bool(weak) or any(row.rejected for row in right))


# Distributions


def normalized(weights: Vector) -> Vector:
    return weights / weights.sum()


def zipf(size: int, random: np.random.Generator) -> Vector:
    """Rank r has a weight of 1/r; ids in random order."""
    return normalized(random.permutation(1 / np.arange(1, size + 1)))


def of_logits(size: int, spread: float, random: np.random.Generator) -> Vector:
    """The softmax of normal logits with this standard deviation."""
    return normalized(np.exp(spread * random.standard_normal(size)))


def heavy_tail(size: int) -> Vector:
    """One token of probability 1/2 and equal ones for the rest."""
    return normalized(np.where(np.arange(size) == size // 3, size - 1.0, 1.0))


def distributions(random: np.random.Generator) -> dict[str, Vector]:
    return {
        "normal logits, 1000": of_logits(1000, 1.0, random),
        "Zipf, 32000": zipf(32_000, random),
        "heavy tail, 32000": heavy_tail(32_000),
        "normal logits, 128256": of_logits(128_256, 2.0, random),
    }


# Biases


def without(p: Vector, ids: slice | int) -> Vector:
    q = p.copy()
    q[ids] = 0
    return normalized(q)


def scaled(p: Vector, ids: Any, factor: float) -> Vector:
    q = p.copy()
    q[ids] *= factor
    return normalized(q)


BIASES: dict[str, Callable[[Vector], Vector]] = {
    "first token never drawn": lambda p: without(p, 0),
    "top token +10 %": lambda p: scaled(p, int(p.argmax()), 1.1),
    "last 128 tokens never drawn": lambda p: without(p, slice(-128, None)),
    "even ids +5 %": lambda p: scaled(p, slice(0, None, 2), 1.05),
    "temperature 1.02": lambda p: normalized(p ** (1 / 1.02)),
    "a quarter of the lanes +20 %": lambda p: scaled(p, np.arange(len(p)) % 32 < 8, 1.2),
}


def ledger_of(p: Vector) -> Ledger:
    """No evidence yet, as a worker begins a series."""
    nothing = Evidence(kernel="", library="", device="", config="")
    probabilities = torch.from_numpy(p)
    series = Series(evidence=nothing, draws=0, seconds=0.0, limit=LIMIT)
    return Ledger(probabilities=probabilities, ways=partitions(probabilities), series=series)


def look(ledger: Ledger, counts: Any) -> float:
    """Count what was drawn since the last look; the logarithm of E."""
    ledger.add(torch.from_numpy(np.append(counts, 0)), 0)
    return ledger.evidence.log10_e


def biases(random: np.random.Generator) -> list[Bias]:
    found = []
    for name, p in distributions(random).items():
        for bias, change in BIASES.items():
            q, ledger = change(p), ledger_of(p)
            counts, drawn, upto, at = np.zeros(len(p), dtype=np.int64), 0, FIRST_LOOK, 0
            while drawn < COSINE_DRAWS:
                upto = min(upto, COSINE_DRAWS)
                new = random.multinomial(upto - drawn, q)
                counts, drawn, upto = counts + new, upto, 2 * upto
                if not ledger.rejected:
                    look(ledger, new)
                    at = drawn
            cosine = float(counts @ p / (np.linalg.norm(counts) * np.linalg.norm(p)))
            found.append(
                Bias(
                    distribution=name,
                    bias=bias,
                    distance=float(np.abs(p - q).sum() / 2),
                    cosine=cosine,
                    rejected=ledger.rejected,
                    draws=at,
                    log10_e=ledger.evidence.log10_e,
                )
            )
    return found


def show_biases(found: list[Bias]) -> None:
    print(f"Biases: cosine > {COSINE} after {COSINE_DRAWS:,} draws, and the e-process at 10^9 within as many.")
    head = ("distribution", "bias", "distance", "cosine", "e-process", "draws", "log10 E")
    print("{:22} {:29} {:>9} {:>8} {:>10} {:>10} {:>9}".format(*head))
    for row in found:
        cosine = "passes" if row.cosine > COSINE else "rejects"
        ours = "rejects" if row.rejected else "passes"
        print(
            f"{row.distribution:22} {row.bias:29} {row.distance:9.2g} {cosine:>8} {ours:>10} {row.draws:10,} "
            f"{row.log10_e:9.1f}"
        )
    seen = sum(row.rejected for row in found)
    usual = sum(not row.cosine > COSINE for row in found)
    print(f"The cosine rejects {usual} of {len(found)}, the e-process {seen}.\n")


# Power


def moved(p: Vector, inside: Any, distance: float) -> Vector:
    """Probability moved into these ids, in proportion, and out of the others."""
    share = p[inside].sum()
    return np.where(inside, p * (1 + distance / share), p * (1 - distance / (1 - share)))


def directions(random: np.random.Generator) -> dict[str, tuple[Vector, Vector]]:
    """The distribution and a sampler of it that is off by DISTANCE, for each way to be."""
    coin, large = np.full(2, 0.5), zipf(6000, random)
    uniform, small = np.full(256, 1 / 256), zipf(256, random)
    ids = np.arange(len(large))
    wave = random.standard_normal(256)
    wave -= (wave * small).sum()
    wave *= DISTANCE / (np.abs(wave * small).sum() / 2)
    row, lane = np.divmod(np.arange(256), 32)
    # As many up as down in every lane, octave of ranks and tail: only single ids show it, all of them a little.
    hidden = np.array([bin(int(value)).count("1") for value in row]) % 2 == lane % 2
    return {
        "two categories": (coin, moved(coin, np.array([True, False]), DISTANCE)),
        "even ids": (large, moved(large, ids % 2 == 0, DISTANCE)),
        "one lane of 32": (large, moved(large, ids % 32 == 5, DISTANCE)),
        "one chunk of 4096": (large, moved(large, ids // 4096 == 1, DISTANCE)),
        "one token": (large, moved(large, ids == int(large.argmax()), DISTANCE)),
        "random over 256": (small, small * (1 + wave)),
        "half of 256, hidden": (uniform, moved(uniform, hidden, DISTANCE)),
        "half of 256, at random": (small, moved(small, random.random(256) < 0.5, DISTANCE)),
    }


def powers(random: np.random.Generator, nights: int) -> list[Power]:
    profile, found = PROFILES["nightly"], []
    for device, draws in (("cuda", profile.cuda_draws), ("cpu", profile.cpu_draws)):
        for direction, (p, q) in directions(random).items():
            assert abs(np.abs(p - q).sum() / 2 - DISTANCE) < 1e-9
            ways = partitions(torch.from_numpy(p))
            least = max(detectable(way.probabilities, draws, among=len(ways)) for way in ways)
            logs: list[torch.Tensor] = []
            for first in range(0, nights, BATCH):
                counts = torch.from_numpy(random.multinomial(draws, q, size=min(BATCH, nights - first)))
                # One look, at the end: those before it can only add to the power.
                logs.append(mixture([log_e(way.probabilities, way.count(counts)) for way in ways]))
            values = torch.cat(logs)
            found.append(
                Power(
                    profile=f"nightly, {device}",
                    direction=direction,
                    categories=len(p),
                    draws=draws,
                    nights=nights,
                    rejected=int((values >= LIMIT).sum()),
                    least_log10_e=float(values.min()) / math.log(10),
                    detectable=least,
                )
            )
    return found


def show_powers(found: list[Power]) -> None:
    print(f"Power for a total variation distance of {DISTANCE} in one night, from no evidence. Lowest: of log10 E.")
    head = ("profile", "direction", "tokens", "draws", "rejected", "lowest", "detectable")
    print("{:14} {:24} {:>7} {:>11} {:>13} {:>8} {:>11}".format(*head))
    for row in found:
        print(
            f"{row.profile:14} {row.direction:24} {row.categories:7,} {row.draws:11,} "
            f"{f'{row.rejected} / {row.nights}':>13} {row.least_log10_e:8.1f} {row.detectable:11.4f}"
        )
    print()


# False alarms


def rights(random: np.random.Generator, lives: int) -> list[Right]:
    draws = PROFILES["nightly"].cuda_draws // LOOKS
    found = []
    for name, p in {
        "Zipf, 256": zipf(256, random),
        "uniform, 1000": normalized(np.ones(1000)),
        "Zipf, 6000": zipf(6000, random),
        "heavy tail, 6000": heavy_tail(6000),
    }.items():
        ledgers = [ledger_of(p) for _ in range(lives)]
        for ledger in ledgers:
            for _ in range(NIGHTS_OF_A_LIFE * LOOKS):
                look(ledger, random.multinomial(draws, p))
        found.append(
            Right(
                distribution=name,
                lives=lives,
                nights=lives * NIGHTS_OF_A_LIFE,
                looks=lives * NIGHTS_OF_A_LIFE * LOOKS,
                draws_of_a_life=ledgers[0].evidence.draws,
                rejected=sum(ledger.rejected for ledger in ledgers),
                highest_log10_e=max(ledger.evidence.log10_e for ledger in ledgers),
            )
        )
    return found


def show_rights(found: list[Right]) -> None:
    nights = sum(row.nights for row in found)
    print(f"False alarms of right samplers in {nights:,} nights, {LOOKS} looks in each. Highest: E at any look.")
    head = ("distribution", "lives", "nights", "looks", "draws of a life", "rejected", "highest")
    print("{:22} {:>6} {:>7} {:>7} {:>16} {:>9} {:>10}".format(*head))
    for row in found:
        print(
            f"{row.distribution:22} {row.lives:6} {row.nights:7} {row.looks:7,} {row.draws_of_a_life:16,} "
            f"{row.rejected:9} {f'10^{row.highest_log10_e:.2f}':>10}"
        )


if __name__ == "__main__":
    sys.exit(main())
