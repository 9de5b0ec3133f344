"""What a run is asked for: the options of the command line, checked."""

from __future__ import annotations

import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kerneltest import discovery
from kerneltest.engine.profile import PROFILES, Chosen, Profile
from kerneltest.model.sequence import STEPS
from kerneltest.session import Options

# What the controller of pytest-xdist tells its processes; see kerneltest.plugin.
SEED = "kernel_seed"
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def options_of(config: pytest.Config) -> Options:
    """The options of a run. Raises pytest.UsageError for what makes no sense."""
    option = config.option
    roots = [discovery.builtin_root()]
    own = config.rootpath / "suites"
    if own.is_dir() and own != roots[0]:
        roots.insert(0, own)
    known = sorted({path.parent.name for root in roots for path in discovery.suite_files(root)})
    suites = [name for name in (option.kernel_suite or "").split(",") if name]
    if "all" in suites:
        suites = known
    for suite in suites:
        one_of("--kernel-suite", suite, ["all", *known])
    kinds = [kind for kind in (option.kernel_steps or "").split(",") if kind]
    for kind in kinds:
        one_of("--kernel-steps", kind, list(STEPS))
    if not DEVICE.fullmatch(option.kernel_device):
        raise pytest.UsageError(
            f"--kernel-device: unknown device {option.kernel_device!r}; valid: auto, cpu, cuda, cuda:N"
        )
    if option.kernel_continue and option.kernel_seed is None:
        raise pytest.UsageError("--kernel-continue: needs --kernel-seed, or the rest of the run would draw other cases")
    if option.kernel_seed is None:
        # Written back for the report. A process of pytest-xdist gets its controller's: one run, one seed.
        given = getattr(config, "workerinput", {}).get(SEED)
        option.kernel_seed = random.SystemRandom().randrange(2**32) if given is None else given
    return Options(
        suites=tuple(suites),
        profile=_profile(option),
        device=option.kernel_device,
        libraries=dict(_library(text) for text in option.kernel_library),
        isolation=option.kernel_isolation,
        seed=option.kernel_seed,
        roots=tuple(roots),
        fixtures=Path(option.kernel_fixtures or config.rootpath / "fixtures"),
        root=config.rootpath,
        invoked_in=config.invocation_params.dir,
        evidence=Path(option.kernel_evidence or config.rootpath / ".kerneltest" / "evidence"),
        steps=tuple(kinds) or tuple(STEPS),
        trace=_trace(config),
        kept=Path(option.kernel_continue) if option.kernel_continue else None,
    )


def _profile(option: Any) -> Profile:
    """The profile of that name, with what other options change of it."""
    one_of("--kernel-profile", option.kernel_profile, list(PROFILES))
    profile = PROFILES[option.kernel_profile]
    if option.kernel_sequences is not None:
        _at_least("--kernel-sequences", option.kernel_sequences, 0)
        profile = replace(profile, cpu_sequences=option.kernel_sequences, cuda_sequences=option.kernel_sequences)
    if option.kernel_modules is not None:
        _at_least("--kernel-modules", option.kernel_modules, 1)
        most = option.kernel_modules
        profile = replace(profile, compiles=most, modules=min(profile.modules, most))
    profile = replace(profile, only=tuple(map(_chosen, filter(None, (option.kernel_only or "").split(",")))))
    if option.kernel_misused is not None:
        _at_least("--kernel-misused", option.kernel_misused, 0)
        profile = replace(profile, misused=option.kernel_misused)
    if option.kernel_draws is not None:
        _at_least("--kernel-draws", option.kernel_draws, 0)
        profile = replace(profile, cpu_draws=option.kernel_draws, cuda_draws=option.kernel_draws)
    return profile


def _trace(config: pytest.Config) -> Path | None:
    """Where to write what workers are asked for: a file for each process of pytest-xdist."""
    if config.option.kernel_trace is None:
        return None
    path, process = Path(config.option.kernel_trace), getattr(config, "workerinput", {}).get("workerid")
    return path.with_name(f"{path.stem}-{process}{path.suffix}") if process else path


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise pytest.UsageError(f"{option}: expected {least} or more, got {value}")


def one_of(option: str, value: str, valid: list[str]) -> None:
    """Raises pytest.UsageError, with the valid values, for any other."""
    if value not in valid:
        raise pytest.UsageError(f"{option}: unknown value {value!r}; valid: {', '.join(valid)}")


def _chosen(text: str) -> Chosen:
    name, equals, value = text.partition("=")
    axis = name.removesuffix("!")
    if not (axis and equals and value):
        raise pytest.UsageError(f"--kernel-only: expected AXIS=VALUE or AXIS!=VALUE, got {text!r}")
    try:
        known = json.loads(value)
    except ValueError:  # a word, such as bfloat16
        known = value
    return Chosen(axis=axis, value=known, equal=axis == name)


def _library(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    # Not resolved: a link to an installation is named as it was given.
    path = Path(os.path.abspath(folder))
    if not (name and equals):
        raise pytest.UsageError(f"--kernel-library: expected NAME=FOLDER, got {text!r}")
    if not ((path / name).is_dir() or (path / f"{name}.py").is_file()):
        raise pytest.UsageError(f"--kernel-library: {path} holds no package {name!r}")
    return name, path
