"""Launch one case again and again, and hold all that it drew together against the distribution that it must follow."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch

from kerneltest.model import Case, Counts, Evidence, Finding, Kernel, Outcome, Series, Status, Unsupported
from kerneltest.oracle.eprocess import Partition, coincidence, detectable, log_e, mixture, partitions
from kerneltest.worker import device as devices
from kerneltest.worker.checks import buffers_keep_their_bounds, inputs_are_intact, outputs_have_the_right_form
from kerneltest.worker.differences import finding
from kerneltest.worker.execute import raised_by, refused
from kerneltest.worker.execution import Execution
from kerneltest.worker.rig import Rig
from kerneltest.worker.staging import KernelRaised, Staged, blamed_on_the_kernel, wrong_form

# Draws before the first look at the evidence; each next look has twice as many behind it. Any number of looks is sound.
FIRST_LOOK = 1 << 16
# Launches between two looks at the clock, which wait for the device.
STRIDE = {"cpu": 1, "cuda": 32}
# Two launches that draw the same are no accident if chance would do it less often than once in 10^18.
FROZEN = math.log(1e-18)
# Launches are numbered with 31 bits, which fit any seed or offset of a library.
NUMBERS = 1 << 31
# Bins of the worst partition that a finding names.
NAMED = 4


def tally(kernel: Kernel, case: Case[Any], rig: Rig, series: Series) -> Outcome:
    """Draw on until the series is complete, out of time or rejected; the outcome has the evidence of all runs so far.

    The buffers are poisoned once, as for any launch, the outputs before every launch. Raises ValueError for an
    operator whose probabilities are none.
    """
    begun = time.perf_counter()
    if (outcome := refused(kernel, case, rig.device)) is not None:
        return outcome
    execution = Execution(kernel, case, rig)
    probabilities = _distribution(execution)
    ledger = Ledger(probabilities=probabilities, ways=partitions(probabilities), series=series)
    found, reason = None, ledger.reason
    if reason is None and not ledger.rejected:
        try:
            found = _draw(execution, ledger)
        except Unsupported as error:
            return Outcome(status=Status.UNSUPPORTED, reason=str(error))
        except KernelRaised as raised:
            return raised_by(kernel, raised.error, rig.device, execution.launches, time.perf_counter() - begun)
    told = found is None and reason is None
    if told:
        found = ledger.finding(execution)
    return Outcome(
        status=Status.FAILED if found else Status.PASSED,
        seconds=time.perf_counter() - begun,
        launches=execution.launches,
        finding=found,
        reason=reason,
        slack=kernel.numerics(case, rig.device).slack,
        evidence=ledger.sealed() if told else None,
    )


def _distribution(execution: Execution) -> torch.Tensor:
    """The probabilities of the categories, float64 [K] on the host."""
    operator, case = execution.kernel.operator, execution.case
    assert operator.draws is not None, "only operators that draw are asked to"
    p = operator.draws.probabilities(case, execution.materials.inputs, execution.device.torch_name).cpu()
    if p.dim() != 1 or p.dtype != torch.float64 or not bool((p >= 0).all()) or abs(float(p.sum()) - 1) > 1e-9:
        raise ValueError(f"{operator.name}: the probabilities of {case.id} are no float64 vector of sum 1")
    return p / p.sum()


@dataclass
class Ledger:
    """The counts of all runs, and what they say."""

    probabilities: torch.Tensor
    ways: tuple[Partition, ...]
    series: Series
    reason: str | None = None  # why no more can be counted
    counts: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.evidence = before = self.series.evidence
        self.counts = [torch.zeros(len(way.labels), dtype=torch.int64) for way in self.ways]
        if before.draws:
            if not _same(self.ways, before.partitions):
                self.reason = "what was counted in earlier runs is of another distribution than this case has now"
                return
            self.counts = [torch.tensor(stored.counts, dtype=torch.int64) for stored in before.partitions]
        if self.ways and not any(self.open) and not self.rejected:
            self.reason = "it has drawn all that random numbers of 24 bits can tell; see oracle/eprocess.py"

    @property
    def open(self) -> list[bool]:
        """Which partitions still count: by how many draws they have, never by what was drawn."""
        return [int(x.sum()) < way.most for way, x in zip(self.ways, self.counts, strict=True)]

    @property
    def rejected(self) -> bool:
        return self.evidence.impossible > 0 or self.evidence.highest >= self.series.limit

    def add(self, by_category: torch.Tensor, next_draw: int) -> None:
        """Count the draws of each category, and of none that there is, int64 [K + 1] on the host; look at them."""
        inside = by_category[:-1]
        impossible = int(by_category[-1]) + int(inside[self.probabilities == 0].sum())
        for number, still in enumerate(self.open):
            if still:
                self.counts[number] += self.ways[number].count(inside)
        log = float(mixture(self._logs()))
        self.evidence = replace(
            self.evidence,
            draws=self.evidence.draws + int(by_category.sum()),
            next_draw=next_draw % NUMBERS,
            log_e=log,
            highest=max(self.evidence.highest, log),
            impossible=self.evidence.impossible + impossible,
        )

    def sealed(self) -> Evidence:
        """The evidence with all counts, and with what they would have shown if nothing is rejected."""
        pairs = list(zip(self.ways, self.counts, strict=True))
        counted = tuple(
            Counts(
                partition=way.name,
                probabilities=tuple(way.probabilities.tolist()),
                counts=tuple(map(int, counts.tolist())),
            )
            for way, counts in pairs
        )
        least = self.evidence.detectable
        if not self.rejected:
            alpha = math.exp(-self.series.limit)
            each = (detectable(way.probabilities, int(x.sum()), alpha, among=len(pairs)) for way, x in pairs)
            least = max(each, default=1.0)
        return replace(self.evidence, partitions=counted, detectable=least)

    def finding(self, execution: Execution) -> Finding | None:
        """The rejection, if there is one, with the bins that deviate most."""
        seen = self.evidence
        if not self.rejected:
            return None
        earlier = self.series.evidence.draws
        drawn = f"{seen.draws:,} draws" + (f", {earlier:,} of them in earlier runs" if earlier else "")
        if seen.impossible:
            return finding(
                execution,
                "WrongDistribution",
                key="impossible",
                what=f"config {seen.config}: {seen.impossible:,} of {drawn} have probability 0",
                details=tuple(self._worst()),
            )
        return finding(
            execution,
            "WrongDistribution",
            key="e-process",
            what=f"config {seen.config}: {drawn}, do not follow the distribution: "
            f"E = 10^{seen.log10_e:.1f}, and 10^{self.series.limit / math.log(10):.0f} rejects",
            details=tuple(self._worst()),
            by_chance=True,
        )

    def _logs(self) -> list[torch.Tensor]:
        return [log_e(way.probabilities, x) for way, x in zip(self.ways, self.counts, strict=True)]

    def _worst(self) -> Iterator[str]:
        """The partition that speaks most against the distribution, and its bins that are furthest off."""
        if not self.ways:
            return
        logs = torch.stack(self._logs())
        worst = int(logs.argmax())
        way, x = self.ways[worst], self.counts[worst].to(torch.float64)
        expected = way.probabilities * x.sum()
        off = (x - expected) / (expected * (1 - way.probabilities)).sqrt().clamp(min=1e-300)
        yield f"most by {way.name}: E = 10^{float(logs[worst]) / math.log(10):.1f} there"
        for one in off.abs().argsort(descending=True)[:NAMED].tolist():
            yield (
                f"{way.labels[one]}: drawn {int(x[one]):,} times, expected {float(expected[one]):,.1f} "
                f"({float(off[one]):+.1f} standard deviations)"
            )


def _same(ways: Sequence[Partition], stored: Sequence[Counts]) -> bool:
    """Whether stored counts are of these very bins, up to the rounding of float64."""
    if [way.name for way in ways] != [one.partition for one in stored]:
        return False
    return all(
        len(way.labels) == len(one.counts)
        and all(map(math.isclose, way.probabilities.tolist(), one.probabilities))  # to 9 digits
        for way, one in zip(ways, stored, strict=True)
    )


def _draw(execution: Execution, ledger: Ledger) -> Finding | None:
    """Launch until there is enough; returns what is wrong with the launches themselves."""
    rig, device, kernel = execution.rig, execution.device, execution.kernel
    assert kernel.operator.draws is not None
    pattern = execution.strategy.patterns[0]
    plan = execution.uniform(pattern)
    series, size = ledger.series, len(ledger.probabilities)
    with rig.memory.arena(execution.case.guard) as arena:
        staged = Staged(kernel, execution.case, execution.materials, device, arena, plan)
        with rig.poisoner.pool(pattern):
            staged.plan()
            rig.poisoner.chip(plan)
            counts = torch.zeros(size + 1, dtype=torch.int64, device=device.torch_name)
            first, ends, drawn, look = None, math.inf, 0, FIRST_LOOK
            for number in count():
                returned = staged.relaunch((series.evidence.next_draw + number) % NUMBERS)
                execution.launches += 1
                if first is None:
                    _wait(device)
                    # What the first launch compiles is not counted.
                    ends = time.perf_counter() + series.seconds
                    if problem := wrong_form(returned, execution.expected, device):
                        return finding(execution, "WrongOutput", key="form", what=problem)
                rows = kernel.operator.draws.categories(returned)
                outside = (rows < 0) | (rows >= size)
                counts.index_add_(0, rows.where(~outside, size), torch.ones_like(rows))
                drawn += rows.numel()
                if first is None:
                    first = rows.clone()
                elif number == 1 and torch.equal(rows, first) and _tells(ledger, rows.numel()):
                    return _frozen(execution, rows.numel())
                late = (number + 1) % STRIDE[device.kind] == 0 and _wait(device) and time.perf_counter() > ends
                done = number > 0 and (drawn >= series.draws or late)  # two at least, to be held against each other
                if done or drawn >= look:
                    _wait(device)
                    ledger.add(counts.cpu(), series.evidence.next_draw + number + 1)
                    counts.zero_()
                    look *= 2
                    if done or ledger.rejected:
                        break
            execution.observations.append(staged.observed(returned))
    checks = (outputs_have_the_right_form, inputs_are_intact, buffers_keep_their_bounds)
    return next(filter(None, (check(execution) for check in checks)), None)


def _wait(device: Any) -> bool:
    with blamed_on_the_kernel():
        devices.synchronize(device)
    return True


def _tells(ledger: Ledger, rows: int) -> bool:
    """Whether two launches that agree are beyond chance: not if nearly all is in one category."""
    return coincidence(ledger.probabilities, rows) < FROZEN


def _frozen(execution: Execution, rows: int) -> Finding:
    return finding(
        execution,
        "WrongDistribution",
        key="frozen",
        what=f"config {execution.case.id}: two launches, each of which should use random numbers of its own, draw the "
        f"same {rows:,} tokens: the state of the random numbers is frozen",
    )
