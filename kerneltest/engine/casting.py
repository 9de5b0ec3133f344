"""Who plays in launch sequences: cases of the kernel under test and of its neighbours that are known to run alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kerneltest.engine.chase import draw
from kerneltest.engine.guards import guarded
from kerneltest.engine.hunt import Target
from kerneltest.engine.pool import Runner
from kerneltest.engine.profile import Profile
from kerneltest.model import Case, Data, Kernel, Neighbour, Outcome, Place, Started, Status
from kerneltest.model.sequence import STEPS

# Cases of a neighbour, and how many are drawn for each that is wanted: a kernel refuses some.
NEIGHBOUR_CASES = 4
DRAWN_FOR_EACH = 4
EVERYWHERE = (
    Place.WORKSPACE,
    Place.ALLOCATOR_POOL,
    Place.OUTPUTS,
    Place.UNUSED_SLOTS,
    Place.UNREFERENCED_PAGES,
)
ON_CHIP = (Place.SHARED_MEMORY, Place.REGISTERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """The cases of the kernel under test, simplest first, with what each gives alone (None: it fails), and those of
    every neighbour by its name.

    ``kinds``: the kinds of steps to draw from. ``places`` can be poisoned here; ``torch_ops`` can be launched.
    ``finite``: the neighbours that are given finite inputs alone, each with the reason.
    """

    kernel: Kernel
    digests: Mapping[Case[Any], str | None]
    neighbours: Mapping[str, tuple[Case[Any], ...]]
    finite: Mapping[str, str] = field(default_factory=dict)
    torch_ops: tuple[str, ...]
    places: tuple[Place, ...]
    kinds: tuple[str, ...]

    @property
    def cases(self) -> tuple[Case[Any], ...]:
        return tuple(self.digests)

    def without(self, cases: Collection[Case[Any]]) -> Cast:
        """The cast less those cases of the kernel under test."""
        return replace(self, digests={case: digest for case, digest in self.digests.items() if case not in cases})


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """Every kernel that can run here, by name. Their cases are drawn from ``seed`` once for all hunts of a run.

    What one hunt learns of them is known to the next: ``right``, those cases that run alone, of the kernels that were
    asked so far; ``lethal``, the kernels that kill a worker by themselves; ``spoilt``, why a kernel cannot be given
    such data.
    """

    targets: Mapping[str, Target]
    seed: int
    right: dict[str, tuple[Case[Any], ...]] = field(default_factory=dict)
    lethal: set[str] = field(default_factory=set)
    spoilt: dict[tuple[str, Data], str] = field(default_factory=dict)


# Runs a case of a kernel alone.
Alone = Callable[[Runner, Target, Case[Any]], Outcome]


def assemble(
    alone: Alone,
    target: Target,
    neighbours: Neighbours,
    runner: Runner,
    quiet: Runner | None,
    profile: Profile,
    kinds: Collection[str],
    seed_value: int,
) -> Cast:
    """Draw cases and run each alone once: the kernel's own in the quiet worker, where nothing else ever runs."""
    started = runner.started
    device = started.device
    assert device is not None, "the caller checks that the worker has a device"
    enough = 2 * profile.victims // 3
    cases = _playable(alone, quiet or runner, target, profile, profile.victims, seed_value, enough)
    others: dict[str, tuple[Case[Any], ...]] = {}
    if cases and Neighbour.kind in kinds:
        for name, other in neighbours.targets.items():
            if name not in neighbours.right:
                whole = replace(profile, only=())  # a neighbour is what it is
                playable = _playable(alone, runner, other, whole, NEIGHBOUR_CASES, neighbours.seed, enough=1)
                neighbours.right[name] = tuple(case for case, digest in playable.items() if digest)
            if neighbours.right[name]:
                others[name] = neighbours.right[name]
    possible = [kind for kind in STEPS if kind in kinds and kind not in started.no_steps]
    if not others and Neighbour.kind in possible:
        possible.remove(Neighbour.kind)
    return Cast(
        kernel=target.kernel,
        digests=cases,
        neighbours=others,
        finite={name: why for name in others if (why := neighbours.targets[name].kernel.contract.needs_finite)},
        torch_ops=started.torch_ops,
        places=EVERYWHERE if device.kind == "cpu" else (*ON_CHIP, *EVERYWHERE),
        kinds=tuple(possible),
    )


def _playable(
    alone: Alone, runner: Runner, target: Target, profile: Profile, wanted: int, seed_value: int, enough: int
) -> dict[Case[Any], str | None]:
    """Up to ``wanted`` cases that the kernel takes, of few specialisations, simplest first; with their digests.

    A specialisation of which fewer than ``enough`` are drawn is passed over, if there is another.

    One that fails alone has no digest. It stays: that is found, too, and needs no step. One that ends the worker is the
    last that is asked for: the next might as well, and each takes a new worker.
    """
    started = runner.started
    found: dict[Case[Any], str | None] = {}
    modules = profile.modules
    for cases in _by_specialisation(target, profile, started, wanted, seed_value, enough):
        if not modules:
            break
        # The places that are left are shared by the specialisations that are.
        before, share = len(found), -(-(wanted - len(found)) // modules)
        for case in cases:
            if len(found) == before + share:
                break
            outcome = alone(runner, target, case)
            if outcome.status is not Status.UNSUPPORTED:
                found[case] = outcome.digest
            if outcome.fatal:
                return _sorted(found)
        modules -= len(found) > before
    return _sorted(found)


def _by_specialisation(
    target: Target, profile: Profile, started: Started, wanted: int, seed_value: int, enough: int
) -> list[list[Case[Any]]]:
    """Drawn cases of each specialisation: first those with enough of them, as they were drawn, then by their number.

    The first one that is drawn is the plainest, and the likeliest to be compiled already. Of some there are one or two
    cases: little to look at in a kernel under test, but enough of a neighbour.
    """
    drawn: dict[str, list[Case[Any]]] = {}

    def collect(case: Case[Any]) -> None:
        cases = drawn.setdefault(target.kernel.specialisation(case), [])
        if case not in cases:
            cases.append(case)

    assert started.device is not None
    strategy = guarded(target.kernel.operator.cases(profile.size(started.device)).filter(profile.wants), started)
    draw(strategy.map(lambda case: replace(case, relation="")), collect, DRAWN_FOR_EACH * wanted, seed_value)
    return sorted(drawn.values(), key=lambda cases: -min(len(cases), enough))


def _sorted(cases: Mapping[Case[Any], str | None]) -> dict[Case[Any], str | None]:
    return dict(sorted(cases.items(), key=lambda item: simplicity(item[0])))


def simplicity(case: Case[Any]) -> tuple[int, str]:
    """What cases are sorted by, the simplest first."""
    return (len(str(case)), str(case))
