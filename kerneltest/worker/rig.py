"""The device under a worker, and what makes its state adversarial: poison for hidden state, guards around buffers."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from kerneltest.model import Case, Device
from kerneltest.worker.memory import Memory
from kerneltest.worker.poison import Poisoner

if TYPE_CHECKING:
    from kerneltest.worker.company.companions import Companions


class Rig:
    """One for a worker and its device, for as long as both live."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.poisoner = Poisoner(device)
        self.memory = Memory(device)
        self.judged: dict[tuple[str, Case[Any]], str] = {}  # kernel and case to the digest that was found right
        self.impossible: dict[str, str] = {}  # kinds of steps that cannot be taken here, and why

    @cached_property
    def companions(self) -> Companions:
        """Kernels of our own to run beside others. Raises ImportError without cuda-core and cuda-bindings."""
        from kerneltest.worker.company.companions import Companions

        return Companions(self.device.ordinal)
