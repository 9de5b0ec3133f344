"""Guarded memory: what a kernel does outside of its buffers is a fault, or seen."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import warnings
from pathlib import Path

import pytest
import torch

from kerneltest.model import Device
from kerneltest.model.guard import Guard
from kerneltest.worker import memory as under_test
from kerneltest.worker.memory import PAINT, Damage, Memory
from kerneltest.worker.pages import HostPages, NoGuards, Parts, Region

CPU = Device(kind="cpu", ordinal=0, name="a CPU", sm=(0, 0), units=1)
GUARDED = (Guard.AFTER, Guard.BEFORE)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.uint8)
INDICES = (torch.int32, torch.int64, torch.bool)


@pytest.fixture
def memory() -> Memory:
    memory = Memory(CPU)
    assert memory.guards is None
    return memory


def faults(address: int, size: int = 1) -> bool:
    """Whether to read there kills a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads are no trouble to a child that only reads
        child = os.fork()
    if child == 0:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.string_at(address, size)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGSEGV
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def write(address: int, size: int = 1, byte: int = 0) -> None:
    ctypes.memset(address, byte, size)


def end_of(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() + tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("shape", [(16,), (5, 16), (3, 4096, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.int32], ids=str)
def test_one_element_past_the_end_faults_when_guarded_after(
    memory: Memory, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    with memory.arena(Guard.AFTER) as arena:
        tensor = arena.tensor("x", shape, dtype)
        assert faults(end_of(tensor), dtype.itemsize)
        assert not faults(end_of(tensor) - dtype.itemsize, dtype.itemsize)
        assert not faults(tensor.data_ptr() - dtype.itemsize, dtype.itemsize)


@pytest.mark.parametrize("shape", [(1,), (5, 7), (3, 4096, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.int32], ids=str)
def test_one_element_before_the_start_faults_when_guarded_before(
    memory: Memory, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    with memory.arena(Guard.BEFORE) as arena:
        tensor = arena.tensor("x", shape, dtype)
        assert faults(tensor.data_ptr() - dtype.itemsize, dtype.itemsize)
        assert not faults(tensor.data_ptr(), dtype.itemsize)
        assert not faults(end_of(tensor), dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.int32], ids=str)
def test_nothing_faults_without_a_guard(memory: Memory, dtype: torch.dtype) -> None:
    with memory.arena(Guard.NONE) as arena:
        tensor = arena.tensor("x", (5, 16), dtype)
        assert not faults(end_of(tensor), dtype.itemsize)
        assert not faults(tensor.data_ptr() - dtype.itemsize, dtype.itemsize)


@pytest.mark.parametrize(("dtype", "numel", "slack"), [(torch.bfloat16, 5, 6), (torch.uint8, 1, 15)])
def test_alignment_of_floats_leaves_a_red_zone_and_then_the_guard(
    memory: Memory, dtype: torch.dtype, numel: int, slack: int
) -> None:
    with memory.arena(Guard.AFTER) as arena:
        tensor = arena.tensor("x", (numel,), dtype)
        assert faults(end_of(tensor) + slack)
        assert not faults(end_of(tensor) + slack - 1)
        write(end_of(tensor) + slack - 1)
        assert arena.damage() == (Damage(label="x", side="after", offset=slack - 1, count=1),)


@pytest.mark.parametrize("numel", [1, 5, 255, 4096, 4097])
def test_one_index_past_the_end_faults_whatever_the_number(memory: Memory, numel: int) -> None:
    with memory.arena(Guard.AFTER) as arena:
        assert faults(end_of(arena.tensor("x", (numel,), torch.int32)), 4)


@pytest.mark.parametrize("dtype", FLOATS + INDICES, ids=str)
@pytest.mark.parametrize("guard", Guard)
@pytest.mark.parametrize("numel", [1, 2, 3, 17, 5000])
def test_alignment(memory: Memory, guard: Guard, dtype: torch.dtype, numel: int) -> None:
    least = 256
    if guard is Guard.AFTER:
        least = 16 if dtype in FLOATS else dtype.itemsize
    with memory.arena(guard) as arena:
        assert arena.tensor("x", (numel,), dtype).data_ptr() % least == 0


@pytest.mark.parametrize("guard", Guard)
@pytest.mark.parametrize("dtype", FLOATS + INDICES, ids=str)
def test_tensors_hold_what_is_written_and_nothing_is_reported(memory: Memory, guard: Guard, dtype: torch.dtype) -> None:
    shapes = [(), (1,), (3, 5, 7), (2, 0, 3), (0,), (4096,), (4097, 3)]
    with memory.arena(guard) as arena:
        tensors = [arena.tensor(f"x{i}", shape, dtype) for i, shape in enumerate(shapes)]
        for i, tensor in enumerate(tensors):
            tensor.fill_(i % 2)
        for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            assert tensor.shape == shape
            assert tensor.dtype == dtype
            assert tensor.is_contiguous()
            assert torch.equal(tensor.double(), torch.full(shape, i % 2, dtype=torch.float64))
        assert arena.damage() == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32], ids=str)
@pytest.mark.parametrize(
    ("guard", "side"),
    [(Guard.NONE, "before"), (Guard.NONE, "after"), (Guard.AFTER, "before"), (Guard.BEFORE, "after")],
    ids=str,
)
@pytest.mark.parametrize(("offset", "count"), [(0, 1), (7, 3), (255, 1), (0, 256)])
def test_damage_is_named(memory: Memory, guard: Guard, side: str, dtype: torch.dtype, offset: int, count: int) -> None:
    with memory.arena(guard) as arena:
        _, tensor, _ = (arena.tensor(label, (5, 7), dtype) for label in "abc")
        if side == "after":
            write(end_of(tensor) + offset, count)
        else:
            write(tensor.data_ptr() - offset - count, count)
        (damage,) = arena.damage()
        assert (damage.label, damage.side, damage.offset, damage.count) == ("b", side, offset, count)


@pytest.mark.parametrize("byte", [0, 0xFF, 0x7F, 0x3F])
def test_what_kernels_write_is_not_the_paint(memory: Memory, byte: int) -> None:
    with memory.arena(Guard.NONE) as arena:
        write(end_of(arena.tensor("x", (4,), torch.uint8)), byte=byte)
        assert len(arena.damage()) == 1


@pytest.mark.parametrize("guard", Guard)
def test_damage_is_reported_in_the_order_of_the_buffers(memory: Memory, guard: Guard) -> None:
    with memory.arena(guard) as arena:
        for tensor in [arena.tensor(label, (3,), torch.bfloat16) for label in "ab"]:
            if guard is not Guard.BEFORE:
                write(tensor.data_ptr() - 1)
            write(end_of(tensor))
        assert [(damage.label, damage.side) for damage in arena.damage()] == [
            (label, side) for label in "ab" for side in (("before", "after"), ("after",))[guard is Guard.BEFORE]
        ]


@pytest.mark.parametrize("numel", [0, 1])
def test_a_red_zone_is_painted_anew(memory: Memory, numel: int) -> None:
    for _ in range(2):
        with memory.arena(Guard.BEFORE) as arena:
            first = arena.tensor("x", (8,), torch.uint8)
            write(end_of(first), 100)
            assert len(arena.damage()) == 1
        with memory.arena(Guard.BEFORE) as arena:
            arena.tensor("x", (numel,), torch.uint8)
            assert arena.damage() == ()


@pytest.mark.parametrize("guard", GUARDED)
def test_an_arena_without_buffers_or_with_empty_ones_has_no_damage(memory: Memory, guard: Guard) -> None:
    with memory.arena(guard) as arena:
        assert arena.damage() == ()
        arena.tensor("x", (0, 3), torch.float32)
        assert arena.damage() == ()


@pytest.mark.parametrize("guard", GUARDED)
def test_the_next_arena_has_the_same_addresses(memory: Memory, guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    def addresses() -> list[int]:
        with memory.arena(guard) as arena:
            tensors = [arena.tensor("x", (size,), torch.bfloat16) for size in (3, 5000, 3, 5000, 100_000)]
            far = arena.far("far", (1 << 20, 1 << 12), torch.bfloat16, (1 << 20) - 1)
            return [tensor.data_ptr() for tensor in [*tensors, far]]

    before = addresses()
    assert len(set(before)) == len(before)
    monkeypatch.setattr(memory.pages, "take", None)
    assert addresses() == before


def test_a_region_serves_buffers_of_other_sizes(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    with memory.arena(Guard.AFTER) as arena:
        end = end_of(arena.tensor("x", (16,), torch.bfloat16))
    monkeypatch.setattr(memory.pages, "take", None)
    with memory.arena(Guard.AFTER) as arena:
        assert end_of(arena.tensor("x", (333,), torch.int32)) == end
        assert faults(end, 4)


@pytest.mark.parametrize("limit", ["bytes", "regions"])
def test_idle_memory_is_bounded(memory: Memory, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    if limit == "bytes":
        monkeypatch.setitem(under_test._IDLE_BYTES, "cpu", 2 * HostPages.granule)
    else:
        monkeypatch.setattr(under_test, "_IDLE_REGIONS", 2)
    with memory.arena(Guard.BEFORE) as arena:
        addresses = [arena.tensor("x", (4,), torch.uint8).data_ptr() for _ in range(4)]
        assert not any(map(faults, addresses))
    assert [faults(address) for address in addresses] == [False, False, True, True]


def test_memory_beyond_the_bound_is_given_back(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(under_test._IDLE_BYTES, "cpu", 1 << 20)
    with memory.arena(Guard.BEFORE) as arena:
        address = arena.tensor("workspace", (2 << 20,), torch.uint8).data_ptr()
    assert faults(address)


def test_least_recently_used_goes_first(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "_IDLE_REGIONS", 2)

    def one(nbytes: int) -> int:
        with memory.arena(Guard.BEFORE) as arena:
            return arena.tensor("x", (nbytes,), torch.uint8).data_ptr()

    small, large = one(1), one(1 << 16)
    assert one(1) == small
    one(1 << 20)
    assert [faults(small), faults(large)] == [False, True]


def test_idle_memory_is_given_up_when_there_is_no_other(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    with memory.arena(Guard.BEFORE) as arena:
        idle = arena.tensor("x", (4,), torch.uint8).data_ptr()
    pages = memory.pages
    take = pages.take

    def full_at_first(span: int, parts: Parts) -> Region:
        if not faults(idle):
            raise RuntimeError("out of memory")
        return take(span, parts)

    monkeypatch.setattr(pages, "take", full_at_first)
    with memory.arena(Guard.BEFORE) as arena:
        assert arena.tensor("x", (1 << 20,), torch.uint8).fill_(1).sum() == 1 << 20


@pytest.mark.parametrize("guard", Guard)
def test_only_the_tail_of_a_far_tensor_is_mapped(memory: Memory, guard: Guard) -> None:
    rows, row, first = 1 << 16, 3 * 1000, (1 << 16) - 2
    with memory.arena(guard) as arena:
        far = arena.far("kv", (rows, 3, 1000), torch.bfloat16, first)
        assert far.shape == (rows, 3, 1000)
        assert far.is_contiguous()
        assert far.data_ptr() % 16 == 0
        far[first:] = torch.arange(2 * row).reshape(2, 3, 1000)
        assert far[rows - 1, 2, 998] == 2 * row - 2
        assert arena.damage() == ()
        address = [far.data_ptr() + 2 * row * index for index in (0, first // 2, first - 4, first, rows)]
        assert [faults(one) for one in address] == [True, True, True, False, True]


def test_writes_around_the_tail_of_a_far_tensor_are_damage(memory: Memory) -> None:
    with memory.arena(Guard.NONE) as arena:
        far = arena.far("kv", (10_001, 1001), torch.bfloat16, 9_998)
        write(far[9_998].data_ptr() - 5, 2)
        write(end_of(far) + 1)
        assert arena.damage() == (
            Damage(label="kv", side="before", offset=3, count=2),
            Damage(label="kv", side="after", offset=1, count=1),
        )


@pytest.mark.parametrize("first", [0, 1])
def test_a_far_tensor_may_be_small(memory: Memory, first: int) -> None:
    with memory.arena(Guard.AFTER) as arena:
        far = arena.far("kv", (2, 8), torch.float32, first)
        far.fill_(1)
        assert faults(end_of(far))
        assert len(arena.damage()) == first  # far[:1] is not to be touched


@pytest.mark.parametrize("first", [-1, 4])
def test_a_far_tensor_must_have_its_first_element(memory: Memory, first: int) -> None:
    with memory.arena(Guard.AFTER) as arena, pytest.raises(ValueError, match=f"kv has no element {first}"):
        arena.far("kv", (4, 8), torch.float32, first)


def test_a_far_tensor_takes_no_memory(memory: Memory) -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    with memory.arena(Guard.AFTER) as arena:
        before = resident()
        far = arena.far("kv", (1 << 20, 1 << 12), torch.bfloat16, (1 << 20) - 1)
        far[-1] = 1
        assert far.numel() == 1 << 32
        assert arena.damage() == ()
        assert resident() - before < 16 << 20


def test_without_guard_pages_red_zones_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere(HostPages):
        def __init__(self) -> None:
            raise NoGuards("not on this machine")

    monkeypatch.setattr(under_test, "HostPages", Nowhere)
    memory = Memory(CPU)
    assert memory.guards == "not on this machine"
    with memory.arena(Guard.AFTER) as arena:
        tensor = arena.tensor("x", (5,), torch.int32)
        write(tensor.data_ptr() - 1)
        write(end_of(tensor))
        assert [damage.side for damage in arena.damage()] == ["before", "after"]
        with pytest.raises(RuntimeError, match="not on this machine"):
            arena.far("kv", (4, 8), torch.float32, 1)


def test_the_host_needs_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(NoGuards, match="Linux"):
        HostPages()


def test_a_lost_device_does_not_hide_what_lost_it(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(region: Region) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(memory.pages, "drop", lost)
    monkeypatch.setattr(under_test, "_IDLE_REGIONS", 0)

    def launch(error: Exception | None) -> None:
        with memory.arena(Guard.AFTER) as arena:
            arena.tensor("x", (1,), torch.float32)
            if error:
                raise error

    with pytest.raises(ValueError, match="the kernel's own"):
        launch(ValueError("the kernel's own"))
    with pytest.raises(RuntimeError, match="device lost"):
        launch(None)


def test_no_memory_is_an_error_that_says_so(memory: Memory) -> None:
    with memory.arena(Guard.AFTER) as arena, pytest.raises(RuntimeError, match="mmap failed: Cannot allocate memory"):
        arena.tensor("x", (1 << 60,), torch.uint8)


def test_the_paint_is_hostile() -> None:
    paint = torch.full((8,), PAINT, dtype=torch.uint8)
    assert paint.view(torch.float16).isnan().all()
    assert (paint.view(torch.bfloat16) > 1e37).all()
    assert (paint.view(torch.int32) > 1 << 30).all()
