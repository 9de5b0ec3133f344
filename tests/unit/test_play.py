"""A sequence judged in this process: what a kernel declares and raises, and instability that hides stale state."""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import block_sparse_axes, case, paged

from kerneltest import discovery
from kerneltest.model import (
    FORMATS,
    FP32,
    IEEE_FP32,
    Beside,
    Call,
    Case,
    Data,
    Device,
    Guard,
    Kernel,
    LaunchSequence,
    Load,
    Neighbour,
    Numerics,
    PageTable,
    Pattern,
    Place,
    Poison,
    Rejection,
    Repeat,
    Reuse,
    Status,
)
from kerneltest.worker import device as devices
from kerneltest.worker.company.performance import perform
from kerneltest.worker.company.play import play, play_alone
from kerneltest.worker.company.scene import Scene
from kerneltest.worker.execute import execute
from kerneltest.worker.execution import Execution
from kerneltest.worker.rig import Rig
from kerneltest.worker.staging import Staged

CPU = Device(kind="cpu", ordinal=0, name="", sm=(0, 0), units=1)
CASE = case((3, 3), dtype="float32")
Outputs = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(CPU)


def numerics(one: Any, device: Device) -> Numerics:
    return Numerics(qk=IEEE_FP32, pv=IEEE_FP32, p=FP32, out=FORMATS[one.axes.dtype], lse_base="e")


def right(call: Call) -> Outputs:
    """One request: plain attention in fp32, without a mask."""
    x = call.inputs
    keys = call.case.axes.requests[0].kv_len
    pages = x["kv_indices"].long()
    k, v = (x[name][pages].flatten(0, 1)[:keys, 0] for name in ("k_pages", "v_pages"))
    scores = x["q"][:, 0] @ k.T * call.case.axes.scale
    call.outputs["out"][:, 0] = torch.softmax(scores, -1) @ v
    call.outputs["lse"][:, 0] = torch.logsumexp(scores, -1)
    return call.outputs


def kernel(launch: Callable[[Call], Any] = right, **more: Any) -> Kernel:
    return Kernel(**{"name": "k", "operator": paged.paged_prefill, "launch": launch, "numerics": numerics, **more})


def played(of: Kernel, rig: Rig, *steps: Any, **more: Any) -> Any:
    return play(of, LaunchSequence(case=CASE, steps=steps), rig, {}, **more)


def test_a_right_kernel_passes_and_is_judged_once_for_the_same_bits(rig: Rig) -> None:
    first, second = (played(kernel(), rig, Reuse(), Repeat(times=2)) for _ in range(2))
    assert (first.status, second.status) == (Status.PASSED, Status.PASSED)
    assert set(first.used) == {"out", "lse"}
    assert second.used == {}
    assert first.repeated == (3, 0)


def test_other_data_that_does_not_fit_into_the_same_buffers_is_refused(rig: Rig) -> None:
    """How many blocks a block-sparse matrix has is drawn with its values."""
    axes = block_sparse_axes(columns=8)
    sparse = importlib.import_module(f"{discovery.PACKAGE}.attention.torch_sparse").masked
    outcomes = [
        play(sparse, LaunchSequence(case=one, steps=(Reuse(buffers="same"),)), rig, {})
        for one in (Case(operator="block_sparse", axes=axes, inputs="generic", seed=seed) for seed in range(12))
    ]
    assert {outcome.reason for outcome in outcomes if outcome.status is Status.UNSUPPORTED} == {
        "the other tensors do not fit into the buffers of the case under test"
    }
    assert {outcome.status for outcome in outcomes} == {Status.PASSED, Status.UNSUPPORTED}


@pytest.mark.parametrize("kv_dtype", ["same", "float8_e4m3fn", "float8_e5m2"])
def test_pages_of_every_format_can_be_moved(rig: Rig, kv_dtype: str) -> None:
    eager = importlib.import_module(f"{discovery.PACKAGE}.attention.torch_eager").eager
    one = case((3, 30), (1, 9), page_size=4, spare_pages=2, kv_dtype=kv_dtype)
    outcome = play(eager, LaunchSequence(case=one, steps=(PageTable(),)), rig, {})
    assert outcome.status is Status.PASSED


