"""Launch kernels as a plain test would, and say what the usual checkers reject.

``python -m kerneltest.power.launch ROOT ...``. Each line of stdin is a JSON object with source, kernel and case; each
answer is a JSON line, the names of the checkers that reject the case. No poison and no isolation: whoever asks must
expect this process to die.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from kerneltest import discovery
from kerneltest.model import Call, Case, Device, Kernel, Unsupported
from kerneltest.power.zoo import USUAL


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # Triton's kernels run in its interpreter, as they do in a worker on a CPU.
    os.environ["TRITON_INTERPRET"] = "1"
    discovery.use_roots([Path(root) for root in sys.argv[1:]])
    for line in sys.stdin:
        request = json.loads(line)
        kernels = discovery.load_kernels(Path(request["source"])).values()
        kernel = next(k for k in kernels if k.name == request["kernel"])
        case: Case[Any] = Case.from_json(request["case"], kernel.operator.axes)
        try:
            rejected = rejecting(kernel, case)
        except Unsupported:
            rejected = []
        except Exception:  # whatever it is, a test would have failed
            rejected = list(USUAL)
        answers.write(json.dumps(rejected) + "\n")


def rejecting(kernel: Kernel, case: Case[Any]) -> list[str]:
    """The usual checkers that reject one launch of the kernel; what it raises comes through."""
    import torch

    from kerneltest.power.checkers import CHECKERS, Answers

    torch.set_num_threads(1)
    device = Device(kind="cpu", ordinal=0, name="cpu", sm=(0, 0), units=1)
    operator, materials = kernel.operator, kernel.operator.materialize(case)
    inputs = {name: value.clone() for name, value in materials.inputs.items()}
    outputs = {
        name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for name, spec in materials.outputs.items()
    }

    def workspace(nbytes: int, *, zeroed: bool = False) -> torch.Tensor:
        del zeroed  # it is, always
        return torch.zeros(nbytes, dtype=torch.uint8)

    call = Call(case=case, device=device, inputs=inputs, outputs=outputs, workspace=workspace)
    if kernel.plan:
        call = Call(
            case=case, device=device, inputs=inputs, outputs=outputs, workspace=workspace, plan=kernel.plan(call)
        )
    returned = kernel.launch(call)
    terms = operator.reference(case, materials.inputs, "cpu")
    budgets = operator.budget(case, terms, kernel.numerics(case, device), operator.strategy(case.inputs))
    ref = budgets["out"].ref
    # A test that asks for no log-sum-exp passes a kernel that returns none.
    lse = returned.get("lse", budgets["lse"].ref)
    answers = Answers(out=returned["out"], lse=lse, ref=ref, ref_lse=budgets["lse"].ref, plain=ref)
    return [name for name in USUAL if not CHECKERS[name](answers)]


if __name__ == "__main__":
    main()
