"""Guarded memory on a CUDA device: what a kernel does outside of its buffers is an illegal address, or seen."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

torch = pytest.importorskip("torch")

from kerneltest.model.guard import Guard  # noqa: E402
from kerneltest.worker import device as devices  # noqa: E402
from kerneltest.worker import memory as under_test  # noqa: E402
from kerneltest.worker.driver import Driver  # noqa: E402
from kerneltest.worker.memory import Damage, Memory  # noqa: E402

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.uint8, torch.int32)
Write = Callable[[int, int], None]

# Reads a byte inside, then one outside.
CHILD = """
import ctypes, sys, torch
from kerneltest.model.guard import Guard
from kerneltest.worker import device as devices
from kerneltest.worker.driver import Driver
from kerneltest.worker.memory import Memory

device = devices.open_device("cuda")
driver = Driver(device.ordinal)
source = 'extern "C" __global__ void read(const volatile unsigned char *at, int *out) {{ *out = *at; }}'
kernel = driver.load(source, ["read"])["read"]
out = torch.empty(1, dtype=torch.int32, device=device.torch_name)
stream = devices.stream(device)

def read(address):
    values = (ctypes.c_uint64(address), ctypes.c_uint64(out.data_ptr()))
    driver.launch(kernel, 1, 1, 0, stream, values)
    driver.synchronize(stream)

memory = Memory(device)
assert memory.guards is None, memory.guards
def start(tensor): return tensor.data_ptr()
def end(tensor): return tensor.data_ptr() + tensor.numel() * tensor.element_size()
with memory.arena(Guard[sys.argv[1]]) as arena:
    {tensor}
    read({inside})
    print("inside", flush=True)
    read({outside})
    print("outside", flush=True)
"""
PLAIN = 't = arena.tensor("t", {shape}, torch.{dtype})'
FAR = 't = arena.far("t", (1 << 20, 1 << 12), torch.bfloat16, (1 << 20) - 2)'
# Name: guard, buffer, a byte inside, a byte outside, whether that is a fault.
PROBES = {
    "after bf16": ("AFTER", PLAIN.format(shape="(5, 16)", dtype="bfloat16"), "end(t) - 1", "end(t)", True),
    "after uint8": ("AFTER", PLAIN.format(shape="(3 << 20,)", dtype="uint8"), "start(t)", "end(t)", True),
    "after int32": ("AFTER", PLAIN.format(shape="(5,)", dtype="int32"), "start(t) - 1", "end(t)", True),
    "after slack": ("AFTER", PLAIN.format(shape="(5,)", dtype="bfloat16"), "end(t) + 5", "end(t) + 6", True),
    "before bf16": ("BEFORE", PLAIN.format(shape="(5, 7)", dtype="bfloat16"), "end(t)", "start(t) - 1", True),
    "before int32": ("BEFORE", PLAIN.format(shape="(3 << 20,)", dtype="int32"), "start(t)", "start(t) - 1", True),
    "none": ("NONE", PLAIN.format(shape="(5, 16)", dtype="bfloat16"), "start(t) - 1", "end(t)", False),
    "far middle": ("AFTER", FAR, "start(t[-2:])", "start(t) + (1 << 32)", True),
    "far before": ("AFTER", FAR, "start(t[-2:])", "start(t[-2:]) - (4 << 20)", True),
    "far end": ("AFTER", FAR, "end(t) - 1", "end(t)", True),
}


@pytest.fixture(scope="module")
def children() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All probes, started at once: most of their time is that of imports."""
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", CHILD.format(tensor=tensor, inside=inside, outside=outside), guard],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (guard, tensor, inside, outside, _) in PROBES.items()
    }
    yield started
    for child in started.values():
        child.kill()
        child.communicate()


@pytest.mark.parametrize("name", PROBES)
def test_reads_outside_are_illegal(children: dict[str, subprocess.Popen[str]], name: str) -> None:
    out, err = children[name].communicate(timeout=240)
    faulted = PROBES[name][-1]
    assert out.split() == (["inside"] if faulted else ["inside", "outside"]), err
    assert ("CUDA_ERROR_ILLEGAL_ADDRESS" in err) is faulted, err


@pytest.fixture(scope="module")
def memory() -> Memory:
    memory = Memory(devices.open_device("cuda"))
    assert memory.guards is None, memory.guards
    return memory


@pytest.fixture(scope="module")
def write(memory: Memory) -> Write:
    driver = Driver(memory.device.ordinal)
    source = """
    extern "C" __global__ void zero(unsigned char *at, int count) { for (int i = 0; i < count; ++i) at[i] = 0; }
    """
    kernel = driver.load(source, ["zero"])["zero"]

    def zero(address: int, count: int) -> None:
        values = (ctypes.c_uint64(address), ctypes.c_int(count))
        driver.launch(kernel, 1, 1, 0, devices.stream(memory.device), values)

    return zero


def end_of(tensor: torch.Tensor) -> int:
    return int(tensor.data_ptr()) + tensor.numel() * tensor.element_size()


def free_bytes() -> int:
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


