"""Workers that hang, die or never start, without pytest around them."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kerneltest import discovery
from kerneltest.engine.job import Job
from kerneltest.engine.pool import SLOWER, Death, WorkerFailed, WorkerPool, threads
from kerneltest.model import Outcome, Start, Started, Status, encode
from kerneltest.model.messages import NOT_THE_KERNELS
from kerneltest.worker.__main__ import serve

if TYPE_CHECKING:
    from user_project import Project

# The seed of a case says how deep below the launch it happens; 0: not at all.
SUITE = """
import ctypes
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from ._cheap import operator


def below(depth, action):
    if depth > 1:
        below(depth - 1, action)
    elif depth == 1:
        action()


def sleep():
    time.sleep(600)  # sleeps here


def read_null():
    ctypes.string_at(0)  # dies here


def hang(call):
    below(call.case.seed, sleep)
    return a.healthy(call)


def segfault(call):
    below(call.case.seed, read_null)
    return a.healthy(call)


def leave_a_child(call):
    child = subprocess.Popen(["sleep", "600"])
    (Path(__file__).parent / "pids").write_text(f"{os.getpid()} {child.pid}")
    return a.healthy(call)


def compile_first(call):
    time.sleep(3)
    return a.healthy(call)


def misread(case, inputs, device):
    if case.seed:
        raise IndexError("a reference goes wrong")
    return operator.reference(case, inputs, device)


mistaken = replace(kernel("pooled.mistaken", a.healthy), operator=replace(operator, reference=misread))
compiling = kernel("pooled.compile", compile_first, unsupported=lambda case, device: None if case.seed else "no")
hanging = kernel("pooled.hang", hang)
dying = kernel("pooled.segfault", segfault)
parent = kernel("pooled.parent", leave_a_child)
"""
DEADLINE = 1.0
# Generous, for the first case of a kernel, on a machine that is busy with something else.
COLD = 60.0
DEPTH = 5


@dataclass
class Pooled:
    """A pool's life: outcomes in order, the seconds of each, and who was alive when."""

    source: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    deaths: int = 0
    group: int = 0
    members: tuple[int, ...] = ()
    before: frozenset[int] = frozenset()
    during: frozenset[int] = frozenset()
    after: frozenset[int] = frozenset()

    def line_of(self, comment: str) -> str:
        (number,) = (n for n, line in enumerate(self.source.read_text().splitlines(), 1) if comment in line)
        return f'File "{self.source}", line {number} in '


def own_children() -> frozenset[int]:
    """Children of this process, dead ones that nobody waited for included."""
    return frozenset(
        int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    )


