"""The check of a case's metamorphic relation: the kernel's own answers to related cases, mapped back and compared."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kerneltest.model import Bounded, Finding, Inapplicable, Relation, Unsupported, Variant
from kerneltest.oracle.rounding import half_ulp
from kerneltest.worker.execution import Execution
from kerneltest.worker.staging import Observation


class _Malformed(Exception):
    """The answer to a transformed case has the wrong form; the message says which."""


def relation_holds(execution: Execution) -> Finding | None:
    """The relation that the case names, if any. Where it says nothing of this kernel, the execution says why."""
    if not execution.case.relation:
        return None
    relation = execution.kernel.operator.relation(execution.case.relation)
    try:
        return next(_contradictions(execution, relation), None)
    except (Inapplicable, Unsupported) as reason:
        execution.unchecked_relation = str(reason)
    except _Malformed as form:
        return Finding(kind="WrongOutput", kernel=execution.kernel.name, key="form", what=str(form))
    return None


def _contradictions(execution: Execution, relation: Relation) -> Iterator[Finding]:
    kernel, case = execution.kernel, execution.case
    numerics = kernel.numerics(case, execution.device)
    if not relation.applies(case):
        raise Inapplicable("it says nothing of this case")
    for name in relation.needs:
        if name not in execution.expected:
            raise Inapplicable(f"it needs {name}, which the kernel does not return")
    exact = kernel.keeps_bits(relation, numerics)
    original = _answer(execution, execution.observations[0], exact)
    if not original:
        raise Inapplicable("the kernel does not promise equal bits of it, and no budget judges what it returns")
    for related in relation.transform(case, execution.materials):
        mapped = related.back([_answer_to(execution, variant, exact) for variant in related.variants], numerics)
        for name, expected in mapped.items():
            yield from _compare(execution, relation, name, original[name], expected)


def _answer_to(execution: Execution, variant: Variant, exact: bool) -> dict[str, Bounded]:
    """Launch a transformed case once, under the poison of the case's first launch."""
    other = execution.related(variant)
    if reason := other.kernel.unsupported(other.case, other.device):
        raise Inapplicable(f"the kernel does not support the transformed case: {reason}")
    execution.launches += 1
    seen = other.observe(execution.observations[0].plan)
    if seen.problem:
        raise _Malformed(f"{seen.problem}, of {other.case}, made from this case")
    return _answer(other, seen, exact)


def _answer(execution: Execution, seen: Observation, exact: bool) -> dict[str, Bounded]:
    """The outputs with what they may be off by: nothing, where equal bits are promised.

    Otherwise the hard bound and the final rounding, for the outputs that have a budget. Only that much is taken from
    the reference; the values are the kernel's. All that may stand for -Inf is -Inf.
    """
    if exact:
        return {
            name: Bounded(value=value.double(), error=torch.zeros_like(value, dtype=torch.float64))
            for name, value in seen.outputs.items()
        }
    answer = {}
    for name, budget in execution.budgets.items():
        if name in seen.outputs:
            value, none = seen.outputs[name].double(), (budget.ref == -torch.inf).cpu()
            error = torch.where(none, 0.0, (budget.hard + half_ulp(budget)).cpu())
            answer[name] = Bounded(value=value.where(~(none & (value <= budget.minus_inf)), -torch.inf), error=error)
    return answer


def differs(one: Bounded, other: Bounded) -> torch.Tensor:
    """Where two answers are further apart than both their errors. NaN is equal to NaN alone, Inf to the same Inf.

    The sign of a zero is not looked at: a sum that starts from +0 does not turn it when all else is turned.
    """
    equal = (one.value == other.value) | (one.value.isnan() & other.value.isnan())
    return ~equal & ~((one.value - other.value).abs() <= one.error + other.error)


def _compare(
    execution: Execution, relation: Relation, name: str, original: Bounded, expected: Bounded
) -> Iterator[Finding]:
    apart = differs(original, expected)
    if not bool(apart.any()):
        return
    first = tuple(int(i) for i in apart.nonzero()[0])
    excess = (original.value - expected.value).abs() - original.error - expected.error
    worst = tuple(
        int(i) for i in torch.unravel_index(excess.where(apart, -1).nan_to_num(nan=torch.inf).argmax(), excess.shape)
    )
    yield Finding(
        kind="RelationBroken",
        kernel=execution.kernel.name,
        key=relation.name,
        what=(
            f"{name}: {int(apart.sum())} of {apart.numel()} elements ({100 * float(apart.double().mean()):.3g} %) are "
            f"not what the same kernel answers with {relation.change}"
        ),
        details=tuple(
            f"{which} at {execution.kernel.operator.locate(execution.case, name, index)}: "
            f"{float(original.value[index]):.9g} here, {float(expected.value[index]):.9g} by way of {relation.name}; "
            f"they may differ by {float(original.error[index] + expected.error[index]):.3g}"
            for which, index in (("first", first), ("worst", worst))
        ),
    )
