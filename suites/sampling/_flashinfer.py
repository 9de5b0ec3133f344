"""What FlashInfer's kernels on rows of a vocabulary have in common: their sums, their random numbers, their parameters.

Lines are those of release 0.6.18.post1, in data/include/flashinfer/. All is compiled with ``-use_fast_math``
(jit/core.py), which takes subnormal numbers for zeros and divides by way of a reciprocal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from kerneltest.model import AccModel, Call, Case, Device, Kernel, LaunchContract, Operator

from ._axes import Rows

if TYPE_CHECKING:
    import torch

    from ._certify import Terms

# A block of 1024 threads from compute capability 8.0 on (DISPATCH_COMPUTE_CAP_NUM_THREADS, sampling.cuh:75). Each adds
# every 1024th vector of up to 4, which is one addition for each of ceil(V / 1024) + 3 elements at most; then 5 levels
# of a warp and the sums of 32 warps one by one (cub's BLOCK_REDUCE_WARP_REDUCTIONS).
BLOCK = AccModel(24, "rne", 1024, extra=3 + 5 + 31)
# The same in each of a few blocks, whose sums are added by atomics (topk.cuh:1855): 57,000 floats fit into one.
BLOCKS = AccModel(24, "rne", 1024, extra=3 + 5 + 31 + 16)
# Random numbers that a row may take from its stream in a launch, a multiple of 4. Rejection samplers take one a round.
STRIDE = 4096


@cache
def parameters(module: str, function: str) -> frozenset[str]:
    """The parameters of a function of the imported release; none if it has no such function."""
    import importlib
    import inspect

    found = getattr(importlib.import_module(module), function, None)
    return frozenset(inspect.signature(found).parameters) if found is not None else frozenset()


def missing(module: str, function: str, *names: str) -> str | None:
    """Why the imported release cannot run a kernel that needs these parameters, or None."""
    have = parameters(module, function)
    if not have:
        return f"this release has no {module}.{function}"
    lacking = sorted(set(names) - have)
    return f"this release's {function} has no parameter {', '.join(lacking)}" if lacking else None


def stream(call: Call) -> dict[str, Any]:
    """The state of Philox: the case's seed, and an offset of each launch's own; on the host or on the device."""
    if call.case.axes.device_seed:
        return {"seed": call.inputs["seed"], "offset": call.inputs["offset"] + STRIDE * call.draw}
    return {"seed": call.case.seed, "offset": STRIDE * call.draw}


def first_numbers(case: Case[Rows], terms: Terms) -> torch.Tensor:
    """The first random number of each row: Philox with the place of the draw for a subsequence (sampling.cuh:795)."""
    import numpy as np
    import torch

    from kerneltest.oracle.philox import curand_uniform

    numbers = curand_uniform(terms.seed, np.arange(case.axes.draws, dtype=np.uint64), terms.offset)
    return torch.from_numpy(numbers).to(terms.probs.device)


def parameter(call: Call, name: str) -> Any:
    """A tensor of one for each row, or a number for all."""
    return call.inputs[name] if call.case.axes.per_row else getattr(call.case.axes, name)


def seed_stays_behind(step: str, case: Case[Any], device: Device) -> str | None:
    """A seed that is a number of the host becomes part of a graph, and is not replayed for another case."""
    if step == "graph" and not case.axes.device_seed:
        return "a seed on the host is captured with the launch"
    return None


# A sum that is not 1 can be seen on the device alone, and the documentation asks for probabilities.
SUMS = "FlashInfer asks for probabilities, and adds none up to see"
ON_THE_DEVICE = "the parameters of rows are read by the device, and not by the host"
RANDOM = LaunchContract(
    captured="values",
    refuses=seed_stays_behind,
    trusts={
        # sampling.cu:76 asks for the dtype of indices alone.
        "index out of range": "the rows and tokens that indices name are read by the device, and not by the host",
        "nan of a row": f"{ON_THE_DEVICE}, and a token cannot hand NaN on",
        "domain": SUMS,
    },
)
PLAIN = LaunchContract(captured="values")
# Filters have a parameter for each row: a k of -1 keeps everything, and so does a p of NaN.
OF_LOGITS = replace(PLAIN, trusts=dict.fromkeys(("nan of a row", "value out of range"), ON_THE_DEVICE))
OF_PROBABILITIES = replace(OF_LOGITS, trusts={**OF_LOGITS.trusts, "domain": SUMS})


def needs_probabilities(case: Case[Rows]) -> str | None:
    """All of FlashInfer's functions ask for probabilities: q starts at 1 (sampling.cuh:997)."""
    return "FlashInfer asks for probabilities, which add up to 1" if case.inputs == "unnormalised" else None


def kernel(name: str, operator: Operator, launch: Callable[[Call], Mapping[str, torch.Tensor]], **more: Any) -> Kernel:
    """A kernel of FlashInfer's; all of a module is compiled at once."""
    settings: dict[str, Any] = {
        "devices": ("cuda",),
        "library": "flashinfer",
        "min_sm": (8, 0),
        "specialisation": lambda _case: "sampling",
    }
    return Kernel(name=f"flashinfer.{name}", operator=operator, launch=launch, **settings | more)
