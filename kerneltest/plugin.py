"""The pytest plugin: options, and hooks that do nothing but delegate.

pytest imports this module in every project of the environment. It imports nothing of its own until
``--kernel-suite`` is given or a found bug is collected, so that an unrelated project pays nothing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--kernel-suite", {"metavar": "NAME[,NAME...|all]", "help": "hunt the kernels of these suites"}),
    (
        "--kernel-profile",
        {"metavar": "quick|default|nightly", "default": "default", "help": "how much the hunt may cost"},
    ),
    (
        "--kernel-device",
        {
            "metavar": "auto|cpu|cuda[:N]",
            "default": "auto",
            "help": "where the kernels run (auto: a GPU if there is one)",
        },
    ),
    (
        "--kernel-library",
        {
            "metavar": "NAME=FOLDER",
            "action": "append",
            "default": [],
            "help": "test the installation of a library that lies in FOLDER, such as flashinfer=/opt/flashinfer-0.2.5",
        },
    ),
    (
        "--kernel-isolation",
        {
            "choices": ("worker", "inprocess"),
            "default": "worker",
            "help": "worker: a process that may crash or hang; inprocess: for a debugger",
        },
    ),
    (
        "--kernel-steps",
        {
            "metavar": "KIND[,KIND...]",
            "help": "make launch sequences of these kinds of steps alone, such as neighbour,torch: no synthetic poison",
        },
    ),
    (
        "--kernel-sequences",
        {
            "type": int,
            "metavar": "N",
            "help": "launch sequences for each kernel, 0 for none (default: as the profile says)",
        },
    ),
    (
        "--kernel-modules",
        {
            "type": int,
            "metavar": "N",
            "help": "compile at most N specialisations of each kernel, refuse cases of others (default: any number)",
        },
    ),
    (
        "--kernel-only",
        {
            "metavar": "AXIS[!]=VALUE[,...]",
            "help": "draw such cases alone, of the kernels that have the axes, such as alibi=true,head_dim!=128",
        },
    ),
    (
        "--kernel-misused",
        {
            "type": int,
            "metavar": "N",
            "help": "small cases of each kernel that are called wrongly, 0 for none (default: as the profile says)",
        },
    ),
    (
        "--kernel-draws",
        {
            "type": int,
            "metavar": "N",
            "help": "draws from each distribution of a sampler, 0 for none (default: as the profile says)",
        },
    ),
    (
        "--kernel-evidence",
        {
            "metavar": "FOLDER",
            "help": "where the draws of all runs are counted (default: .kerneltest/evidence, as for reports)",
        },
    ),
    ("--kernel-seed", {"type": int, "metavar": "N", "help": "what all cases are drawn from (default: a new one)"}),
    (
        "--kernel-report",
        {"metavar": "PATH", "help": "the HTML report (default: reports/kerneltest.html beside the configuration file)"},
    ),
    ("--kernel-json", {"metavar": "PATH", "help": "a summary for machines; schema in docs/summary.md"}),
    (
        "--kernel-continue",
        {
            "metavar": "FOLDER",
            "help": "keep there what hunts end with, and hunt only what it lacks: for a run that may be cut off",
        },
    ),
    (
        "--kernel-trace",
        {"metavar": "PATH", "help": "write all that workers are asked for, with its answer, as lines of JSON, at once"},
    ),
    ("--kernel-fixtures", {"metavar": "FOLDER", "help": "where found bugs are written (default: fixtures)"}),
)


# <kernel>/<Failure>-<hash>/case.json, as the engine writes it. Anybody may have a file called case.json.
REPRO_FOLDER = re.compile(r"[A-Z][A-Za-z]*-[0-9a-f]{8}")


def is_repro(path: Path) -> bool:
    """Whether the path has the form of a bug that a hunt wrote down."""
    return path.name == "case.json" and REPRO_FOLDER.fullmatch(path.parent.name) is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kerneltest", "hunting bugs in GPU kernels")
    for name, settings in OPTIONS:
        group.addoption(name, **settings)


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.kernel_suite is not None:
        from kerneltest import collection

        collection.add_suites_to_arguments(config)
    asked = option.kernel_suite is not None or option.kernel_report or option.kernel_json
    if asked and not hasattr(config, "workerinput"):  # a process of pytest-xdist leaves the report to its controller
        from kerneltest.report.listener import ReportListener

        config.pluginmanager.register(ReportListener(config), "kerneltest-report")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _in_use():
        from kerneltest import collection

        if session := config.stash.get(collection.SESSION, None):
            session.close()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # An installed suite may lie below a folder that pytest skips, such as .venv.
    if config.option.kernel_suite is None:
        return None
    from kerneltest import collection

    roots = collection.start(config).options.roots
    return False if any(root.is_relative_to(collection_path) for root in roots) else None


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if is_repro(file_path):
        from kerneltest import collection

        return collection.FixtureFile.from_parent(parent, path=file_path)
    if file_path.suffix == ".py" and not parent.session.isinitpath(file_path):
        return pytest_pycollect_makemodule(file_path, parent)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    # Also asked for a suite file that was named on the command line, which pytest would import as a test module.
    if parent.config.option.kernel_suite is None:
        return None
    from kerneltest import collection

    return collection.suite_file(module_path, parent)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _in_use():
        from kerneltest import collection

        collection.put_bad_input_last(items)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    # pytest-xdist parses the command line again in each of its processes, and would draw a seed in each.
    node.workerinput["kernel_seed"] = node.config.option.kernel_seed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if call.when == "call" and _in_use():
        from kerneltest import collection

        # An extra attribute of a report travels with it from a process of pytest-xdist to the controller.
        if (record := collection.encoded_record(item)) is not None:
            report.kerneltest = record
    return report


def _in_use() -> bool:
    # Only an option or a collected fixture of ours imports this module.
    return "kerneltest.collection" in sys.modules
