"""What company costs: a launch sequence against its parts, guard pages, and the same stray read under memcheck.

    python benchmarks/sequences.py [--device cuda] [--library flashinfer=FOLDER]

The parts of a sequence are its launches, each staged, waited for and copied away by itself, and one checked case.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from kerneltest import discovery
from kerneltest.model import (
    Again,
    Case,
    Data,
    Guard,
    Kernel,
    LaunchSequence,
    Neighbour,
    PageTable,
    Pattern,
    Place,
    Poison,
    Step,
    TorchOp,
)

TIMES = 20
MEMCHECK_SECONDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--library", action="append", default=[], metavar="NAME=FOLDER")
    arguments = parser.parse_args()
    sys.path[:0] = [folder for _, _, folder in (text.partition("=") for text in arguments.library)]
    import torch

    if arguments.device == "cpu" or not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
    from kerneltest.worker.device import open_device
    from kerneltest.worker.rig import Rig

    discovery.use_roots([discovery.builtin_root()])
    device = open_device(arguments.device)
    rig = Rig(device)
    print(f"{device.name}, torch {torch.__version__}; medians of {TIMES}\n")
    kernels = {
        kernel.name: kernel
        for path in discovery.suite_files(discovery.builtin_root())
        for kernel in discovery.load_kernels(path).values()
        if kernel.operator.name == "paged_prefill"
        and device.kind in kernel.devices
        and (kernel.library != "flashinfer" or arguments.library)
    }
    print("| kernel | five steps, ms | launches and a checked case | ratio | guarded case | unguarded | ratio |")
    print("|---|---|---|---|---|---|---|")
    for kernel in kernels.values():
        print(row(kernel, kernels, rig), flush=True)
    if device.kind == "cuda":
        stray_reads()


def a_case(kernel: Kernel, **changes: Any) -> Case[Any]:
    module = sys.modules[f"{discovery.PACKAGE}.attention.paged_prefill"]
    requests = tuple(module.Request(qo_len=rows, kv_len=keys) for rows, keys in ((64, 200), (1, 333), (17, 40)))
    axes = module.PagedPrefill(
        requests=requests,
        dtype="bfloat16",
        head_dim=128,
        kv_heads=2,
        group=2,
        page_size=16,
        causal=True,
        shuffled=True,
        spare_pages=1,
    )
    return Case(operator=kernel.operator.name, axes=axes, inputs="generic", seed=1, **changes)


def row(kernel: Kernel, kernels: dict[str, Kernel], rig: Any) -> str:
    from kerneltest.worker.company import torch_ops
    from kerneltest.worker.company.play import play
    from kerneltest.worker.device import synchronize
    from kerneltest.worker.execute import execute
    from kerneltest.worker.execution import Execution

    case = a_case(kernel)
    neighbour = next(other for other in kernels.values() if other.name.startswith("torch"))
    steps: tuple[Step, ...] = (
        TorchOp(op="softmax", elements=1 << 16, data=Data.NAN),
        Again(case=replace(case, seed=2)),
        PageTable(),
        Neighbour(kernel=neighbour.name, case=case),
        Poison(place=Place.WORKSPACE, pattern=Pattern.NAN),
    )
    sequence = LaunchSequence(case=case, steps=steps)

    def whole() -> None:
        rig.judged.clear()  # or the verdict would be the last one's
        outcome = play(kernel, sequence, rig, {neighbour.name: neighbour})
        if outcome.finding or outcome.reason:
            raise SystemExit(f"{kernel.name}: {outcome}")

    def launch(of: Kernel) -> Callable[[], None]:
        execution = Execution(of, case, rig)
        return lambda: void(execution.observe(execution.uniform(Pattern.ZERO)))

    def operation() -> None:
        torch_ops.OPS["softmax"](torch_ops.numbers(1 << 16, Data.NAN, rig.device.torch_name))
        synchronize(rig.device)

    def checked(guard: Guard) -> Callable[[], None]:
        return lambda: void(execute(kernel, replace(case, guard=guard), rig))

    # Alone, the other case, the other page table, and the launch under test twice.
    own = 5 * milliseconds(launch(kernel))
    parts = own + milliseconds(launch(neighbour)) + milliseconds(operation) + milliseconds(checked(Guard.NONE))
    guarded, plain = in_turn(checked(Guard.AFTER), checked(Guard.NONE))
    took = milliseconds(whole)
    return (
        f"| {kernel.name} | {took:.1f} | {parts:.1f} | {took / parts:.2f} | {guarded:.1f} | {plain:.1f} | "
        f"{guarded / plain:.2f} |"
    )


def void(_value: object) -> None: ...


def milliseconds(act: Callable[[], None]) -> float:
    for _ in range(3):
        act()
    times = []
    for _ in range(TIMES):
        begin = time.perf_counter()
        act()
        times.append(1000 * (time.perf_counter() - begin))
    return median(times)


def in_turn(*acts: Callable[[], None]) -> list[float]:
    """Medians in milliseconds of acts that take turns, so that whatever slows the machine slows all of them."""
    times: list[list[float]] = [[] for _ in acts]
    for _ in range(3 * TIMES):
        for act, took in zip(acts, times, strict=True):
            begin = time.perf_counter()
            act()
            took.append(1000 * (time.perf_counter() - begin))
    return [median(took[3:]) for took in times]


# One int32 past the end of a table of 1024, by a kernel that does not use it.
STRAY = (
    """
