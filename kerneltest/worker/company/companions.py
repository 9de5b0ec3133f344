"""Kernels of our own beside the kernel under test, or just before it: they disturb when it runs, not what it reads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kerneltest.worker.driver import Driver

_SOURCE = """
__device__ unsigned long long now()
{
    unsigned long long ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
}

// A block with all of the shared memory has its SM to itself.
extern "C" __global__ void occupy(unsigned long long ns)
{
    for (unsigned long long start = now(); now() - start < ns;) {}
}

extern "C" __global__ void stream(const float4 *from, float4 *to, unsigned long long count, unsigned long long ns)
{
    const unsigned long long start = now();
    const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
    while (now() - start < ns)
        for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
            to[i] = from[i];
}

// Until the host opens it, or takes so long that it may be waiting for what is behind it.
extern "C" __global__ void gate(const volatile int *open, unsigned long long ns)
{
    for (unsigned long long start = now(); !*open && now() - start < ns;) {}
}

// Jobs are triples: source, target, bytes. The trigger lets a dependent launch start at once; what this kernel writes
// is promised to it only behind griddepcontrol.wait.
extern "C" __global__ void late_copy(const unsigned long long *jobs, int count, unsigned long long ns)
{
    asm volatile("griddepcontrol.launch_dependents;");
    for (unsigned long long start = now(); now() - start < ns;) {}
    const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
    for (int job = 0; job < count; ++job) {
        const char *from = (const char *)jobs[3 * job];
        char *to = (char *)jobs[3 * job + 1];
        for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < jobs[3 * job + 2];
             i += step)
            to[i] = from[i];
    }
}
"""
# How long a load lasts, and how long inputs keep a dependent launch waiting: longer than the host takes to launch, also
# where other processes keep its cores busy.
LOAD_NS = 1_000_000
LATE_NS = 2_000_000
# How long a gate stays shut if nobody opens it, because the host waits for what is behind it.
GATE_NS = 5_000_000
BANDWIDTH_BYTES = 64 << 20
LATE_BLOCKS = 8


class Companions:
    """The kernels, loaded at first use. Raises ImportError without cuda-core and cuda-bindings."""

    def __init__(self, ordinal: int) -> None:
        self._driver = Driver(ordinal)
        self._device = f"cuda:{ordinal}"
        self._sms = self._driver.attribute("MULTIPROCESSOR_COUNT")
        self._shared = self._driver.attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self._kernels = self._driver.load(_SOURCE, ("occupy", "stream", "gate", "late_copy"), self._shared)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._green: dict[int, int] = {}

    def occupy(self, stream: int) -> None:
        """Take half of the SMs for ``LOAD_NS``. Asynchronous."""
        values = (ctypes.c_uint64(LOAD_NS),)
        self._driver.launch(self._kernels["occupy"], self._sms // 2, 32, self._shared, stream, values)

    def use_bandwidth(self, stream: int) -> None:
        """Copy ``BANDWIDTH_BYTES`` to and fro for ``LOAD_NS``. Asynchronous."""
        if self._buffers is None:
            one, other = (torch.zeros(BANDWIDTH_BYTES, dtype=torch.uint8, device=self._device) for _ in range(2))
            self._buffers = (one, other)
            torch.cuda.synchronize(self._device)
        source, target = (ctypes.c_uint64(buffer.data_ptr()) for buffer in self._buffers)
        values = (source, target, ctypes.c_uint64(BANDWIDTH_BYTES // 16), ctypes.c_uint64(LOAD_NS))
        self._driver.launch(self._kernels["stream"], self._sms // 2, 256, 0, stream, values)

    def hold(self, stream: int) -> Callable[[], None]:
        """Let what comes later on the stream wait until the function that is returned is called, or for ``GATE_NS``.

        The function has to live until the stream is through. Asynchronous.
        """
        opened = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        values = (ctypes.c_uint64(opened.data_ptr()), ctypes.c_uint64(GATE_NS))
        self._driver.launch(self._kernels["gate"], 1, 1, 0, stream, values)

        def open_gate() -> None:
            opened.fill_(1)

        return open_gate

    def jobs(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """What :meth:`late_copy` takes, of (source, target) pairs of equal size that are contiguous."""
        triples = [
            [source.data_ptr(), target.data_ptr(), source.numel() * source.element_size()] for source, target in copies
        ]
        return torch.tensor(triples, dtype=torch.int64).to(self._device)

    def late_copy(self, jobs: torch.Tensor, stream: int) -> None:
        """Trigger dependent launches at once, and copy after ``LATE_NS``. Asynchronous."""
        values = (ctypes.c_uint64(jobs.data_ptr()), ctypes.c_int32(len(jobs)), ctypes.c_uint64(LATE_NS))
        self._driver.launch(self._kernels["late_copy"], LATE_BLOCKS, 256, 0, stream, values)

    def green_stream(self, sms: int) -> int:
        """The handle of a stream whose kernels run on at least ``sms`` SMs and on no others."""
        if sms not in self._green:
            driver, api = self._driver, self._driver.api
            with driver.current():
                all_sms = driver.call(
                    "cuDeviceGetDevResource", driver.device, api.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
                )
                (few,) = driver.call("cuDevSmResourceSplitByCount", 1, all_sms, 0, sms)[:1]
                description: Any = driver.call("cuDevResourceGenerateDesc", [few], 1)
                flags = api.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
                context = driver.call("cuGreenCtxCreate", description, driver.device, flags)
                stream = driver.call("cuGreenCtxStreamCreate", context, api.CUstream_flags.CU_STREAM_NON_BLOCKING, 0)
            self._green[sms] = int(stream)
        return self._green[sms]
