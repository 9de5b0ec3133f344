"""Measures on a CUDA device the constants that kerneltest declares about arithmetic.

    python benchmarks/calibrate.py --json FILE [--date DATE] [--only WORD]

Accumulators of matrix products by designed probes and by sweeps over K; elementary functions over every fp32 of their
domain. Each constant stands beside the declared one. A section that fails is reported with its error, and the others
run. Exits 1 when a declared constant is contradicted, 2 when none is but a section failed or nothing declared was
compared, 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# A checkout is enough, also where kerneltest is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.calibration import bound, elementary, probes, subjects, verdict

ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What was measured of one subject; ``error`` says why the rest of it was not.

    The containers are filled as things are measured, so that an error keeps what came before it.
    """

    name: str
    constants: list[verdict.Constant] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None


Measure = Callable[[Section], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--date", default=datetime.now(UTC).isoformat(timespec="seconds"))
    parser.add_argument("--only", default="", metavar="WORD", help="sections whose name holds WORD")
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "date": arguments.date,
        "command": shlex.join(["python", *sys.argv]),
        "device": device_facts(),
    }
    print(f"{', '.join(f'{name} {value}' for name, value in report['device'].items())}\n")
    print("| section | constant | measured | declared | holds | |\n|---|---|---|---|---|---|")
    sections: list[Section] = []
    for name, measure in measures():
        if arguments.only not in name:
            continue
        sections.append(run(name, measure))
        print("\n".join(table_rows(sections[-1])), flush=True)
        report["declared_holds"] = holds(sections)
        report["sections"] = [asdict(section) for section in sections]
        if arguments.json:  # after each, so that a run that is cut short leaves what it has
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(to_json(report))
    failed = [section.name for section in sections if section.error]
    outcome = {True: "hold", False: "CONTRADICTED", None: "not all compared"}[holds(sections)]
    print(f"\ndeclared constants: {outcome}; not run: {', '.join(failed) or 'none'}")
    raise SystemExit(exit_code(sections))


def measures() -> Iterator[tuple[str, Measure]]:
    """Every section by name."""
    for subject in subjects.subjects():
        yield f"accumulator: {subject.name}", accumulator(subject)
        yield f"bound: {subject.name}", error_bound(subject)
    for domain in elementary.DOMAINS:
        yield f"function: {domain.function}, {domain.where}", function(domain)


def accumulator(subject: subjects.Subject, device: str = "cuda") -> Measure:
    def measure(section: Section) -> None:
        try:
            found = probes.measure(subjects.diagonal(subject.product, device), subject.operand)
        finally:
            section.facts["instructions"] = sorted(subject.instructions)
        section.facts["first_steps"] = found.layout.steps[:4]
        section.facts["regular"] = found.layout.regular
        section.constants.extend(verdict.of_accumulator(found, subject.declared))

    return measure


def error_bound(subject: subjects.Subject, device: str = "cuda") -> Measure:
    def measure(section: Section) -> None:
        section.facts["model"] = asdict(subject.declared)
        points = bound.sweep(subject.product, subject.operand, subject.declared, rows=ROWS, device=device)
        section.points.extend(asdict(point) | {"used": point.used} for point in points)
        section.constants.extend(verdict.of_bound(points, subject.declared))

    return measure


def function(domain: elementary.Domain) -> Measure:
    def measure(section: Section) -> None:
        worst = elementary.worst(domain, elementary.on_device)
        numbers = sum(elementary.bit_patterns(*span)[1] for span in domain.spans)
        section.facts.update(asdict(domain), **asdict(worst), numbers=numbers)
        section.constants.extend(verdict.of_function(domain, worst))

    return measure


def run(name: str, measure: Measure) -> Section:
    """Measure a section; whatever it raises is its error."""
    section = Section(name=name)
    error = None
    start = time.perf_counter()
    try:
        measure(section)
    except Exception as raised:  # a compiler, a library that lacks the call, a device that died: all are reported
        error = f"{type(raised).__name__}: {raised}"
    return replace(section, seconds=time.perf_counter() - start, error=error)


def holds(sections: Sequence[Section]) -> bool | None:
    """Whether the declared constants hold. None: no contradiction, but a section failed or none was compared."""
    compared = [constant.declared_holds for section in sections for constant in section.constants]
    if False in compared:
        return False
    return True if True in compared and not any(section.error for section in sections) else None


def exit_code(sections: Sequence[Section]) -> int:
    return {False: 1, None: 2, True: 0}[holds(sections)]


def table_rows(section: Section) -> Iterator[str]:
    """Markdown rows: one for each constant, one for the error."""
    for constant in section.constants:
        yes = {None: "", True: "yes", False: "**NO**"}[constant.declared_holds]
        declared = "" if constant.declared_holds is None else cell(constant.declared)
        row = (section.name, constant.name, cell(constant.measured), declared, yes, constant.note)
        yield table_row(*row)
    if section.error:
        lines = section.error.splitlines()
        yield table_row(section.name, "**not run**", "", "", "", lines[0] if lines else "")


def table_row(*cells: str) -> str:
    """Cells of Markdown: |x| would end one."""
    return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in cells)} |"


def cell(value: verdict.Value) -> str:
    """A number as people read it: errors as powers of two as well."""
    if isinstance(value, float) and 0 < value < 0.01:
        return f"{value:.3g} = 2^{math.log2(value):.2f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_json(report: dict[str, Any]) -> str:
    return json.dumps(_strict(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _strict(value: Any) -> Any:
    """JSON has no infinity and no NaN: they are written as words, not dropped."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def device_facts() -> dict[str, Any]:
    """The device and every version that a figure may depend on. Exits without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("calibrate.py needs a CUDA device")
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cuda-core": package_version("cuda-core"),
        "python": platform.python_version(),
    }


def driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[0] if done.stdout.split() else None


def package_version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
