"""A runner that writes down what it is asked for, at once: what a run that was killed had been waiting for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from kerneltest.engine.job import Job
from kerneltest.engine.pool import Runner
from kerneltest.model import Misuse, Outcome, Started


class Traced:
    """Lines of JSON in ``path``, one before each job and one behind it, appended and flushed.

    ``who``: which of several runners it is. ``at``: seconds since it was made.
    """

    def __init__(self, runner: Runner, path: Path, who: str) -> None:
        self._runner, self._path, self._who = runner, path, who
        self._begun = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def started(self) -> Started:
        return self._runner.started

    def run(self, job: Job, *, deadline: float, cold: float) -> Outcome:
        begun = time.monotonic()
        self._write(asked=f"{job.kernel.name}: {_asked(job)}", deadline=deadline, cold=cold)
        outcome = self._runner.run(job, deadline=deadline, cold=cold)
        told: dict[str, Any] = {"reason": outcome.reason} if outcome.reason else {}
        if (finding := outcome.finding) is not None:
            told["finding"] = [finding.kind, finding.what, *finding.details]
        self._write(answered=outcome.status.value, seconds=round(time.monotonic() - begun, 3), **told)
        return outcome

    def close(self) -> None:
        self._runner.close()

    def _write(self, **fields: Any) -> None:
        line = {"worker": self._who, "at": round(time.monotonic() - self._begun, 3)} | fields
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _asked(job: Job) -> str:
    """The case, and what is to happen with it."""
    if job.company is not None:
        return f"{job.company.sequence}{'; alone' if job.company.alone else ''}"
    if isinstance(job.misuse, Misuse):
        return f"{job.case}; {job.misuse.argument} {job.misuse.says}"
    return f"{job.case}{f'; beside {job.peer[0].name}' if job.peer else ''}"