def test_the_digest_is_that_of_the_launch_alone(rig: Rig) -> None:
    alone = play_alone(kernel(), LaunchSequence(case=CASE), rig)
    assert alone.digest == played(kernel(), rig, Reuse()).digest
    doubled = kernel(lambda call: {name: value.mul_(2) for name, value in right(call).items()})
    assert alone.digest != play_alone(doubled, LaunchSequence(case=CASE), rig).digest


def test_other_bits_than_in_the_quiet_worker_are_stale_state(rig: Rig) -> None:
    outcome = played(kernel(), rig, fresh="0" * 16)
    assert (outcome.finding.kind, outcome.finding.key) == ("StaleState", "process")
    assert not outcome.fatal  # or it could not be shown to take none of the steps


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_a_sequence_leaves_behind_in_the_process_shows_in_the_next_launch_alone(
    rig: Rig, deterministic: bool
) -> None:
    kept: list[int] = []

    def remembers(call: Call) -> Outputs:
        right(call)
        if len(kept) >= 3:  # alone, in company and the next one
            call.outputs["lse"] += 1
        kept.append(1)
        return call.outputs

    outcome = played(kernel(remembers, deterministic=deterministic), rig)
    assert (outcome.finding.kind, outcome.finding.key) == ("StaleState", "process, afterwards")
    assert outcome.finding.culprit == "something that outlives the launches"
    assert outcome.fatal


def spoilt_by_company(amount: Callable[[], float]) -> Callable[[Call], Outputs]:
    """Right when it is launched for the first time, and off by ``amount`` ever after."""
    launches = itertools.count()

    def launch(call: Call) -> Outputs:
        right(call)
        if next(launches):
            call.outputs["lse"] += amount()
        return call.outputs

    return launch


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_company_leaves_in_the_process_is_not_taken_for_chance(rig: Rig, deterministic: bool) -> None:
    outcome = played(kernel(spoilt_by_company(lambda: 1.0), deterministic=deterministic), rig, Reuse())
    assert (outcome.finding.kind, outcome.finding.key) == ("StaleState", "process, afterwards")
    assert outcome.finding.what.endswith("are not what they are alone; neither is the kernel alone from then on")
    assert outcome.fatal


def test_a_coin_that_falls_the_other_way_for_a_while_has_not_outlived_anything(rig: Rig) -> None:
    """Those of the sequence, and as many alone as a pair is repeated."""
    launches = itertools.count()

    def falls(call: Call) -> Outputs:
        right(call)
        if 2 <= next(launches) < 7:
            call.outputs["lse"] += 1
        return call.outputs

    outcome = played(kernel(falls), rig, Reuse())
    assert (outcome.status, outcome.finding.key) == (Status.FAILED, "lse")


def test_a_process_in_which_a_kernel_moves_since_company_was_there_is_not_used_again(rig: Rig) -> None:
    fresh = play_alone(kernel(), LaunchSequence(case=CASE), rig).digest
    chance = random.Random(1)
    outcome = played(kernel(spoilt_by_company(chance.random)), rig, Reuse(), fresh=fresh)
    assert (outcome.finding.kind, outcome.fatal) == ("Nondeterministic", True)


@pytest.mark.parametrize(("launches", "fatal"), [({2}, False), ({2, 3, 4, 5, 6, 7}, True), (set(range(8)), False)])
def test_a_process_in_which_a_kernel_raises_since_company_was_there_is_not_used_again(
    rig: Rig, launches: set[int], fatal: bool
) -> None:
    numbers = itertools.count()

    def raises(call: Call) -> Outputs:
        if next(numbers) in launches:
            raise RuntimeError("no")
        return right(call)

    outcome = played(kernel(raises), rig, Reuse())
    assert (outcome.finding.kind, outcome.fatal) == ("LaunchRaised", fatal)


def test_a_process_that_is_as_it_was_is_used_again(rig: Rig) -> None:
    fresh = play_alone(kernel(), LaunchSequence(case=CASE), rig).digest
    launches = itertools.count(1)

    def once(call: Call) -> Outputs:
        right(call)
        if next(launches) == 3:  # behind alone, and the step
            call.outputs["lse"] += 1
        return call.outputs

    outcome = played(kernel(once), rig, Reuse(), fresh=fresh)
    assert (outcome.status, outcome.fatal) == (Status.FAILED, False)


