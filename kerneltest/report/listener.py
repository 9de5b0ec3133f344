"""Collect the records of a run as pytest reports them, and hand them to the writers at its end."""

from __future__ import annotations

import datetime
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import kerneltest
from kerneltest.model import Conclusion, KernelRecord, MisuseTally, RunRecord, Unchecked, decode
from kerneltest.model.record import Hunted

if TYPE_CHECKING:
    import pytest

DEFAULT_REPORT = Path("reports") / "kerneltest.html"


class ReportListener:
    """Registered with pytest in the controlling process, also under pytest-xdist."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._start = time.monotonic()
        self._kernels: list[KernelRecord] = []
        self._unchecked: list[Unchecked] = []

    def pytest_report_header(self) -> list[str]:
        option = self._config.option
        return [
            f"kerneltest: profile {option.kernel_profile}, device {option.kernel_device}, seed {option.kernel_seed}"
        ]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = getattr(report, "kerneltest", None)
        if data is not None:
            self._kernels.append(decode(KernelRecord, data))
            if self._config.option.kernel_json:
                # After each kernel: a run that is ended from outside, by a time limit, keeps what it knows.
                self._write_summary(self.run())
        elif report.failed:
            reason = str(report.longrepr).strip()
            self._unchecked.append(Unchecked(what=report.nodeid, why=reason))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._unchecked.append(Unchecked(what=report.nodeid, why=str(report.longrepr).strip()))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._config.option.collectonly:
            return
        run = self.run()
        terminalreporter.section("kerneltest")
        for line in _lines(run):
            terminalreporter.write_line(line)
        for what, path in self._write(run):
            terminalreporter.write_line(f"{what}: {path}")

    def run(self) -> RunRecord:
        """What was heard so far."""
        option = self._config.option
        return RunRecord(
            began=self._began,
            seconds=time.monotonic() - self._start,
            command=shlex.join(["pytest", *self._config.invocation_params.args]),
            version=kerneltest.__version__,
            profile=option.kernel_profile,
            seed=option.kernel_seed,
            kernels=tuple(self._kernels),
            unchecked=tuple(self._unchecked),
        )

    def _write(self, run: RunRecord) -> list[tuple[str, Path]]:
        from kerneltest.report.html import html

        option = self._config.option
        report = Path(option.kernel_report or self._config.rootpath / DEFAULT_REPORT)
        written = [("report", _write(report, html(run)))]
        if option.kernel_json:
            written.append(("summary", self._write_summary(run)))
        return written

    def _write_summary(self, run: RunRecord) -> Path:
        from kerneltest.report.summary import summary

        return _write(Path(self._config.option.kernel_json), summary(run))


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _of_cases(kernel: KernelRecord) -> str:
    """How much of its budget the kernel used."""
    used = ", ".join(f"{output} {share:.2f}" for output, share in kernel.used.items()) or "-"
    slack = f" of a budget widened by slack {kernel.slack:g}" if kernel.slack > 1 else ""
    return f"{_ran(kernel)}, budget used {used}{slack}"


def _of_sequences(kernel: KernelRecord) -> str:
    """From how many places in the pair matrix the kernel was seen, and whether its bits repeat."""
    repeats, differing = kernel.repeated
    repeated = f", {repeats} repeated launches, {differing} differ" if repeats else ""
    return f"{_ran(kernel)}, after {len(kernel.before)} different launches{repeated}"


def _of_misuse(kernel: KernelRecord) -> str:
    """What became of the calls in which something was wrong."""
    tally = kernel.misuses or MisuseTally()
    failed = f"{tally.failed} neither, " if tally.failed else ""
    return (
        f"{tally.total} misuses: {tally.raised} raised, {tally.right} answered rightly, {failed}"
        f"{tally.trusted} left to the caller, {len(tally.unclear)} unclear errors"
    )


def _of_distribution(kernel: KernelRecord) -> str:
    """How much was drawn, what it says, and what it would have shown."""
    found = kernel.distributions
    if not found:
        return _ran(kernel)
    return (
        f"{len(found)} configs, {sum(kernel.unsupported.values())} unsupported, "
        f"{sum(one.drawn for one in found):,} draws ({sum(one.draws for one in found):,} with earlier runs), "
        f"E at most 10^{kernel.log10_e:.1f} of 10^{found[0].limit:.0f}, "
        f"detects a total variation distance of {kernel.detectable:.4f}"
    )


def _ran(kernel: KernelRecord) -> str:
    return f"{len(kernel.cases)} {kernel.hunt}, {sum(kernel.unsupported.values())} unsupported"


OF: dict[Hunted, Callable[[KernelRecord], str]] = {
    "cases": _of_cases,
    "sequences": _of_sequences,
    "misuse": _of_misuse,
    "distribution": _of_distribution,
}


def _lines(run: RunRecord) -> list[str]:
    lines = []
    for kernel in run.kernels:
        if kernel.verdict is Conclusion.UNCHECKED:
            continue  # has a line of its own below, with the reason
        kept = f", kept from {kernel.kept}" if kernel.kept else ""
        lines.append(
            f"{kernel.verdict.value:9} {kernel.title}: {OF[kernel.hunt](kernel)}, {kernel.seconds:.1f} s{kept}"
        )
    for place in run.coverage:
        if place.share is not None:
            lines.append(f"poison    {place.place.value}: {place.percent} proven ({place.note})")
    return lines + [f"unchecked {item.what}: {item.why.splitlines()[0]}" for item in run.everything_unchecked]
