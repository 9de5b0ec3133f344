"""Follow the first bug that is met, and no other, to the smallest thing that shows it."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis.errors import Unsatisfiable

from kerneltest.model import Case, Finding, LaunchSequence, Outcome, Status

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# What is run: a case, or a case with steps around it.
S = TypeVar("S", Case[Any], LaunchSequence)


class Found(Exception):
    """Raised inside a property: the finding with the identity that is hunted."""


@dataclass
class Chase(Generic[S]):
    """Every subject that ran, with its outcome, and the bug that is hunted, which is the first that was met.

    ``ask``: runs a subject. ``patience``: seconds from the first sight of the bug for which smaller subjects are tried.
    ``twice``: a smaller subject must show the bug two times running, since there is chance in how launches meet.
    """

    ask: Callable[[S], Outcome]
    patience: float
    twice: bool = False
    begun: float = field(default_factory=time.monotonic)
    outcomes: dict[S, Outcome] = field(default_factory=dict)
    unsupported: Counter[str] = field(default_factory=Counter)
    prey: Finding | None = None
    found_at: float = 0.0
    minimal: tuple[S, Finding] | None = None
    others: dict[tuple[str, str, str], Finding] = field(default_factory=dict)
    out_of_time: bool = False
    _confirmed: dict[S, bool] = field(default_factory=dict)

    @property
    def ran(self) -> dict[S, Outcome]:
        """The subjects that the kernel did not refuse."""
        return {one: outcome for one, outcome in self.outcomes.items() if outcome.status is not Status.UNSUPPORTED}

    def run(self, subject: S) -> Outcome:
        """Run a subject and keep its outcome: asked again, shrinking cannot contradict itself."""
        outcome = self.outcomes[subject] = self.ask(subject)
        if outcome.status is Status.UNSUPPORTED:
            self.unsupported[outcome.reason or "no reason given"] += 1
        return outcome

    def shows_prey(self, subject: S) -> bool:
        """Whether the subject fails with the bug that is hunted."""
        if self.prey and subject not in self.outcomes and time.monotonic() - self.found_at > self.patience:
            self.out_of_time = True
            return False
        finding = (self.outcomes.get(subject) or self.run(subject)).finding
        if finding is None:
            return False
        if self.prey is None:
            self.prey, self.found_at = finding, time.monotonic()
        if finding.identity == self.prey.identity:
            if subject not in self._confirmed:
                # Asked again, the answer must be the same, or Hypothesis would take the subject for flaky.
                self._confirmed[subject] = not (self.twice and self.minimal) or self.again(subject, finding)
            if self._confirmed[subject]:
                self.minimal = (subject, finding)
            return self._confirmed[subject]
        self.others.setdefault(finding.identity, finding)
        return False

    def check(self, subject: S) -> Outcome | None:
        """The property. Raises :class:`Found` for the bug that is hunted; returns what else came of the subject."""
        if self.shows_prey(subject):
            raise Found
        outcome = self.outcomes.get(subject)
        if outcome is not None and outcome.status is Status.UNSUPPORTED:
            reject()
        return outcome

    def again(self, subject: S, finding: Finding) -> bool:
        """Whether another run of the subject shows the same bug."""
        found = self.ask(subject).finding
        return found is not None and found.identity == finding.identity


# Subjects in a run of Hypothesis. Behind the tenth it varies each of them five times over by copying parts of it to
# other parts (ConjectureRunner.generate_mutations_from): of 200 in one run some 60 would be drawn, and the others be
# their likes, so that what is rare would be there often or not at all.
INDEPENDENT = 10
# Runs one after the other without anything new, after which there is taken to be nothing.
BARREN = 5


def draw(
    strategy: SearchStrategy[S], check: Callable[[S], object], examples: int, seed_value: int, bred: int = 0
) -> bool:
    """Let Hypothesis draw that many different subjects, and shrink the first for which ``check`` raises :class:`Found`.

    ``bred``: how many of them come last, from one run that is long enough to breed for what ``check`` tells it.
    Returns whether any was accepted: False if the kernel refused all of them.
    """
    accepted: set[S] = set()

    def noted(subject: S) -> None:
        check(subject)
        accepted.add(subject)

    number = barren = 0
    while len(accepted) < examples - bred and barren < BARREN:
        before = len(accepted)
        # Every run begins with the simplest subject, which all but the first have had.
        if _run(strategy, noted, min(INDEPENDENT, examples - bred - before + bool(number)), seed_value, number):
            return True
        number, barren = number + 1, 0 if len(accepted) > before else barren + 1
    if bred and accepted and _run(strategy, noted, bred + 1, seed_value, number):
        return True
    return bool(accepted)


def _run(
    strategy: SearchStrategy[S], check: Callable[[S], object], examples: int, seed_value: int, number: int
) -> bool:
    """One run of Hypothesis; returns whether :class:`Found` was raised."""

    @seed(random.Random(f"{seed_value}/{number}").getrandbits(64))  # noqa: S311  (nothing is secret)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.target, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(subject=strategy)
    def prop(subject: S) -> None:
        check(subject)

    try:
        prop()
    except Found:
        return True
    except Unsatisfiable:
        pass
    return False
