"""The table in the terminal: mutants against checkers, then false alarms, then the zoo, then the targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kerneltest.power.summary import LegalRow, MutantRow, Summary, Target
from kerneltest.power.trials import ALL

NAME = 36
SHORT = {ALL: "ours", "T1-T4": "T1-T4", "fixed 1e-2": "1e-2", "fixed 1e-3": "1e-3", "torch bf16": "torch"}


def lines(summary: Summary) -> Iterator[str]:
    """The whole table, a line at a time."""
    yield f"kerneltest {summary.version}, torch {summary.torch}, size {summary.size}, seed {summary.seed}"
    yield ""
    yield "Detection: share of single cases on random normal inputs that each checker rejects (mean of the families);"
    yield "portfolio: ours on one normal, one dyadic, one count and one poison case; same: bitwise equal, not counted."
    yield _row("mutant", [*(_short(name) for name in summary.checkers), "portfolio", "same"])
    for kind in dict.fromkeys(row.kind for row in summary.mutants):
        yield f"-- {kind}"
        yield from (_mutant(row, summary) for row in summary.mutants if row.kind == kind)
    yield ""
    yield "False alarms on correct kernels: share of single requests, then of whole batches, that each checker rejects."
    yield _row("legal variant", [*(_short(name) for name in summary.checkers), "requests"])
    for row in summary.legal:
        yield _row(row.name, [*_alarms(row, summary.checkers), str(row.cases)])
    yield _row("all, requests", [*_all_alarms(summary, batches=False), str(summary.correct_cases)])
    yield _row("all, batches", [*_all_alarms(summary, batches=True), str(summary.correct_batches)])
    yield ""
    yield "Margins of the correct kernels: the largest share of each limit that was used (T4: standard deviations)."
    yield from (f"  {name:<40}{value:8.3f}" for name, value in summary.margins.items())
    yield ""
    yield from _zoo(summary)
    yield ""
    yield "Targets"
    yield from (_target(target) for target in summary.targets)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<{NAME}}" + "".join(f"{cell:>10}" for cell in cells)


def _short(name: str) -> str:
    return SHORT.get(name, name)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mutant(row: MutantRow, summary: Summary) -> str:
    singles = [_share(row.single[name]) for name in summary.checkers]
    return _row(row.name, [*singles, _share(row.portfolio[ALL]), str(row.equivalent)])


def _alarms(row: LegalRow, checkers: Sequence[str]) -> list[str]:
    return [_rate(row.flagged_cases.get(name, 0), row.cases) for name in checkers]


def _all_alarms(summary: Summary, *, batches: bool) -> list[str]:
    total = summary.correct_batches if batches else summary.correct_cases
    flagged = [row.flagged_batches if batches else row.flagged_cases for row in summary.legal]
    return [_rate(sum(counts.get(name, 0) for counts in flagged), total) for name in summary.checkers]


def _rate(count: int, total: int) -> str:
    # A few false alarms must not be rounded to none.
    return "0" if count == 0 else f"{100 * count / total:.2g}%"


def _zoo(summary: Summary) -> Iterator[str]:
    if summary.zoo_absent is not None:
        yield f"The zoo was not run: {summary.zoo_absent}"
        return
    yield "The zoo: share of drawn cases that each rejects, on a CPU; [twin] and [sound] are right and must stay at 0."
    yield _row("kernel", [*(_short(name) for name in summary.zoo_checkers), "cases"])
    for row in summary.zoo:
        shares = [_share(row.flagged.get(name, 0) / row.cases if row.cases else None) for name in summary.zoo_checkers]
        yield _row(row.name, [*shares, str(row.cases)]) + (f"  {', '.join(row.notes)}" if row.notes else "")


def _target(target: Target) -> str:
    verdict = "met" if target.met else "MISSED" if target.judged else "not judged in this size"
    return f"  {target.name}: {target.measured:.6g}, wanted {target.wanted:.6g}: {verdict}"
