"""The zoo as a corpus: kernels of suite files, run by the real worker for our verdict and once more for the others'.

Kernels that kill, hang or raise are the point, so nothing of them runs in this process: cases go to a worker of
:mod:`kerneltest.engine.pool` and to :mod:`kerneltest.power.launch`. To lose the process counts as found by everybody.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kerneltest import discovery
from kerneltest.engine.job import Job
from kerneltest.engine.pool import WorkerPool
from kerneltest.engine.profile import PROFILES
from kerneltest.model import Case, Kernel, Start, Status, encode
from kerneltest.model import Size as CaseSize
from kerneltest.power.corpus import Size, Unit
from kerneltest.power.tally import Tally

ZOO = "zoo"
KERNELTEST = "kerneltest"
# flash-attention's criterion needs an unfused baseline, which these operators do not have.
USUAL = ("fixed 1e-2", "fixed 1e-3", "torch bf16", "2 ulp", "FlashMLA", "diff 1e-3", "diff 1e-5", "cos 0.99")
DETECTORS = (KERNELTEST, *USUAL)
# What the usual checkers' tolerances are meant for.
DTYPE = "bfloat16"
# How the zoo names the kernels that are right.
CORRECT = ("[twin]", "[sound]")
DEADLINE, COLD_DEADLINE = 20.0, 120.0


@dataclass(frozen=True, slots=True)
class Zoo:
    """The CPU kernels of the suites under ``root``."""

    root: str
    # Kernels that share a worker, which takes seconds to start.
    together: int = 12

    def units(self, size: Size) -> Sequence[Unit]:
        if not size.zoo:
            return []
        return [
            Unit(group=ZOO, subject=name, family="cpu", strategy="drawn", trials=size.zoo)
            for name, (kernel, _) in self.kernels().items()
            if "cpu" in kernel.devices
        ]

    def sources(self) -> list[Path]:
        """Every file that a verdict on the zoo depends on."""
        return list(Path(self.root).rglob("*.py"))

    def kernels(self) -> dict[str, tuple[Kernel, Path]]:
        """Kernels by name, with the file of each."""
        discovery.use_roots(self._roots())
        files = discovery.suite_files(Path(self.root))
        return {kernel.name: (kernel, path) for path in files for kernel in discovery.load_kernels(path).values()}

    def run(self, units: Sequence[Unit], seed: int) -> list[Tally]:
        kernels = self.kernels()
        roots = tuple(str(root) for root in self._roots())
        libraries = tuple(sorted({kernel.library for kernel, _ in kernels.values() if kernel.library}))
        pool = WorkerPool(Start(device="cpu", suite_roots=roots, libraries=libraries), {})
        launcher = _Launcher(roots)
        try:
            return [_tally(*kernels[unit.subject], unit, seed, pool, launcher) for unit in units]
        finally:
            pool.close()
            launcher.close()

    def _roots(self) -> list[Path]:
        return [Path(self.root), discovery.builtin_root()]


class _Launcher:
    """A process of :mod:`kerneltest.power.launch`, started again when a kernel has ended it."""

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = list(roots)
        self._child: subprocess.Popen[bytes] | None = None

    def rejecting(self, kernel: Kernel, source: Path, case: Case[Any]) -> Sequence[str]:
        """The usual checkers that reject a launch; all of them if the process died or hung."""
        deadline = DEADLINE if self._child else COLD_DEADLINE
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        request = {"source": str(source), "kernel": kernel.name, "case": encode(case)}
        with contextlib.suppress(BrokenPipeError):  # found dead below
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
        answer = child.stdout.readline() if select.select([child.stdout], [], [], deadline)[0] else b""
        if answer.endswith(b"\n"):
            rejected: list[str] = json.loads(answer)
            return rejected
        self.close()
        return USUAL

    def _start(self) -> subprocess.Popen[bytes]:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "kerneltest.power.launch", *self._roots],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # This process may run from a folder that is on no path of the child's.
            cwd=Path(__file__).parents[2],
        )
        return self._child

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            with contextlib.suppress(BrokenPipeError):  # unsent bytes for a dead process
                self._child.communicate()
            self._child = None


def _tally(kernel: Kernel, source: Path, unit: Unit, seed: int, pool: WorkerPool, launcher: _Launcher) -> Tally:
    started = pool.started
    assert started.device is not None, "a CPU is always there"
    if reason := kernel.unmet(started.device, started.missing):
        return Tally(notes=(reason,))
    found, kinds, supported = Counter[str](), Counter[str](), 0
    for case in _draw(kernel, unit.trials, seed):
        outcome = pool.run(Job(kernel=kernel, source=source, case=case), deadline=DEADLINE, cold=COLD_DEADLINE)
        if outcome.status is Status.UNSUPPORTED:
            continue
        supported += 1
        if outcome.finding is not None:
            found[KERNELTEST] += 1
            kinds[outcome.finding.kind] += 1
        found.update(launcher.rejecting(kernel, source, case))
    notes = tuple(f"{kind} in {count}" for kind, count in kinds.items())
    return Tally(trials=supported, flagged=dict(found), notes=notes or (() if supported else ("supports no case",)))


def _draw(kernel: Kernel, count: int, seed: int) -> list[Case[Any]]:
    """Distinct cases of the kernel's operator, small ones, the same for the same seed."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    small: CaseSize = PROFILES["default"].cpu
    drawn: dict[str, Case[Any]] = {}

    @seeded(seed)
    @settings(
        max_examples=4 * count,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=kernel.operator.cases(small))
    def keep(case: Case[Any]) -> None:
        if getattr(case.axes, "dtype", DTYPE) == DTYPE:
            drawn.setdefault(case.id, case)

    keep()
    return list(drawn.values())[:count]
