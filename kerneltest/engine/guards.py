"""Guard pages as seen by the parent: drawn for each case, and told apart from other deaths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Case, Finding, Guard, Outcome, Started

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# The simplest comes first; one in four keeps the allocator's own layout.
DRAWN = (Guard.NONE, Guard.AFTER, Guard.BEFORE, Guard.AFTER)
# Deaths of which no page is the cause: a division by zero, an instruction that is none.
NO_PAGES_DOING = ("signal SIGFPE", "signal SIGILL")


def guarded(cases: SearchStrategy[Case[Any]], started: Started) -> SearchStrategy[Case[Any]]:
    """The cases, each with one end of its buffers at an unmapped page, where there are such pages."""
    from hypothesis import strategies as st

    if started.no_guards:
        return cases
    return st.builds(lambda case, guard: replace(case, guard=guard), cases, st.sampled_from(DRAWN))


def blamed_on_the_guard(
    outcome: Outcome, case: Case[Any], prey: Finding | None, ask: Callable[[Case[Any]], Outcome]
) -> Outcome:
    """The outcome, with a death that does not happen without guard pages called by its name.

    ``prey``: once a bug is hunted, deaths of smaller cases count as what the first was found to be: asking costs a
    worker each time.
    """
    finding = outcome.finding
    if finding is None or not outcome.died or case.guard is Guard.NONE:
        return outcome
    if finding.kind == "Hung" or finding.key in NO_PAGES_DOING:
        return outcome
    if prey is None or prey.kind not in ("Crashed", "OutOfBounds"):
        beyond = not ask(replace(case, guard=Guard.NONE)).died
    else:
        beyond = prey.kind == "OutOfBounds"
    return replace(outcome, finding=out_of_bounds(finding, case.guard)) if beyond else outcome


def named(finding: Finding, case: Case[Any], ask: Callable[[Case[Any], str | None], Outcome]) -> Finding:
    """The finding with the buffer whose end was passed, told by guarding one at a time: only the guilty one costs a
    worker. ``ask(case, buffer)`` runs a case with that buffer alone at a guard page, or as the case says if None.
    """
    if finding.kind != "OutOfBounds" or case.guard is Guard.NONE or not finding.key.startswith("guard page"):
        return finding
    buffers = ask(replace(case, guard=Guard.NONE), None).buffers
    guilty = next((buffer for buffer in buffers if ask(case, buffer).died), None)
    if guilty is None:
        return finding
    edge = "behind the end" if case.guard is Guard.AFTER else "before the beginning"
    what = f"the launch touches memory {edge} of {guilty}; without a guard page there it does not show"
    return replace(finding, what=what, culprit=f"guard page {case.guard.value} {guilty}")


def out_of_bounds(death: Finding, guard: Guard) -> Finding:
    """A death at a guard page, as a finding."""
    edge = "behind the end" if guard is Guard.AFTER else "before the beginning"
    return Finding(
        kind="OutOfBounds",
        kernel=death.kernel,
        key=f"guard page {guard.value}",
        what=f"the launch touches memory {edge} of one of its buffers; without a guard page there it does not show",
        details=(death.what, *death.details),
        culprit=f"guard page {guard.value} every buffer",
    )
