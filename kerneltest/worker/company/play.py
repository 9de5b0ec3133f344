"""Play a launch sequence and judge it: the answer must be what the same kernel gives alone."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kerneltest.model import (
    FewSMs,
    Finding,
    Graph,
    Kernel,
    LaunchSequence,
    Outcome,
    Pattern,
    Place,
    Status,
    Unsupported,
)
from kerneltest.worker import device as devices
from kerneltest.worker.checks import (
    buffers_keep_their_bounds,
    explained,
    inputs_are_intact,
    outputs_have_the_right_form,
    outputs_lie_within_budget,
    uncertified,
    wrong,
)
from kerneltest.worker.company.feasible import refusal
from kerneltest.worker.company.performance import Performance, perform
from kerneltest.worker.differences import BY_CHANCE, REPEATS, difference, finding, first, share, two_values, unstable
from kerneltest.worker.execute import raised_by, refused
from kerneltest.worker.execution import Execution
from kerneltest.worker.poison import as_bits
from kerneltest.worker.rig import Rig
from kerneltest.worker.staging import KernelRaised, Observation

if TYPE_CHECKING:
    import torch

FORM = (outputs_have_the_right_form, inputs_are_intact, buffers_keep_their_bounds)
# The key of findings after which the answers of this process mean nothing any more.
AFTERWARDS = "process, afterwards"
# Launches that have to agree in being something else: an output that falls like a coin does so with BY_CHANCE.
STEADY = math.ceil(-math.log2(BY_CHANCE))


@dataclass
class _Play:
    """A sequence being judged: the kernel alone, and in company."""

    execution: Execution
    sequence: LaunchSequence
    kernels: Mapping[str, Kernel]
    fresh: str | None
    suspect: str | None
    performance: Performance | None = None
    used: Mapping[str, float] = field(default_factory=dict)

    @property
    def alone(self) -> Observation:
        return self.execution.observations[0]

    @property
    def exact(self) -> bool:
        """Whether equal bits are promised: not by a graph that is planned another way, nor on fewer SMs."""
        contract = self.execution.kernel.contract
        loose = any(
            isinstance(step, FewSMs) or (isinstance(step, Graph) and not contract.graph_bits)
            for step in self.sequence.steps
        )
        return self.execution.kernel.deterministic and not loose

    def differs(self, seen: Observation) -> tuple[str, torch.Tensor] | tuple[None, None]:
        return difference(self.execution, seen, self.alone, exact=self.exact)

    def is_changed(self) -> bool:
        """Whether alone, and steadily, it is something else than before: what the sequence left is there to stay."""
        steady: Observation | None = None
        for _ in range(STEADY):
            seen = self.execution.observe(self.alone.plan)
            if difference(self.execution, seen, self.alone)[0] is None:
                return False
            steady = steady or seen
            if difference(self.execution, seen, steady)[0] is not None:
                return False
        return True

    def is_spoilt(self) -> bool:
        """Whether nothing that this process says from now on is to be believed.

        What moved by itself before the sequence as well would not have been what a fresh worker gives.
        """
        return (
            self.performance is not None
            and self.fresh is not None
            and all(difference(self.execution, seen, self.alone)[0] is not None for seen in self._afterwards())
        )

    def raises_from_now_on(self) -> bool:
        """Whether alone, where it had an answer before, it has none any more."""
        return bool(self.execution.observations) and not self._afterwards()

    def _afterwards(self) -> list[Observation]:
        """Launches alone, on buffers of their own; none if it does not answer."""
        try:
            return [self.execution.observe(self.alone.plan) for _ in range(REPEATS)]
        except (KernelRaised, Unsupported):
            return []

    def shows(self, launch: int, clean: Place | None = None) -> bool:
        """Whether that launch of another performance differs from the kernel alone."""
        return self.differs(self.perform(clean and (clean, launch)).launches[launch])[0] is not None

    def perform(self, clean: tuple[Place, int] | None = None) -> Performance:
        return perform(self.execution, self.sequence, self.kernels, clean)


def play(
    kernel: Kernel,
    sequence: LaunchSequence,
    rig: Rig,
    kernels: Mapping[str, Kernel],
    *,
    fresh: str | None = None,
    suspect: str | None = None,
) -> Outcome:
    """Run the kernel alone and in the sequence, and compare.

    ``kernels``: those that the sequence names. ``fresh``: the digest of the same case alone in a fresh worker.
    ``suspect``: the place to try first, should one be to blame.
    """
    start = time.perf_counter()
    if (outcome := refused(kernel, sequence.case, rig.device)) is not None:
        return outcome
    if reason := refusal(kernel, sequence, rig):
        return Outcome(status=Status.UNSUPPORTED, reason=reason)
    execution = Execution(kernel, sequence.case, rig)
    playing = _Play(execution, sequence, kernels, fresh, suspect)
    try:
        execution.observations.append(execution.observe(execution.uniform(Pattern.ZERO)))
        found = next((found for check in CHECKS if (found := check(playing))), None)
        fatal = found is not None and (found.key == AFTERWARDS or playing.is_spoilt())
    except Unsupported as error:
        # A neighbour that raised may have taken the device context with it.
        lost = devices.context_is_lost(rig.device)
        return Outcome(status=Status.UNSUPPORTED, reason=str(error), fatal=lost)
    except KernelRaised as raised:
        outcome = raised_by(kernel, raised.error, rig.device, execution.launches, time.perf_counter() - start)
        return outcome if outcome.fatal else replace(outcome, fatal=playing.raises_from_now_on())
    return Outcome(
        status=Status.FAILED if found else Status.PASSED,
        seconds=time.perf_counter() - start,
        launches=execution.launches,
        finding=found and explained(execution, found),
        fatal=fatal,
        used=playing.used,
        digest=digest(playing.alone),
        repeated=_repeated(playing),
    )


def play_alone(kernel: Kernel, sequence: LaunchSequence, rig: Rig) -> Outcome:
    """One launch of the case with nothing around it, for its digest."""
    if (outcome := refused(kernel, sequence.case, rig.device)) is not None:
        return outcome
    execution = Execution(kernel, sequence.case, rig)
    try:
        seen = execution.observe(execution.uniform(Pattern.ZERO))
    except Unsupported as error:
        return Outcome(status=Status.UNSUPPORTED, reason=str(error))
    except KernelRaised as raised:
        return raised_by(kernel, raised.error, rig.device, execution.launches, 0.0)
    return Outcome(status=Status.PASSED, launches=1, digest=digest(seen))


def digest(seen: Observation) -> str:
    """Sixteen hexadecimal digits of all output bits; all NaNs count as one."""
    whole = hashlib.sha256()
    for name, value in sorted(seen.outputs.items()):
        bits = as_bits(value).clone()
        bits[value.isnan()] = -1
        whole.update(name.encode() + bits.numpy().tobytes())
    return whole.hexdigest()[:16]


# --- the checks, in the order in which they mean something


def alone_it_has_the_right_form(playing: _Play) -> Finding | None:
    return next((found for check in FORM if (found := check(playing.execution))), None)


def alone_it_is_what_a_fresh_worker_gives(playing: _Play) -> Finding | None:
    """What ran in this process before must not show in a launch that shares nothing with it."""
    execution = playing.execution
    if playing.fresh is None or not execution.kernel.deterministic or digest(playing.alone) == playing.fresh:
        return None
    if moving := unstable(execution, playing.alone):
        return moving
    return finding(
        execution,
        "StaleState",
        key="process",
        what="alone, the kernel gives other bits in this process than in one where nothing else ran",
        details=("a replay, which is alone in its process, need not show it",),
        culprit="something that ran in this process before",
    )


def in_company_it_has_the_right_form(playing: _Play) -> Finding | None:
    playing.performance = playing.perform()
    execution, alone = playing.execution, playing.execution.observations
    try:
        execution.observations = list(playing.performance.launches)
        return next((found for check in FORM if (found := check(execution))), None)
    finally:
        execution.observations = alone


def bystanders_are_intact(playing: _Play) -> Finding | None:
    """No buffer of another launch changed."""
    assert playing.performance is not None
    if not playing.performance.bystanders:
        return None
    names = ", ".join(playing.performance.bystanders)
    return finding(
        playing.execution, "OutOfBounds", key="bystander", what=f"buffers of other launches changed: {names}"
    )


def in_company_it_answers_as_alone(playing: _Play) -> Finding | None:
    """The launch under test, and then the next one, which finds what the first has left behind."""
    assert playing.performance is not None
    for launch, seen in enumerate(playing.performance.launches[:2]):
        name, differs = playing.differs(seen)
        if name is not None and differs is not None:
            return _blamed(playing, name, differs, seen, launch)
    return None


def every_launch_answers_the_same(playing: _Play) -> Finding | None:
    """Where equal bits are promised; elsewhere it is counted how many differ."""
    assert playing.performance is not None
    execution, (before, _, *more) = playing.execution, playing.performance.launches
    for number, seen in enumerate(more, 3):
        name, moved = difference(execution, seen, before)
        if name is not None and moved is not None:
            return finding(
                execution,
                "Nondeterministic",
                key=name,
                what=f"{name}: {share(moved)} differ between launch 1 and launch {number} of the same call",
                details=(two_values(execution, name, first(moved), seen, before),),
            )
    return None


def alone_it_is_afterwards_what_it_was_before(playing: _Play) -> Finding | None:
    """What outlives the sequence, such as a buffer that the library keeps, must not show in the next launch."""
    execution = playing.execution
    seen = execution.observe(execution.uniform(Pattern.ZERO))
    name, moved = difference(execution, seen, playing.alone)
    if name is None or moved is None:
        return None
    if not execution.kernel.deterministic and not playing.is_changed():
        return None  # one that may be wrong by itself
    what = f"{name}: {share(moved)} are not what they were before, in a launch that shares nothing with the sequence"
    return _outliving(execution, what, two_values(execution, name, first(moved), seen, playing.alone))


def alone_it_is_right(playing: _Play) -> Finding | None:
    """All tiers of the oracle and the certificate, once: the same bits of the same case need no second verdict."""
    execution, judged = playing.execution, playing.execution.rig.judged
    key, bits = (execution.kernel.name, execution.case), digest(playing.alone)
    if judged.get(key) == bits:
        return None
    found = outputs_lie_within_budget(execution) or uncertified(execution, playing.alone)
    if found is None:
        judged[key] = bits
        playing.used = {name: verdict.used for name, verdict in execution.verdicts.items()}
    return found


CHECKS: tuple[Callable[[_Play], Finding | None], ...] = (
    alone_it_has_the_right_form,
    alone_it_is_what_a_fresh_worker_gives,
    in_company_it_has_the_right_form,
    bystanders_are_intact,
    in_company_it_answers_as_alone,
    every_launch_answers_the_same,
    alone_it_is_afterwards_what_it_was_before,
    alone_it_is_right,
)


def _blamed(playing: _Play, name: str, differs: torch.Tensor, seen: Observation, launch: int) -> Finding:
    """Which place carried the difference, told by making one place at a time harmless before that launch."""
    execution, alone = playing.execution, playing.alone
    is_changed = playing.is_changed()
    if not is_changed and execution.kernel.deterministic and (moving := unstable(execution, alone)):
        return moving
    spoilt = differs & ~seen.outputs[name].isfinite() & alone.outputs[name].isfinite()
    are = "are NaN or Inf" if bool((spoilt == differs).all()) else "are not"
    what = f"{name}: {share(differs)} {are} what they are alone" if are == "are not" else ""
    what = what or f"{name}: {share(differs)} {are}, and alone they are not"
    what += " when launched once more" if launch else ""
    values = two_values(execution, name, first(differs), seen, alone)
    if is_changed:
        because = wrong(execution, seen)
        what += "; neither is the kernel alone from then on"
        return _outliving(execution, what, values, *((because.what, *because.details) if because else ()))
    for place in sorted(execution.places, key=lambda place: place.value != playing.suspect):
        if all(playing.shows(launch) and not playing.shows(launch, place) for _ in range(REPEATS)):
            return finding(
                execution,
                "NonFinite" if place.in_inputs and bool(spoilt.any()) else "StaleState",
                key=place.value,
                what=what,
                details=(values, f"with the {place.value} made harmless just before the launch it is right"),
                culprit=place.value,
            )
    if found := wrong(execution, seen):
        return replace(found, details=(what, *found.details, values), by_chance=False)
    return finding(execution, "Nondeterministic", key=f"{name}, in company", what=what, details=(values,))


def _outliving(execution: Execution, what: str, *details: str) -> Finding:
    return finding(
        execution,
        "StaleState",
        key=AFTERWARDS,
        what=what,
        details=details,
        culprit="something that outlives the launches",
    )


def _repeated(playing: _Play) -> tuple[int, int] | None:
    """How many further launches there were, and how many of them differ in any bit from the first."""
    performance = playing.performance
    if performance is None or len(performance.launches) == 2:
        return None
    before, *others = performance.launches
    differ = sum(difference(playing.execution, seen, before, exact=True)[0] is not None for seen in others)
    return (len(others), differ)
