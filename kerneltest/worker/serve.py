"""Answer the messages of the process boundary, whether they come through a pipe or from a debugger's own process."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from kerneltest import discovery
from kerneltest.model import Case, Device, Kernel, LaunchSequence, Outcome, Run, Start, Started, decode, encode


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

    @property
    def device_answers(self) -> bool:
        """Whether there is a device by now, and its context is not lost."""
        from kerneltest.worker.device import context_is_lost

        return self._device is not None and not context_is_lost(self._device)

    def _start(self, start: Start) -> Started:
        if start.device == "cpu" or (start.device == "auto" and not _sees_cuda()):
            # Must be set before Triton is imported: on a CPU its kernels run in its interpreter.
            os.environ["TRITON_INTERPRET"] = "1"
        from kerneltest.worker.company.feasible import impossible_steps
        from kerneltest.worker.company.torch_ops import OPS
        from kerneltest.worker.device import NoDevice, open_device
        from kerneltest.worker.misuse import Misuser
        from kerneltest.worker.rig import Rig

        discovery.use_roots([Path(root) for root in start.suite_roots])
        try:
            device = open_device(start.device)
        except NoDevice as error:
            return Started(device=None, error=str(error))
        self._rig = Rig(device)
        self._misuser = Misuser(self._rig)
        coverage = self._rig.poisoner.prove()
        self._rig.impossible = impossible_steps(self._rig)
        libraries: dict[str, str] = {}
        missing: dict[str, str] = {}
        for name in dict.fromkeys(("torch", *start.libraries)):
            try:
                libraries[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
            except Exception as error:  # a broken installation may raise anything; the run says what
                missing[name] = f"{type(error).__name__}: {error}"
        self._device = device
        return Started(
            device=device,
            libraries=libraries,
            missing=missing,
            coverage=coverage,
            no_steps=self._rig.impossible,
            no_guards=self._rig.memory.guards,
            torch_ops=tuple(OPS),
        )

    def _run(self, run: Run) -> Outcome:
        self._rig.memory.only = run.guarded
        self._rig.memory.labels.clear()
        outcome = self._execute(run)
        return replace(outcome, buffers=tuple(self._rig.memory.labels))

    def _execute(self, run: Run) -> Outcome:
        from kerneltest.worker.company.play import play, play_alone
        from kerneltest.worker.execute import execute
        from kerneltest.worker.tally import tally

        kernel = self._kernel(run.source, run.kernel)
        case: Case[Any] = Case.from_json(run.case, kernel.operator.axes)
        if run.misuses:
            return self._misuser.misuses(kernel, case)
        if run.misuse is not None:
            return self._misuser.run(kernel, case, run.misuse)
        if run.series is not None:
            return tally(kernel, case, self._rig, run.series)
        if run.sequence is None:
            peer = self._kernel(*run.peer) if run.peer else None
            return execute(kernel, case, self._rig, peer)
        kernels = {name: self._kernel(source, name) for name, source in run.neighbours.items()}
        sequence = LaunchSequence.from_json(case, run.sequence, lambda name: kernels[name].operator.axes)
        if run.alone:
            return play_alone(kernel, sequence, self._rig)
        return play(kernel, sequence, self._rig, kernels, fresh=run.fresh, suspect=run.suspect)

    def _kernel(self, source: str, name: str) -> Kernel:
        if (source, name) not in self._kernels:
            for found in discovery.load_kernels(Path(source)).values():
                self._kernels[source, found.name] = found
        return self._kernels[source, name]


def _sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
