"""Imports run one way: which room of the package may know which, and who may know torch.

Read from the source text, so that imports inside functions and under ``TYPE_CHECKING`` count as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import kerneltest
from kerneltest import discovery

PACKAGE = Path(kerneltest.__file__).parent
SUITES = discovery.builtin_root()

# Each room and the rooms of this project that it may import. "kerneltest" is the package's own __init__.
MAY_IMPORT = {
    "kerneltest": set(),
    "model": {"model"},
    "oracle": {"oracle", "model"},
    "worker": {"worker", "oracle", "model", "discovery"},
    "engine": {"engine", "model"},
    "report": {"report", "model", "kerneltest"},
    "power": {"power", "oracle", "engine", "model", "discovery", "kerneltest"},
    "cli": {"power", "kerneltest"},
    "strategies": set(),
    "discovery": {"model"},
    "session": {"engine", "model", "discovery"},
    "commandline": {"session", "engine", "model", "discovery"},
    "collection": {"commandline", "session", "engine", "model", "discovery"},
    "plugin": {"collection", "report", "discovery", "engine"},
    "suites": {"suites", "model", "oracle", "strategies"},
}
# (module, scope, imported room): what is allowed in one place only.
EXCEPTIONS = {
    # The worker without a process, for debuggers.
    ("kerneltest.engine.pool", "InProcess", "worker"),
}
HEAVY = {"torch", "triton", "flashinfer", "cuda", "numpy"}
WITHOUT_TORCH = {
    "kerneltest",
    "model",
    "engine",
    "report",
    "session",
    "commandline",
    "collection",
    "plugin",
    "discovery",
    "strategies",
    "cli",
}
# Suite files that declare nothing and that only functions import.
WORKERS_SUITE_FILES = (
    "_attribution",
    "_block_sparse",
    "_certify",
    "_eager",
    "_forms",
    "_inputs",
    "_layer_budget",
    "_layer_inputs",
    "_layer_terms",
    "_masks",
    "_materials",
    "_merge",
    "_page_append",
    "_reference",
    "_speculation",
    "_tensors",
    "_torch_filters",
    "_transformations",
    "_triton_decode",
    "_triton_prefill",
)


@dataclass(frozen=True)
class Import:
    """``name`` is dotted and absolute; ``scope`` the enclosing definitions, outermost first, and TYPE_CHECKING."""

    name: str
    line: int
    scope: tuple[str, ...]
    in_function: bool

    @property
    def typing_only(self) -> bool:
        return "TYPE_CHECKING" in self.scope


def imports(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    """Every import of a module's source, also by ``import_module("literal")`` and ``__import__("literal")``."""
    package = module if is_package else module.rpartition(".")[0]
    return list(_imports(ast.parse(source), package, (), False))


def _imports(node: ast.AST, package: str, scope: tuple[str, ...], in_function: bool) -> Iterator[Import]:
    def found(name: str) -> Import:
        return Import(name, node.lineno, scope, in_function)  # type: ignore[attr-defined]

    match node:
        case ast.Import(names=names):
            yield from (found(alias.name) for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            base = [*package.split(".")[: len(package.split(".")) - level + 1]] if level else []
            base += [module] if module else []
            yield from (found(".".join([*base, alias.name])) for alias in names)
        case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]):
            if called in ("import_module", "__import__"):
                yield found(name)
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            inner, in_function = (*scope, name), True
        case ast.ClassDef(name=name):
            inner = (*scope, name)
        case _:
            inner = scope
    guarded: list[ast.stmt] = []
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        guarded = node.body
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, package, (*inner, "TYPE_CHECKING") if child in guarded else inner, in_function)


