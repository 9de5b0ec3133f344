"""Compiles _prefill.cu at first use, with one planted bug or none, and launches it on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kerneltest.model import Call

if TYPE_CHECKING:
    import torch

SOURCE = Path(__file__).with_name("_prefill.cu")
TILE, SPLITS = 32, 2
MAX_HEAD_DIM = 256
COMMON_BYTES = 256 << 20
DTYPES = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}


class Problem(ctypes.Structure):
    """The struct of that name in the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "lse", "q", "k_pages", "v_pages")),
        *((name, ctypes.c_void_p) for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")),
        *((name, ctypes.c_void_p) for name in ("partial", "counters")),
        *((name, ctypes.c_int64) for name in ("k_stride", "v_stride")),
        *((name, ctypes.c_int32) for name in ("batch", "group", "page_size", "causal")),
        ("scale", ctypes.c_float),
    )


def shared_bytes(head_dim: int) -> int:
    """Sums, query, scores, keys and values."""
    return 4 * (32 + head_dim + TILE + 2 * TILE * head_dim)


def defines(dtype: str, bug: str | None) -> str:
    """What the source needs to be told, as lines in front of it."""
    words = [DTYPES[dtype], f"TILE {TILE}", f"SPLITS {SPLITS}", *([f"BUG_{bug.upper()}"] if bug else [])]
    return "".join(f"#define {word}\n" for word in words)


@functools.cache
def compiled(entry: str, dtype: str, bug: str | None, ordinal: int) -> Any:
    """The kernel as a CUfunction of the device's primary context, its code loaded."""
    from cuda import core
    from cuda.bindings import driver

    device = core.Device(ordinal)
    device.set_current()
    options = core.ProgramOptions(arch=f"sm_{device.arch}")
    program = core.Program(defines(dtype, bug) + SOURCE.read_text(), code_type="c++", options=options)
    module = checked(driver.cuModuleLoadData(bytes(program.compile("cubin").code)))
    function = checked(driver.cuModuleGetFunction(module, entry.encode()))
    attribute = driver.CUfunction_attribute
    most = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(function, most, shared_bytes(MAX_HEAD_DIM)))
    # As attention kernels do, whose tiles live there: all of it is shared memory, and none of it is cache.
    carveout = attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    checked(driver.cuFuncSetAttribute(function, carveout, 100))
    return function


def problem(call: Call, partial: torch.Tensor | None = None, counters: torch.Tensor | None = None) -> Problem:
    """The kernel's argument. The shapes are those of the buffers; lengths stay on the device."""
    axes, x = call.case.axes, call.inputs
    pointers = {
        **{name: x[name].data_ptr() for name in ("q", "k_pages", "v_pages")},
        **{name: x[name].data_ptr() for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")},
        **{name: call.outputs[name].data_ptr() for name in ("out", "lse")},
    }
    return Problem(
        **pointers,
        partial=None if partial is None else partial.data_ptr(),
        counters=None if counters is None else counters.data_ptr(),
        k_stride=x["k_pages"].stride(0),
        v_stride=x["v_pages"].stride(0),
        batch=x["qo_indptr"].shape[0] - 1,
        group=axes.group,
        page_size=axes.page_size,
        causal=axes.causal,
        scale=axes.scale,
    )


@functools.cache
def common(ordinal: int) -> Callable[..., torch.Tensor]:
    """Memory of the process, uint8, as a launch asks for it: partial results, and counters that start at zero."""
    import torch

    partial, counters = (torch.zeros(COMMON_BYTES, dtype=torch.uint8, device=f"cuda:{ordinal}") for _ in range(2))

    def part(nbytes: int, *, zeroed: bool = False) -> torch.Tensor:
        return (counters if zeroed else partial)[:nbytes]

    return part


def launch(call: Call, entry: str, bug: str | None, argument: Problem, splits: int = 1) -> None:
    """One block for each row, head and split; no synchronisation."""
    import torch
    from cuda.bindings import driver

    rows, heads, head_dim = call.inputs["q"].shape
    if rows == 0:
        return
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = rows, heads, splits
    config.blockDimX, config.blockDimY, config.blockDimZ = head_dim, 1, 1
    config.sharedMemBytes = shared_bytes(head_dim)
    config.hStream = driver.CUstream(torch.cuda.current_stream(call.device.ordinal).cuda_stream)
    attributes = [programmatic()] if call.pdl else []
    config.attrs, config.numAttrs = attributes, len(attributes)
    function = compiled(entry, call.case.axes.dtype, bug, call.device.ordinal)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))


def programmatic() -> Any:
    """Lets the kernel start before the one ahead of it in the stream is through."""
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a driver call; raises RuntimeError when it reports an error."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"the driver reports {error.name}")
    return values[0] if values else None