def test_a_kernel_that_declares_nothing_is_not_a_crash(rig: Rig) -> None:
    silent = Kernel(name="k", operator=paged.paged_prefill, launch=right)
    for outcome in (played(silent, rig), play_alone(silent, LaunchSequence(case=CASE), rig)):
        assert outcome.finding.kind == "BadNumerics"


def test_what_unsupported_raises_is_the_kernels_fault(rig: Rig) -> None:
    def broken(one: Any, device: Device) -> str | None:
        raise KeyError("no such table")

    for outcome in (
        played(kernel(unsupported=broken), rig),
        play_alone(kernel(unsupported=broken), LaunchSequence(case=CASE), rig),
    ):
        assert (outcome.finding.kind, outcome.finding.key) == ("LaunchRaised", "KeyError")


def test_a_launch_that_is_wrong_the_second_time_has_left_something_behind(rig: Rig) -> None:
    def accumulates(call: Call) -> Outputs:
        right(call)
        sums = call.workspace(4 * call.outputs["out"].numel()).view(torch.float32)
        sums = sums[: call.outputs["out"].numel()].view(call.outputs["out"].shape)
        call.outputs["out"].copy_(sums.add_(call.outputs["out"]))
        return call.outputs

    finding = played(kernel(accumulates), rig).finding
    assert (finding.kind, finding.culprit) == ("StaleState", Place.WORKSPACE.value)
    assert finding.what.endswith("when launched once more")


def jitters(call: Call, counter: Any) -> Outputs:
    right(call)
    call.outputs["lse"][0] += next(counter) * 2.0**-20
    return call.outputs


def test_a_kernel_that_moves_by_itself_is_nondeterministic(rig: Rig) -> None:
    counter = itertools.count()
    finding = played(kernel(lambda call: jitters(call, counter)), rig).finding
    assert (finding.kind, finding.key) == ("Nondeterministic", "lse")


def test_stale_state_shows_although_other_elements_move(rig: Rig) -> None:
    counter = itertools.count()

    def leaks(call: Call) -> Outputs:
        jitters(call, counter)
        call.outputs["out"][1, 0, 0] += call.workspace(64).view(torch.float32)[0] * 0
        return call.outputs

    finding = played(kernel(leaks), rig).finding
    assert (finding.kind, finding.culprit) == ("StaleState", Place.WORKSPACE.value)
    assert finding.what.startswith("out: 1 of ")


def finite(case: Any, terms: Any, numerics: Any, outputs: Outputs) -> Iterator[Rejection]:
    if not bool(outputs["out"].isfinite().all()):
        yield Rejection(kind="NonFinite", output="out", what="not finite")


def certified(launch: Callable[[Call], Any]) -> Kernel:
    """A kernel that may answer as it likes as long as that is finite: without equal bits and without a budget."""
    judged = replace(paged.paged_prefill, budget=lambda *_: {}, certified=("out", "lse"), certify=finite)
    return kernel(launch, operator=judged, deterministic=False)


def test_what_only_a_certificate_judges_is_judged_in_company(rig: Rig) -> None:
    def leaks(call: Call) -> Outputs:
        jitters(call, counter)
        call.outputs["out"][1, 0, 0] += call.workspace(64).view(torch.float32)[0] * 0
        return call.outputs

    counter = itertools.count()
    step = Poison(place=Place.WORKSPACE, pattern=Pattern.NAN)
    assert played(certified(lambda call: jitters(call, counter)), rig, step).status is Status.PASSED
    finding = played(certified(leaks), rig, step).finding
    assert (finding.kind, finding.culprit) == ("StaleState", Place.WORKSPACE.value)


def test_what_only_a_certificate_judges_is_judged_alone(rig: Rig) -> None:
    def infinite(call: Call) -> Outputs:
        right(call)["out"][0] = torch.inf
        return call.outputs

    finding = played(certified(infinite), rig).finding
    assert (finding.kind, finding.key, finding.what) == ("NonFinite", "out", "out: not finite")


