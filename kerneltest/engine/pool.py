"""Worker processes: started, spoken to with a deadline, found dead, replaced.

The parent finds a death by itself, from the end of the pipe, the exit status or the clock; a dying process need not
speak. Workers are spawned, never forked: a forked CUDA context is broken.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kerneltest.engine.job import Job
from kerneltest.model import Finding, Kernel, Outcome, Start, Started, Status, decode, encode
from kerneltest.model.messages import NOT_THE_KERNELS

# From the start of the process to its first answer: importing torch and compiling the poison kernels takes a while.
START_DEADLINE = 300.0
# A device that was there may be busy with its recovery from what a kernel did to it, or be gone for good.
TIMES_TO_OPEN, SECONDS_BETWEEN = 3, 10.0
STDERR_LINES = 12
# How much longer than the first time it may take to load what is compiled, on a machine that is busier by then.
SLOWER = 3
LAST_WORDS_SECONDS = 0.2
# How faulthandler begins what it writes; the innermost frame comes first.
TRACE_STARTS = ("Fatal Python error", "Current thread", "Stack (most recent call first)")
WORKER_FRAMES = os.path.join("kerneltest", "worker", "")


class WorkerFailed(Exception):
    """A worker could not be started, or not with the device, or was ended by an error of an operator's or of ours.

    The message holds the end of its stderr.
    """


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended. ``returncode`` as in :mod:`subprocess` (negative: a signal); None: killed as hung."""

    returncode: int | None
    stderr: tuple[str, ...]


class Runner(Protocol):
    """What a hunt needs: something that runs cases."""

    @property
    def started(self) -> Started: ...
    def run(self, job: Job, *, deadline: float, cold: float) -> Outcome: ...
    def close(self) -> None: ...


