"""The performance table of the README: what poison costs, and how many cases a second are run and judged.

    python benchmarks/figures.py [--device cuda] [--cases 200] [--library flashinfer=FOLDER]

Cases are small (batch <= 4, kv_len <= 512); each kernel's are run once to warm up, then timed from drawing to verdict.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kerneltest import discovery
from kerneltest.engine.hunt import Target, hunt
from kerneltest.engine.pool import WorkerPool
from kerneltest.engine.profile import Profile
from kerneltest.engine.text import where
from kerneltest.model import Kernel, Size, Start

SMALL = Size(batch=4, qo_len=128, kv_len=512, heads=8)
LAUNCHES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--library", action="append", default=[], metavar="NAME=FOLDER")
    arguments = parser.parse_args()
    root = discovery.builtin_root()
    discovery.use_roots([root])
    libraries = {name: Path(folder) for name, _, folder in (text.partition("=") for text in arguments.library)}
    start = Start(device=arguments.device, suite_roots=(str(root),), libraries=("flashinfer", "triton"))
    pool = WorkerPool(start, libraries)
    started = pool.started
    if started.device is None:
        raise SystemExit(started.error)
    print(f"{where(started)}\n")
    print("| kernel | cases | launches | seconds | checked cases a second |\n|---|---|---|---|---|")
    for path in discovery.suite_files(root):
        for kernel in discovery.load_kernels(path).values():
            reason = kernel.unmet(started.device, started.missing)
            print(
                f"| {kernel.name} | - | - | - | {reason} |" if reason else row(pool, kernel, path, arguments.cases),
                flush=True,
            )
    pool.close()
    if started.device.kind == "cuda":
        poison(started.device.ordinal)


def row(pool: WorkerPool, kernel: Kernel, path: Path, cases: int) -> str:
    """Warm up, then time the same cases."""
    profile = Profile(name="figures", cases=cases, cpu=SMALL, cuda=SMALL)
    target = Target(kernel=kernel, source=path)
    hunt(target, pool, profile, 1)
    trail = hunt(target, pool, profile, 1)
    if trail.caught:
        return f"| {kernel.name} | {len(trail.cases)} | - | - | RED: {trail.caught.finding.what} |"
    rate = len(trail.cases) / trail.seconds
    return f"| {kernel.name} | {len(trail.cases)} | {trail.launches} | {trail.seconds:.2f} | {rate:.0f} |"


def poison(ordinal: int) -> None:
    """Time a fill as one node of a graph, so that the host's launch overhead stays out."""
    import torch

    from kerneltest.worker.onchip import OnChip

    chip = OnChip(ordinal)
    print("\n| poison | microseconds a launch | read back |\n|---|---|---|")
    for name, fill, prove in (
        ("shared memory", chip.fill_shared, chip.shared_coverage),
        ("registers", chip.fill_registers, chip.register_coverage),
    ):
        share = prove(0xFFFFFFFF, torch.cuda.current_stream().cuda_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(LAUNCHES):
                fill(0xFFFFFFFF, torch.cuda.current_stream().cuda_stream)
        graph.replay()
        times = []
        for _ in range(9):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1000 * begin.elapsed_time(end) / LAUNCHES)
        print(f"| {name} | {sorted(times)[len(times) // 2]:.1f} | {100 * share:.4g} % |")
    print(f"\n{chip.sm_count} SMs with {chip.shared_bytes} bytes of shared memory; median of 9 x {LAUNCHES} launches")


if __name__ == "__main__":
    main()
