"""What a suite declares: operators (what is computed), kernels (who computes it) and the data between them.

Suites are read on both sides of the process boundary, so declarations cost nothing: torch is imported inside the
functions that they point to, which only the worker calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kerneltest.model.case import Case
from kerneltest.model.materials import Materials
from kerneltest.model.messages import Device
from kerneltest.model.misuse import known_kind
from kerneltest.model.numerics import Arithmetic, Fmt
from kerneltest.model.poison import Pattern
from kerneltest.model.relation import Relation

if TYPE_CHECKING:
    import torch
    from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True, slots=True, kw_only=True)
class InputStrategy:
    """How the live bytes are drawn, and the patterns of the poisoned launches: at least two, one answer.

    ``tier`` says what the error budget may rest on. ``exact``: every softmax weight is a number that needs no
    rounding, so that only the accumulation and the last rounding remain. ``hard``: any data, worst case. ``generic``:
    independent random data, where errors behave like noise and are judged as noise too.
    """

    name: str
    patterns: tuple[Pattern, ...] = (Pattern.NAN, Pattern.FINITE)
    tier: Literal["exact", "hard", "generic"] = "hard"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Upper limits of a drawn case.

    Of attention: requests in a batch, query and KV tokens of one request, query heads. Of what works on distributions
    over tokens: ``rows`` and the ``vocabulary``.
    """

    batch: int
    qo_len: int
    kv_len: int
    heads: int
    rows: int = 8
    vocabulary: int = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """How errors behave on independent random inputs: rounding noise on top of a small systematic part.

    Over an output of shape [..., d]: ``sigma``, the standard deviation of the noise before the last rounding, and
    ``det``, a bound on everything else. ``freedom`` [...]: how many independent roundings make up the noise of a row,
    in effect. ``along(weight)``: the standard deviation [...] of Σ_d weight_d noise_d, whose elements share roundings,
    and a bound [...] on what everything else adds to that sum, which may be far below Σ_d det_d |weight_d|.
    """

    det: torch.Tensor
    sigma: torch.Tensor
    freedom: torch.Tensor
    along: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBudget:
    """What one output must be, and how far the declared arithmetic may take it from there.

    ``ref`` and ``hard``, the bound on the absolute error before the last rounding, are float64.
    ``out`` is the format of that last rounding. ``ref`` may hold ±Inf where the contract says so; never NaN. Where it
    is -Inf, the kernel may return ``minus_inf`` or anything below. ``noise``: for inputs of the generic tier only.
    """

    ref: torch.Tensor
    hard: torch.Tensor
    out: Fmt
    minus_inf: float = float("-inf")
    noise: Noise | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Why a certificate rejects an output that no error budget can judge, such as a token or a set of them.

    ``kind`` names a class of :data:`~kerneltest.model.failure.FAILURES`. ``what`` is one sentence, ``details`` are the
    lines below it. ``by_chance``: the verdict rests on the improbability of these draws.
    """

    kind: Literal["WrongSupport", "WrongDistribution", "Mismatch", "NonFinite"]
    output: str
    what: str
    details: tuple[str, ...] = ()
    by_chance: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """How the random outputs of an operator are held against the distribution that they must follow.

    ``cases(size)``: a fixed portfolio of cases, in each of which all rows follow one distribution, independently, and
    so do launches that differ in :attr:`Call.draw`. ``probabilities(case, inputs, device)``: that distribution over K
    categories, float64 [K], from the host tensors. ``categories(outputs)``: which of them each row drew, int64 [rows].
    """

    cases: Callable[[Size], tuple[Case[Any], ...]]
    probabilities: Callable[[Case[Any], Mapping[str, torch.Tensor], str], torch.Tensor]
    categories: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


class Workspace(Protocol):
    """Hands out scratch memory, uint8 and at least 256-byte aligned.

    Its contents are arbitrary. ``zeroed``: all zero when it is handed out for the first time; a kernel that asks for
    that must leave it so, since later launches may be given the same memory as it is.
    """

    def __call__(self, nbytes: int, *, zeroed: bool = False) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a kernel's ``plan`` and ``launch`` are given: one case on the device, its buffers poisoned.

    ``outputs`` are buffers of the right shape that a kernel may write to and return; one that allocates its own
    returns those. ``workspace(nbytes)`` gives uint8 scratch memory, see :class:`Workspace`. ``plan`` holds what the
    kernel's ``plan`` returned; inside ``plan`` it is None, or an earlier one that is to be planned anew instead of
    making another (:attr:`LaunchContract.replans`). ``captured``: the launch will be captured in a CUDA graph, and
    replayed with other values and lengths in the same buffers. ``pdl``: launch with programmatic stream serialization.
    ``draw``: the number of the launch in a series, each of which has to use random numbers of its own; launches of
    equal number use the same.
    """

    case: Case[Any]
    device: Device
    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    workspace: Workspace
    plan: Any = None
    captured: bool = False
    pdl: bool = False
    draw: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Paging:
    """Inputs that are addressed through a page table: ``pages`` by their leading index, which ``table`` holds."""

    pages: tuple[str, ...]
    table: str


