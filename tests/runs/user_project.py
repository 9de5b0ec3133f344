"""A user's project in a temporary folder, with suites of its own, and pytest runs in it as child processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

HEALTHY = Path(__file__).parents[1] / "zoo" / "suites" / "zoo" / "_attention.py"
# Draws three cases, each with either guard and without, and no more: one small request, so that a hunt takes a
# fraction of a second.
CHEAP = """
from dataclasses import replace

from kerneltest.model import Case, Kernel

from ..attention.paged_prefill import PagedPrefill, Request, paged_prefill
from . import _attention as a

AXES = PagedPrefill(
    requests=(Request(qo_len=2, kv_len=3),), dtype="float32", head_dim=64, kv_heads=1, group=1, page_size=4,
    causal=True, shuffled=False, spare_pages=0,
)


def case(seed):
    return Case(operator="paged_prefill", axes=AXES, inputs="generic", seed=seed)


def cases(size):
    from hypothesis import strategies as st

    return st.integers(0, 2).map(case)


operator = replace(
    paged_prefill, cases=cases, inputs=paged_prefill.inputs[:1], relations=(), simpler=lambda case: ()
)


def kernel(name, launch, **more):
    settings = {"numerics": a.numerics, "devices": ("cpu",), **more}
    return Kernel(name=name, operator=operator, launch=launch, **settings)
"""
MINIMAL_CASE = (
    "paged_prefill(requests=[2/3], dtype=float32, head_dim=64, kv_heads=1, group=1, page_size=4, causal=True, "
    "shuffled=False, spare_pages=0, inputs=generic, seed=0)"
)
# Runs pytest once for each command line that it is given as JSON, all of them in one process.
MANY = """
import contextlib, io, json, sys
import pytest

runs = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = pytest.main(arguments)
    runs.append((int(code), out.getvalue(), err.getvalue()))
print(json.dumps(runs))
"""
# Launch sequences and bad input have runs of their own.
HUNT = ("--kernel-profile=quick", "--kernel-device=cpu", "--kernel-sequences=0", "--kernel-misused=0")


@dataclass(frozen=True)
class Run:
    """A pytest run that is over."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def totals(self) -> str:
        """The last line without its seconds, such as ``1 failed, 2 passed``."""
        return re.sub(r" in [\d.]+s( \(.*\))?|[= ]+$|^[= ]+", "", self.lines[-1])

    @property
    def node_ids(self) -> list[str]:
        """What ``--collect-only -q`` lists."""
        return [line for line in self.lines if "::" in line]


class Project:
    """A folder with a test of its own and a pytest.ini that turns every warning into an error."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("pytest.ini", "[pytest]\nfilterwarnings = error\ntestpaths = tests\n")
        self.write("tests/test_plain.py", "def test_plain(): pass\n")

    def write(self, path: str, text: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(dedent(text))
        return target

    def suite(self, name: str, **files: str) -> None:
        """``suites/<name>/<file>.py`` for every file, beside the helpers that all of them may use."""
        self.write(f"suites/{name}/_attention.py", HEALTHY.read_text())
        self.write(f"suites/{name}/_cheap.py", CHEAP)
        for file, text in files.items():
            helpers = "from . import _attention as a\nfrom ._cheap import kernel\n"
            self.write(f"suites/{name}/{file}.py", helpers + dedent(text))

    def pytest(self, *arguments: str, **environment: str) -> Run:
        done = self._python("-m", "pytest", *arguments, **environment)
        return Run(done.returncode, done.stdout, done.stderr)

    def pytest_each(self, *commands: Sequence[str], **environment: str) -> list[Run]:
        """Runs that start no worker, one after the other in a process that imports pytest but once."""
        done = self._python("-c", MANY, json.dumps(commands), **environment)
        assert done.returncode == 0, done.stderr
        return [Run(*run) for run in json.loads(done.stdout)]

    def pytest_at_once(self, *commands: Sequence[str], **environment: str) -> list[Run]:
        """Runs that do not disturb each other, two at a time."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda command: self.pytest(*command, **environment), commands))

    def _python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        # This run's own settings, such as those of pytest-xdist, are nothing to a run inside it.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_") and key != "CI"}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env={**inherited, "COLUMNS": "300", "NO_COLOR": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def junit(self, path: str) -> list[tuple[str, str, str]]:
        """Class name (the path with dots), name and failure text, empty if there is none, of every item in a report."""
        return [
            (
                case.get("classname", ""),
                case.get("name", ""),
                "".join(child.text or "" for child in case if child.tag in ("failure", "error")).strip(),
            )
            for case in ET.parse(self.root / path).getroot().iter("testcase")
        ]
