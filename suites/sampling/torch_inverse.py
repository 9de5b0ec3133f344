"""Drawing by inverse transform in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kerneltest.model import Call, Case, Device, Kernel

from ._axes import Rows
from ._checks import checked
from ._semantics import Inverse, Semantics
from .torch_sort import IN_DOUBLE
from .unfiltered import sampling_from_probs

if TYPE_CHECKING:
    import torch

    from ._certify import Terms


def launch(call: Call) -> dict[str, torch.Tensor]:
    """One draw from each chosen row."""
    from . import _torch_filters as f

    return f.tokens(call, f.draw(f.chosen(call, call.inputs["probs"]), f.generator(call)))


def numbers(case: Case[Rows], terms: Terms) -> torch.Tensor:
    """The numbers of the first launch once more."""
    from . import _torch_filters as f

    return f.uniform(case.axes.draws, f.seeded(case, 0, terms.probs.device))


def semantics(case: Case[Rows], device: Device) -> Semantics:
    """No filter; sums and numbers in float64."""
    return Semantics(mass=IN_DOUBLE, inverse=Inverse(numbers=numbers, scaled=True))


from_probs = Kernel(
    name="torch.sampling_from_probs[inverse]",
    operator=sampling_from_probs,
    launch=checked(launch),
    numerics=semantics,
)
