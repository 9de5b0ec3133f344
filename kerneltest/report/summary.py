"""The summary for machines: JSON with a versioned schema, documented in docs/summary.md."""

from __future__ import annotations

import json
import math
from typing import Any

from kerneltest.model import KernelRecord, RunRecord, encode

SCHEMA = "kerneltest.summary/1"


def summary(run: RunRecord) -> str:
    """The run as JSON text."""
    return json.dumps(as_dict(run), indent=2) + "\n"


def as_dict(run: RunRecord) -> dict[str, Any]:
    """The run in the form of the schema. Single cases are left out: they are in the HTML report."""
    return {
        "schema": SCHEMA,
        "version": run.version,
        "command": run.command,
        "began": run.began,
        "profile": run.profile,
        "seed": run.seed,
        "device": encode(run.device),
        "libraries": run.libraries,
        "coverage": encode(run.coverage),
        "seconds": round(run.seconds, 3),
        "cases": _ran(run, "cases"),
        "sequences": _ran(run, "sequences"),
        "kernels": [
            {
                "name": kernel.name,
                "suite": kernel.suite,
                "hunt": kernel.hunt,
                "cases": len(kernel.cases),
                "unsupported": sum(kernel.unsupported.values()),
                "launches": kernel.launches,
                "inputs": kernel.inputs,
                "used": {output: round(share, 4) for output, share in kernel.used.items()},
                "slack": kernel.slack,
                "energy": {
                    output: {inputs: round(value, 4) for inputs, value in by_inputs.items()}
                    for output, by_inputs in kernel.energy.items()
                },
                "before": dict(sorted(kernel.before.items())),
                "kinds": dict(sorted(kernel.kinds.items())),
                "repeated": list(kernel.repeated),
                "misuses": encode(kernel.misuses),
                "distribution": _distribution(kernel),
                "verdict": kernel.verdict.value,
                "seconds": round(kernel.seconds, 3),
                "kept": kernel.kept,
            }
            for kernel in run.kernels
        ],
        "failures": [
            {
                "kernel": failure.kernel,
                "kind": failure.kind,
                "culprit": failure.culprit,
                "what": failure.what,
                "steps": encode(failure.steps),
                "misuse": failure.misuse,
                "case": failure.case,
                "fixture": failure.fixture,
                "replay": failure.replay,
                "seconds_to_find": round(failure.seconds_to_find, 3),
                "seconds_to_shrink": round(failure.seconds_to_shrink, 3),
            }
            for kernel in run.kernels
            for failure in kernel.failures
        ],
        "unchecked": encode(run.everything_unchecked),
    }


def _distribution(kernel: KernelRecord) -> dict[str, Any] | None:
    """What a sampler drew, and what that can tell."""
    if not kernel.distributions:
        return None
    return {
        "configs": encode(kernel.distributions),
        "drawn": sum(one.drawn for one in kernel.distributions),
        "draws": sum(one.draws for one in kernel.distributions),
        "log10_e": round(kernel.log10_e, 4) if math.isfinite(kernel.log10_e) else None,
        "limit": kernel.distributions[0].limit,
        "detectable": kernel.detectable,
    }


def _ran(run: RunRecord, hunt: str) -> int:
    return sum(len(kernel.cases) for kernel in run.kernels if kernel.hunt == hunt)
