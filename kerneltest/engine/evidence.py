"""What samplers have drawn in all runs so far: a folder with a JSON file for each series.

A series is what one kernel, of one version of its library, on one kind of device, drew of one case. Each has its own
e-process, which rejects a right sampler with a probability of at most ALPHA, however many runs add to it: MOST series
together do so once in a million, for the life of the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kerneltest.engine.files import write_whole
from kerneltest.engine.repro import slug
from kerneltest.model import Case, DecodeError, Evidence, Kernel, Started, decode, encode

SCHEMA = "kerneltest.evidence/1"
ALPHA = 1e-9
MOST = 1000
# The natural logarithm of E from which a distribution is rejected.
LIMIT = -math.log(ALPHA)


class BadEvidence(Exception):
    """A file of the store that does not hold what its place says; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    schema: str
    evidence: Any


class Store:
    """The files in ``folder``, which is made when the first of them is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, evidence: Evidence) -> Path:
        """Where the evidence of that key lies."""
        name = re.sub(r"[^\w.+-]+", "-", "-".join((evidence.library, evidence.device, evidence.config)))
        return self.folder / slug(evidence.kernel) / f"{name}.json"

    def load(self, empty: Evidence) -> Evidence:
        """What is known of the key of ``empty``, or that itself. Raises :class:`BadEvidence`."""
        path = self.path(empty)
        try:
            text = path.read_text()
        except FileNotFoundError:
            return empty
        except (OSError, UnicodeDecodeError) as error:
            raise BadEvidence(f"{path}: cannot be read as evidence: {error}") from error
        try:
            file = decode(_File, json.loads(text))
            if file.schema != SCHEMA:
                raise DecodeError(f"schema: expected {SCHEMA!r}, got {file.schema!r}")
            found = decode(Evidence, file.evidence, "evidence")
        except ValueError as error:
            what = f"not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise BadEvidence(f"{path}: no evidence that this release can read: {what}") from error
        if found.key != empty.key:
            raise BadEvidence(f"{path}: holds the evidence of {' / '.join(found.key)}, not of {' / '.join(empty.key)}")
        return found

    def full(self, evidence: Evidence) -> bool:
        """Whether there is no room for this series beside those that the store has."""
        return not self.path(evidence).exists() and sum(1 for _ in self.folder.glob("*/*.json")) >= MOST

    def save(self, evidence: Evidence) -> None:
        """Write it to its place."""
        write_whole(self.path(evidence), json.dumps({"schema": SCHEMA, "evidence": encode(evidence)}) + "\n")


def nothing_yet(kernel: Kernel, case: Case[Any], started: Started, seed_value: int) -> Evidence:
    """The key of a series, and where its random numbers begin.

    That start comes from the run's seed, once: every later run of the series goes on where the one before it ended, so
    that no random number is counted twice, whatever the seeds of the runs. The case, and with it its tensors, is the
    same in all of them.
    """
    device = started.device
    assert device is not None, "the caller checks that the worker has a device"
    library = kernel.library or "torch"
    start = hashlib.sha256(f"{seed_value}/{kernel.name}/{case.id}".encode()).digest()
    return Evidence(
        kernel=kernel.name,
        library=f"{library} {started.libraries.get(library, 'unknown')}",
        device=device.kind,
        config=case.id,
        next_draw=int.from_bytes(start[:4]) >> 1,
    )
