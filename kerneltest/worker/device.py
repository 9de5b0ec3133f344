"""The only door to ``torch.cuda``."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch

from kerneltest.model import Device


class NoDevice(RuntimeError):
    """The device that was asked for is not here; the message says what is."""


def open_device(name: str) -> Device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to a device in use. Raises :class:`NoDevice`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return Device(kind="cpu", ordinal=0, name=_cpu_name(), sm=(0, 0), units=os.cpu_count() or 1)
    ordinal = int(name.partition(":")[2] or 0)
    if not torch.cuda.is_available():
        raise NoDevice(
            f"{name} was asked for, but this machine has no CUDA device that torch {torch.__version__} can use"
        )
    if ordinal >= torch.cuda.device_count():
        raise NoDevice(f"{name} was asked for, but there are only {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(ordinal)
    properties = torch.cuda.get_device_properties(ordinal)
    return Device(
        kind="cuda",
        ordinal=ordinal,
        name=properties.name,
        sm=(properties.major, properties.minor),
        units=properties.multi_processor_count,
    )


def synchronize(device: Device) -> None:
    """Wait for the device; raises what an earlier launch did wrong."""
    if device.kind == "cuda":
        torch.cuda.synchronize(device.ordinal)


def stream(device: Device) -> int:
    """The raw handle of the stream that torch launches on."""
    return int(torch.cuda.current_stream(device.ordinal).cuda_stream)


def new_stream(device: Device) -> torch.cuda.Stream:
    """A stream beside torch's current one."""
    return torch.cuda.Stream(device.ordinal)  # type: ignore[no-untyped-call]


def stream_at(handle: int, device: Device) -> torch.cuda.Stream:
    """The view that torch has of a stream that somebody else made."""
    return torch.cuda.ExternalStream(handle, device=device.torch_name)  # type: ignore[no-untyped-call]


@contextmanager
def on_stream(device: Device, stream: torch.cuda.Stream) -> Iterator[None]:
    """What is launched meanwhile goes to ``stream``, after what was launched before; what comes later waits for it."""
    default = torch.cuda.current_stream(device.ordinal)
    stream.wait_stream(default)
    with torch.cuda.stream(stream):
        yield
    default.wait_stream(stream)


def beside_on(stream: torch.cuda.Stream) -> AbstractContextManager[object]:
    """What is launched meanwhile goes to ``stream``, whatever other streams do."""
    return torch.cuda.stream(stream)


def wait_for(device: Device, earlier: torch.cuda.Event) -> None:
    """Let what is launched from now on wait for what was on another stream when the event was recorded."""
    torch.cuda.current_stream(device.ordinal).wait_event(earlier)


def capture(device: Device, launch: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of a launch, and what the launch returned. The launch itself has not run."""
    graph, stream = torch.cuda.CUDAGraph(), new_stream(device)
    synchronize(device)
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            returned = launch()
        except BaseException:
            with suppress(RuntimeError):  # the launch's own error says more
                graph.capture_end()
            raise
        graph.capture_end()
    return graph, returned


def empty_cache(device: Device) -> None:
    """Give free memory back to the driver, or to the operating system."""
    if device.kind == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def context_is_lost(device: Device) -> bool:
    """Whether the device no longer answers: after an illegal address every later call fails too.

    After a launch that the driver refused only the next one does: whoever launched has not fetched the error.
    """
    if device.kind != "cuda":
        return False
    for _ in range(2):
        try:
            torch.cuda.synchronize(device.ordinal)
            torch.zeros(1, device=device.torch_name).item()
        except RuntimeError:
            continue
        return False
    return True


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
