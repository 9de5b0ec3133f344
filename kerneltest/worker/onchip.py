"""Poison for on-chip state: shared memory and registers keep what the previous kernel left in them.

A kernel that reads a cell it never wrote gets this stale data, often benign by luck. Filling every cell with
a hostile word first takes the luck away; reading the cells back measures how many really hold the word.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from kerneltest.worker.driver import Driver

if TYPE_CHECKING:
    import torch

    from kerneltest.worker.driver import Argument

_SHARED_THREADS = 1024
# 256 threads of up to 255 registers (allocated as 256) take the whole register file of one SM: 65536 words.
_REGISTER_THREADS = 256
# Of the 255, as many as no architecture spills; addresses and the comparison take the others.
_HELD = 248
_PROBED = 240
_ATTEMPTS = 3

_DEFINES = f"""
#define SHARED_THREADS {_SHARED_THREADS}
#define REGISTER_THREADS {_REGISTER_THREADS}
#define HELD {_HELD}
#define PROBED {_PROBED}
"""
_SOURCE = """
extern __shared__ unsigned shared_words[];

// volatile: nothing in this kernel reads the stores, so they would be dead otherwise.
extern "C" __global__ void __launch_bounds__(SHARED_THREADS, 1) fill_shared(unsigned word, unsigned words)
{
    volatile unsigned *cell = shared_words;
    for (unsigned i = threadIdx.x; i < words; i += SHARED_THREADS) cell[i] = word;
}

// volatile: nothing in this kernel writes the cells, so the compiler could take any value for them. Barriers
// count the matches, because a reduction through shared memory would overwrite what is being read.
extern "C" __global__ void __launch_bounds__(SHARED_THREADS, 1)
read_shared(unsigned word, unsigned words, unsigned *records)
{
    const volatile unsigned *cell = shared_words;
    unsigned matched = 0;
    for (unsigned base = 0; base < words; base += SHARED_THREADS) {
        unsigned i = base + threadIdx.x;
        matched += __syncthreads_count(i < words && cell[i] == word);
    }
    if (threadIdx.x == 0) {
        unsigned sm;
        asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
        records[2 * blockIdx.x] = sm;
        records[2 * blockIdx.x + 1] = matched;
    }
}

// The word goes through a volatile cell, because copies of a known value would share one register. The branch
// is never taken, but its condition needs every copy loaded and its stores need them all at the same time.
extern "C" __global__ void __launch_bounds__(REGISTER_THREADS, 1) fill_registers(unsigned word)
{
    volatile unsigned *cell = shared_words + threadIdx.x;
    unsigned held[HELD];
    unsigned differ = 0;
    *cell = word;
#pragma unroll
    for (int i = 0; i < HELD; ++i) held[i] = *cell;
#pragma unroll
    for (int i = 0; i < HELD; ++i) differ |= held[i] ^ word;
    if (differ) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) *cell = held[i];
    }
}

