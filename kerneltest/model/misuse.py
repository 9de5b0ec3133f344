"""Bad input: one thing that is wrong with an otherwise valid call, and what became of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from kerneltest.model.case import Case
from kerneltest.model.codec import decode, encode

# What can be wrong with a call. A kernel may leave a kind to its caller: see LaunchContract.trusts.
KINDS = {
    "dtype": "a tensor has another dtype; its values are the same where that dtype can hold them",
    "device": "a tensor lies on another device",
    "shape": "a tensor has more or fewer elements, or dimensions, than the rest of the call needs",
    "strides": "a tensor is not contiguous; its values are right",
    "alignment": "a tensor begins one element behind an aligned address; its values are right",
    "index out of range": "an index is negative, or points behind the end of what it indexes",
    "indptr": "offsets fall, or end behind the end of what they point into",
    "value out of range": "another integer in a tensor is negative, or huge",
    "nan": "a parameter is NaN",
    "nan of a row": "the parameter of one row, in a tensor, is NaN",
    "domain": "rows of probabilities lack a token, and no longer add up to 1",
    "parameter": "a parameter contradicts the shapes of the tensors",
    "workspace": "the workspace is smaller than what was asked for, or less aligned",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Misuse:
    """One thing that is wrong with a call.

    ``role`` and ``argument``: an input or an output of that name, a parameter (a field of the case's axes), or the
    workspace. ``kind`` is one of :data:`KINDS`, ``change`` tells apart what can be done of one kind to one argument,
    and ``says`` completes the sentence that begins with the argument. ``benign``: what is meant is as clear as before,
    so that the right answer is the natural one; all others make no sense.

    Raises ValueError for a kind that is none.
    """

    role: Literal["input", "output", "parameter", "workspace"]
    argument: str
    kind: str
    change: str
    says: str
    benign: bool = False

    def __post_init__(self) -> None:
        known_kind(self.kind)

    def __str__(self) -> str:
        return f"{self.argument} {self.says}"

    @property
    def key(self) -> str:
        """What findings are told apart by: bugs of one kind in one argument count as one."""
        return f"{self.kind} of {self.argument}"

    @property
    def name(self) -> tuple[str, str, str, str]:
        """Its identity among the misuses of a case."""
        return (self.role, self.argument, self.kind, self.change)


@dataclass(frozen=True, slots=True, kw_only=True)
class Misused:
    """A case with one thing wrong with it."""

    case: Case[Any]
    misuse: Misuse

    def __str__(self) -> str:
        return f"{self.misuse}, in {self.case}"

    @property
    def id(self) -> str:
        """Eight hexadecimal digits that depend on the case and on what is wrong."""
        text = json.dumps([self.case.id, *self.misuse.name])
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @classmethod
    def from_json(cls, case: Case[Any], misuse: object) -> Misused:
        """Raises :class:`DecodeError` with the path of the offending field."""
        return cls(case=case, misuse=decode(Misuse, misuse, "misuse"))

    def to_json(self) -> Any:
        """The misuse alone: the case has a JSON form of its own."""
        return encode(self.misuse)


@dataclass(frozen=True, slots=True, kw_only=True)
class MisuseTally:
    """What became of the misuses of one kernel.

    ``raised``: there was an error, which named something in all but those that ``unclear`` lists in a line each.
    ``right``: there was the right answer. ``failed``: there was something else. ``trusted``: left to the caller.
    """

    raised: int = 0
    right: int = 0
    failed: int = 0
    trusted: int = 0
    unclear: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.raised + self.right + self.failed + self.trusted


def known_kind(kind: str) -> None:
    """Raises ValueError for a kind of misuse that is none, listing those there are."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of misuse; valid: {', '.join(KINDS)}")
