"""What a run that was killed leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attention_cases import case, paged

from kerneltest.engine.job import Company, Job
from kerneltest.engine.traced import Traced
from kerneltest.model import EmptyCache, Finding, Kernel, LaunchSequence, Misuse, Outcome, Started, Status

KERNEL = Kernel(name="rule", operator=paged.paged_prefill, launch=lambda call: {})
OF = case((1, 3))


class Answers:
    """Gives what it is given, or is interrupted."""

    started = Started(device=None)

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes = list(outcomes)

    def run(self, job: Job, *, deadline: float, cold: float) -> Outcome:
        if not self.outcomes:
            raise KeyboardInterrupt
        return self.outcomes.pop(0)

    def close(self) -> None: ...


def job(**more: Any) -> Job:
    return Job(kernel=KERNEL, source=Path("rule.py"), case=OF, **more)


def test_what_is_waited_for_is_written_before_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trace"
    dead = Finding(kind="Hung", kernel="rule", key="", what="no answer", details=("its line",))
    refused = Outcome(status=Status.UNSUPPORTED, reason="not here")
    traced = Traced(Answers(refused, Outcome(status=Status.FAILED, finding=dead)), path, "busy")
    traced.run(job(misuse="list"), deadline=1.0, cold=2.0)
    bad = Misuse(role="input", argument="q", kind="dtype", change="int8", says="is int8", benign=False)
    traced.run(job(misuse=bad), deadline=1.0, cold=2.0)
    with pytest.raises(KeyboardInterrupt):
        traced.run(
            job(company=Company(sequence=LaunchSequence(case=OF, steps=(EmptyCache(),)))), deadline=1.0, cold=2.0
        )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    told = [{name: value for name, value in line.items() if name not in ("at", "seconds")} for line in lines]
    limits = {"worker": "busy", "deadline": 1.0, "cold": 2.0}
    assert told == [
        {"asked": f"rule: {OF}", **limits},
        {"worker": "busy", "answered": "unsupported", "reason": "not here"},
        {"asked": f"rule: {OF}; q is int8", **limits},
        {"worker": "busy", "answered": "failed", "finding": ["Hung", "no answer", "its line"]},
        {"asked": f"rule: {OF}; after the allocator's cache was emptied", **limits},
    ]


def test_several_runners_share_a_file(tmp_path: Path) -> None:
    for who in ("busy", "quiet"):
        Traced(Answers(Outcome(status=Status.PASSED)), tmp_path / "trace", who).run(job(), deadline=1.0, cold=1.0)
    lines = map(json.loads, (tmp_path / "trace").read_text().splitlines())
    assert [(line["worker"], "asked" in line) for line in lines] == [
        ("busy", True),
        ("busy", False),
        ("quiet", True),
        ("quiet", False),
    ]
