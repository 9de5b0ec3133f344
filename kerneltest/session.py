"""One run of the plugin: its options, its worker, and from a kernel to a record. Knows nothing of pytest's nodes."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kerneltest import discovery
from kerneltest.engine import repro
from kerneltest.engine.casting import Neighbours
from kerneltest.engine.company import hunt_sequences, replay_sequence
from kerneltest.engine.distribution import hunt_distribution, replay_distribution
from kerneltest.engine.evidence import Store
from kerneltest.engine.hunt import Caught, Target, Trail, hunt, replay
from kerneltest.engine.kept import Kept, Result, digest
from kerneltest.engine.misuse import hunt_misuse, replay_misuse
from kerneltest.engine.pool import InProcess, Runner, WorkerPool
from kerneltest.engine.profile import Profile
from kerneltest.engine.recording import failure_record, kernel_record
from kerneltest.engine.text import failure_text, misuse_text, nothing_checked_text, vacuous_text
from kerneltest.engine.traced import Traced
from kerneltest.model import (
    FAILURES,
    Case,
    Drawn,
    Failure,
    FailureRecord,
    Finding,
    Kernel,
    KernelRecord,
    LaunchSequence,
    Misused,
    NothingChecked,
    Start,
    Started,
    Unchecked,
    VacuousBudget,
    encode,
)
from kerneltest.model.record import TITLES, Hunted
from kerneltest.model.sequence import STEPS

# A budget of which no case uses more than this share cannot tell right from wrong; fewer cases cannot tell that.
VACUOUS = 0.05
ENOUGH_CASES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line, parsed and valid.

    ``roots``: folders of suites. ``fixtures``: where found bugs are written. ``root``: what paths in a report are
    relative to; ``invoked_in``: what those of a command are. ``evidence``: where it is kept what samplers drew.
    ``steps``: the kinds of steps that sequences are made of.
    """

    suites: tuple[str, ...]
    profile: Profile
    device: str
    libraries: Mapping[str, Path]
    isolation: str
    seed: int
    roots: tuple[Path, ...]
    fixtures: Path
    root: Path
    invoked_in: Path
    evidence: Path
    steps: tuple[str, ...] = tuple(STEPS)
    trace: Path | None = None
    kept: Path | None = None


