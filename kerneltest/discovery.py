"""Find kernels: every module-level ``Kernel`` in ``<root>/<suite>/*.py``. There is no registry to edit.

Used on both sides of the process boundary. Several roots (kerneltest's own, the user's) merge into one package, so
that a user's file in ``suites/attention/`` can say ``from .paged_prefill import paged_prefill``.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterable, Sequence
from pathlib import Path

from kerneltest.model import Kernel

PACKAGE = "kerneltest_suites"
EXPECTED_FORM = (
    "a Python file that imports without a GPU and binds kerneltest.model.Kernel objects to module-level names"
)


def builtin_root() -> Path:
    """Where kerneltest's own suites lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "_suites"
    return installed if installed.is_dir() else package.parent / "suites"


def use_roots(roots: Sequence[Path]) -> None:
    """Make ``roots`` the search path of the suites' package; earlier roots win."""
    package = sys.modules.setdefault(PACKAGE, types.ModuleType(PACKAGE))
    package.__path__ = [str(root) for root in roots]
    importlib.invalidate_caches()


def suite_files(root: Path) -> Iterable[Path]:
    """The suite files under ``root``, sorted; names with a leading underscore are private to their suite."""
    return sorted(path for path in root.glob("*/*.py") if not path.name.startswith("_"))


def suite_of(path: Path, roots: Sequence[Path]) -> str | None:
    """The suite that ``path`` belongs to, or None if it is no suite file of these roots."""
    if path.suffix == ".py" and not path.name.startswith("_") and path.parent.parent in roots:
        return path.parent.name
    return None


def load_kernels(path: Path) -> dict[str, Kernel]:
    """Import a suite file and return the kernels it defines, by name. Raises whatever the import raises."""
    module = importlib.import_module(f"{PACKAGE}.{path.parent.name}.{path.stem}")
    if module.__file__ is None or Path(module.__file__) != path:
        raise ImportError(f"{path} is hidden by {module.__file__}, a suite file of the same name in another folder")
    kernels: dict[str, Kernel] = {}
    for value in vars(module).values():
        if isinstance(value, Kernel):
            if value.name in kernels and kernels[value.name] is not value:
                raise ValueError(f"{path} defines two kernels named {value.name!r}")
            kernels[value.name] = value
    return kernels
