"""What a worker is asked to run: a case of a kernel, and all that is to happen with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from kerneltest.model import Case, Kernel, LaunchSequence, Misuse, Run, Series, encode

# Another kernel, and the file that defines it.
Peer = tuple[Kernel, Path]
# What is wrong with a call, or only the question what can be.
Bad = Misuse | Literal["list"]
# What has to be compiled: a kernel by its name, and one of its specialisations.
Module = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Company:
    """What happens around a case: the steps, where the kernels that they name live, and what the case gives alone.

    ``alone``: nothing happens around it, and nothing is wanted but the digest of its answer. ``suspect``: what a larger
    sequence turned out to depend on.
    """

    sequence: LaunchSequence
    neighbours: Mapping[str, Peer] = field(default_factory=dict)
    fresh: str | None = None
    alone: bool = False
    suspect: str | None = None

    def modules(self, kernel: Kernel) -> set[Module]:
        """What has to be compiled for it."""
        own = {(kernel.name, kernel.specialisation(case)) for case in self.sequence.cases}
        theirs = {
            (step.kernel, self.neighbours[step.kernel][0].specialisation(step.case))
            for step in self.sequence.neighbours
        }
        return own | theirs


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A case of a kernel that lives in ``source``. At most one of ``company``, ``misuse`` and ``series`` is given.

    ``peer`` runs beside it and is held against it. ``guarded``: the one buffer that lies at a guard page, None for all.
    """

    kernel: Kernel
    source: Path
    case: Case[Any]
    peer: Peer | None = None
    company: Company | None = None
    guarded: str | None = None
    misuse: Bad | None = None
    series: Series | None = None

    @property
    def module(self) -> Module:
        """What has to be compiled for the case itself."""
        return (self.kernel.name, self.kernel.specialisation(self.case))

    @property
    def modules(self) -> set[Module]:
        """All that has to be compiled for it."""
        found = {self.module}
        if self.peer:
            found.add((self.peer[0].name, self.peer[0].specialisation(self.case)))
        return found | (self.company.modules(self.kernel) if self.company else set())

    @property
    def bare(self) -> Job:
        """The case and nothing else."""
        return Job(kernel=self.kernel, source=self.source, case=self.case)

    @property
    def message(self) -> Any:
        """The JSON form of the :class:`~kerneltest.model.Run` that it is for a worker."""
        run = Run(
            source=str(self.source),
            kernel=self.kernel.name,
            case=encode(self.case),
            peer=(str(self.peer[1]), self.peer[0].name) if self.peer else None,
            guarded=self.guarded,
            misuse=self.misuse if isinstance(self.misuse, Misuse) else None,
            misuses=self.misuse == "list",
            series=self.series,
        )
        if (company := self.company) is not None:
            run = replace(
                run,
                sequence=company.sequence.to_json(),
                neighbours={name: str(path) for name, (_, path) in company.neighbours.items()},
                fresh=company.fresh,
                alone=company.alone,
                suspect=company.suspect,
            )
        return encode(run)
