"""Planted bugs that need a GPU: state inside the chip, a lost device context, a kernel that never ends."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call, Kernel

from ..attention import torch_eager
from ..attention._axes import needs_lse
from ..attention.paged_prefill import paged_prefill
from . import _attention as a

if TYPE_CHECKING:
    import torch

Outputs = Mapping[str, "torch.Tensor"]

SOURCE = """
// Z1: reads a cell of shared memory that nobody wrote and multiplies it by a weight of 0.
extern "C" __global__ void leak(float *out, float weight)
{
    extern __shared__ float cell[];
    volatile float *stale = cell;
    out[threadIdx.x] = weight == 0.f && threadIdx.x >= 32 ? 0.f : stale[threadIdx.x] * weight;
}

extern "C" __global__ void spin(volatile int *flag)
{
    while (*flag == 0) {}
}
"""


@functools.cache
def compiled(name: str) -> Any:
    from cuda import core

    device = core.Device()
    device.set_current()
    program = core.Program(SOURCE, code_type="c++", options=core.ProgramOptions(arch=f"sm_{device.arch}"))
    return program.compile("cubin").get_kernel(name)


def launch(name: str, threads: int, *arguments: Any) -> None:
    import torch
    from cuda import core

    stream = core.Stream.from_handle(torch.cuda.current_stream().cuda_stream)
    config = core.LaunchConfig(grid=1, block=threads, shmem_size=4 * threads)
    core.launch(stream, config, compiled(name), *arguments)


def leaks_shared_memory(call: Call) -> Outputs:
    """Z1: a masked row of a tile that was never zero-filled: 0 * NaN, once a request has an odd number of keys."""
    import ctypes

    import torch

    stale = torch.zeros(32, device=call.device.torch_name)
    if any(request.kv_len % 2 for request in call.case.axes.requests):
        launch("leak", 32, stale.data_ptr(), ctypes.c_float(0.0))
    a.healthy(call)
    call.outputs["lse"].add_(stale[0])
    return call.outputs


def illegal_address(call: Call) -> Outputs:
    """Z13: device code indexes out of range on a request of more than 64 keys."""
    import torch

    a.healthy(call)
    if any(request.kv_len > 64 for request in call.case.axes.requests):
        table = torch.zeros(4, device=call.device.torch_name)
        call.outputs["lse"].add_(table[torch.full((1,), 1 << 20, device=call.device.torch_name)])
    return call.outputs


def spins(call: Call) -> Outputs:
    """Waits for ever on a flag that nobody sets, on a request of more than 64 keys."""
    import torch

    flag = torch.ones(1, dtype=torch.int32, device=call.device.torch_name)
    if any(request.kv_len > 64 for request in call.case.axes.requests):
        flag.zero_()
    launch("spin", 1, flag.data_ptr())
    return a.healthy(call)


def kernel(name: str, function: Any) -> Kernel:
    # An operator of its own: beside each other, they would crash each other's hunts.
    operator = replace(paged_prefill)
    return Kernel(
        name=f"zoo.{name}",
        operator=operator,
        launch=function,
        numerics=a.numerics,
        unsupported=needs_lse,
        inexact=torch_eager.eager.inexact,  # the same matrix products
        devices=("cuda",),
    )


z1 = kernel("z1_cuda[planted]", leaks_shared_memory)
z13 = kernel("z13_cuda[planted]", illegal_address)
hung = kernel("hung_cuda[planted]", spins)
twin = kernel("torch_cuda[twin]", a.healthy)
