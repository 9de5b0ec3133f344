"""From tallies to the table of figures: everything that the JSON file holds, schema ``kerneltest.power/1``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from kerneltest.power.corpus import Size, Unit
from kerneltest.power.emulated import MUTANT, VARIANT
from kerneltest.power.subjects import LEGAL, MUTANTS, Kind
from kerneltest.power.tally import Tally
from kerneltest.power.trials import ALL, DETECTORS
from kerneltest.power.zoo import CORRECT, KERNELTEST, ZOO
from kerneltest.power.zoo import DETECTORS as ZOO_DETECTORS

SCHEMA = "kerneltest.power/1"
GENERIC = "normal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Trials of one mutant in one family under one strategy; ``detected``: trials that each detector flagged."""

    family: str
    strategy: str
    trials: int
    equivalent: int
    detected: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MutantRow:
    """``single`` and ``portfolio``, by detector: the share of single cases on normal inputs, and of portfolios of
    one case for each strategy, that it rejects; means over the families, None where no answer ever differed.
    """

    name: str
    kind: str
    trials: int
    equivalent: int
    single: Mapping[str, float | None]
    portfolio: Mapping[str, float | None]
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LegalRow:
    """``cases`` requests in ``batches`` batches, and how many of each a detector wrongly flagged."""

    name: str
    cases: int
    batches: int
    outputs: int
    flagged_cases: Mapping[str, int]
    flagged_batches: Mapping[str, int]
    margins: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooRow:
    """A kernel of the zoo: ``cases`` that it supports of those drawn, and how many each detector rejected."""

    name: str
    cases: int
    flagged: Mapping[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the default size is held to."""

    portfolio_mean: float = 0.99
    logic_min: float = 0.95
    generic_mean: float = 0.95
    numeric_mean: float = 0.70
    correct_cases: int = 20_000
    variants: int = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A limit and the figure held against it. ``judged``: whether to miss it fails the run; few do if it is small."""

    name: str
    wanted: float
    measured: float
    met: bool
    judged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The whole table. ``zoo_absent``: why the zoo was not run, if it was not."""

    schema: str = SCHEMA
    version: str
    torch: str
    size: str
    seed: int
    portfolio_mean: float
    logic_min: float
    logic_min_mutant: str
    generic_mean: float
    numeric_mean: float
    numeric: Mapping[str, float]
    false_alarms: int
    correct_cases: int
    correct_batches: int
    correct_outputs: int
    checkers: tuple[str, ...] = DETECTORS
    mutants: tuple[MutantRow, ...]
    legal: tuple[LegalRow, ...]
    margins: Mapping[str, float]
    zoo: tuple[ZooRow, ...]
    zoo_false_alarms: int
    zoo_checkers: tuple[str, ...] = ZOO_DETECTORS
    zoo_absent: str | None
    targets: tuple[Target, ...] = ()


def summarise(
    tallies: Mapping[Unit, Tally],
    size: Size,
    seed: int,
    *,
    version: str,
    torch_version: str,
    zoo_absent: str | None,
    limits: Limits,
) -> Summary:
    """Everything that is reported, from the tallies alone; one size and seed give one summary."""
    mutants = [_mutant(name, tallies) for name in MUTANTS]
    legal = [_legal(name, tallies) for name in LEGAL]
    logic = [row for row in mutants if row.kind == Kind.LOGIC.value]
    numeric = {row.name: _known(row.single[ALL]) for row in mutants if row.kind == Kind.NUMERIC.value}
    portfolio = {row.name: _known(row.portfolio[ALL]) for row in logic}
    weakest = min(portfolio, key=lambda name: portfolio[name])
    zoo = [
        ZooRow(name=unit.subject, cases=tally.judged, flagged=tally.flagged, notes=tally.notes)
        for unit, tally in tallies.items()
        if unit.group == ZOO
    ]
    summary = Summary(
        version=version,
        torch=torch_version,
        size=size.name,
        seed=seed,
        portfolio_mean=_mean(portfolio.values()) or 0.0,
        logic_min=portfolio[weakest],
        logic_min_mutant=weakest,
        generic_mean=_mean(row.single[ALL] for row in logic) or 0.0,
        numeric_mean=_mean(numeric.values()) or 0.0,
        numeric=numeric,
        false_alarms=sum(row.flagged_cases.get(ALL, 0) + row.flagged_batches.get(ALL, 0) for row in legal),
        correct_cases=sum(row.cases for row in legal),
        correct_batches=sum(row.batches for row in legal),
        correct_outputs=sum(row.outputs for row in legal),
        mutants=tuple(mutants),
        legal=tuple(legal),
        margins=sum((Tally(margins=row.margins) for row in legal), Tally()).margins,
        zoo=tuple(zoo),
        zoo_false_alarms=sum(row.flagged.get(KERNELTEST, 0) for row in zoo if row.name.endswith(CORRECT)),
        zoo_absent=zoo_absent,
    )
    return replace(summary, targets=tuple(_targets(summary, limits, size.judged)))


def _targets(summary: Summary, limits: Limits, judged: bool) -> Iterator[Target]:
    for name, wanted, measured in (
        ("portfolio, mean over the logic mutants", limits.portfolio_mean, summary.portfolio_mean),
        (f"portfolio, worst logic mutant ({summary.logic_min_mutant})", limits.logic_min, summary.logic_min),
        ("one normal case, mean over the logic mutants", limits.generic_mean, summary.generic_mean),
        ("one normal case, mean over the numeric mutants", limits.numeric_mean, summary.numeric_mean),
        ("correct cases", limits.correct_cases, summary.correct_cases),
        ("legal variants", limits.variants, len(summary.legal)),
    ):
        yield Target(name=name, wanted=wanted, measured=measured, met=measured >= wanted, judged=judged)
    # A false alarm is one in a run of any size.
    for name, alarms in (
        ("false alarms, at most", summary.false_alarms),
        ("correct kernels of the zoo: false alarms, at most", summary.zoo_false_alarms),
    ):
        yield Target(name=name, wanted=0, measured=alarms, met=alarms == 0, judged=True)


def _mutant(name: str, tallies: Mapping[Unit, Tally]) -> MutantRow:
    mine = {
        (unit.family, unit.strategy): tally
        for unit, tally in tallies.items()
        if (unit.group, unit.subject) == (MUTANT, name)
    }
    total = sum(mine.values(), Tally())
    return MutantRow(
        name=name,
        kind=MUTANTS[name].kind.value,
        trials=total.trials,
        equivalent=total.equivalent,
        single=_by_detector(lambda d: _mean(t.share(d) for (_, s), t in mine.items() if s == GENERIC)),
        portfolio=_by_detector(lambda d: portfolio(mine, d)),
        cells=tuple(
            Cell(family=f, strategy=s, trials=t.trials, equivalent=t.equivalent, detected=t.flagged)
            for (f, s), t in mine.items()
        ),
    )


def portfolio(cells: Mapping[tuple[str, str], Tally], detector: str) -> float | None:
    """1 - Π (1 - detection) over the strategies of a family, mean over the families; cells by (family, strategy).

    Takes the strategies' detections as independent. A strategy on which the flaw never changed a bit adds nothing; a
    family in which no strategy did is left out; None if none is left.
    """
    families = dict.fromkeys(family for family, _ in cells)
    shares = {family: [t.share(detector) for (f, _), t in cells.items() if f == family] for family in families}
    return _mean(
        1 - math.prod(1 - share for share in known if share is not None)
        for known in shares.values()
        if any(share is not None for share in known)
    )


def _legal(name: str, tallies: Mapping[Unit, Tally]) -> LegalRow:
    total = sum((t for u, t in tallies.items() if (u.group, u.subject) == (VARIANT, name)), Tally())
    return LegalRow(
        name=name,
        cases=total.trials,
        batches=total.batches,
        outputs=total.outputs,
        flagged_cases=total.flagged,
        flagged_batches=total.flagged_batches,
        margins=total.margins,
    )


def _by_detector(figure: Callable[[str], float | None]) -> dict[str, float | None]:
    return {detector: figure(detector) for detector in DETECTORS}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _known(value: float | None) -> float:
    # A mutant that nothing could show is a hole in the corpus, not a success.
    return 0.0 if value is None else value