def test_a_device_that_is_lost_to_a_neighbours_nan_is_not_held_against_the_kernel(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> None:
        raise RuntimeError("device-side assert triggered\nmore words")

    monkeypatch.setattr(Scene, "watch", lost)
    sequence = LaunchSequence(case=CASE, steps=(Neighbour(kernel="k", case=CASE, data=Data.NAN),))
    outcome = play(kernel(), sequence, rig, {"k": kernel()})
    assert outcome.status is Status.UNSUPPORTED
    assert outcome.reason == "the neighbour k does not survive nan: device-side assert triggered"
    # With numbers that it should survive, it may be the kernel's doing.
    finite = LaunchSequence(case=CASE, steps=(Neighbour(kernel="k", case=CASE),))
    with pytest.raises(RuntimeError, match="device-side assert"):
        play(kernel(), finite, rig, {"k": kernel()})


def test_two_launches_beside_each_other_wait_behind_one_gate_until_both_are_made(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Stream:
        cuda_stream = 7

        def record_event(self) -> str:
            done.append("recorded")
            return "event"

    class Companions:
        def hold(self, stream: int) -> Callable[[], None]:
            done.append(f"stream {stream} held")
            return lambda: done.append("opened")

        def occupy(self, stream: int) -> None:
            done.append("loaded")

    def launch(call: Call) -> Outputs:
        done.append(f"launched {call.case.seed}")
        return right(call)

    monkeypatch.setattr(devices, "new_stream", lambda _: Stream())
    monkeypatch.setattr(devices, "beside_on", lambda _: nullcontext())
    monkeypatch.setattr(devices, "wait_for", lambda _, event: done.append(f"waits for {event}"))
    monkeypatch.setitem(vars(rig), "companions", Companions())
    other = replace(CASE, seed=CASE.seed + 1)
    # A load stands for what has to be the last before the launch, wherever it stands in the sequence.
    sequence = LaunchSequence(case=CASE, steps=(Load(what="sms"), Beside(case=other)))
    perform(Execution(kernel(launch), CASE, rig), sequence, {})
    first, second = (f"launched {one.seed}" for one in (other, CASE))
    assert done == ["stream 7 held", "recorded", first, "waits for event", "loaded", second, "opened"] * 2


def test_what_is_wrong_by_chance_is_not_blamed_on_the_poison(rig: Rig) -> None:
    def sometimes(call: Call) -> Outputs:
        right(call)["out"][0] += chance.choice((0, 1))
        return call.outputs

    chance = random.Random(7)
    outcome = execute(kernel(sometimes, deterministic=False), CASE, rig)
    assert outcome.finding is not None
    assert (outcome.finding.kind, outcome.finding.key) == ("Mismatch", "out")


def test_dead_elements_of_a_case_smaller_than_its_buffers_are_filled(rig: Rig) -> None:
    """As when a graph was captured with a larger one."""
    large, small = (case((3, keys), dtype="float32", spare_pages=2) for keys in (40, 3))
    large_materials, small_materials = map(paged.materialize, (large, small))
    with rig.memory.arena(Guard.NONE) as arena:
        staged = Staged(kernel(), large, large_materials, CPU, arena, dict.fromkeys(Place, Pattern.ZERO))
        staged.become(small, small_materials)
        staged.fill_dead(Place.UNREFERENCED_PAGES, Pattern.NAN)
        pages = staged.live["k_pages"]
        (dead,) = (d for d in small_materials.dead if (d.tensor, d.place) == ("k_pages", Place.UNREFERENCED_PAGES))
        assert len(dead.mask) < len(pages)
        used = pages[: len(dead.mask)]
        assert bool(dead.mask.any())
        assert bool(used[dead.mask].isnan().all())
        assert not bool(used[~dead.mask].isnan().any())


def test_a_device_is_lost_only_if_it_fails_again(monkeypatch: pytest.MonkeyPatch) -> None:
    left = 1

    def synchronize(_ordinal: int) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    on_cuda = replace(CPU, kind="cuda")
    assert not devices.context_is_lost(on_cuda)
    left = 100
    assert devices.context_is_lost(on_cuda)
