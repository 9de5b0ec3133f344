"""What a person reads when a kernel fails."""

from __future__ import annotations

from collections.abc import Sequence

from kerneltest.engine.hunt import Caught, Trail
from kerneltest.model import Finding, MisuseTally, Outcome, Started, Status


def failure_text(caught: Caught, started: Started, replay: str | None, ran: int) -> str:
    """What, how much of it, where first, the minimal case, the culprit, and the command that shows it again."""
    finding = caught.finding
    lines = [headline(caught), f"  {finding.what}"]
    if finding.culprit and not caught.misuse:
        lines.append(f"  culprit: {finding.culprit}")
    lines += [f"  {line}" for line in finding.details]
    for number, (step, without) in enumerate(zip(steps(caught), caught.without, strict=False), 1):
        lines.append(f"  step {number}: {step}. Without it: {without}.")
    lines.append(f"  minimal case: {caught.case}")
    if not caught.complete:
        lines.append("  shrinking ran out of time: a smaller case may exist")
    lines.append(f"  on: {where(started)}")
    if caught.confirmed_of:
        lines.append(
            f"  found after {caught.seconds_to_find:.1f} s, shrunk for {caught.seconds_to_shrink:.1f} s; {ran} cases; "
            f"the minimal one failed again in {caught.reproduced} of {caught.confirmed_of} runs"
        )
    if caught.fresh_of:
        lines.append(f"  with other data of the same kind {caught.fresh} of {caught.fresh_of} runs fail as well")
    lines += [f"  {name} {_opinion(outcome)}" for name, outcome in caught.peers.items()]
    lines += [f"  seen while shrinking: {other.kind}: {other.what}" for other in caught.others]
    if replay:
        lines.append(f"  replay: {replay}")
    return "\n".join(lines)


def headline(caught: Caught) -> str:
    """What, in which kernel, and after or beside which step: "StaleState in KERNEL after torch.sort: shared memory"."""
    text = f"{caught.finding.kind} in {caught.finding.kernel}"
    if caught.misuse:
        return f"{text} on bad input: {caught.finding.culprit}"
    if not caught.sequence or not caught.sequence.steps:
        return text
    culprit = f": {caught.finding.culprit}" if caught.finding.culprit else ""
    return f"{text} {', '.join(step.short for step in caught.sequence.steps)}{culprit}"


def steps(caught: Caught) -> tuple[str, ...]:
    """The words of the steps around the minimal case."""
    return tuple(map(str, caught.sequence.steps)) if caught.sequence else ()


def _opinion(outcome: Outcome) -> str:
    """What another kernel's outcome says about the case."""
    if outcome.status is Status.UNSUPPORTED:
        return f"does not support this case: {outcome.reason}"
    if outcome.finding and outcome.finding.kind == "Hung":  # which may be the compiler
        return f"said nothing of this case: {outcome.finding.what}"
    if outcome.finding:
        return f"fails on this case: {outcome.finding.kind}: {outcome.finding.what}"
    return "agrees with the reference on this case"


def misuse_text(found: Sequence[Caught], tally: MisuseTally, first: str) -> str:
    """Everything that a kernel did wrong on bad input, a line each, and the whole text of the first."""
    if len(found) == 1:
        return first
    kernel = found[0].finding.kernel
    lines = [f"{len(found)} findings in {kernel} on bad input, of {tally.total} calls with something wrong"]
    lines += [f"  {caught.finding.kind}: {caught.finding.culprit}" for caught in found]
    return "\n".join((*lines, "", first))


def vacuous_text(finding: Finding, started: Started) -> str:
    """Why a kernel of which every case passed is not green."""
    return "\n".join(
        (
            f"{finding.kind} in {finding.kernel}",
            f"  {finding.what}",
            "  its declared numerics are looser than its arithmetic: state accumulators and formats as they are",
            f"  on: {where(started)}",
        )
    )


def nothing_checked_text(kernel: str, trail: Trail, started: Started) -> str:
    """Why a kernel that refused every case is not green."""
    lines = [f"NothingChecked in {kernel}", f"  none of {sum(trail.unsupported.values())} drawn cases is supported:"]
    lines += [f"  {count} x {reason}" for reason, count in sorted(trail.unsupported.items())]
    lines.append(f"  on: {where(started)}")
    return "\n".join(lines)


def where(started: Started) -> str:
    """Device and versions on a line."""
    device = started.device
    name = "no device" if device is None else device.name
    if device is not None and device.kind == "cuda":
        name += f" (sm {device.sm[0]}.{device.sm[1]}, {device.units} SMs)"
    return ", ".join([name, *(f"{library} {version}" for library, version in started.libraries.items())])