class _Process:
    """One worker process and its pipes."""

    def __init__(self, start: Start, libraries: Mapping[str, Path]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by kill, which ends every worker)
        environment = dict(os.environ)
        # The parent may run from a folder that is on no path of the child's.
        package = str(Path(__file__).parents[2])
        paths = [*map(str, libraries.values()), package, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if (share := threads(environment)) is not None:
            environment.setdefault("OMP_NUM_THREADS", str(share))
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "kerneltest.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            # A group of its own: a compiler that a killed worker has started must not outlive it.
            start_new_session=True,
        )
        self.warm: set[tuple[str, str]] = set()
        self._buffer = b""
        self._asked_at = 0
        with contextlib.suppress(BrokenPipeError):  # a process that is dead already is found by receive
            self._send(encode(start))

    def receive(self, deadline: float) -> Any | Death:
        """The next answer, or how the process ended instead."""
        assert self._popen.stdout is not None
        descriptor = self._popen.stdout.fileno()
        end = time.monotonic() + deadline
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return self._end(hung=True)
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                return self._end(hung=False)
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def ask(self, message: Any, deadline: float) -> Any | Death:
        self._asked_at = os.fstat(self._stderr.fileno()).st_size
        try:
            self._send(message)
        except BrokenPipeError:
            return self._end(hung=False)
        return self.receive(deadline)

    def kill(self) -> None:
        """End the process and its children, and wait for it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout, self._stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # unsent bytes for a dead process
                    pipe.close()

    def _send(self, message: Any) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(message).encode() + b"\n")
        self._popen.stdin.flush()

    def _end(self, *, hung: bool) -> Death:
        if hung:
            # The worker's faulthandler writes the line that it hangs in, even if native code never returns.
            os.kill(self._popen.pid, signal.SIGUSR1)
            time.sleep(LAST_WORDS_SECONDS)
            returncode = None
        else:
            returncode = self._popen.wait()
        death = Death(returncode, self._last_words())
        self.kill()
        return death

    def _last_words(self) -> tuple[str, ...]:
        """What the process wrote since it was last asked: its message, then the trace from the innermost frame on."""
        self._stderr.seek(self._asked_at)
        lines = [line for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        starts = [number for number, line in enumerate(lines) if line.startswith(TRACE_STARTS)]
        if not starts:
            return tuple(lines[-STDERR_LINES:])
        before, trace = lines[: starts[0]], lines[starts[0] :]
        # Below the kernel's own frames come those of this package, and then lists of modules.
        own = [number for number, line in enumerate(trace) if WORKER_FRAMES in line]
        return (*before[-STDERR_LINES:], *trace[: own[0] if own else STDERR_LINES])


def threads(environment: Mapping[str, str]) -> int | None:
    """A worker's share of the threads where pytest-xdist says that there are others; None: as many as it likes.

    With all of them for each, workers wait for each other's: 15 workers on 16 cores ran a tenth of the cases.
    """
    others = environment.get("PYTEST_XDIST_WORKER_COUNT")
    return None if others is None else max(1, (os.cpu_count() or 1) // int(others))


def _spares(environment: Mapping[str, str]) -> int:
    """How many workers start up at once: each keeps a core busy for seconds."""
    return max(2, min(4, threads(environment) or (os.cpu_count() or 1) // 2))


class WorkerPool:
    """A worker in use, and after the first death a few spare ones that start up meanwhile.

    Shrinking a crash kills many workers in a row, and each takes seconds to import torch.
    """

    def __init__(self, start: Start, libraries: Mapping[str, Path]) -> None:
        self._start, self._libraries = start, libraries
        self._worker: _Process | None = None
        self._spares: deque[_Process] = deque()
        self._started: Started | None = None
        # A case of each specialisation that passed, as its message.
        self._passed: dict[tuple[str, str], Any] = {}
        # Seconds until each specialisation first gave an answer, and until the first worker gave its first one.
        self._took: dict[tuple[str, str], float] = {}
        self._opening = 0.0
        self.deaths = 0

    @property
    def started(self) -> Started:
        """What the first worker said of itself; starts it. Raises :class:`WorkerFailed`."""
        if self._started is None:
            self._ready()
        assert self._started is not None
        return self._started

    def run(self, job: Job, *, deadline: float, cold: float) -> Outcome:
        """Do a job; a death of the worker is an outcome like any other. Raises :class:`WorkerFailed`.

        ``cold`` is the deadline in seconds where something may have to be compiled first, ``deadline`` that of a warm
        worker. A new worker has the time that its modules took when they were compiled, and after a death a case that
        passed before is run again first: otherwise every new worker would allow the next hang the time of a compiler.
        """
        module, modules = job.module, job.modules
        worker = self._ready()
        if module not in worker.warm and module in self._passed:
            if isinstance(worker.ask(self._passed[module], self._patience(worker, {module}, deadline, cold)), Death):
                self._replace()
                worker = self._ready()
            else:
                worker.warm.add(module)
        begun = time.monotonic()
        answer = worker.ask(job.message, self._patience(worker, modules, deadline, cold))
        if isinstance(answer, Death):
            self._replace()
            if answer.returncode == NOT_THE_KERNELS:
                raise WorkerFailed("\n  ".join(("an error that is not the kernel's ended its worker:", *answer.stderr)))
            seconds = time.monotonic() - begun
            finding = _death(job.kernel, answer, seconds, compiled=modules <= self._took.keys())
            return Outcome(status=Status.FAILED, seconds=seconds, finding=finding, fatal=True)
        outcome = decode(Outcome, answer)
        if outcome.launches:  # a case that was refused has compiled nothing
            self._note(modules, time.monotonic() - begun)
            worker.warm |= modules
        if outcome.status is Status.PASSED and job.series is None:  # a single launch of it may be too large a case
            self._passed.setdefault(module, job.bare.message)
        if outcome.fatal:
            worker.kill()
            self._replace()
        return outcome

    def _patience(self, worker: _Process, modules: set[tuple[str, str]], deadline: float, cold: float) -> float:
        """How long an answer may take: the time of a compiler for nothing that any worker has compiled before."""
        missing = modules - worker.warm
        if missing - self._took.keys():
            return cold
        loading = sum(self._took[module] for module in missing) + (0.0 if worker.warm else self._opening)
        return min(cold, deadline + SLOWER * loading) if missing else deadline

    def _note(self, modules: set[tuple[str, str]], seconds: float) -> None:
        """Remember what those took that ran for the first time; several at once share the time."""
        self._opening = self._opening or seconds
        new = modules - self._took.keys()
        self._took |= dict.fromkeys(new, seconds / len(new) if new else 0.0)

    def close(self) -> None:
        for process in (self._worker, *self._spares):
            if process is not None:
                process.kill()
        self._worker = None
        self._spares.clear()

    def _replace(self) -> None:
        self.deaths += 1
        self._worker = None

    def _ready(self) -> _Process:
        tries = 0
        while self._worker is None:
            worker = self._spares.popleft() if self._spares else _Process(self._start, self._libraries)
            answer = worker.receive(START_DEADLINE)
            if isinstance(answer, Death):
                how = _how_it_ended(answer)
                raise WorkerFailed("\n  ".join((f"the worker process could not start: {how}", *answer.stderr)))
            started = decode(Started, answer)
            if self._started is not None and self._started.device is not None and started.device is None:
                worker.kill()
                tries += 1
                if tries == TIMES_TO_OPEN:
                    raise WorkerFailed(f"the device is gone, and nothing more can be run: {started.error}")
                time.sleep(SECONDS_BETWEEN)
                continue
            self._started = self._started or started
            self._worker = worker
            while self.deaths and len(self._spares) < _spares(os.environ):
                self._spares.append(_Process(self._start, self._libraries))
        return self._worker


class InProcess:
    """The same answers without a process boundary, for a debugger. A crash or a hang takes pytest with it."""

    def __init__(self, start: Start, libraries: Mapping[str, Path]) -> None:
        from kerneltest.worker.serve import Worker

        sys.path[:0] = [str(folder) for folder in libraries.values()]
        self._worker = Worker()
        self.started = decode(Started, json.loads(json.dumps(self._worker.answer(encode(start)))))

    def run(self, job: Job, *, deadline: float, cold: float) -> Outcome:
        """Do a job, however long it takes: nobody is there to watch ``deadline`` and ``cold``."""
        del deadline, cold
        return decode(Outcome, json.loads(json.dumps(self._worker.answer(job.message))))

    def close(self) -> None:
        """Nothing to give back."""


def _death(kernel: Kernel, death: Death, seconds: float, *, compiled: bool) -> Finding:
    """What a worker's end says; ``compiled``: there was nothing to compile that no worker had compiled before."""
    lines = tuple(f"stderr: {line}" for line in death.stderr)
    if death.returncode is None:
        compiler = "" if compiled else ", or it was still being compiled"
        what = f"no answer after {seconds:.1f} s{compiler}; the worker was killed"
        return Finding(kind="Hung", kernel=kernel.name, key="deadline", what=what, details=lines)
    how = _how_it_ended(death)
    return Finding(kind="Crashed", kernel=kernel.name, key=how, what=f"the worker process died: {how}", details=lines)


def _how_it_ended(death: Death) -> str:
    if death.returncode is None:
        return f"no answer after {START_DEADLINE:.0f} s"
    if death.returncode >= 0:
        return f"exit status {death.returncode}"
    try:
        return f"signal {signal.Signals(-death.returncode).name}"
    except ValueError:
        return f"signal {-death.returncode}"