def _nothing_simpler(_case: Case[Any]) -> Iterable[Case[Any]]:
    return ()


def _certifies_nothing(
    _case: Case[Any], _terms: Any, _numerics: Any, _outputs: Mapping[str, torch.Tensor]
) -> Iterable[Rejection]:
    return ()


def _no_idea(_case: Case[Any], _inputs: Mapping[str, torch.Tensor], _outputs: Mapping[str, torch.Tensor]) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """WHAT is computed.

    ``axes``: the frozen dataclass of its cases. ``cases(size)``: the Hypothesis strategy that draws them. ``inputs``:
    its input strategies. ``materialize(case)``: the host tensors. ``reference(case, inputs, device)``: float64
    values and the terms of the error budget, from the host tensors, computed on that torch device.
    ``budget(case, terms, numerics, strategy)``: a budget for each output that can be judged.
    ``locate(case, output, index)``: an index in the words of the domain, such as "request 3, token 17, head 2, dim 5".
    ``simpler(case)``: cases one step simpler, tried after Hypothesis has shrunk what it drew; must not cycle.
    ``relations``: the metamorphic relations that a case may name. ``paging``: which inputs are pages, if any.
    ``addresses``: other integer inputs that hold indices, each with the input whose leading dimension they count along,
    with that input and the dimension, or with a function of the case: how many things there are to count.
    ``distributions``: inputs each of whose rows is a probability distribution, unless an input strategy says otherwise.
    ``captures(case)``: draws cases whose tensors are nowhere smaller than those of ``case``, and equal in all that is
    not a leading dimension: what a CUDA graph may have been captured with before it is replayed for ``case``.
    ``explain(case, inputs, outputs)``: a sentence that names the cause of wrong outputs, or None; tensors on the host.
    ``certified``: the outputs that ``certify(case, terms, numerics, outputs)`` judges instead of a budget: discrete
    ones, of which many may be right. ``draws``: the distribution that random outputs follow, if they do.
    """

    name: str
    axes: type[Any]
    inputs: tuple[InputStrategy, ...]
    cases: Callable[[Size], SearchStrategy[Case[Any]]]
    materialize: Callable[[Case[Any]], Materials]
    reference: Callable[[Case[Any], Mapping[str, torch.Tensor], str], Any]
    budget: Callable[[Case[Any], Any, Any, InputStrategy], Mapping[str, ErrorBudget]]
    locate: Callable[[Case[Any], str, tuple[int, ...]], str]
    simpler: Callable[[Case[Any]], Iterable[Case[Any]]] = _nothing_simpler
    relations: tuple[Relation, ...] = ()
    paging: Paging | None = None
    addresses: Mapping[str, str | tuple[str, int] | Callable[[Case[Any]], int]] = field(default_factory=dict)
    distributions: tuple[str, ...] = ()
    captures: Callable[[Case[Any]], SearchStrategy[Case[Any]]] | None = None
    explain: Callable[[Case[Any], Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], str | None] = _no_idea
    certified: tuple[str, ...] = ()
    certify: Callable[[Case[Any], Any, Any, Mapping[str, torch.Tensor]], Iterable[Rejection]] = _certifies_nothing
    draws: Draws | None = None

    def strategy(self, name: str) -> InputStrategy:
        """The input strategy of that name; raises ValueError that lists the valid ones."""
        for strategy in self.inputs:
            if strategy.name == name:
                return strategy
        valid = ", ".join(s.name for s in self.inputs)
        raise ValueError(f"{self.name} has no input strategy {name!r}; valid: {valid}")

    def relation(self, name: str) -> Relation:
        """The relation of that name; raises ValueError that lists the valid ones."""
        for relation in self.relations:
            if relation.name == name:
                return relation
        valid = ", ".join(r.name for r in self.relations) or "none"
        raise ValueError(f"{self.name} has no relation {name!r}; valid: {valid}")


def _supports_all(_case: Case[Any], _device: Device) -> str | None:
    return None


def _one_specialisation(_case: Case[Any]) -> str:
    return ""


