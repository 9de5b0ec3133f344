"""CUDA C++ from this folder, compiled when it is first needed and launched on torch's device."""

from __future__ import annotations

import ctypes
import functools
import importlib
from pathlib import Path
from typing import Any

import torch


@functools.cache
def kernel(file: str, name: str) -> Any:
    """The handle of kernel ``name`` of a .cu file beside this one.

    Raises RuntimeError, with the compiler's log, when compilation or a driver call fails.
    """
    return _call("cuModuleGetFunction", _module(file), name.encode())


@functools.cache
def _module(file: str) -> Any:
    core: Any = importlib.import_module("cuda.core")
    if not hasattr(core, "Program"):  # older releases have it in the experimental namespace only
        core = importlib.import_module("cuda.core.experimental")
    major, minor = torch.cuda.get_device_capability()
    options = core.ProgramOptions(arch=f"sm_{major}{minor}")
    try:
        program = core.Program((Path(__file__).parent / file).read_text(), code_type="c++", options=options)
        cubin = bytes(program.compile("cubin").code)
    except Exception as error:  # its class differs between releases; its text holds the log
        raise RuntimeError(f"NVRTC could not compile {file}:\n{error}") from error
    torch.cuda.synchronize()  # makes the primary context current
    return _call("cuModuleLoadData", cubin)


def launch(file: str, name: str, grid: tuple[int, int], threads: int, *arguments: torch.Tensor | int) -> None:
    """Launch a kernel on torch's stream: tensors are passed as pointers, int as 32 bits. Synchronises.

    Raises RuntimeError when a driver call or the kernel fails.
    """
    values = [ctypes.c_uint64(x.data_ptr()) if isinstance(x, torch.Tensor) else ctypes.c_uint32(x) for x in arguments]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    stream = torch.cuda.current_stream().cuda_stream
    _call("cuLaunchKernel", kernel(file, name), *grid, 1, threads, 1, 1, 0, stream, ctypes.addressof(pointers), 0)
    torch.cuda.synchronize()


def _call(name: str, *arguments: Any) -> Any:
    driver: Any = importlib.import_module("cuda.bindings.driver")
    error, *values = getattr(driver, name)(*arguments)
    if int(error) != 0:
        raise RuntimeError(f"{name} failed: {error.name}")
    return values[0] if values else None
