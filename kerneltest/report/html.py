"""The HTML report: one self-contained file."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from kerneltest.model import Conclusion, Device, KernelRecord, RunRecord
from kerneltest.model.record import TITLES, Hunted

TEMPLATE = "report.html.jinja"
# What stands for the ends of a sequence in a pair of step kinds.
BEGIN, LAUNCH = "begin", "launch"
# What a hunt runs.
NOUNS: dict[Hunted, str] = {
    "cases": "case",
    "sequences": "sequence",
    "misuse": "wrong call",
    "distribution": "configuration",
}


def html(run: RunRecord) -> str:
    """Render the run. All that comes from outside is escaped: a kernel's name or a library's text is no markup."""
    environment = Environment(
        loader=PackageLoader("kerneltest.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        aligned=_aligned,
        gist=_gist,
        many=_many,
        moment=_moment,
        number=_number,
        power=_power,
        seconds=_seconds,
        share=_share,
    )
    environment.tests["over"] = _over
    return environment.get_template(TEMPLATE).render(
        run=run,
        headline=_headline(run),
        totals=_totals(run),
        devices=_devices(run),
        libraries=_libraries(run),
        energies=_energies(run),
        pairs=_pairs(run),
        kinds=_kinds(run),
        nouns=NOUNS,
        titles=TITLES,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Totals:
    """The counts of the header. The same case of the same kernel counts once, also if two items ran it.

    ``noun``: what has a verdict. Once some were hunted in other ways than case by case, a kernel can have several.
    """

    noun: str
    green: int
    red: int
    unchecked: int
    broken: int
    cases: int
    sequences: int
    launches: int
    unsupported: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Energies:
    """The fingerprints of the kernels: a column for each input strategy, a row for each output judged by noise."""

    inputs: tuple[str, ...]
    rows: tuple[_EnergyRow, ...]

    def __bool__(self) -> bool:
        return bool(self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _EnergyRow:
    kernel: str
    output: str
    energy: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """How often each pair was tried: ``rows`` come first, ``columns`` second."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[int, ...]], ...]

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def tried(self) -> int:
        return sum(count > 0 for _, counts in self.rows for count in counts)

    @property
    def possible(self) -> int:
        return len(self.rows) * len(self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Headline:
    """The verdict on the whole run: a word, the style that goes with it, and why in a sentence."""

    word: str
    style: str
    why: str


def _totals(run: RunRecord) -> _Totals:
    verdicts = [kernel.verdict for kernel in run.kernels]
    return _Totals(
        noun="hunt" if any(kernel.hunt != "cases" for kernel in run.kernels) else "kernel",
        green=verdicts.count(Conclusion.GREEN),
        red=verdicts.count(Conclusion.RED),
        unchecked=verdicts.count(Conclusion.UNCHECKED),
        broken=len(run.unchecked),
        cases=_distinct(kernel for kernel in run.kernels if kernel.hunt == "cases"),
        sequences=_distinct(_in_company(run)),
        launches=sum(kernel.launches for kernel in run.kernels),
        unsupported=sum(sum(kernel.unsupported.values()) for kernel in run.kernels),
    )


def _distinct(kernels: Iterable[KernelRecord]) -> int:
    return len({(kernel.suite, kernel.name, case.id) for kernel in kernels for case in kernel.cases})


def _in_company(run: RunRecord) -> list[KernelRecord]:
    """The hunts of sequences that played any."""
    return [kernel for kernel in run.kernels if kernel.hunt == "sequences" and kernel.cases]


def _energies(run: RunRecord) -> _Energies:
    rows = tuple(
        _EnergyRow(kernel=kernel.title, output=output, energy=energy)
        for kernel in run.kernels
        for output, energy in kernel.energy.items()
    )
    return _Energies(inputs=tuple(sorted({inputs for row in rows for inputs in row.energy})), rows=rows)


def _pairs(run: RunRecord) -> _Matrix:
    """Which launch was the last one before which kernel."""
    counts: Counter[tuple[str, str]] = Counter()
    for kernel in _in_company(run):
        counts.update({(before, kernel.name): count for before, count in kernel.before.items()})
    return _matrix(
        rows=sorted({before for before, _ in counts}),
        columns=sorted({kernel.name for kernel in _in_company(run)}),
        counts=counts,
    )


def _kinds(run: RunRecord) -> _Matrix:
    """Which kind of step stood before which, over all kernels. A kind seen in one place is one to try in the other."""
    counts: Counter[tuple[str, str]] = Counter()
    for kernel in _in_company(run):
        for pair, count in kernel.kinds.items():
            first, _, second = pair.partition(" > ")
            counts[first, second] += count
    names = sorted({name for pair in counts for name in pair} - {BEGIN, LAUNCH})
    return _matrix(rows=[BEGIN, *names], columns=[*names, LAUNCH], counts=counts) if counts else _matrix([], [], counts)


def _matrix(rows: Sequence[str], columns: Sequence[str], counts: Mapping[tuple[str, str], int]) -> _Matrix:
    return _Matrix(
        columns=tuple(columns),
        rows=tuple((row, tuple(counts.get((row, column), 0) for column in columns)) for row in rows),
    )


def _headline(run: RunRecord) -> _Headline:
    """RED if a kernel is red or an item broke (those are the run's own ``unchecked``), GREEN only if something ran."""
    totals = _totals(run)
    ran = totals.green + totals.red
    parts = []
    if totals.red:
        parts.append(f"{totals.red} of {_many(ran, totals.noun)} that ran failed")
    if totals.broken:
        parts.append(f"{_many(totals.broken, 'item')} broke before a verdict")
    if totals.red or totals.broken:
        word, style = "RED", "red"
    elif totals.green:
        word, style = "GREEN", "green"
        noun = totals.noun
        parts.append(f"the {noun} that ran is green" if ran == 1 else f"all {ran} {noun}s that ran are green")
    else:
        word, style = "NOTHING CHECKED", "unchecked"
        parts.append("no kernel ran, so there is no verdict on any")
    if totals.unchecked:
        parts.append(f"{_many(totals.unchecked, totals.noun)} {'was' if totals.unchecked == 1 else 'were'} not checked")
    sentence = "; ".join(parts)
    return _Headline(word=word, style=style, why=f"{sentence[0].upper()}{sentence[1:]}.")


def _devices(run: RunRecord) -> tuple[Device, ...]:
    return tuple(dict.fromkeys(kernel.device for kernel in run.kernels if kernel.device))


def _libraries(run: RunRecord) -> dict[str, tuple[str, ...]]:
    """Every version of every library: the workers of one run need not agree."""
    found: dict[str, dict[str, None]] = {}
    for kernel in run.kernels:
        for name, version in kernel.libraries.items():
            found.setdefault(name, {})[version] = None
    return {name: tuple(versions) for name, versions in sorted(found.items())}


def _over(share: float) -> bool:
    """Whether a share of the budget is a failure; a NaN is."""
    return not share <= 1


def _share(share: float) -> str:
    """A share of the error budget, to two digits, and never rounded down to a zero that it is not."""
    if share == 0 or not math.isfinite(share):
        return f"{share:g}"
    if share > 1 and round(share, 2) == 1:
        return ">1.00"
    if share < 0.0995:
        return f"{share:.1e}" if share < 0.000995 else f"{share:.2g}"
    return f"{share:.2f}" if share < 100 else f"{share:.1e}"


def _aligned(share: float) -> str:
    """As :func:`_share`, with the decimals fixed: for long columns."""
    return "<0.01" if 0 < share < 0.005 else f"{share:.2f}" if 0 <= share <= 1 else _share(share)


def _seconds(seconds: float) -> str:
    if seconds == 0:
        return "0"
    return f"{seconds:,.1f}" if seconds >= 10 else f"{seconds:.3f}" if seconds < 1 else f"{seconds:.2f}"


def _power(exponent: float | None) -> str:
    """A power of ten that is known by its exponent; None is infinite."""
    return "infinite" if exponent is None or math.isinf(exponent) else f"10^{exponent:.1f}"


def _number(number: int) -> str:
    return f"{number:,}"


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _gist(text: str) -> str:
    """The line of a long reason that says most: pytest marks it with an E, elsewhere it is the first."""
    lines = text.strip().splitlines()
    return next((line.removeprefix("E").strip() for line in lines if line.startswith("E   ")), lines[0])


def _moment(text: str) -> str:
    """An ISO 8601 time for a reader; anything else as it is."""
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    if moment.tzinfo is not None:
        moment = moment.astimezone(datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
