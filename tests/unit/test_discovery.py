"""Finding kernels in files. Whatever imports suites runs in a process of its own, because imports outlive a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kerneltest import discovery

KERNEL = """
from kerneltest.model import Kernel

from .paged_prefill import paged_prefill

def make(name):
    return Kernel(name=name, operator=paged_prefill, launch=lambda call: {}, numerics=lambda case, device: None)
"""

MAIN = """
import json, sys
from pathlib import Path
from kerneltest import discovery

roots = [Path(root) for root in sys.argv[2:]]
discovery.use_roots(roots)
try:
    kernels = discovery.load_kernels(Path(sys.argv[1]))
except Exception as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
else:
    print(json.dumps({
        "names": list(kernels),
        "operators": sorted({getattr(kernel.operator, "name", "") for kernel in kernels.values()}),
        "heavy": sorted(sys.modules.keys() & {"torch", "triton", "flashinfer", "hypothesis"}),
    }))
"""


def write(root: Path, name: str, source: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


def load(path: Path, *roots: Path) -> Any:
    """What :func:`discovery.load_kernels` says about ``path`` with these roots, in a fresh process."""
    child = subprocess.run(
        [sys.executable, "-c", MAIN, str(path), *map(str, roots)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


BUILTIN = discovery.builtin_root()


def test_the_builtin_suites_are_there() -> None:
    names = [f"{path.parent.name}/{path.name}" for path in discovery.suite_files(BUILTIN)]
    assert {"attention/paged_prefill.py", "attention/triton_paged.py", "attention/flashinfer.py"} <= set(names)
    assert names == sorted(names)


def test_a_users_file_joins_a_builtin_suite(tmp_path: Path) -> None:
    path = write(tmp_path, "attention/mine.py", KERNEL + "one = make('mine[1]')\ntwo = make('mine[2]')\n")
    for roots in ((tmp_path, BUILTIN), (BUILTIN, tmp_path)):
        assert load(path, *roots) == {
            "names": ["mine[1]", "mine[2]"],
            "operators": ["paged_prefill"],
            "heavy": [],
        }


def test_a_suite_of_its_own_needs_no_builtin_root(tmp_path: Path) -> None:
    write(tmp_path, "other/paged_prefill.py", "paged_prefill = None\n")
    path = write(tmp_path, "other/mine.py", KERNEL + "one = make('mine')\n")
    assert load(path, tmp_path)["names"] == ["mine"]


# The reference is the worker's: only functions import it.
DECLARATIONS = [path for path in discovery.suite_files(BUILTIN) if path.name != "reference.py"]


@pytest.mark.parametrize("path", DECLARATIONS, ids=lambda path: path.name)
def test_builtin_files_import_without_torch(path: Path) -> None:
    found = load(path, BUILTIN)
    assert found["heavy"] == []
    assert len(found["names"]) == len(set(found["names"]))


def test_a_hidden_file_is_an_error(tmp_path: Path) -> None:
    mine = write(tmp_path, "attention/triton_paged.py", "")
    found = load(mine, BUILTIN, tmp_path)
    assert found["error"] == "ImportError"
    assert str(mine) in found["text"]
    assert str(BUILTIN / "attention" / "triton_paged.py") in found["text"]
    # With the roots turned round it is the builtin file that is hidden.
    assert load(mine, tmp_path, BUILTIN)["names"] == []
    assert load(BUILTIN / "attention" / "triton_paged.py", tmp_path, BUILTIN)["error"] == "ImportError"


def test_two_kernels_of_one_name_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "attention/mine.py", KERNEL + "one = make('same')\ntwo = make('same')\n")
    found = load(path, tmp_path, BUILTIN)
    assert (found["error"], found["text"]) == ("ValueError", f"{path} defines two kernels named 'same'")


def test_one_kernel_of_two_names_is_none(tmp_path: Path) -> None:
    path = write(tmp_path, "attention/mine.py", KERNEL + "one = make('same')\nalias = one\n")
    assert load(path, tmp_path, BUILTIN)["names"] == ["same"]


@pytest.mark.parametrize(
    ("source", "error"),
    [("import no_such_library\n", "ModuleNotFoundError"), ("def\n", "SyntaxError"), ("1 / 0\n", "ZeroDivisionError")],
)
def test_what_an_import_raises_is_passed_on(tmp_path: Path, source: str, error: str) -> None:
    assert load(write(tmp_path, "attention/mine.py", source), tmp_path, BUILTIN)["error"] == error


def test_underscore_files_and_other_files_are_ignored(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/_private.py", "b/__init__.py", "a/x.py", "a/y.txt", "top.py", "a/deep/er.py"):
        write(tmp_path, name, "")
    assert list(discovery.suite_files(tmp_path)) == [tmp_path / "a" / "x.py", tmp_path / "b" / "z.py"]
    assert list(discovery.suite_files(tmp_path / "nowhere")) == []


@pytest.mark.parametrize(
    ("name", "suite"),
    [
        ("attention/mine.py", "attention"),
        ("attention/_mine.py", None),
        ("attention/mine.txt", None),
        ("mine.py", None),
        ("attention/deep/mine.py", None),
    ],
)
def test_the_suite_of_a_path(tmp_path: Path, name: str, suite: str | None) -> None:
    roots = [tmp_path / "one", tmp_path / "two"]
    assert discovery.suite_of(roots[1] / name, roots) == suite
    assert discovery.suite_of(tmp_path / "three" / name, roots) is None