// source is always null. The compiler cannot know, so its loads give every element a register of its own; as
// they never run, the stores read what the registers held before the kernel.
extern "C" __global__ void __launch_bounds__(REGISTER_THREADS, 1)
read_registers(const volatile unsigned *source, volatile unsigned *out)
{
    unsigned held[PROBED];
    if (source != nullptr) {
#pragma unroll
        for (int i = 0; i < PROBED; ++i) held[i] = source[i];
    }
    out += (size_t)blockIdx.x * (PROBED * REGISTER_THREADS) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < PROBED; ++i) out[i * REGISTER_THREADS] = held[i];
}
"""


class OnChip:
    """Poison for the state inside the chip: shared memory and registers of every SM of one CUDA device.

    Every `word` is a 32-bit pattern, 0 <= word < 2**32 (ValueError otherwise); every `stream` is a raw
    cudaStream_t handle of the device, 0 for the default stream. A failing driver call raises RuntimeError.
    """

    __slots__ = ("_driver", "_kernels", "_ordinal", "shared_bytes", "sm_count")

    sm_count: int
    shared_bytes: int  # the most that one block can have, by opt-in (232448 on H100)

    def __init__(self, ordinal: int) -> None:
        """Compile the kernels and load them into the primary context of CUDA device `ordinal`.

        Raises RuntimeError when compilation or a driver call fails, ImportError without cuda.core.
        """
        self._driver = Driver(ordinal)
        self._ordinal = ordinal
        self.sm_count = self._driver.attribute("MULTIPROCESSOR_COUNT")
        self.shared_bytes = self._driver.attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        names = ("fill_shared", "read_shared", "fill_registers", "read_registers")
        self._kernels = self._driver.load(_DEFINES + _SOURCE, names, self.shared_bytes)

    def fill_shared(self, word: int, stream: int) -> None:
        """Write `word` to all shared memory a block can have, on every SM. Asynchronous.

        A block leaves no room for another on its SM, so the first sm_count blocks go to one SM each if the
        device is idle; there are twice as many, for an SM that is late. The blocks overwrite up to a quarter
        of the registers, so fill those afterwards.
        """
        values = (_uint32(word), ctypes.c_uint32(self.shared_bytes // 4))
        self._launch("fill_shared", 2 * self.sm_count, _SHARED_THREADS, self.shared_bytes, stream, values)

    def shared_coverage(self, word: int, stream: int) -> float:
        """Share of all shared-memory words, in [0, 1], that hold `word` after a fill. Synchronises.

        It is the best of up to three attempts, each a fresh fill and read-back, since a kernel of another
        stream may run between the two. An SM that no block of the read-back visited counts as zero.
        """
        best = 0.0
        records = self._empty(2 * self.sm_count, 2)
        for _ in range(_ATTEMPTS):
            self.fill_shared(word, stream)
            best = max(best, self._read_shared(word, stream, records))
            if best == 1.0:
                break
        return best

    def fill_registers(self, word: int, stream: int) -> None:
        """Write `word` to nearly all registers of every SM. Asynchronous.

        At least 248 of the 256 registers per thread take it, and so does the first KiB of shared memory.
        """
        # With all shared memory, so that the SM keeps its split into L1 cache and shared memory.
        blocks, values = 2 * self.sm_count, (_uint32(word),)
        self._launch("fill_registers", blocks, _REGISTER_THREADS, self.shared_bytes, stream, values)

    def register_coverage(self, word: int, stream: int) -> float:
        """Share of the probed registers, in [0, 1], that hold `word` after a fill. Synchronises.

        The probe has sm_count blocks of 256 threads and reads 240 registers of each thread.
        """
        values = self._empty(self.sm_count, _PROBED, _REGISTER_THREADS)
        self.fill_registers(word, stream)
        return self._read_registers(word, stream, values)

    def _read_shared(self, word: int, stream: int, records: torch.Tensor) -> float:
        """Share of shared-memory words that hold `word` now. Synchronises.

        `records`: int32 [2 * sm_count, 2] for (SM, matched words) of each block, allocated before the fill.
        """
        words = self.shared_bytes // 4
        values = (_uint32(word), ctypes.c_uint32(words), ctypes.c_uint64(records.data_ptr()))
        self._launch("read_shared", len(records), _SHARED_THREADS, self.shared_bytes, stream, values)
        self._driver.synchronize(stream)
        matched: dict[int, int] = {}
        for sm, count in records.tolist():
            matched[sm] = min(count, matched.get(sm, count))  # of several visits to an SM, the worst
        return sum(matched.values()) / (self.sm_count * words)

    def _read_registers(self, word: int, stream: int, values: torch.Tensor) -> float:
        """Share of the probed registers that hold `word` now. Synchronises.

        `values`: int32 [sm_count, 240, 256] by block, register and thread, allocated before the fill.
        """
        pointers = (ctypes.c_uint64(0), ctypes.c_uint64(values.data_ptr()))
        self._launch("read_registers", len(values), _REGISTER_THREADS, 0, stream, pointers)
        self._driver.synchronize(stream)
        signed = ctypes.c_int32(_uint32(word).value).value
        return int((values == signed).sum()) / values.numel()

    def _empty(self, *shape: int) -> torch.Tensor:
        """Uninitialised int32 tensor on the device that no pending work uses.

        The kernels write all of it, so no torch kernel has to run. The synchronisation is for a read-back on
        a stream other than torch's: the allocator may hand out memory that work on torch's stream still uses.
        """
        import torch

        tensor = torch.empty(shape, dtype=torch.int32, device=f"cuda:{self._ordinal}")
        torch.cuda.synchronize(self._ordinal)
        return tensor

    def _launch(
        self, name: str, blocks: int, threads: int, shared: int, stream: int, values: tuple[Argument, ...]
    ) -> None:
        self._driver.launch(self._kernels[name], blocks, threads, shared, stream, values)


def _uint32(word: int) -> ctypes.c_uint32:
    """A kernel argument of 32 bits. Raises ValueError when `word` does not fit."""
    if not 0 <= word < 1 << 32:
        raise ValueError(f"word {word:#x} is not an unsigned 32-bit integer")
    return ctypes.c_uint32(word)