import ctypes, sys
import torch
from kerneltest.model import Guard
from kerneltest.worker.device import open_device
from kerneltest.worker.driver import Driver
from kerneltest.worker.memory import Memory

SOURCE = """
    + repr(
        """
extern "C" __global__ void stray(const volatile int *table, int n, int *out)
{
    int sum = 0;
    for (int i = 0; i < n; ++i) sum += table[i];
    int next = table[n];
    (void)next;
    *out = sum;
}
"""
    )
    + """
device = open_device("cuda")
driver = Driver(0)
kernel = driver.load(SOURCE, ["stray"])["stray"]
out = torch.zeros(1, dtype=torch.int32, device="cuda")
if sys.argv[1] == "guard":
    arena = Memory(device).arena(Guard.AFTER)
    table = arena.tensor("table", (1024,), torch.int32)
    table.fill_(1)
    address = table.data_ptr()
elif sys.argv[1] == "cuMemAlloc":
    with driver.current():
        address = int(driver.call("cuMemAlloc", 4096))
        driver.call("cuMemsetD32", address, 1, 1024)
else:
    table = torch.ones(1024, dtype=torch.int32, device="cuda")
    address = table.data_ptr()
torch.cuda.synchronize()
driver.launch(kernel, 1, 1, 0, 0, (ctypes.c_uint64(address), ctypes.c_int32(1024), ctypes.c_uint64(out.data_ptr())))
torch.cuda.synchronize()
print("not seen, sum", out.item())
"""
)


def stray_reads() -> None:
    """The same kernel in memory at a guard page, and under compute-sanitizer in two allocators' memory."""
    tool = shutil.which("compute-sanitizer")
    print("\n| one int32 read past the end of a table | seen | seconds of the whole process |\n|---|---|---|")
    for place, sanitized in (("guard", False), ("torch", False), ("cuMemAlloc", True), ("torch", True)):
        if sanitized and tool is None:
            print(f"| {place}, memcheck | not run: no compute-sanitizer here | |")
            continue
        prefix = [tool, "--tool", "memcheck"] if sanitized and tool else []
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*prefix, sys.executable, "-c", STRAY, place],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            said = process.communicate(timeout=MEMCHECK_SECONDS)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            print(f"| {place}{', memcheck' if sanitized else ''} | no answer in {MEMCHECK_SECONDS} s | |", flush=True)
            continue
        seconds = time.perf_counter() - begin
        wanted = "Invalid __global__ read" if sanitized else "illegal memory access"
        verdict = "yes" if wanted in said else "no" if "not seen" in said else said.strip().splitlines()[-1][:80]
        print(f"| {place}{', memcheck' if sanitized else ''} | {verdict} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
