"""Answer the messages of the process boundary, whether they come through a pipe or from a debugger's own process."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from kerneltest import discovery
from kerneltest.model import Case, Device, Kernel, Outcome, Run, Start, Started, decode, encode


class Worker:
    """Holds the device from the first message on, which must be a :class:`Start`; all later ones are :class:`Run`."""

    def __init__(self) -> None:
        self._device: Device | None = None
        self._kernels: dict[tuple[str, str], Kernel] = {}

    def answer(self, message: Any) -> Any:
        """One decoded message in, one JSON-able answer out."""
        if self._device is None:
            return encode(self._start(decode(Start, message)))
        return encode(self._run(decode(Run, message)))

    def _start(self, start: Start) -> Started:
        if start.device == "cpu" or (start.device == "auto" and not _sees_cuda()):
            # Must be set before Triton is imported: on a CPU its kernels run in its interpreter.
            os.environ["TRITON_INTERPRET"] = "1"
        from kerneltest.worker.device import NoDevice, open_device
        from kerneltest.worker.poison import Poisoner

        discovery.use_roots([Path(root) for root in start.suite_roots])
        try:
            device = open_device(start.device)
        except NoDevice as error:
            return Started(device=None, error=str(error))
        self._poisoner = Poisoner(device)
        coverage = self._poisoner.prove()
        libraries: dict[str, str] = {}
        missing: dict[str, str] = {}
        for name in dict.fromkeys(("torch", *start.libraries)):
            try:
                libraries[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
            except Exception as error:  # a broken installation may raise anything; the run says what
                missing[name] = f"{type(error).__name__}: {error}"
        self._device = device
        return Started(device=device, libraries=libraries, missing=missing, coverage=coverage)

    def _run(self, run: Run) -> Outcome:
        from kerneltest.worker.execute import execute

        assert self._device is not None
        kernel = self._kernel(run.source, run.kernel)
        case: Case[Any] = Case.from_json(run.case, kernel.operator.axes)
        peer = self._kernel(*run.peer) if run.peer else None
        return execute(kernel, case, self._device, self._poisoner, peer)

    def _kernel(self, source: str, name: str) -> Kernel:
        if (source, name) not in self._kernels:
            for found in discovery.load_kernels(Path(source)).values():
                self._kernels[source, found.name] = found
        return self._kernels[source, name]


def _sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
