"""The operators ``merge_state``, ``merge_state_in_place`` and ``merge_states``: attention over a union of sets of keys.

A state is the output ``v`` of attention over some keys and the log-sum-exp ``s`` of its scores. With the base B of the
log-sum-exps, which the kernel declares, and w_i = B^(s_i - s) the merged state is

    s = log_B Σ_i B^s_i,  v = Σ_i w_i v_i.

A state with s = -Inf is that of no keys, has v = 0 and changes nothing; such states alone merge to another one.
``merge_state`` takes two states ``v_a``, ``v_b`` [rows, heads, d], ``s_a``, ``s_b`` [rows, heads] float32; the one in
place takes ``v``, ``s``, ``v_other``, ``s_other``, and leaves rows alone where ``mask`` (bool [rows], if there is one)
is false; ``merge_states`` takes ``v`` [rows, states, heads, d] and ``s`` [rows, states, heads].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from kerneltest.model import (
    Case,
    ErrorBudget,
    InputStrategy,
    Materials,
    Operator,
    Related,
    Relation,
    Size,
)

from ._merge_axes import DTYPES, MergeNumerics, MergeStates

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st

    from ._merge import States

HEAD_DIMS = (128, 64, 256)
HEADS = (1, 2, 3, 7, 8, 16, 32)
STATES = (2, 1, 3, 4, 5, 8, 9, 16, 17, 33, 64, 100)


INPUTS = (
    InputStrategy(name="generic"),
    # One state outweighs the others, or differences are so large that weights are subnormal.
    InputStrategy(name="far"),
    # Log-sum-exps of thousands, close together.
    InputStrategy(name="large"),
    # Half of the states have no keys; in some rows none has any.
    InputStrategy(name="empty"),
    # The same with FlashInfer's finite number in place of -Inf.
    InputStrategy(name="stand_in"),
)


def cases(name: str, size: Size) -> st.SearchStrategy[Case[MergeStates]]:
    """Draw cases; the simplest has one row and one head."""
    from hypothesis import strategies as st

    from kerneltest.strategies import edges

    several = name == "merge_states"

    def build(masked: bool, inputs: str, seed: int, relation: Relation | None, **axes: Any) -> Case[MergeStates]:
        case = Case(operator=name, axes=MergeStates(masked=masked, **axes), inputs=inputs, seed=seed)
        return replace(case, relation=relation.name) if relation and relation.applies(case) else case

    return st.builds(
        build,
        rows=edges(max(size.qo_len, 1), 64, minimum=1),
        states=st.sampled_from([n for n in STATES if n <= size.kv_len]) if several else st.just(2),
        heads=st.sampled_from([h for h in HEADS if h <= size.heads]),
        head_dim=st.sampled_from(HEAD_DIMS),
        dtype=st.sampled_from(DTYPES),
        masked=st.booleans() if name == "merge_state_in_place" else st.just(False),
        inputs=st.sampled_from([strategy.name for strategy in INPUTS]),
        seed=st.integers(0, 2**32 - 1),
        relation=st.sampled_from([None, *RELATIONS]),
    )


def materialize(case: Case[MergeStates]) -> Materials:
    """Host tensors, all of them from ``case.seed``; raises ValueError for a case that the operator has not."""
    from ._merge import materials, values

    if case.operator != "merge_states" and case.axes.states != 2:
        raise ValueError(f"{case.operator} merges two states, got {case.axes.states}")
    return materials(case, values(case))


def reference(case: Case[MergeStates], inputs: Mapping[str, torch.Tensor], device: str) -> States:
    """The states in float64. What they merge to depends on the base, which the kernel's numerics say."""
    from ._merge import states

    return states(case, inputs, device)


def budget(
    case: Case[MergeStates], terms: States, numerics: MergeNumerics, strategy: InputStrategy
) -> Mapping[str, ErrorBudget]:
    """The budgets of ``out`` and ``lse``; see :func:`._merge.merge_budget`."""
    from ._merge import merge_budget

    return merge_budget(terms, numerics)


def simpler(case: Case[MergeStates]) -> Iterator[Case[MergeStates]]:
    """The case with one number at its simplest value, or half of it."""
    axes = case.axes
    if case.relation:
        yield replace(case, relation="")
    simplest: dict[str, Any] = {"rows": 1, "heads": 1, "head_dim": HEAD_DIMS[0], "dtype": DTYPES[0], "masked": False}
    if case.operator == "merge_states":
        simplest["states"] = STATES[0] if axes.states > 1 else 1
    for name, value in simplest.items():
        if getattr(axes, name) != value:
            yield replace(case, axes=replace(axes, **{name: value}))
    for name in ("rows", "heads", *(["states"] if case.operator == "merge_states" else [])):
        if getattr(axes, name) > simplest[name]:
            for less in {getattr(axes, name) // 2, getattr(axes, name) - 1}:
                yield replace(case, axes=replace(axes, **{name: max(less, 1)}))
    if case.inputs != INPUTS[0].name:
        yield replace(case, inputs=INPUTS[0].name)
    if case.seed:
        yield replace(case, seed=0)


def locate(case: Case[MergeStates], output: str, index: tuple[int, ...]) -> str:
    """An index in words: "row 3, head 2, dim 5" for ``out``; ``lse`` has no dim."""
    place = f"row {index[0]}, head {index[1]}"
    return place if output == "lse" else f"{place}, dim {index[2]}"


def _transform(name: str, case: Case[MergeStates], materials: Materials) -> tuple[Related, ...]:
    from ._merge import TRANSFORMATIONS

    return TRANSFORMATIONS[name](case, materials)


def _always(_case: Case[MergeStates]) -> bool:
    return True


def _several_rows(case: Case[MergeStates]) -> bool:
    return case.axes.rows > 1


def _several_states(case: Case[MergeStates]) -> bool:
    # In place, the first state is the one that stays where a row is not merged.
    return case.axes.states > 1 and not case.axes.masked


def _can_be_split(case: Case[MergeStates]) -> bool:
    return case.operator == "merge_states" and case.axes.states > 1


def _relation(
    name: str, change: str, promise: Literal["deterministic", "batch_invariant"] | None, applies: Any, *needs: str
) -> Relation:
    return Relation(
        name=name, change=change, promise=promise, applies=applies, transform=partial(_transform, name), needs=needs
    )


RELATIONS = (
    _relation("value_sign", "-V", "deterministic", _always),
    _relation("row_order", "the rows in another order", "batch_invariant", _several_rows),
    _relation("repeat", "the very same inputs once more", "deterministic", _always),
    _relation("state_order", "the states in another order", None, _several_states),
    _relation("split", "half of the states merged first, then the others", None, _can_be_split, "out", "lse"),
)


def _operator(name: str) -> Operator:
    return Operator(
        name=name,
        axes=MergeStates,
        inputs=INPUTS,
        cases=partial(cases, name),
        materialize=materialize,
        reference=reference,
        budget=budget,
        locate=locate,
        simpler=simpler,
        relations=RELATIONS,
    )


merge_state = _operator("merge_state")
merge_state_in_place = _operator("merge_state_in_place")
merge_states = _operator("merge_states")
