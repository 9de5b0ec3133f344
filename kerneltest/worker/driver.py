"""The CUDA driver, for what torch offers no way to: kernels of our own and address space."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Argument = ctypes._SimpleCData[Any]


class Driver:
    """The driver's calls in the primary context of one CUDA device, which is torch's context too.

    Every ``stream`` is a raw cudaStream_t handle of the device, 0 for the default stream. A failing call raises
    RuntimeError with the driver's name for the error.
    """

    __slots__ = ("_context", "api", "device")

    api: Any  # the module cuda.bindings.driver, for its enums and structs
    device: Any  # the driver's handle; as an integer it is the ordinal

    def __init__(self, ordinal: int) -> None:
        """Take hold of CUDA device ``ordinal``. Raises ImportError without cuda-bindings."""
        self.api = importlib.import_module("cuda.bindings.driver")
        self.call("cuInit", 0)
        self.device = self.call("cuDeviceGet", ordinal)
        self._context: Any = self.call("cuDevicePrimaryCtxRetain", self.device)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a driver function and return its value, None if it has none."""
        error, *values = getattr(self.api, name)(*arguments)
        if int(error) != 0:
            raise RuntimeError(f"{name} failed: {error.name}")
        return values[0] if values else None

    def attribute(self, name: str) -> int:
        """An attribute of the device by its name without CU_DEVICE_ATTRIBUTE, such as ``MULTIPROCESSOR_COUNT``."""
        key = getattr(self.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.call("cuDeviceGetAttribute", key, self.device))

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the primary context current: stream 0 is the default stream of the current context."""
        self.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent")

    def load(self, source: str, names: Sequence[str], shared_bytes: int = 0) -> dict[str, Any]:
        """Compile CUDA C++ and load its kernels ``names``, which must be ``extern "C"``.

        Each of them may be launched with up to ``shared_bytes`` of dynamic shared memory. Raises RuntimeError, with the
        compiler's log, when compilation fails, and ImportError without cuda-core.
        """
        major, minor = self.attribute("COMPUTE_CAPABILITY_MAJOR"), self.attribute("COMPUTE_CAPABILITY_MINOR")
        cubin = compile_source(source, f"sm_{major}{minor}")
        opt_in = self.api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        kernels: dict[str, Any] = {}
        with self.current():
            module = self.call("cuModuleLoadData", cubin)
            for name in names:
                kernels[name] = self.call("cuModuleGetFunction", module, name.encode())
                # Needed above 48 KiB. It also loads the code now, and not at the first launch.
                self.call("cuFuncSetAttribute", kernels[name], opt_in, shared_bytes)
        return kernels

    def launch(self, kernel: Any, grid: int, block: int, shared: int, stream: int, values: Sequence[Argument]) -> None:
        """Launch ``grid`` blocks of ``block`` threads; ``shared`` is dynamic shared memory in bytes. Asynchronous."""
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        shape = (grid, 1, 1, block, 1, 1, shared)
        with self.current():
            self.call("cuLaunchKernel", kernel, *shape, stream, ctypes.addressof(pointers), 0)

    def synchronize(self, stream: int) -> None:
        """Wait for the stream."""
        with self.current():
            self.call("cuStreamSynchronize", stream)


def compile_source(source: str, arch: str) -> bytes:
    """Compile CUDA C++ for ``arch`` ("sm_90") to a cubin.

    Raises RuntimeError, with the compiler's log, when compilation fails, and ImportError without cuda-core.
    """
    core: Any = importlib.import_module("cuda.core")
    if not hasattr(core, "Program"):  # older releases have it in the experimental namespace only
        core = importlib.import_module("cuda.core.experimental")
    try:
        program = core.Program(source, code_type="c++", options=core.ProgramOptions(arch=arch))
        return bytes(program.compile("cubin").code)
    except Exception as error:  # its class differs between releases; its text holds the log
        raise RuntimeError(f"NVRTC could not compile a source for {arch}:\n{error}") from error
