"""A launch sequence: a small program of steps around the kernel under test, whose answer must not depend on them.

Most steps happen before the launch, in their order. Some say how it is made (in a graph, on another stream, beside
something else); for those the order means nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, ClassVar, Literal

from kerneltest.model.case import Case, said
from kerneltest.model.codec import DecodeError, decode, encode
from kerneltest.model.poison import Pattern, Place

SCHEMA = "kerneltest.sequence/1"


class Data(Enum):
    """What an unrelated launch is given: its ordinary inputs, or a quarter of them replaced by NaN or by ±Inf."""

    FINITE = "finite"
    NAN = "nan"
    INF = "inf"


class Keeps(Enum):
    """What a launch of the same kernel with another case leaves for the launch under test.

    NOTHING: buffers, workspace and plan of its own. WORKSPACE: a plan of its own on the same workspace. PLAN: the very
    plan, planned anew. RESIZED: the plan, planned anew on a larger workspace that lies somewhere else.
    """

    NOTHING = "nothing"
    WORKSPACE = "workspace"
    PLAN = "plan"
    RESIZED = "resized"


class _Words:
    """How a step reads behind the name of a kernel: ``short`` in a headline, with ``details`` elsewhere."""

    __slots__ = ()

    @property
    def short(self) -> str:
        raise NotImplementedError

    @property
    def details(self) -> str:
        return ""

    def __str__(self) -> str:
        return f"{self.short}: {self.details}" if self.details else self.short


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Poison(_Words):
    """Fill a place."""

    kind: ClassVar[str] = "poison"
    place: Place
    pattern: Pattern

    @property
    def short(self) -> str:
        were = "were" if self.place.value.endswith("s") else "was"
        return f"after the {self.place.value} {were} filled with {self.pattern.value}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour(_Words):
    """Launch another kernel of any suite, with a case and buffers of its own."""

    kind: ClassVar[str] = "neighbour"
    kernel: str
    case: Case[Any]
    data: Data = Data.FINITE

    @property
    def short(self) -> str:
        return f"after {self.kernel}{_on(self.data)}"

    @property
    def details(self) -> str:
        return str(self.case)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TorchOp(_Words):
    """Launch an operation of torch on ``elements`` numbers."""

    kind: ClassVar[str] = "torch"
    op: str
    elements: int
    data: Data = Data.FINITE

    @property
    def short(self) -> str:
        return f"after torch.{self.op}{_on(self.data)}"

    @property
    def details(self) -> str:
        return f"{self.elements} elements"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Again(_Words):
    """Launch the kernel under test with another case before."""

    kind: ClassVar[str] = "again"
    case: Case[Any]
    keeps: Keeps = Keeps.NOTHING

    @property
    def short(self) -> str:
        return {
            Keeps.NOTHING: "after the same kernel with another case",
            Keeps.WORKSPACE: "after the same kernel with another case on the same workspace",
            Keeps.PLAN: "planned anew after another case",
            Keeps.RESIZED: "planned anew on a larger workspace after another case",
        }[self.keeps]

    @property
    def details(self) -> str:
        return str(self.case)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reuse(_Words):
    """Launch the kernel before on other data in the same buffers, or on the same data in others that are then freed."""

    kind: ClassVar[str] = "reuse"
    buffers: Literal["same", "moved"] = "same"

    @property
    def short(self) -> str:
        if self.buffers == "same":
            return "after the same kernel on other data in the same buffers"
        return "after the same kernel on the same data in buffers that were freed"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PageTable(_Words):
    """Launch the kernel before with the pages in another order, then change page table and pages in place."""

    kind: ClassVar[str] = "page_table"

    @property
    def short(self) -> str:
        return "after the same kernel with another page table in the same buffers"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EmptyCache(_Words):
    """Give the allocator's free memory back."""

    kind: ClassVar[str] = "empty_cache"

    @property
    def short(self) -> str:
        return "after the allocator's cache was emptied"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Graph(_Words):
    """Capture the launch with the case ``captured``, then write the case under test into its buffers and replay.

    What the case under test leaves of the buffers is padding. Replayed ``replays`` times, of which the last is judged.
    """

    kind: ClassVar[str] = "graph"
    captured: Case[Any]
    replays: int = 1

    @property
    def short(self) -> str:
        times = "" if self.replays == 1 else f" {self.replays} times"
        return f"replayed{times} from a CUDA graph of another case"

    @property
    def details(self) -> str:
        return str(self.captured)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OtherStream(_Words):
    """Launch on a stream that is not torch's default."""

    kind: ClassVar[str] = "stream"

    @property
    def short(self) -> str:
        return "on another stream"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Beside(_Words):
    """Launch the kernel with another case at the same time, on a stream and a workspace of its own."""

    kind: ClassVar[str] = "beside"
    case: Case[Any]

    @property
    def short(self) -> str:
        return "beside the same kernel with another case on another stream"

    @property
    def details(self) -> str:
        return str(self.case)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load(_Words):
    """Launch beside a kernel that occupies half of the SMs, or the memory bandwidth."""

    kind: ClassVar[str] = "load"
    what: Literal["sms", "bandwidth"] = "sms"

    @property
    def short(self) -> str:
        return f"beside a kernel that takes {'half of the SMs' if self.what == 'sms' else 'memory bandwidth'}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FewSMs(_Words):
    """Launch in a green context of so many SMs (rounded up to what the device can split off)."""

    kind: ClassVar[str] = "few_sms"
    sms: int

    @property
    def short(self) -> str:
        return f"in a green context of {self.sms} SMs"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LateInputs(_Words):
    """Launch with programmatic dependent launch, behind a kernel that triggers at once and writes the inputs late."""

    kind: ClassVar[str] = "late_inputs"

    @property
    def short(self) -> str:
        return "in a programmatic dependent launch behind the kernel that writes its inputs"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FarPages(_Words):
    """Put the pages at the end of a cache of 5 * 2^30 elements, of which the rest is not mapped."""

    kind: ClassVar[str] = "far_pages"

    @property
    def short(self) -> str:
        return "with its pages at high page numbers"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Repeat(_Words):
    """Launch ``times`` more times: all must agree bit for bit, or, where that is not promised, it is counted."""

    kind: ClassVar[str] = "repeat"
    times: int

    @property
    def short(self) -> str:
        return f"launched {self.times} times more"


