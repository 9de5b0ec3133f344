"""Hypothesis strategies for launch sequences, and the ways to make one simpler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from kerneltest.engine.casting import Cast
from kerneltest.engine.hunt import simpler
from kerneltest.engine.ledger import BEGIN, Ledger
from kerneltest.model import (
    Again,
    Beside,
    Case,
    Data,
    EmptyCache,
    FarPages,
    FewSMs,
    Graph,
    Keeps,
    Kernel,
    LateInputs,
    LaunchSequence,
    Load,
    Neighbour,
    OtherStream,
    PageTable,
    Pattern,
    Place,
    Poison,
    Repeat,
    Reuse,
    Step,
    TorchOp,
)

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

MOST_STEPS = 5
ELEMENTS = (1 << 10, 1 << 16, 1 << 20)
FEW = (8, 16, 66)
# What a place can be filled with; a previous answer is for outputs alone.
PATTERNS = (
    Pattern.NAN,
    Pattern.FINITE,
    Pattern.INF,
    Pattern.MAX,
    Pattern.ONE,
    Pattern.ZERO,
    Pattern.RANDOM,
    Pattern.PREVIOUS,
)
# Kinds that say how the launch is made: twice the same says nothing.
ONCE = frozenset({"graph", "stream", "beside", "load", "few_sms", "late_inputs", "far_pages", "repeat"})


def sequences(cast: Cast, ledger: Ledger) -> SearchStrategy[LaunchSequence]:
    """Draw sequences of up to MOST_STEPS steps, weighted by what the ledger has not seen; the simplest has none."""
    # Frozen here: while Hypothesis draws, the same choices must keep their meaning.
    following = {kind: ledger.after(kind, cast.kinds) for kind in (BEGIN, *cast.kinds)}
    makers = _makers(cast, ledger)

    @st.composite
    def program(draw: st.DrawFn) -> LaunchSequence:
        case = draw(st.sampled_from(cast.cases))
        steps: list[Step] = []
        previous = BEGIN
        for _ in range(draw(st.integers(0, MOST_STEPS))):
            used = {step.kind for step in steps} & ONCE
            kinds = [kind for kind in following[previous] if kind not in used]
            if not kinds:
                break
            previous = draw(st.sampled_from(kinds))
            steps.append(draw(makers[previous](case)))
        return LaunchSequence(case=case, steps=tuple(steps), plan_first=draw(st.sampled_from((True, False))))

    return program()


def with_other_values(case: Case[Any]) -> Case[Any]:
    """The same tensors but for what they hold."""
    return replace(case, seed=(case.seed + 1) % 2**32)


def step_of(kind: str, cast: Cast) -> Callable[[Case[Any]], SearchStrategy[Step]]:
    """Steps of one kind, as a strategy for each case that they may stand around."""
    return _makers(cast, Ledger())[kind]


def _makers(cast: Cast, ledger: Ledger) -> dict[str, Callable[[Case[Any]], SearchStrategy[Any]]]:
    """For each kind of step the strategy of its fields, given the case under test."""
    names = ledger.weighted(sorted(cast.neighbours))
    operations = [name.removeprefix("torch.") for name in ledger.weighted([f"torch.{op}" for op in cast.torch_ops])]
    others = st.sampled_from(cast.cases)
    data = st.sampled_from(Data)
    keeps = (Keeps.NOTHING, Keeps.WORKSPACE, *((Keeps.PLAN, Keeps.RESIZED) if cast.kernel.contract.replans else ()))

    def poison(_case: Case[Any]) -> SearchStrategy[Poison]:
        return st.builds(
            lambda place, pattern: Poison(
                place=place,
                pattern=Pattern.NAN if pattern is Pattern.PREVIOUS and place is not Place.OUTPUTS else pattern,
            ),
            st.sampled_from(cast.places),
            st.sampled_from(PATTERNS),
        )

    def launched(name: str) -> SearchStrategy[Neighbour]:
        given = st.just(Data.FINITE) if name in cast.finite else data
        return st.builds(Neighbour, kernel=st.just(name), case=st.sampled_from(cast.neighbours[name]), data=given)

    def neighbour(_case: Case[Any]) -> SearchStrategy[Neighbour]:
        return st.sampled_from(names).flatmap(launched)

    def beside(case: Case[Any]) -> SearchStrategy[Beside]:
        # Two launches of one size overlap longest, and want the same parts of whatever they should not share.
        return st.builds(Beside, case=st.one_of(st.just(with_other_values(case)), others))

    def graph(case: Case[Any]) -> SearchStrategy[Graph]:
        other_values = with_other_values(case)
        captures = cast.kernel.operator.captures
        lengths = cast.kernel.contract.captured == "lengths" and captures is not None
        captured = captures(other_values) if lengths and captures else st.just(other_values)
        return st.builds(Graph, captured=captured, replays=st.integers(1, 3))

    def always(step: type[Step], **fields: SearchStrategy[Any]) -> Callable[[Case[Any]], SearchStrategy[Any]]:
        return lambda _case: st.builds(step, **fields)

    return {
        "poison": poison,
        "neighbour": neighbour,
        "torch": always(TorchOp, op=st.sampled_from(operations), elements=st.sampled_from(ELEMENTS), data=data),
        "again": always(Again, case=others, keeps=st.sampled_from(keeps)),
        "reuse": always(Reuse, buffers=st.sampled_from(("same", "moved"))),
        "page_table": always(PageTable),
        "empty_cache": always(EmptyCache),
        "graph": graph,
        "stream": always(OtherStream),
        "beside": beside,
        "load": always(Load, what=st.sampled_from(("sms", "bandwidth"))),
        "few_sms": always(FewSMs, sms=st.sampled_from(FEW)),
        "late_inputs": always(LateInputs),
        "far_pages": always(FarPages),
        "repeat": always(Repeat, times=st.sampled_from((2, 10))),
    }


def plainer(sequence: LaunchSequence, kernels: Mapping[str, Kernel], kernel: Kernel) -> Iterator[LaunchSequence]:
    """Sequences one step simpler: a step less, a simpler case, a plainer step. ``kernels``: the neighbours."""
    for number in range(len(sequence.steps)):
        yield sequence.without(number)
    if not sequence.plan_first:
        yield replace(sequence, plan_first=True)
    for case in simpler(kernel.operator, sequence.case):
        yield replace(sequence, case=case)
    for number, step in enumerate(sequence.steps):
        for other in _plainer_step(step, sequence.case, kernels, kernel):
            steps = (*sequence.steps[:number], other, *sequence.steps[number + 1 :])
            yield replace(sequence, steps=steps)


def _plainer_step(step: Step, case: Case[Any], kernels: Mapping[str, Kernel], kernel: Kernel) -> Iterator[Step]:
    match step:
        case Neighbour(kernel=name):
            yield from (replace(step, case=other) for other in kernels[name].operator.simpler(step.case))
        case Again():
            if step.keeps is not Keeps.NOTHING:
                yield replace(step, keeps=Keeps.NOTHING)
            yield from (replace(step, case=other) for other in kernel.operator.simpler(step.case))
        case Beside():
            yield from (replace(step, case=other) for other in kernel.operator.simpler(step.case))
        case Graph():
            same = with_other_values(case)
            if step.captured != same:
                yield replace(step, captured=same)
            if step.replays > 1:
                yield replace(step, replays=1)
        case TorchOp() if step.elements > ELEMENTS[0]:
            yield replace(step, elements=ELEMENTS[0])
        case Repeat() if step.times > 2:
            yield replace(step, times=2)
    if isinstance(step, Neighbour | TorchOp) and step.data is not Data.FINITE:
        yield replace(step, data=Data.FINITE)
