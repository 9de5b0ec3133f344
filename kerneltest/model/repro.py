"""A found bug on disk: ``case.json``, everything that a replay needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "kerneltest.case/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Repro:
    """A minimal failing case. ``found_on`` says on which device, of which kind, and with which versions it was seen.

    ``sequence``: the steps around its launch, where the case alone is right. ``misuse``: what is wrong with the call.
    ``draws``: how many it took to see that they follow another distribution; 0 for a failure of a single launch.
    """

    schema: str
    suite: str
    kernel: str
    kind: str
    key: str
    culprit: str | None
    what: str
    case: Any
    sequence: Any = None
    misuse: Any = None
    draws: int = 0
    found_on: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema!r} is not known to this release, which reads {SCHEMA!r}")
