"""The MLA suite, loaded the way a run loads it, and short ways to make cases of it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from hypothesis import HealthCheck, settings

from kerneltest import discovery
from kerneltest.model import Call, Case, Device, Kernel

# Small tensors only: on a busy machine threads would wait for each other most of the time.
torch.set_num_threads(1)
discovery.use_roots([discovery.builtin_root()])


def module(name: str) -> Any:
    """A file of the suite."""
    return importlib.import_module(f"{discovery.PACKAGE}.mla.{name}")


axes = module("_axes")
paged, layer = module("mla_paged_attention"), module("mla_attention")
CPU = Device(kind="cpu", ordinal=0, name="CPU", sm=(0, 0), units=1)
DEFAULTS = {
    "dtype": "bfloat16",
    "dims": axes.SMALL,
    "heads": 2,
    "page_size": 16,
    "causal": False,
    "shuffled": False,
    "spare_pages": 0,
}
OPERATORS = {"mla_paged_attention": paged.mla_paged_attention, "mla_attention": layer.mla_attention}


def case(
    *lengths: tuple[int, int],
    operator: str = "mla_paged_attention",
    inputs: str = "generic",
    seed: int = 0,
    **more: Any,
) -> Case[Any]:
    """A case with a request for each (qo_len, kv_len); what is not said is plain, but for the scale of ``dyadic``."""
    requests = tuple(axes.Request(qo_len=qo_len, kv_len=kv_len) for qo_len, kv_len in lengths)
    scale = {"sm_scale": 0.6931471805599453} if inputs == "dyadic" else {}
    made = axes.Mla(requests=requests, **DEFAULTS | scale | more)
    return Case(operator=operator, axes=made, inputs=inputs, seed=seed)


def draws(count: int) -> settings:
    """``count`` examples, the same ones in every run."""
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


def launched(kernel: Kernel, one: Case[Any], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a kernel of this suite answers on the CPU."""
    outputs = {
        name: torch.full(spec.shape, float("nan"), dtype=getattr(torch, spec.dtype))
        for name, spec in kernel.operator.materialize(one).outputs.items()
    }

    def workspace(nbytes: int, *, zeroed: bool = False) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    call = Call(case=one, device=CPU, inputs=inputs, outputs=outputs, workspace=workspace)
    return dict(kernel.launch(call))