Step = (
    Poison
    | Neighbour
    | TorchOp
    | Again
    | Reuse
    | PageTable
    | EmptyCache
    | Graph
    | OtherStream
    | Beside
    | Load
    | FewSMs
    | LateInputs
    | FarPages
    | Repeat
)
STEPS: Mapping[str, type[Step]] = {step.kind: step for step in typing.get_args(Step)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSequence:
    """The case under test and the steps around its launch.

    ``plan_first``: the kernel plans before the steps and launches after them, as a model plans once for all its layers;
    otherwise plan and launch follow each other.
    """

    case: Case[Any]
    steps: tuple[Step, ...] = ()
    plan_first: bool = True

    def __str__(self) -> str:
        return "; ".join([str(self.case), *map(str, self.steps)])

    @property
    def id(self) -> str:
        """Eight hexadecimal digits that depend on nothing but the content."""
        steps = [[step.kind, said(step)] for step in self.steps]
        text = json.dumps([self.case.id, steps, self.plan_first], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def neighbours(self) -> tuple[Neighbour, ...]:
        return tuple(step for step in self.steps if isinstance(step, Neighbour))

    @property
    def cases(self) -> tuple[Case[Any], ...]:
        """Every case that the kernel under test is given."""
        own = [step.case for step in self.steps if isinstance(step, Again | Beside)]
        return (self.case, *own, *(step.captured for step in self.steps if isinstance(step, Graph)))

    def without(self, number: int) -> LaunchSequence:
        """The sequence without that step."""
        return dataclasses.replace(self, steps=(*self.steps[:number], *self.steps[number + 1 :]))

    def to_json(self) -> dict[str, Any]:
        """All but the case, which a file holds beside it."""
        steps = [{"step": step.kind, **encode(step)} for step in self.steps]
        return {"schema": SCHEMA, "plan_first": self.plan_first, "steps": steps}

    @classmethod
    def from_json(
        cls, case: Case[Any], data: object, axes_of: Callable[[str], type[Any]], path: str = "sequence"
    ) -> LaunchSequence:
        """Inverse of :meth:`to_json`. ``axes_of(kernel)``: the axes of a neighbour's cases; may raise ValueError.

        Raises :class:`DecodeError` that names the step which this release does not know, and those that it does.
        """
        raw = decode(_Raw, data, path)
        if raw.schema != SCHEMA:
            strange = [f"[{n}] {_name(step)!r}" for n, step in enumerate(raw.steps) if not _known(step)]
            unknown = f"of its steps {', '.join(strange)} {'is' if len(strange) == 1 else 'are'} unknown"
            raise DecodeError(
                f"{path}: schema {raw.schema!r} is of another release, this one reads {SCHEMA!r}; "
                f"{unknown if strange else 'all of its steps are known by name'}; known: {', '.join(STEPS)}"
            )
        own = type(case.axes)
        steps = tuple(_decode_step(step, own, axes_of, f"{path}.steps[{n}]") for n, step in enumerate(raw.steps))
        return cls(case=case, steps=steps, plan_first=raw.plan_first)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Raw:
    schema: str
    steps: tuple[Any, ...]
    plan_first: bool = True


def _name(step: Any) -> Any:
    return step.get("step") if isinstance(step, dict) else step


def _known(step: Any) -> bool:
    return isinstance(_name(step), str) and _name(step) in STEPS


def _decode_step(data: Any, own: type[Any], axes_of: Callable[[str], type[Any]], path: str) -> Step:
    name = _name(data)
    if not isinstance(data, dict) or not _known(data):
        raise DecodeError(f"{path}: unknown step {name!r}; this release knows {', '.join(STEPS)}")
    step: Any = STEPS[name]
    given = {key: value for key, value in data.items() if key != "step"}
    fields = {field.name: field for field in dataclasses.fields(step)}
    if unknown := sorted(set(given) - set(fields)):
        raise DecodeError(f"{path}: step {name!r} has no field {unknown[0]!r}; known: {', '.join(fields) or 'none'}")
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in given]
    if missing:
        raise DecodeError(f"{path}: step {name!r} lacks its field {missing[0]!r}")
    hints = typing.get_type_hints(step)
    values = {}
    for key, value in given.items():
        if typing.get_origin(hints[key]) is Case:
            try:
                axes = axes_of(given["kernel"]) if step is Neighbour else own
            except ValueError as error:
                raise DecodeError(f"{path}: {error}") from error
            values[key] = Case.from_json(value, axes, f"{path}.{key}")
        else:
            values[key] = decode(hints[key], value, f"{path}.{key}")
    return typing.cast("Step", step(**values))


def _on(data: Data) -> str:
    return "" if data is Data.FINITE else f" with {'NaN' if data is Data.NAN else 'Inf'} among its inputs"
