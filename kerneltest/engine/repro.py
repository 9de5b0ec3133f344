"""Write a caught bug where ``pytest fixtures/`` replays it, and read it back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from kerneltest.engine.hunt import Caught
from kerneltest.model import DecodeError, Misused, Started, decode, encode
from kerneltest.model.repro import SCHEMA, Repro

FILE_NAME = "case.json"
EXPECTED_FORM = (
    f'a JSON object with "schema": "{SCHEMA}", "suite", "kernel", "kind", "key", "culprit", "what" and "case"'
)


def slug(kernel: str) -> str:
    """A kernel's name as a folder's: brackets would read as parametrisation in a node id, a blank ends a word."""
    return kernel.replace("[", "-").replace("]", "").replace("/", "-").replace(" ", "-")


def write(folder: Path, suite: str, caught: Caught, started: Started) -> Path:
    """Write ``<folder>/<kernel>/<failure>-<hash>/case.json`` and return its path. The same bug gets the same name."""
    finding, case = caught.finding, caught.case
    shown = caught.sequence or (Misused(case=case, misuse=caught.misuse) if caught.misuse else case)
    digest = hashlib.sha256("\0".join((*finding.identity, shown.id)).encode()).hexdigest()[:8]
    target = folder / slug(finding.kernel) / f"{finding.kind}-{digest}" / FILE_NAME
    device = started.device
    where = {"device": device.name, "kind": device.kind} if device else {}
    repro = Repro(
        schema=SCHEMA,
        suite=suite,
        kernel=finding.kernel,
        kind=finding.kind,
        key=finding.key,
        culprit=finding.culprit,
        what=finding.what,
        case=encode(case),
        sequence=caught.sequence and caught.sequence.to_json(),
        misuse=caught.misuse and encode(caught.misuse),
        draws=caught.draws,
        found_on={**where, **started.libraries},
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(encode(repro), indent=2) + "\n")
    return target


def read(path: Path) -> Repro:
    """Inverse of :func:`write`; raises :class:`DecodeError` with the reason alone."""
    try:
        return decode(Repro, json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise DecodeError(f"not a JSON file: {error}") from error
