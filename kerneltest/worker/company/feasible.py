"""Which steps can be taken: on this device at all, and around this launch of this kernel."""

from __future__ import annotations

from kerneltest.model import (
    Again,
    Beside,
    FarPages,
    FewSMs,
    Graph,
    Keeps,
    Kernel,
    LateInputs,
    LaunchSequence,
    Load,
    OtherStream,
    PageTable,
    Step,
)
from kerneltest.worker.rig import Rig

NEEDS_CUDA = (Graph, OtherStream, Beside, Load, FewSMs, LateInputs)
NEEDS_COMPANIONS = (Beside, Load, FewSMs, LateInputs)
# Two that make the same launch in two ways: a graph is bound to the context it was captured in, and plans its own way.
AT_ODDS = ((Graph, FewSMs), (Graph, LateInputs), (FewSMs, OtherStream))


def impossible_steps(rig: Rig) -> dict[str, str]:
    """The kinds of steps that cannot be taken on the device, and why."""
    if rig.device.kind == "cpu":
        return {step.kind: "a CPU has neither streams nor graphs" for step in NEEDS_CUDA}
    try:
        rig.companions  # noqa: B018  (compiles its kernels, or says what is missing)
    except ImportError as error:
        reason = f"needs the packages cuda-core and cuda-bindings (extra 'cuda'): {error}"
        return {step.kind: reason for step in NEEDS_COMPANIONS}
    if rig.device.sm < (9, 0):
        return {LateInputs.kind: "programmatic dependent launch needs compute capability 9.0"}
    return {}


def refusal(kernel: Kernel, sequence: LaunchSequence, rig: Rig) -> str | None:
    """The first step that cannot be taken around this launch, and why; None if all can.

    "step KIND: why" says that no step of the kind can be taken around any launch of the kernel.
    """
    for step in sequence.steps:
        if why := rig.impossible.get(step.kind) or _undeclared(kernel, step):
            return f"step {step.kind}: {why}"
        if why := kernel.contract.refuses(step.kind, sequence.case, rig.device) or _at_odds(kernel, step, sequence):
            return f"step {step.kind} here: {why}"
    return None


def _undeclared(kernel: Kernel, step: Step) -> str | None:
    """What the kernel's contract and its operator do not offer."""
    match step:
        case Graph() if kernel.contract.captured is None:
            return "the kernel does not declare that its launch can be captured"
        case LateInputs() if not kernel.contract.pdl:
            return "the kernel declares no switch for programmatic dependent launch"
        case PageTable() | FarPages() if kernel.operator.paging is None:
            return f"the operator {kernel.operator.name} has no page table"
    return None


def _at_odds(kernel: Kernel, step: Step, sequence: LaunchSequence) -> str | None:
    """What does not go together, or not with this case."""
    contract, kinds = kernel.contract, {type(other) for other in sequence.steps}
    for one, other in AT_ODDS:
        if isinstance(step, one) and other in kinds:
            return f"goes with no step {other.kind}"
    match step:
        case Again(keeps=Keeps.PLAN | Keeps.RESIZED) if not contract.replans:
            return "the kernel declares no plan that can be planned anew"
        case Again(keeps=keeps) if keeps is not Keeps.NOTHING and Graph in kinds:
            return "a plan that was captured is not shared"
        case Graph(captured=captured) if contract.captured == "values" and captured.axes != sequence.case.axes:
            return "the kernel declares that a graph of it can be replayed for other values only"
    return None
