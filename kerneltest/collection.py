"""pytest's side: from suite files and fixtures to items."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kerneltest import discovery
from kerneltest.commandline import one_of, options_of
from kerneltest.engine import repro
from kerneltest.engine.evidence import BadEvidence
from kerneltest.engine.hunt import Target
from kerneltest.engine.kept import BadKept
from kerneltest.engine.pool import WorkerFailed
from kerneltest.model import Case, Conclusion, Drawn, Failure, KernelRecord, LaunchSequence, Misused, encode
from kerneltest.model.record import TITLES, Hunted
from kerneltest.session import Options, Session

SESSION = pytest.StashKey[Session]()


def start(config: pytest.Config) -> Session:
    """The session of this run, made at first use. Raises pytest.UsageError for options that make no sense."""
    if SESSION not in config.stash:
        session = Session(options_of(config))
        config.stash[SESSION] = session
        _check_libraries(session)
        if session.options.device.startswith("cuda") and not config.option.collectonly:
            _require_device(session)
    return config.stash[SESSION]


def add_suites_to_arguments(config: pytest.Config) -> None:
    """Collect the chosen suites: alone if no path was given, beside the paths given otherwise.

    A pasted node id such as ``suites/attention/flashinfer.py::...`` narrows the run to what it names.
    """
    options = start(config).options
    folders = [str(root / suite) for root in options.roots for suite in options.suites if (root / suite).is_dir()]
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = folders
        return
    here = config.invocation_params.dir
    narrowed = False
    for number, argument in enumerate(config.args):
        path, *names = argument.split("::", 1)
        absolute = Path(os.path.abspath(here / path))
        narrowed |= any(absolute.is_relative_to(root) for root in options.roots)
        if not absolute.exists() and (installed := _suite_file(options, path)):
            config.args[number] = "::".join([str(installed), *names])
            narrowed = True
    if not narrowed:
        config.args = [*config.args, *folders]


def suite_file(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """The collector of a suite file, None for any other file."""
    options = start(parent.config).options
    suite = discovery.suite_of(path, options.roots)
    if suite not in options.suites:
        return None
    # An installed suite lies somewhere else: its node ids are those it would have in the project.
    nodeid = None if path.is_relative_to(options.root / "suites") else f"suites/{suite}/{path.name}"
    return SuiteFile.from_parent(parent, path=path, nodeid=nodeid)


def _suite_file(options: Options, nodeid_path: str) -> Path | None:
    folder, *rest = Path(nodeid_path).parts or ("",)
    candidates = [root.joinpath(*rest) for root in options.roots] if folder == "suites" and rest else []
    return next((path for path in candidates if path.exists()), None)


class SuiteFile(pytest.File):
    """A suite file; its items are the kernels it defines, or the one that says why there are none."""

    def collect(self) -> Iterator[pytest.Item]:
        suite = self.path.parent.name
        try:
            kernels = discovery.load_kernels(self.path)
        except (Exception, SystemExit) as error:  # whatever an import may raise is a finding about this file alone
            reason = f"{type(error).__name__}: {error}"
            yield BrokenItem.from_parent(self, name="import", reason=reason, expected=discovery.EXPECTED_FORM)
            return
        profile = start(self.config).options.profile
        for kernel in kernels.values():
            if not profile.concerns(kernel.operator):
                continue
            asked: dict[Hunted, Any] = {
                "cases": True,
                "sequences": profile.cuda_sequences,
                "misuse": profile.misused,
                "distribution": profile.cuda_draws and kernel.operator.draws,
            }
            for hunted in (hunted for hunted, wanted in asked.items() if wanted):
                name = kernel.name + TITLES[hunted].replace(" ", "-")
                target = Target(kernel=kernel, source=self.path)
                yield KernelItem.from_parent(self, name=name, suite=suite, target=target, hunted=hunted)


def put_bad_input_last(items: list[pytest.Item]) -> None:
    """Move the items on bad input behind all others, in their order.

    A GPU whose contexts are lost by the dozen can be busy with that for minutes, or be gone: nothing else should wait
    for it, or be lost with it.
    """
    items.sort(key=lambda item: isinstance(item, KernelItem) and item.hunted == "misuse")


class RecordedItem(pytest.Item):
    """An item that leaves a record for the reports."""

    record: KernelRecord | None = None

    def conclude(self, record: KernelRecord, failure: Failure | None) -> None:
        """Pass, fail or skip, as the record says."""
        self.record = record
        if failure is not None:
            raise failure
        if record.verdict is Conclusion.UNCHECKED or not record.cases:
            pytest.skip("; ".join(unchecked.why for unchecked in record.unchecked))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, (Failure, WorkerFailed, BrokenFile, BadEvidence, BadKept)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[os.PathLike[str], int | None, str]:
        # Not the bare name: pytest would turn its dots into "::", and the line into a node id that is none.
        return self.path, None, f"kernel {self.name}"


class KernelItem(RecordedItem):
    """One hunt of one kernel."""

    def __init__(self, *, suite: str, target: Target, hunted: Hunted, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.suite, self.target, self.hunted = suite, target, hunted

    def runtest(self) -> None:
        self.conclude(*start(self.config).hunt(self.hunted, self.suite, self.target))


class FixtureFile(pytest.File):
    """A ``case.json``; its item replays the bug."""

    def collect(self) -> Iterator[pytest.Item]:
        try:
            session = start(self.config)
        except pytest.UsageError as error:
            raise self.CollectError(str(error)) from None
        try:
            read = repro.read(self.path)
            target = _find(session, read.suite, read.kernel)
            case: Case[Any] = Case.from_json(read.case, target.kernel.operator.axes)
            target.kernel.operator.strategy(case.inputs)
            if case.relation:
                target.kernel.operator.relation(case.relation)
            played: Case[Any] | LaunchSequence | Misused | Drawn = case
            if read.sequence is not None:
                played = LaunchSequence.from_json(case, read.sequence, session.axes_of)
            elif read.misuse is not None:
                played = Misused.from_json(case, read.misuse)
            elif read.draws and target.kernel.operator.draws:
                played = Drawn(case=case, draws=read.draws)
        except ValueError as error:
            yield BrokenItem.from_parent(self, name="read", reason=str(error), expected=repro.EXPECTED_FORM)
            return
        yield ReplayItem.from_parent(
            self, name="replay", suite=read.suite, target=target, case=played, found_on=read.found_on
        )


class ReplayItem(RecordedItem):
    """Run the case, the sequence, the bad input or the draws of a fixture; it passes once the bug is gone."""

    def __init__(
        self,
        *,
        suite: str,
        target: Target,
        case: Case[Any] | LaunchSequence | Misused | Drawn,
        found_on: Mapping[str, str],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.suite, self.target, self.case, self.found_on = suite, target, case, found_on

    def runtest(self) -> None:
        self.conclude(*start(self.config).replay(self.suite, self.target, self.case, self.path, self.found_on))


class BrokenFile(Exception):
    """A suite file or fixture that cannot be used."""


class BrokenItem(RecordedItem):
    """Fails with the file, the reason and the expected form, while everything else still runs."""

    def __init__(self, *, reason: str, expected: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reason, self.expected = reason, expected

    def runtest(self) -> None:
        raise BrokenFile(f"{self.path}\n  {self.reason}\n  expected: {self.expected}")


def encoded_record(item: pytest.Item) -> Any | None:
    """The JSON form of what an item left behind, for a report that may cross to another process."""
    record = item.record if isinstance(item, RecordedItem) else None
    return None if record is None else encode(record)


def _check_libraries(session: Session) -> None:
    for name in session.options.libraries:
        one_of("--kernel-library", name, list(session.libraries))


def _require_device(session: Session) -> None:
    try:
        error = session.runner.started.error
    except WorkerFailed as failed:
        error = str(failed)
    if error:
        session.close()
        raise pytest.UsageError(f"--kernel-device: {error}")


def _find(session: Session, suite: str, name: str) -> Target:
    """The kernel of that name; raises ValueError that lists the valid ones."""
    files = [path for root in session.options.roots for path in discovery.suite_files(root)]
    suites = sorted({path.parent.name for path in files})
    if suite not in suites:
        raise ValueError(f"unknown suite {suite!r}; valid: {', '.join(suites)}")
    known: list[str] = []
    broken: list[str] = []
    for path in files:
        if path.parent.name != suite:
            continue
        try:
            kernels = discovery.load_kernels(path)
        except (Exception, SystemExit) as error:
            broken.append(f"{path} does not import: {type(error).__name__}: {error}")
            continue
        if name in kernels:
            return Target(kernel=kernels[name], source=path)
        known += kernels
    raise ValueError("\n  ".join([f"suite {suite!r} has no kernel {name!r}; valid: {', '.join(known)}", *broken]))
