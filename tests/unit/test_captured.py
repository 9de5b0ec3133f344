"""What a kernel says can be captured in a CUDA graph must not ask the device for a value: seen without a GPU.

Tensors are fakes, which have shapes and no values; that they say that they lie on a GPU, and that their stream is being
captured, leaves out the checks of values that a launch makes otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from kerneltest import discovery
from kerneltest.engine.profile import PROFILES
from kerneltest.model import Call, Case, Device, Kernel

CPU = Device(kind="cpu", ordinal=0, name="CPU", sm=(0, 0), units=1)
CASES = 60
ROOT = discovery.builtin_root()


def captured() -> Iterator[Kernel]:
    """Kernels of torch: those of Triton and FlashInfer launch code that knows no fakes."""
    discovery.use_roots([ROOT])
    for path in discovery.suite_files(ROOT):
        for kernel in discovery.load_kernels(path).values():
            if kernel.contract.captured and kernel.library is None and "cpu" in kernel.devices:
                yield kernel


def fake(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Inside the mode, a tensor that has no values."""
    return torch.empty(tuple(shape), dtype=dtype)


def workspace(nbytes: int, *, zeroed: bool = False) -> torch.Tensor:
    return fake([nbytes], torch.uint8)


@pytest.mark.parametrize("kernel", list(captured()), ids=lambda kernel: kernel.name)
def test_a_captured_launch_asks_the_device_for_nothing(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    @settings(max_examples=CASES, deadline=None, derandomize=True, database=None)
    @given(kernel.operator.cases(PROFILES["quick"].size(CPU)))
    def each(case: Case[Any]) -> None:
        if kernel.unsupported(case, CPU) is not None:
            return
        materials = kernel.operator.materialize(case)
        with monkeypatch.context() as patch, FakeTensorMode():
            patch.setattr(torch.Tensor, "is_cuda", property(lambda _tensor: True))
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            inputs = {name: fake(tensor.shape, tensor.dtype) for name, tensor in materials.inputs.items()}
            outputs = {name: fake(s.shape, getattr(torch, s.dtype)) for name, s in materials.outputs.items()}
            call = Call(case=case, device=CPU, inputs=inputs, outputs=outputs, workspace=workspace)
            kernel.launch(call)
        launched.append(case)

    each()
    assert len(launched) > CASES / 5
