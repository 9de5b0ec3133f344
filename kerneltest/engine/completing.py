"""Play what the drawing of sequences left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from kerneltest.engine.casting import Cast
from kerneltest.engine.chase import Chase, draw
from kerneltest.engine.ledger import LAUNCH, Ledger
from kerneltest.engine.programs import step_of
from kerneltest.model import Case, LaunchSequence, Neighbour, TorchOp

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# Sequences of a kind of step that was left out.
ALONE = 4


def complete_kinds(chase: Chase[LaunchSequence], ledger: Ledger, cast: Cast, seed_value: int) -> None:
    """Play each kind of step that no sequence had, in a few by itself."""
    for kind in cast.kinds:
        played = any(kind in pair for pair in ledger.kinds)
        if chase.minimal is None and not played and kind not in ledger.refused:
            draw(_around(cast, step_of(kind, cast)), chase.check, ALONE, seed_value)


def complete_pairs(chase: Chase[LaunchSequence], ledger: Ledger, cast: Cast, seed_value: int) -> None:
    """Play what the draw left out: every launch just before the kernel, every kind of step behind every other."""
    left_out: list[SearchStrategy[Any]] = [
        st.builds(Neighbour, kernel=st.just(name), case=st.sampled_from(cases))
        for name, cases in cast.neighbours.items()
        if not ledger.before[name]
    ]
    left_out += [
        st.builds(TorchOp, op=st.just(op), elements=st.just(1 << 16))
        for op in (cast.torch_ops if TorchOp.kind in cast.kinds else ())
        if not ledger.before[f"torch.{op}"]
    ]
    for launch in left_out:
        if chase.minimal is None:
            draw(_around(cast, lambda _case, launch=launch: launch), chase.check, 2, seed_value)  # type: ignore[misc]
    for first in cast.kinds:
        for second in (*cast.kinds, LAUNCH):
            if chase.minimal is not None or ledger.kinds[first, second] or {first, second} & ledger.refused.keys():
                continue
            pair = [step_of(kind, cast) for kind in (first, second) if kind != LAUNCH]
            draw(_around(cast, *pair), chase.check, 2, seed_value)


def _around(cast: Cast, *steps: Callable[[Case[Any]], SearchStrategy[Any]]) -> SearchStrategy[LaunchSequence]:
    """Sequences of just these steps around any case."""

    def build(case: Case[Any]) -> SearchStrategy[LaunchSequence]:
        made = [step(case) for step in steps]
        return st.builds(lambda *chosen: LaunchSequence(case=case, steps=chosen), *made)

    return st.sampled_from(cast.cases).flatmap(build)