class Session:
    """Holds the workers, from the first kernel that needs one until :meth:`close`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._runner: Runner | None = None
        self._quiet: Runner | None = None
        discovery.use_roots(options.roots)

    @property
    def runner(self) -> Runner:
        if self._runner is None:
            cls = InProcess if self.options.isolation == "inprocess" else WorkerPool
            self._runner = self._traced(cls(self._start, self.options.libraries), "busy")
        return self._runner

    @property
    def quiet(self) -> Runner | None:
        """A worker in which nothing but launches alone ever runs; None where all share the process of pytest."""
        if self._quiet is None and self.options.isolation != "inprocess":
            self._quiet = self._traced(WorkerPool(self._start, self.options.libraries), "quiet")
        return self._quiet

    def _traced(self, runner: Runner, who: str) -> Runner:
        return Traced(runner, self.options.trace, who) if self.options.trace else runner

    @property
    def _start(self) -> Start:
        return Start(
            device=self.options.device,
            suite_roots=tuple(str(root) for root in self.options.roots),
            libraries=self.libraries,
        )

    @cached_property
    def _targets(self) -> tuple[Target, ...]:
        """Every kernel of these suites."""
        found: list[Target] = []
        for root in self.options.roots:
            for path in discovery.suite_files(root):
                try:
                    kernels = discovery.load_kernels(path).values()
                except (Exception, SystemExit):  # noqa: S112  (a broken suite file has an item of its own)
                    continue
                found += (Target(kernel=kernel, source=path) for kernel in kernels)
        return tuple(found)

    def _peers(self, kernel: Kernel) -> tuple[Target, ...]:
        """The other kernels of the same operator, the very object, that can run here."""
        return tuple(
            other
            for other in self._targets
            if other.kernel.name != kernel.name
            and other.kernel.operator is kernel.operator
            and not _unmet(other.kernel, self.runner.started)
        )

    @cached_property
    def libraries(self) -> tuple[str, ...]:
        """Every library that some kernel of these suites asks for."""
        return tuple(sorted({found.kernel.library for found in self._targets if found.kernel.library}))

    def close(self) -> None:
        for runner in (self._runner, self._quiet):
            if runner is not None:
                runner.close()
        self._runner = self._quiet = None

    def hunt(self, hunted: Hunted, suite: str, target: Target) -> Result:
        """Hunt one kernel, unless the run is continued and that had ended before.

        Each failure is written to ``fixtures``; the one to be raised is returned. Raises
        :class:`~kerneltest.engine.pool.WorkerFailed`, :class:`~kerneltest.engine.kept.BadKept` and, of draws,
        :class:`~kerneltest.engine.evidence.BadEvidence`.
        """
        follow = {
            "cases": self._hunt_cases,
            "sequences": self._hunt_sequences,
            "misuse": self._hunt_misuse,
            "distribution": self._hunt_distribution,
        }[hunted]
        if self._kept is None:
            return follow(suite, target)
        title = f"{suite} {target.kernel.name}{TITLES[hunted]}"
        if (result := self._kept.load(title)) is None:
            result = follow(suite, target)
            self._kept.save(title, result)
        return result

    @cached_property
    def _kept(self) -> Kept | None:
        """The hunts that had ended, of a run in which all is the same that a result follows from."""
        options = self.options
        if options.kept is None:
            return None
        started = self.runner.started
        run = {
            "code": digest([Path(__file__).parent, *options.roots]),
            "profile": repr(options.profile),
            "seed": options.seed,
            "steps": options.steps,
            "isolation": options.isolation,
            "libraries": {name: str(folder) for name, folder in options.libraries.items()},
            "versions": started.libraries,
            "device": encode(started.device),
        }
        return Kept(options.kept, run)

    def _hunt_cases(self, suite: str, target: Target) -> Result:
        """Case by case."""
        kernel, started = target.kernel, self.runner.started
        if reason := _unmet(kernel, started):
            return self._record(suite, kernel, unchecked=(Unchecked(what=kernel.name, why=reason),)), None
        target = replace(target, peers=self._peers(kernel))
        trail = hunt(target, self.runner, self.options.profile, self._seed(kernel))
        if trail.unsupported and not trail.cases and self.options.profile.only:
            # The kernel's domain, and no mistake of anybody's, as values would be that no case has.
            why = f"it supports none of the cases that --kernel-only leaves: {_commonest(trail.unsupported)}"
            return self._record(suite, kernel, trail, unchecked=(Unchecked(what=kernel.name, why=why),)), None
        if not trail.cases:
            finding = Finding(kind="NothingChecked", kernel=kernel.name, key="", what="no drawn case is supported")
            failure: Failure = NothingChecked(finding, nothing_checked_text(kernel.name, trail, started))
            return self._record(suite, kernel, trail, (failure_record(failure),)), failure
        if trail.caught is None:
            record = self._record(suite, kernel, trail)
            if vacuous := _vacuous(record, trail.wide):
                failure = VacuousBudget(vacuous, vacuous_text(vacuous, started))
                return self._record(suite, kernel, trail, (failure_record(failure),)), failure
            return record, None
        path = repro.write(self.options.fixtures, suite, trail.caught, started)
        return self._caught(suite, kernel, trail, path)

    def _hunt_sequences(self, suite: str, target: Target) -> Result:
        """In the company of all others."""
        profile, kinds, seed = self.options.profile, self.options.steps, self._seed(target.kernel)

        def follow(target: Target) -> Trail:
            return hunt_sequences(target, self.neighbours, self.runner, self.quiet, profile, seed, kinds)

        return self._follow(suite, target, "sequences", follow, "it ran none of the cases drawn for it alone")

    def _hunt_distribution(self, suite: str, target: Target) -> Result:
        """By what a sampler draws."""
        profile, store, seed = self.options.profile, Store(self.options.evidence), self._seed(target.kernel)

        def follow(target: Target) -> Trail:
            return hunt_distribution(target, self.runner, profile, store, seed)

        return self._follow(suite, target, "distribution", follow, "it drew from none of its configs")

    def _follow(
        self, suite: str, target: Target, hunt: Hunted, follow: Callable[[Target], Trail], nothing: str
    ) -> tuple[KernelRecord, Failure | None]:
        """A hunt after the one of single cases; ``nothing`` says why no case ran, should that be so."""
        kernel = target.kernel
        what = f"{kernel.name}{TITLES[hunt]}"
        if reason := _unmet(kernel, self.runner.started):
            return self._record(suite, kernel, unchecked=(Unchecked(what=what, why=reason),), hunt=hunt), None
        trail = follow(replace(target, peers=self._peers(kernel)))
        if trail.caught is not None:
            path = repro.write(self.options.fixtures, suite, trail.caught, self.runner.started)
            return self._caught(suite, kernel, trail, path, hunt=hunt)
        unchecked = () if trail.cases else (Unchecked(what=what, why=nothing),)
        return self._record(suite, kernel, trail, unchecked=unchecked, hunt=hunt), None

    def _hunt_misuse(self, suite: str, target: Target) -> Result:
        """On bad input; what is raised is the first failure, with a text that lists all of them."""
        kernel, options = target.kernel, self.options
        if reason := _unmet(kernel, self.runner.started):
            why = Unchecked(what=f"{kernel.name} on bad input", why=reason)
            return self._record(suite, kernel, unchecked=(why,), hunt="misuse"), None
        trail = hunt_misuse(target, self.runner, options.profile, self._seed(kernel))
        failures = []
        for caught in trail.found:
            path = repro.write(options.fixtures, suite, caught, self.runner.started)
            failures.append(self._failure(caught, path, len(trail.cases)))
        nothing = Unchecked(what=f"{kernel.name} on bad input", why="it ran none of the cases drawn for it")
        unchecked = () if trail.cases or trail.tally.trusted else (nothing,)
        records = tuple(record for _, record in failures)
        record = self._record(suite, kernel, trail, records, unchecked, hunt="misuse")
        if not failures:
            return record, None
        first = failures[0][0]
        return record, type(first)(first.finding, misuse_text(trail.found, trail.tally, str(first)))

    @cached_property
    def neighbours(self) -> Neighbours:
        """Every kernel of every suite that can run here."""
        started = self.runner.started
        targets = {one.kernel.name: one for one in self._targets if not _unmet(one.kernel, started)}
        return Neighbours(targets=targets, seed=self.options.seed)

    def replay(
        self,
        suite: str,
        target: Target,
        case: Case[Any] | LaunchSequence | Misused | Drawn,
        path: Path,
        found_on: Mapping[str, str],
    ) -> tuple[KernelRecord, Failure | None]:
        """Run the case, the sequence, the bad input or the draws of a fixture; green means that the bug is gone."""
        kernel, profile, started = target.kernel, self.options.profile, self.runner.started
        if reason := _unmet(kernel, started) or _elsewhere(found_on, started):
            return self._record(suite, kernel, unchecked=(Unchecked(what=self._shown(path), why=reason),)), None
        target = replace(target, peers=self._peers(kernel))
        hunt: Hunted = "cases"
        if isinstance(case, LaunchSequence):
            hunt = "sequences"
            absent = [step.kernel for step in case.neighbours if step.kernel not in self.neighbours.targets]
            if absent:
                why = f"{absent[0]}, which runs before it, cannot run here"
                return self._record(suite, kernel, unchecked=(Unchecked(what=self._shown(path), why=why),)), None
            trail = replay_sequence(target, self.neighbours.targets, self.runner, self.quiet, profile, case)
        elif isinstance(case, Misused):
            hunt, trail = "misuse", replay_misuse(target, self.runner, profile, case)
        elif isinstance(case, Drawn):
            hunt, trail = "distribution", replay_distribution(target, self.runner, profile, case, self._seed(kernel))
        else:
            trail = replay(target, self.runner, profile, case)
        if trail.caught is not None:
            return self._caught(suite, kernel, trail, path, hunt)
        unchecked = tuple(
            Unchecked(what=self._shown(path), why=f"unsupported: {reason}") for reason in trail.unsupported
        )
        return self._record(suite, kernel, trail, unchecked=unchecked, hunt=hunt), None

    def axes_of(self, name: str) -> type[Any]:
        """The axes of a kernel's cases; raises ValueError that lists the kernels there are."""
        for one in self._targets:
            if one.kernel.name == name:
                return one.kernel.operator.axes
        raise ValueError(f"unknown kernel {name!r}; valid: {', '.join(one.kernel.name for one in self._targets)}")

    def _caught(
        self, suite: str, kernel: Kernel, trail: Trail, path: Path, hunt: Hunted = "cases"
    ) -> tuple[KernelRecord, Failure]:
        assert trail.caught is not None
        failure, record = self._failure(trail.caught, path, len(trail.cases))
        return self._record(suite, kernel, trail, (record,), hunt=hunt), failure

    def _failure(self, caught: Caught, path: Path, ran: int) -> tuple[Failure, FailureRecord]:
        """A catch that lies in a fixture, as what is raised and as what is kept."""
        command = self._replay_command(path)
        text = failure_text(caught, self.runner.started, command, ran)
        failure = FAILURES[caught.finding.kind](caught.finding, text)
        return failure, failure_record(failure, caught, self._shown(path), command)

    def _record(
        self,
        suite: str,
        kernel: Kernel,
        trail: Trail | None = None,
        failures: tuple[FailureRecord, ...] = (),
        unchecked: tuple[Unchecked, ...] = (),
        hunt: Hunted = "cases",
    ) -> KernelRecord:
        return kernel_record(suite, kernel, self.runner.started, hunt, trail, failures, unchecked)

    def _seed(self, kernel: Kernel) -> int:
        """Every kernel draws cases of its own: two kernels of a run together see twice as many."""
        return int.from_bytes(hashlib.sha256(f"{self.options.seed}/{kernel.name}".encode()).digest()[:8])

    def _shown(self, path: Path) -> str:
        return _relative(path, self.options.root)

    def _replay_command(self, path: Path) -> str:
        here = self.options.invoked_in
        words = ["pytest", _relative(path, here)]
        words += [
            f"--kernel-library={name}={_relative(folder, here)}" for name, folder in self.options.libraries.items()
        ]
        if self.options.device != "auto":
            words.append(f"--kernel-device={self.options.device}")
        return shlex.join(words)


