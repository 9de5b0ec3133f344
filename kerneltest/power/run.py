"""Run the units of corpora in processes, keep what is done in a file, and go on from there."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kerneltest.model import DecodeError, decode, encode
from kerneltest.power.corpus import Corpus, Size, Unit
from kerneltest.power.tally import Tally

PROGRESS = "kerneltest.power-progress/1"
ROOMS = ("model", "oracle", "power")
# mallopt's names: freed memory is kept, because every trial asks for the same large blocks again.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT = -1, -3, 1 << 30
PR_SET_PDEATHSIG = 1
WIDTH = 30


class ProgressFileError(ValueError):
    """The file to resume from belongs to another run, or to none; the message says which field differs."""


@dataclass(frozen=True, slots=True)
class Job:
    """Units of a corpus that one process runs in a row."""

    corpus: Corpus
    units: tuple[Unit, ...]


class ProgressFile:
    """JSON lines: a header that identifies the run, then a line for each finished unit. Safe to kill at any time."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Open or create; raises :class:`ProgressFileError` where ``header`` does not fit, OSError as ever."""
        self.path, self.done = path, dict[str, Tally]()
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if path.exists() and (lines := list(_whole_lines(path.read_bytes()))):
            whole = sum(len(line) for line in lines)
            self._read(lines, header)
        self._file: IO[bytes] = path.open("r+b" if path.exists() else "x+b")
        # A line that a killed run left unfinished is cut off.
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._write(header)

    def _read(self, lines: Sequence[bytes], header: Mapping[str, Any]) -> None:
        try:
            found, *entries = (json.loads(line) for line in lines)
            for name, value in header.items():
                if found[name] != value:
                    raise ProgressFileError(f"{self.path}: {name} is {found[name]!r}, this run's is {value!r}")
            self.done = {entry["unit"]: decode(Tally, entry["tally"], "tally") for entry in entries}
        except (json.JSONDecodeError, DecodeError, KeyError, TypeError) as error:
            raise ProgressFileError(f"{self.path} is no progress file of kerneltest power: {error!r}") from error

    def add(self, unit: Unit, tally: Tally) -> None:
        self._write({"unit": unit.key, "tally": encode(tally)})

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _whole_lines(data: bytes) -> Iterator[bytes]:
    return (line for line in data.splitlines(keepends=True) if line.endswith(b"\n"))


def fingerprint(extra: Iterable[Path] = ()) -> str:
    """A digest of every source that a verdict depends on, and of torch's version."""
    import torch

    digest = hashlib.sha256(torch.__version__.encode())
    package = Path(__file__).parents[1]
    for path in (*sorted(p for room in ROOMS for p in (package / room).rglob("*.py")), *sorted(extra)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run(
    corpora: Iterable[Corpus], size: Size, seed: int, *, processes: int = 1, progress: ProgressFile | None = None
) -> dict[Unit, Tally]:
    """The tally of every unit. Depends on units and seed alone, not on order, processes or interruptions."""
    known = progress.done if progress else {}
    units, jobs = list[Unit](), list[Job]()
    for corpus in corpora:
        wanted = corpus.units(size)
        units += wanted
        left = [unit for unit in wanted if unit.key not in known]
        jobs += (Job(corpus, tuple(left[at : at + corpus.together])) for at in range(0, len(left), corpus.together))
    done = {unit: known[unit.key] for unit in units if unit.key in known}
    with Bar(len(units), len(done)) as bar:
        for job, tallies in _results(jobs, seed, processes):
            for unit, tally in zip(job.units, tallies, strict=True):
                done[unit] = tally
                if progress:
                    progress.add(unit, tally)
                bar.step(f"{unit.group} {unit.subject}")
    return {unit: done[unit] for unit in units}


def _results(jobs: Sequence[Job], seed: int, processes: int) -> Iterator[tuple[Job, list[Tally]]]:
    if processes == 1:
        prepare_process()
        for job in jobs:
            yield job, job.corpus.run(job.units, seed)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_prepare_child) as pool:
        waiting: dict[Future[list[Tally]], Job] = {pool.submit(job.corpus.run, job.units, seed): job for job in jobs}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _prepare_child() -> None:
    """A pool's process does not notice by itself that its parent was killed; on Linux the system tells it."""
    prepare_process()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def prepare_process() -> None:
    """One thread, whose order of additions no other process can change, and memory that is used again."""
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError, OSError):  # a C library without mallopt is only slower
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


class Bar:
    """A progress bar on stderr; silent where nobody watches."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done, self._began = total, done, time.monotonic()
        self._fresh = 0
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> Bar:
        return self

    def step(self, what: str) -> None:
        self._done += 1
        self._fresh += 1
        if not self._shown:
            return
        filled = WIDTH * self._done // self._total
        left = (time.monotonic() - self._began) / self._fresh * (self._total - self._done)
        line = f"[{'#' * filled}{'.' * (WIDTH - filled)}] {self._done}/{self._total}, {left:.0f} s left: {what}"
        sys.stderr.write(f"\r\033[K{line[:119]}")
        sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