def running_in_group(group: int) -> list[int]:
    """Processes of a process group that are alive; one that is dead and not yet waited for is not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.fixture(scope="module")
def modules() -> Iterator[None]:
    """What discovery leaves in this process is taken back."""
    package = sys.modules.get(discovery.PACKAGE)
    path = list(package.__path__) if package else []
    yield
    for name in [name for name in sys.modules if name.startswith(f"{discovery.PACKAGE}.pooled")]:
        del sys.modules[name]
    discovery.use_roots([Path(folder) for folder in path])


@pytest.fixture(scope="module")
def pooled(new_project: Callable[[], Project], modules: None) -> Pooled:
    project = new_project()
    project.suite("pooled", pooled=SUITE)
    roots = [project.root / "suites", discovery.builtin_root()]
    discovery.use_roots(roots)
    source = roots[0] / "pooled" / "pooled.py"
    kernels = discovery.load_kernels(source)
    case: Any = sys.modules[f"{discovery.PACKAGE}.pooled._cheap"].case
    result = Pooled(source, before=own_children())
    pool = WorkerPool(Start(device="cpu", suite_roots=tuple(map(str, roots)), libraries=()), {})

    def run(label: str, kernel: str, seed: int, deadline: float = DEADLINE) -> None:
        begun = time.monotonic()
        result.outcomes[label] = pool.run(
            Job(kernel=kernels[kernel], source=source, case=case(seed)), deadline=deadline, cold=COLD
        )
        result.seconds[label] = time.monotonic() - begun

    try:
        run("warm", "pooled.hang", 0)
        run("hung", "pooled.hang", DEPTH)
        run("hung again", "pooled.hang", DEPTH)
        run("after hung", "pooled.hang", 0)
        run("refused", "pooled.compile", 0)
        run("compiled", "pooled.compile", 1)
        run("died", "pooled.segfault", DEPTH)
        run("after death", "pooled.parent", 0)
        result.deaths = pool.deaths
        result.during = own_children() - result.before
        result.members = tuple(map(int, (source.parent / "pids").read_text().split()))
        result.group = os.getpgid(result.members[0])
        assert set(result.members) <= set(running_in_group(result.group))
    finally:
        pool.close()
    result.after = own_children()
    return result


def test_a_launch_that_does_not_come_back_is_killed_at_its_deadline(pooled: Pooled) -> None:
    assert pooled.outcomes["warm"].status is Status.PASSED
    outcome = pooled.outcomes["hung"]
    assert outcome.status is Status.FAILED
    assert outcome.fatal
    assert outcome.finding is not None
    assert (outcome.finding.kind, outcome.finding.kernel) == ("Hung", "pooled.hang")
    assert outcome.finding.what == f"no answer after {outcome.seconds:.1f} s; the worker was killed"
    assert DEADLINE <= outcome.seconds <= pooled.seconds["hung"] < 20 * DEADLINE


def test_a_hang_says_whether_it_may_have_been_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = WorkerPool(Start(device="cpu", suite_roots=(), libraries=()), {})
    hung: Any = SimpleNamespace(warm=set(), ask=lambda message, patience: Death(returncode=None, stderr=()))
    monkeypatch.setattr(pool, "_ready", lambda: hung)
    module = ("own", "")
    job: Any = SimpleNamespace(module=module, modules={module}, message={}, kernel=SimpleNamespace(name="own"))

    def said() -> str:
        finding = pool.run(job, deadline=1.0, cold=100.0).finding
        assert finding is not None
        return finding.what

    assert said() == "no answer after 0.0 s, or it was still being compiled; the worker was killed"
    pool._note({module}, 2.0)
    assert said() == "no answer after 0.0 s; the worker was killed"


def test_a_new_worker_does_not_get_the_time_of_a_compiler_for_what_has_run_before(pooled: Pooled) -> None:
    again = pooled.outcomes["hung again"]
    assert again.finding is not None
    assert again.finding.kind == "Hung"
    assert again.seconds < 20 * DEADLINE < COLD


def test_only_what_no_worker_has_run_gets_the_time_of_a_compiler() -> None:
    """Kernels beside the one under test are loaded by a new worker as well, and one of them may be what hangs."""
    pool = WorkerPool(Start(device="cpu", suite_roots=(), libraries=()), {})
    own, other = ("own", ""), ("other", "")

    def patience(modules: set[tuple[str, str]], *warm: tuple[str, str]) -> float:
        worker: Any = SimpleNamespace(warm=set(warm))
        return pool._patience(worker, modules, deadline=1.0, cold=100.0)

    assert patience({own}) == 100.0
    pool._note({own}, 2.0)
    pool._note({own, other}, 5.0)
    assert patience({own}, own) == 1.0
    assert patience({own, other}, own) == 1.0 + SLOWER * 5.0
    assert patience({own, other}) == 1.0 + SLOWER * (2.0 + 5.0 + 2.0)  # a new worker, which imports as the first did
    assert patience({own, other, ("third", "")}, own) == 100.0
    pool._note({("slow", "")}, 90.0)
    assert patience({("slow", "")}, own) == 100.0


def test_a_refused_case_has_compiled_nothing(pooled: Pooled) -> None:
    assert pooled.outcomes["refused"].status is Status.UNSUPPORTED
    assert pooled.outcomes["compiled"].status is Status.PASSED
    assert pooled.outcomes["compiled"].seconds > DEADLINE


def test_the_line_that_hangs_is_named(pooled: Pooled) -> None:
    finding = pooled.outcomes["hung"].finding
    assert finding is not None
    assert any(pooled.line_of("# sleeps here") + "sleep" in line for line in finding.details), finding.details


def test_a_signal_is_told_by_name(pooled: Pooled) -> None:
    outcome = pooled.outcomes["died"]
    assert outcome.status is Status.FAILED
    assert outcome.fatal
    assert outcome.finding is not None
    assert outcome.finding.kind == "Crashed"
    assert outcome.finding.what == "the worker process died: signal SIGSEGV"
    assert outcome.finding.key == "signal SIGSEGV"


def test_the_line_that_died_is_named(pooled: Pooled) -> None:
    finding = pooled.outcomes["died"].finding
    assert finding is not None
    assert any(pooled.line_of("# dies here") + "read_null" in line for line in finding.details), finding.details


def test_the_next_case_finds_a_new_worker(pooled: Pooled) -> None:
    assert pooled.outcomes["after hung"].status is Status.PASSED
    assert pooled.outcomes["after death"].status is Status.PASSED
    assert pooled.deaths == 3


def test_close_leaves_no_process_behind(pooled: Pooled) -> None:
    assert pooled.members[0] in pooled.during
    assert len(pooled.during) > 1, "a spare starts up after a death"
    assert pooled.after == pooled.before
    assert pooled.group != os.getpgrp()
    # A child of the worker is not ours to wait for: its end may be seen a moment later.
    end = time.monotonic() + 10
    while running_in_group(pooled.group) and time.monotonic() < end:
        time.sleep(0.01)
    assert running_in_group(pooled.group) == []


# One reads what it is sent before it ends; the other does not, and what does not fit into the pipe cannot be sent.
@pytest.mark.parametrize(
    ("before_the_end", "root"),
    [("read message", "/somewhere"), ("exec 0<&-", "/somewhere/" * 2**17)],
    ids=["sent", "unsent"],
)
def test_a_worker_that_cannot_start_says_why(
    before_the_end: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{before_the_end}\necho 'libcuda.so.1: cannot open shared object' >&2\nexit 127\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    before = own_children()
    pool = WorkerPool(Start(device="cpu", suite_roots=(root,), libraries=()), {})
    try:
        with pytest.raises(WorkerFailed) as caught:
            _ = pool.started
    finally:
        pool.close()
    assert (
        str(caught.value)
        == "the worker process could not start: exit status 127\n  libcuda.so.1: cannot open shared object"
    )
    assert own_children() == before


def test_a_device_that_is_gone_is_no_crash_of_a_kernel(
    pooled: Pooled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker without a device takes no job; others are asked for one, and then it is the run that ends."""
    flag, program, python = tmp_path / "started", tmp_path / "python", sys.executable
    gone = json.dumps(encode(Started(device=None, error="No CUDA GPUs are available")))
    program.write_text(
        f"#!/bin/sh\nif [ -e {flag} ]; then read message; echo '{gone}'; sleep 600; fi\n"
        f'touch {flag}\nexec {python} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr("kerneltest.engine.pool.SECONDS_BETWEEN", 0.0)
    kernel = discovery.load_kernels(pooled.source)["pooled.segfault"]
    case: Any = sys.modules[f"{discovery.PACKAGE}.pooled._cheap"].case
    roots = (str(pooled.source.parents[1]), str(discovery.builtin_root()))
    pool = WorkerPool(Start(device="cpu", suite_roots=roots, libraries=()), {})
    try:
        assert pool.run(Job(kernel=kernel, source=pooled.source, case=case(DEPTH)), deadline=COLD, cold=COLD).fatal
        with pytest.raises(WorkerFailed, match=r"the device is gone, .*: No CUDA GPUs are available"):
            pool.run(Job(kernel=kernel, source=pooled.source, case=case(0)), deadline=COLD, cold=COLD)
    finally:
        pool.close()


def test_an_error_that_is_not_the_kernels_ends_the_hunt_and_accuses_nobody(pooled: Pooled) -> None:
    kernel = discovery.load_kernels(pooled.source)["pooled.mistaken"]
    case: Any = sys.modules[f"{discovery.PACKAGE}.pooled._cheap"].case
    roots = (str(pooled.source.parents[1]), str(discovery.builtin_root()))
    pool = WorkerPool(Start(device="cpu", suite_roots=roots, libraries=()), {})
    try:
        with pytest.raises(WorkerFailed) as caught:
            pool.run(Job(kernel=kernel, source=pooled.source, case=case(1)), deadline=COLD, cold=COLD)
        # The next job gets a new worker.
        after = pool.run(Job(kernel=kernel, source=pooled.source, case=case(0)), deadline=COLD, cold=COLD)
    finally:
        pool.close()
    lines = str(caught.value).splitlines()
    assert lines[0] == "an error that is not the kernel's ended its worker:"
    assert lines[-1] == "  IndexError: a reference goes wrong"
    assert after.status is Status.PASSED


@pytest.mark.parametrize(("answers", "status"), [(True, NOT_THE_KERNELS), (False, 1)])
def test_behind_a_lost_context_an_error_is_the_kernels(
    monkeypatch: pytest.MonkeyPatch, answers: bool, status: int
) -> None:
    class Broken:
        device_answers = answers

        def answer(self, message: Any) -> Any:
            raise RuntimeError(message)

    monkeypatch.setattr("kerneltest.worker.__main__.Worker", Broken)
    with pytest.raises(SystemExit) as ended:
        serve(io.StringIO('"CUDA error"\n'), io.StringIO())
    assert ended.value.code == status


def test_workers_side_by_side_share_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    counts = (None, "3", "40")
    environments = [{} if count is None else {"PYTEST_XDIST_WORKER_COUNT": count} for count in counts]
    assert [threads(environment) for environment in environments] == [None, 5, 1]