def _commonest(unsupported: Mapping[str, int]) -> str:
    return max(unsupported, key=lambda reason: unsupported[reason])


def _vacuous(record: KernelRecord, wide: Collection[str]) -> Finding | None:
    """Whether some output's budget was never put to use, over enough cases to tell.

    Worst cases of plain fp32 arithmetic are never met either; only what is declared wider than that is asked.
    """
    for output, used in record.used.items():
        if len(record.cases) >= ENOUGH_CASES and used <= VACUOUS and output in wide:
            what = f"{output}: no case used more than {100 * used:.2g} % of an error budget wider than fp32 needs"
            return Finding(kind="VacuousBudget", kernel=record.name, key=output, what=what)
    return None


def _relative(path: Path, folder: Path) -> str:
    """The path as seen from the folder, if it lies in it."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _elsewhere(found_on: Mapping[str, str], started: Started) -> str | None:
    """Why passing here would not mean that a bug is gone."""
    assert started.device is not None
    if started.device.kind == "cpu" and found_on.get("kind", "cpu") != "cpu":
        return f"found on {found_on.get('device', 'a GPU')}: what runs on a CPU is another program"
    return None


def _unmet(kernel: Kernel, started: Started) -> str | None:
    assert started.device is not None
    return kernel.unmet(started.device, started.missing)
