"""The hunts of a run that was cut off, in a folder: continued, the run does not hunt again what it had ended with.

A hunt is known again by all that its result follows from: the code of kerneltest and of the suites, the options, the
device and the versions of the libraries. Whatever is different is hunted anew, and kept beside it. A library that was
changed under the same version is not told apart.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kerneltest.engine.files import write_whole
from kerneltest.engine.repro import slug
from kerneltest.model import FAILURES, DecodeError, Failure, Finding, KernelRecord, decode, encode

SCHEMA = "kerneltest.kept/1"

# A hunt's result: what reports show of it, and what is raised.
Result = tuple[KernelRecord, Failure | None]


class BadKept(Exception):
    """A file of the folder that holds no hunt; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Raised:
    finding: Finding
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    schema: str
    record: KernelRecord
    failure: _Raised | None = None


class Kept:
    """The results in ``folder`` of the run that ``run`` tells from all others."""

    def __init__(self, folder: Path, run: Any) -> None:
        self._folder = folder / hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, title: str) -> Path:
        """Where the hunt of that title lies."""
        return self._folder / f"{slug(title)}-{hashlib.sha256(title.encode()).hexdigest()[:8]}.json"

    def load(self, title: str) -> Result | None:
        """What the hunt had ended with; None if it has not. Raises :class:`BadKept`."""
        path = self.path(title)
        try:
            file = decode(_File, json.loads(path.read_text(encoding="utf-8")))
            if file.schema != SCHEMA:
                raise DecodeError(f"schema: expected {SCHEMA!r}, got {file.schema!r}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise BadKept(f"{path}: no hunt that this release can read: {error}") from error
        raised = file.failure
        return file.record, FAILURES[raised.finding.kind](raised.finding, raised.text) if raised else None

    def save(self, title: str, result: Result) -> None:
        """Keep what a hunt has ended with, and when."""
        record, failure = result
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        raised = _Raised(finding=failure.finding, text=str(failure)) if failure else None
        file = _File(schema=SCHEMA, record=replace(record, kept=now), failure=raised)
        write_whole(self.path(title), json.dumps(encode(file)) + "\n")


def digest(roots: Iterable[Path]) -> str:
    """What tells apart the Python code below these folders from any other."""
    whole = hashlib.sha256()
    for root in sorted(roots):
        for path in sorted(root.rglob("*.py")):
            whole.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return whole.hexdigest()
