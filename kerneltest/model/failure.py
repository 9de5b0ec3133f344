"""One exception class per kind of bug, and the finding: the same thing as data, on its way from worker to report."""

from __future__ import annotations

from dataclasses import dataclass


class Unsupported(Exception):
    """Raised by a kernel's ``plan`` or ``launch`` for a case outside its domain; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A failure as data.

    ``kind`` names a class of :data:`FAILURES`. ``key`` tells apart bugs of one kind in one kernel (which output, which
    signal): kind, kernel and key are the identity of a bug, never the text, so that shrinking cannot slide from one
    bug to another. ``culprit`` is what made it show. ``what`` is one sentence, ``details`` are the lines below it.
    ``by_chance``: the verdict rests on the improbability of these data, and should be asked again with others.
    """

    kind: str
    kernel: str
    key: str
    what: str
    details: tuple[str, ...] = ()
    culprit: str | None = None
    by_chance: bool = False

    @property
    def identity(self) -> tuple[str, str, str]:
        return (self.kind, self.kernel, self.key)


class Failure(AssertionError):
    """A bug in a kernel. The text is written once, by whoever raises it; equality is that of the finding."""

    def __init__(self, finding: Finding, text: str) -> None:
        super().__init__(text)
        self.finding = finding


class NonFinite(Failure):
    """NaN or Inf where the reference has none, or the other way round."""


class Mismatch(Failure):
    """An output outside the interval that the error budget allows."""


class WrongSupport(Failure):
    """A draw, or a set of tokens, that the declared rule excludes, or one that lacks what the rule includes."""


class WrongDistribution(Failure):
    """Draws that do not follow the distribution that they must, beyond a fixed probability of a false alarm."""


class BadInputAccepted(Failure):
    """A call that makes no sense was answered: neither with an error nor with the right answer."""


class StaleState(Failure):
    """The answer depends on bytes that nobody gave to the kernel."""


class Nondeterministic(Failure):
    """Two identical launches of a kernel that promises bitwise determinism differ."""


class Unwritten(Failure):
    """Elements of an output still hold what the buffer held before the launch."""


class RelationBroken(Failure):
    """Two answers of the kernel contradict a relation that holds between them, whatever the right answers are."""


class InputMutated(Failure):
    """The launch changed one of its inputs."""


class OutOfBounds(Failure):
    """The launch touched memory next to a buffer: a red zone was overwritten, or a guard page hit."""


class WrongOutput(Failure):
    """An output is missing or has the wrong shape, dtype or device."""


class LaunchRaised(Failure):
    """``plan`` or ``launch`` raised an exception on a case that the kernel says it supports."""


class Crashed(Failure):
    """The worker process died, or its device context did."""


class Hung(Failure):
    """The launch did not come back before its deadline."""


class Disagreement(Failure):
    """Two kernels that both lie within their budgets are further apart than their errors explain."""


class BadNumerics(Failure):
    """The kernel declares no arithmetic, or one that cannot be: there is nothing to judge it by."""


class VacuousBudget(Failure):
    """No case came near the declared error: the declaration is so loose that it cannot tell right from wrong."""


class NothingChecked(Failure):
    """The kernel could run here, yet supported none of the cases drawn: green would be a lie."""


FAILURES: dict[str, type[Failure]] = {
    cls.__name__: cls
    for cls in (
        NonFinite,
        Mismatch,
        WrongSupport,
        WrongDistribution,
        BadInputAccepted,
        StaleState,
        Nondeterministic,
        Unwritten,
        RelationBroken,
        InputMutated,
        OutOfBounds,
        WrongOutput,
        LaunchRaised,
        Crashed,
        Hung,
        Disagreement,
        BadNumerics,
        VacuousBudget,
        NothingChecked,
    )
}