@pytest.mark.parametrize("guard", Guard)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_hold_what_is_written_and_nothing_is_reported(memory: Memory, guard: Guard, dtype: torch.dtype) -> None:
    shapes = [(), (1,), (3, 5, 7), (2, 0, 3), (0,), (4096,), (1025, 1025)]
    with memory.arena(guard) as arena:
        tensors = [arena.tensor(f"x{i}", shape, dtype) for i, shape in enumerate(shapes)]
        for i, tensor in enumerate(tensors):
            tensor.fill_(i % 2)
        for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            assert (tensor.shape, tensor.dtype, tensor.device.type) == (shape, dtype, "cuda")
            assert tensor.device.index == memory.device.ordinal
            assert tensor.is_contiguous()
            assert torch.equal(tensor.cpu().double(), torch.full(shape, i % 2, dtype=torch.float64))
            least = 256 if guard is not Guard.AFTER else dtype.itemsize if dtype == torch.int32 else 16
            assert tensor.data_ptr() % least == 0
        assert arena.damage() == ()


def test_torch_computes_on_guarded_memory(memory: Memory) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(130, 70, device="cuda"), torch.randn(70, 50, device="cuda")
    for guard in (Guard.AFTER, Guard.BEFORE):
        with memory.arena(guard) as arena:
            x, y = arena.tensor("x", a.shape, a.dtype).copy_(a), arena.tensor("y", b.shape, b.dtype).copy_(b)
            out = torch.matmul(x, y, out=arena.tensor("out", (130, 50), a.dtype))
            assert torch.allclose(out, a @ b, rtol=1e-3, atol=1e-3)
            assert torch.equal(x.clone(), a)
            assert arena.damage() == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("guard", "side"),
    [(Guard.NONE, "before"), (Guard.NONE, "after"), (Guard.AFTER, "before"), (Guard.BEFORE, "after")],
    ids=str,
)
@pytest.mark.parametrize(("offset", "count"), [(0, 1), (7, 3), (0, 256)])
def test_damage_is_named(
    memory: Memory, write: Write, guard: Guard, side: str, dtype: torch.dtype, offset: int, count: int
) -> None:
    with memory.arena(guard) as arena:
        _, tensor, _ = (arena.tensor(label, (5, 7), dtype) for label in "abc")
        write(end_of(tensor) + offset if side == "after" else tensor.data_ptr() - offset - count, count)
        (damage,) = arena.damage()
        assert (damage.label, damage.side, damage.offset, damage.count) == ("b", side, offset, count)


def test_the_next_arena_has_the_same_addresses_and_asks_no_driver(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def addresses() -> list[int]:
        with memory.arena(Guard.AFTER) as arena:
            tensors = [arena.tensor("x", (size,), torch.bfloat16) for size in (3, 5000, 3, 3 << 20, 128 << 20)]
            far = arena.far("far", (1 << 20, 1 << 12), torch.bfloat16, (1 << 20) - 1)
            return [tensor.data_ptr() for tensor in [*tensors, far]]

    before = addresses()
    monkeypatch.setattr(memory.pages, "take", None)
    assert addresses() == before


def test_memory_beyond_the_bound_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(devices.open_device("cuda"))
    monkeypatch.setitem(under_test._IDLE_BYTES, "cuda", 64 << 20)
    before = free_bytes()
    with memory.arena(Guard.BEFORE) as arena:
        arena.tensor("workspace", (256 << 20,), torch.uint8).fill_(1)
        assert free_bytes() <= before - (256 << 20)
    assert free_bytes() > before - (64 << 20)


def test_a_far_tensor_takes_no_memory_and_its_tail_can_be_used(memory: Memory) -> None:
    before = free_bytes()
    with memory.arena(Guard.AFTER) as arena:
        far = arena.far("kv", (1 << 21, 3, 1000), torch.bfloat16, (1 << 21) - 2)
        assert far.shape == (1 << 21, 3, 1000)
        values = torch.arange(6000).reshape(2, 3, 1000).to(torch.bfloat16)
        far[-2:] = values.cuda()
        assert torch.equal(far[-2:].cpu(), values)
        index = torch.tensor([far.shape[0] - 1], device="cuda")
        assert torch.equal(far.index_select(0, index).cpu(), values[1:])
        assert arena.damage() == ()
        assert before - free_bytes() < 64 << 20


def test_writes_around_the_tail_of_a_far_tensor_are_damage(memory: Memory, write: Write) -> None:
    first = (1 << 20) - 2
    with memory.arena(Guard.NONE) as arena:
        far = arena.far("kv", (1 << 20, 1001), torch.bfloat16, first)
        write(far.data_ptr(), 4)
        write(far[first].data_ptr() - 5, 2)
        assert arena.damage() == (
            Damage(label="kv", side="before", offset=first * 2002 - 4, count=4),
            Damage(label="kv", side="before", offset=3, count=2),
        )


def test_no_memory_is_an_error_that_says_so_and_takes_nothing(memory: Memory) -> None:
    before = free_bytes()
    with memory.arena(Guard.AFTER) as arena, pytest.raises(RuntimeError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        arena.tensor("x", (1 << 40,), torch.uint8)
    assert free_bytes() >= before
