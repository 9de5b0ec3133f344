"""``kerneltest power``: run the corpora, print the table, store it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kerneltest
from kerneltest.model import encode
from kerneltest.power import run as runs
from kerneltest.power import table
from kerneltest.power.corpus import SIZES, Corpus
from kerneltest.power.emulated import Emulated
from kerneltest.power.summary import Limits, Summary, summarise
from kerneltest.power.zoo import Zoo

LIMITS = Limits()
PROGRESS_NAME = "power-progress.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``json`` and ``resume``: files to write, None for none. ``zoo``: a folder of suites, or None."""

    size: str
    seed: int
    jobs: int
    json: Path | None
    resume: Path | None
    zoo: Path | None


def power(options: Options) -> int:
    """Run, print and store; 0 if every target that is judged was met, else 1.

    Raises :class:`kerneltest.power.run.ProgressFileError` for a file to resume from that is another run's.
    """
    size = SIZES[options.size]
    corpora: list[Corpus] = [Emulated()]
    zoo, absent = _zoo(options)
    if zoo is not None:
        corpora.append(zoo)
    progress = None
    if options.resume is not None:
        header = {
            "schema": runs.PROGRESS,
            "size": size.name,
            "seed": options.seed,
            "sources": runs.fingerprint(zoo.sources() if zoo else ()),
        }
        progress = runs.ProgressFile(_progress_file(options.resume), header)
    try:
        tallies = runs.run(corpora, size, options.seed, processes=options.jobs, progress=progress)
    finally:
        if progress is not None:
            progress.close()
    summary = summarise(
        tallies,
        size,
        options.seed,
        version=kerneltest.__version__,
        torch_version=torch.__version__,
        zoo_absent=absent,
        limits=LIMITS,
    )
    for line in table.lines(summary):
        sys.stdout.write(line + "\n")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(as_json(summary), indent=1) + "\n")
    missed = [target.name for target in summary.targets if target.judged and not target.met]
    if missed:
        sys.stderr.write(f"kerneltest power: target missed: {'; '.join(missed)}\n")
    return 1 if missed else 0


def as_json(summary: Summary) -> Mapping[str, Any]:
    """The summary as it is stored; the schema is documented in docs/power.md."""
    stored: Mapping[str, Any] = encode(summary)
    return stored


def _zoo(options: Options) -> tuple[Zoo | None, str | None]:
    """The zoo, or why there is none in this run."""
    if not SIZES[options.size].zoo:
        return None, f"size {options.size} leaves it out"
    if options.zoo is None:
        return None, "this is no checkout of kerneltest, and no --zoo was given"
    return Zoo(str(options.zoo.resolve())), None


def _progress_file(resume: Path) -> Path:
    return resume / PROGRESS_NAME if resume.is_dir() else resume
