"""Two kernels that both pass may still be further apart than both are likely to be from the truth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import case, paged

from kerneltest.model import BF16, IEEE_FP32, Call, Device, Kernel, Numerics, Pattern
from kerneltest.oracle.compare import likely
from kerneltest.worker.agreement import agrees_with_its_peer
from kerneltest.worker.device import open_device
from kerneltest.worker.execution import Execution
from kerneltest.worker.rig import Rig
from kerneltest.worker.staging import KernelRaised

CASE = case((1, 400), head_dim=128, kv_heads=2, group=2)
WHERE = (0, 1, 17)


def numerics(case: Any, device: Device) -> Numerics:
    return Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=BF16, out=BF16)


def answers(name: str, *, off: float) -> Kernel:
    """A kernel that is exact but for one element, which is ``off`` times as far away as is likely at most."""

    def launch(call: Call) -> dict[str, torch.Tensor]:
        terms = paged.reference(call.case, call.inputs, "cpu")
        strategy = paged.paged_prefill.strategy(call.case.inputs)
        budget = paged.budget(call.case, terms, numerics(call.case, call.device), strategy)["out"]
        assert budget.noise is not None
        out = budget.ref.clone()
        out[WHERE] += off * likely(budget, budget.noise)[WHERE]
        return {"out": out.bfloat16(), "lse": terms.lse.float()}

    return Kernel(name=name, operator=paged.paged_prefill, launch=launch, numerics=numerics)


def execution(kernel: Kernel, peer: Kernel | None) -> Execution:
    device = open_device("cpu")
    found = Execution(kernel, CASE, Rig(device), peer=peer)
    found.observations.append(found.observe(found.uniform(Pattern.FINITE)))
    return found


@pytest.mark.parametrize(("here", "there"), [(0.0, 0.0), (0.6, 0.6), (0.6, 0.0), (0.5, -0.5)])
def test_what_both_are_likely_to_be_agrees(here: float, there: float) -> None:
    seen = execution(answers("here", off=here), answers("there", off=there))
    assert agrees_with_its_peer(seen) is None
    assert seen.compared_with == "there"


def test_two_that_pass_on_opposite_sides_disagree() -> None:
    sides = [answers("here", off=0.9), answers("there", off=-0.9)]
    assert all(verdict.ok for kernel in sides for verdict in execution(kernel, None).verdicts.values())
    finding = agrees_with_its_peer(execution(sides[0], sides[1]))
    assert finding is not None
    assert (finding.kind, finding.kernel, finding.key) == ("Disagreement", "here", "out, there")
    assert "request 0, token 0, head 1, dim 17" in finding.details[0]
    assert finding.by_chance


def test_what_is_wrong_by_itself_is_not_this_kernels_fault() -> None:
    def raises(call: Call) -> Any:
        raise RuntimeError("no")

    right, wrong = answers("here", off=0.0), answers("there", off=3.0)
    assert not execution(wrong, None).verdicts["out"].ok
    for peer in (
        wrong,
        replace(right, launch=raises),
        replace(right, launch=lambda call: {}),
        replace(right, unsupported=lambda case, device: "not here"),
    ):
        seen = execution(right, peer)
        assert agrees_with_its_peer(seen) is None
        assert seen.compared_with is None
    assert agrees_with_its_peer(execution(right, None)) is None


def test_a_log_sum_exp_in_another_base_is_another_number() -> None:
    base_2 = replace(
        answers("there", off=0.0),
        launch=lambda call: {
            name: value / (0.6931471805599453 if name == "lse" else 1)
            for name, value in answers("there", off=0.0).launch(call).items()
        },
        numerics=lambda case, device: replace(numerics(case, device), lse_base="2"),
    )
    assert execution(base_2, None).verdicts["lse"].ok
    assert agrees_with_its_peer(execution(answers("here", off=0.0), base_2)) is None


@pytest.mark.parametrize("lost", [False, True])
def test_a_peer_that_raises_is_nothing_to_this_kernel_unless_it_took_the_device_with_it(
    lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(call: Call) -> dict[str, torch.Tensor]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("kerneltest.worker.device.context_is_lost", lambda device: lost)
    there = Kernel(name="there", operator=paged.paged_prefill, launch=launch, numerics=numerics)
    seen = execution(answers("here", off=0.0), there)
    if not lost:
        assert agrees_with_its_peer(seen) is None
        return
    with pytest.raises(KernelRaised):
        agrees_with_its_peer(seen)
