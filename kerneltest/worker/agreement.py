"""Kernel against kernel: two that both lie within their budgets must also lie close to each other."""

from __future__ import annotations

import torch

from kerneltest.model import ErrorBudget, Finding, Kernel, Unsupported
from kerneltest.model.numerics import TYPICAL_ROUNDING, WORST_ROUNDING
from kerneltest.oracle.rounding import Z, half_ulp
from kerneltest.worker import device as devices
from kerneltest.worker.execution import Execution
from kerneltest.worker.staging import KernelRaised


def agrees_with_its_peer(execution: Execution) -> Finding | None:
    """Run the peer on the same inputs. What it does wrong by itself is for its own hunt to find, not for this one."""
    peer = execution.peer
    if peer is None:
        return None
    other = execution.beside(peer)
    if not _willing(peer, other):
        return None
    try:
        seen = other.observe(other.uniform(other.strategy.patterns[-1]))
        if seen.problem or not all(verdict.ok for verdict in other.judged(seen).values()):
            return None
    except Unsupported:
        return None
    except KernelRaised:
        if devices.context_is_lost(execution.device):
            raise  # nobody can go on in this worker; the parent finds out whose fault it was
        return None
    ours = execution.observations[0]
    for name, theirs in other.budgets.items():
        budget = execution.budgets.get(name)
        # An output in another unit, such as a log-sum-exp in base 2, has another reference.
        if budget is None or name not in seen.outputs or not torch.equal(budget.ref, theirs.ref):
            continue
        execution.compared_with = peer.name
        apart = (ours.outputs[name].double() - seen.outputs[name].double()).abs().to(budget.ref.device)
        share = torch.where(budget.ref.isfinite(), apart / _allowed(budget, theirs), 0.0)
        if bool((share > 1).any()):
            return _too_far_apart(execution, peer.name, name, share, ours.outputs[name], seen.outputs[name])
    return None


def _willing(peer: Kernel, other: Execution) -> bool:
    """Whether the peer takes the case, and declares an arithmetic that it can be judged by."""
    try:
        if peer.unsupported(other.case, other.device):
            return False
        peer.numerics(other.case, other.device)
    except Exception:
        return False
    return True


def _too_far_apart(
    execution: Execution, peer: str, name: str, share: torch.Tensor, here: torch.Tensor, there: torch.Tensor
) -> Finding:
    where = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
    reference = float(execution.budgets[name].ref[where])
    place = execution.kernel.operator.locate(execution.case, name, where)
    return Finding(
        kind="Disagreement",
        kernel=execution.kernel.name,
        key=f"{name}, {peer}",
        what=f"{name}: further from {peer} than the errors of both allow, though each is within its budget",
        details=(
            f"worst at {place}: {float(here[where]):.9g} here, {float(there[where]):.9g} there, "
            f"reference {reference:.9g}, {float(share[where]):.3g} times what is allowed",
        ),
        by_chance=execution.budgets[name].noise is not None,
    )


def _allowed(one: ErrorBudget, other: ErrorBudget) -> torch.Tensor:
    """How far two outputs may be apart: hard bounds add up, and so do roundings; noise adds up in squares.

    The sum of the bounds alone could not fail where both outputs lie within theirs.
    """
    rounding = half_ulp(one) + half_ulp(other)
    apart = one.hard + other.hard
    if one.noise is not None and other.noise is not None:
        noise = (one.noise.sigma.square() + other.noise.sigma.square()).sqrt()
        likely = one.noise.det + other.noise.det + Z * WORST_ROUNDING / TYPICAL_ROUNDING * noise
        apart = torch.minimum(apart, likely)
    return apart + rounding