def room_of(name: str) -> str | None:
    """The room that a dotted name lies in, or None outside of this project."""
    first, *rest = name.split(".")
    if first == discovery.PACKAGE:
        return "suites"
    if first != "kerneltest":
        return None
    return rest[0] if rest and rest[0] in MAY_IMPORT else "kerneltest"


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module imports against the rules, a line each."""
    room = room_of(module)
    assert room is not None, module
    stem = module.rpartition(".")[2]
    bad = []
    for one in imports(source, module, is_package=is_package):
        target, top = room_of(one.name), one.name.partition(".")[0]
        at_module_level = not one.in_function and not one.typing_only
        # What loads torch when it is imported.
        heavy = top in HEAVY or target == "oracle" or bool(set(one.name.split(".")) & set(WORKERS_SUITE_FILES))
        here = f"{module}:{one.line}: {room} may not import {one.name}"
        if target is not None:
            excepted = any((module, part, target) in EXCEPTIONS for part in one.scope) and not at_module_level
            forbidden = target not in MAY_IMPORT[room] and not excepted
        elif room == "model":
            forbidden = top not in sys.stdlib_module_names and not one.typing_only
        else:
            forbidden = top in HEAVY and room in WITHOUT_TORCH
        if forbidden:
            bad.append(here)
        elif at_module_level and (
            (room == "suites" and heavy and stem not in WORKERS_SUITE_FILES)
            or (room == "plugin" and top not in (sys.stdlib_module_names | {"pytest"}))
        ):
            bad.append(f"{here} outside of a function")
    return bad


def modules() -> list[tuple[str, Path]]:
    """Every file of the package and of its suites, with its dotted name."""
    roots = [("kerneltest", PACKAGE), (discovery.PACKAGE, SUITES)]
    return [
        (".".join([name, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__"), path)
        for name, root in roots
        for path in sorted(root.rglob("*.py"))
        if root == SUITES or not path.is_relative_to(SUITES)
    ]


def test_every_room_is_there_and_has_rules() -> None:
    assert {room_of(name) for name, _ in modules()} == set(MAY_IMPORT)
    on_disk = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert on_disk - {"__init__"} == set(MAY_IMPORT) - {"kerneltest", "suites"}
    assert all(any(path.stem == stem for _, path in modules()) for stem in WORKERS_SUITE_FILES)


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_run_one_way(module: str, path: Path) -> None:
    assert violations(path.read_text(), module, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(("module", "scope", "room"), sorted(EXCEPTIONS))
def test_exceptions_are_still_needed(module: str, scope: str, room: str) -> None:
    source = dict(modules())[module].read_text()
    assert any(scope in one.scope and room_of(one.name) == room for one in imports(source, module))


def test_rooms_have_no_cycle() -> None:
    left = {room: set(targets) - {room} for room, targets in MAY_IMPORT.items()}
    while left:
        leaves = {room for room, targets in left.items() if not targets & left.keys()}
        assert leaves, f"these rooms import each other: {sorted(left)}"
        left = {room: targets for room, targets in left.items() if room not in leaves}


IN_FUNCTION = "def f():\n    {}\n"
TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}\n"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kerneltest.model.case", "import torch"),
        ("kerneltest.model.case", "import torch.nn.functional as F"),
        ("kerneltest.model.case", "import numpy"),
        ("kerneltest.model.case", "import hypothesis"),
        ("kerneltest.model.case", IN_FUNCTION.format("from torch import Tensor")),
        ("kerneltest.model.case", IN_FUNCTION.format("import importlib; importlib.import_module('torch')")),
        ("kerneltest.model.case", IN_FUNCTION.format("__import__('torch.cuda')")),
        ("kerneltest.model.case", "from kerneltest import discovery"),
        ("kerneltest.model.case", "from .. import discovery"),
        ("kerneltest.model.case", TYPING.format("from kerneltest.oracle.rounding import ErrorBudget")),
        ("kerneltest.model.spec", "from kerneltest.oracle.rounding import ErrorBudget"),
        ("kerneltest.model.spec", TYPING.format("from kerneltest.oracle.rounding import ErrorBudget")),
        ("kerneltest.model.spec", IN_FUNCTION.format("from kerneltest.oracle.rounding import ErrorBudget")),
        ("kerneltest.model.spec", TYPING.format("import kerneltest.worker.serve")),
        ("kerneltest.model.spec", TYPING.format("pass\nelse:\n    import torch")),
        ("kerneltest.oracle.compare", "from kerneltest.worker import checks"),
        ("kerneltest.oracle.compare", "from kerneltest.engine.hunt import hunt"),
        ("kerneltest.worker.serve", "from kerneltest.engine import pool"),
        ("kerneltest.worker.serve", IN_FUNCTION.format("from kerneltest.report.html import html")),
        ("kerneltest.engine.hunt", "from kerneltest.session import Session"),
        ("kerneltest.engine.hunt", "from kerneltest.report import html"),
        ("kerneltest.engine.hunt", IN_FUNCTION.format("import torch")),
        ("kerneltest.engine.hunt", IN_FUNCTION.format("from kerneltest.worker.serve import Worker")),
        (
            "kerneltest.engine.hunt",
            "class InProcess:\n    def f(self):\n        from kerneltest.worker.serve import Worker",
        ),
        ("kerneltest.engine.pool", IN_FUNCTION.format("from kerneltest.worker.serve import Worker")),
        ("kerneltest.engine.pool", "class InProcess:\n    from kerneltest.worker.serve import Worker"),
        ("kerneltest.engine.pool", "class InProcess:\n    def f(self):\n        import torch"),
        ("kerneltest.report.html", "from kerneltest.engine.text import where"),
        ("kerneltest.report.html", TYPING.format("import torch")),
        ("kerneltest.strategies", "from kerneltest.model import Size"),
        ("kerneltest.strategies", "import kerneltest"),
        ("kerneltest.discovery", "from kerneltest.engine import repro"),
        ("kerneltest.session", "from kerneltest.report.listener import ReportListener"),
        ("kerneltest.session", IN_FUNCTION.format("from kerneltest.worker.execute import execute")),
        ("kerneltest.collection", "from kerneltest.plugin import OPTIONS"),
        ("kerneltest.collection", "from kerneltest.report import html"),
        ("kerneltest.plugin", "from kerneltest import discovery"),
        ("kerneltest.plugin", "import hypothesis"),
        ("kerneltest.plugin", "try:\n    import jinja2\nexcept ImportError:\n    pass"),
        ("kerneltest.plugin", IN_FUNCTION.format("from kerneltest.session import Session")),
        ("kerneltest.plugin", IN_FUNCTION.format("import torch")),
        ("kerneltest", "from kerneltest.model import Case"),
        ("kerneltest.power.trials", "from kerneltest.worker.checks import judge"),
        ("kerneltest.power.zoo", "from kerneltest.session import Session"),
        ("kerneltest.oracle.verdict", "from kerneltest.power.trials import flawed"),
        ("kerneltest.cli", "import torch"),
        ("kerneltest.cli", "from kerneltest.oracle.verdict import judge"),
        ("kerneltest_suites.attention.mine", "import torch"),
        ("kerneltest_suites.attention.mine", "if True:\n    from triton import language"),
        ("kerneltest_suites.attention.mine", "class K:\n    import flashinfer"),
        ("kerneltest_suites.attention.mine", "from kerneltest.worker import device"),
        ("kerneltest_suites.attention.mine", IN_FUNCTION.format("from kerneltest.engine import repro")),
        ("kerneltest_suites.attention.mine", "from ._reference import paged_attention_terms"),
        ("kerneltest_suites.attention.mine", "from . import _triton_prefill"),
        ("kerneltest_suites.attention.mine", "from kerneltest.oracle.attention import AttentionTerms"),
    ],
)
def test_the_checker_sees(module: str, source: str) -> None:
    assert len(violations(source, module, is_package=module == "kerneltest")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kerneltest.model.case", "import json\nfrom kerneltest.model.codec import encode\nfrom . import codec"),
        ("kerneltest.model.spec", TYPING.format("import torch")),
        ("kerneltest.oracle.compare", "import torch\nfrom kerneltest.model import Fmt"),
        (
            "kerneltest.engine.pool",
            "class InProcess:\n    def f(self):\n        from kerneltest.worker.serve import Worker",
        ),
        ("kerneltest.report.html", "import kerneltest\nfrom kerneltest import __version__\nimport jinja2"),
        ("kerneltest.plugin", "import pytest\n" + IN_FUNCTION.format("from kerneltest import collection, discovery")),
        ("kerneltest_suites.attention.mine", "from .paged_prefill import paged_prefill"),
        ("kerneltest_suites.attention.mine", IN_FUNCTION.format("import torch\n    from . import _triton_prefill")),
        ("kerneltest_suites.attention.mine", TYPING.format("import torch")),
        (
            "kerneltest_suites.attention._reference",
            "import torch\nfrom kerneltest.oracle.attention import AttentionTerms",
        ),
    ],
)
def test_the_checker_lets_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("kerneltest.plugin", {"torch", "hypothesis", "jinja2", "numpy", "kerneltest.model"}),
        ("kerneltest.model", {"torch", "hypothesis", "numpy"}),
        ("kerneltest.discovery", {"torch", "hypothesis", "numpy"}),
        ("kerneltest.strategies", {"torch", "kerneltest.model"}),
        ("kerneltest.cli", {"torch", "hypothesis", "numpy", "kerneltest.model", "kerneltest.power"}),
        ("kerneltest.collection", {"torch", "triton", "kerneltest.worker", "kerneltest.oracle"}),
        ("kerneltest.report.html", {"torch", "kerneltest.worker", "kerneltest.engine"}),
    ],
)
def test_what_an_import_really_loads(module: str, absent: set[str]) -> None:
    script = f"import sys, {module}\nprint(*sorted(sys.modules.keys() & {absent!r}))"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (child.returncode, child.stdout.split()) == (0, []), child.stderr