def _no_numerics(_case: Case[Any], _device: Device) -> Arithmetic:
    raise ValueError("the kernel declares no numerics")


def _takes_all(_step: str, _case: Case[Any], _device: Device) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchContract:
    """What may be done around a launch of the kernel. What is not declared is not done, and counted as unsupported.

    ``replans``: ``plan`` accepts an earlier plan in ``call.plan``. ``shares_workspace``: plans of several cases may be
    alive on one workspace. ``captured``: the launch can be captured in a CUDA graph (``"values"``: replayed for other
    values of the same case; ``"lengths"``: for other lengths as well, planned anew if there is a plan; None: not at
    all). ``graph_bits``: a replay promises the bits of an eager launch, and not only an answer within the budget.
    ``pdl``: there is a switch for programmatic dependent launch. ``refuses(step, case, device)``: why a kind of step
    cannot be taken around this case, or None. ``trusts``: the kinds of bad input
    (:data:`~kerneltest.model.misuse.KINDS`) that the kernel leaves to its caller, each with the reason. ``overwrites``:
    inputs that the launch first copies into an output, since the library changes them in place. What is wrong with
    their form ends with the copy; the same is done to the output. ``needs_finite``: why a launch does not come back if
    there is NaN or Inf among its inputs, as where the device asserts that there is none; "" if it does. As a neighbour
    the kernel is then given neither.

    Raises ValueError for a kind of bad input that is none.
    """

    replans: bool = False
    shares_workspace: bool = False
    captured: Literal["values", "lengths"] | None = None
    graph_bits: bool = True
    pdl: bool = False
    refuses: Callable[[str, Case[Any], Device], str | None] = _takes_all
    trusts: Mapping[str, str] = field(default_factory=dict)
    overwrites: tuple[str, ...] = ()
    needs_finite: str = ""

    def __post_init__(self) -> None:
        for kind in self.trusts:
            known_kind(kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """WHO computes it.

    ``launch(call)`` returns the outputs by name, without synchronising; ``returns`` names those it has, if not all.
    ``numerics(case, device)`` is the arithmetic that it is judged by; without it nothing is.
    ``plan(call)``, where there is one, does the host work before it: on-chip state is poisoned between the two.
    ``unsupported(case, device)`` returns the reason why a case is outside the domain, or None. ``devices``, ``library``
    and ``min_sm`` say what must be there at all. ``deterministic`` is a promise of equal bits for equal inputs.
    ``inexact``: relations that this promise does not cover, each with the reason why bits may differ.
    ``specialisation(case)`` names what is compiled at first use, so that a compiler's minutes are not taken for a hang.
    ``contract``: what may be done around its launch.

    Raises ValueError for an inexact relation that the operator does not have.
    """

    name: str
    operator: Operator
    launch: Callable[[Call], Mapping[str, torch.Tensor]]
    numerics: Callable[[Case[Any], Device], Arithmetic] = _no_numerics
    plan: Callable[[Call], Any] | None = None
    unsupported: Callable[[Case[Any], Device], str | None] = _supports_all
    devices: tuple[str, ...] = ("cpu", "cuda")
    library: str | None = None
    returns: tuple[str, ...] | None = None
    min_sm: tuple[int, int] = (0, 0)
    deterministic: bool = True
    inexact: Mapping[str, str] = field(default_factory=dict)
    specialisation: Callable[[Case[Any]], str] = _one_specialisation
    contract: LaunchContract = field(default_factory=LaunchContract)

    def __post_init__(self) -> None:
        for name in self.inexact:
            self.operator.relation(name)

    def keeps_bits(self, relation: Relation, numerics: Arithmetic) -> bool:
        """Whether the kernel promises equal bits, not only equal answers, for the relation."""
        if not self.deterministic or relation.name in self.inexact:
            return False
        return relation.promise == "deterministic" or (
            relation.promise == "batch_invariant" and numerics.batch_invariant
        )

    def unmet(self, device: Device, missing: Mapping[str, str]) -> str | None:
        """Why the kernel cannot run here at all, or None. ``missing``: libraries that do not import, and why."""
        if device.kind not in self.devices:
            return f"needs a {' or '.join(self.devices)} device, this is {device.kind}"
        if device.kind == "cuda" and device.sm < self.min_sm:
            need, have = (".".join(map(str, sm)) for sm in (self.min_sm, device.sm))
            return f"needs compute capability {need}, this is {have}"
        if self.library is not None and self.library in missing:
            return f"the library {self.library} cannot be imported: {missing[self.library]}"
        return None
