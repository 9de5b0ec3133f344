"""What the oracle costs on a GPU: the comparison in one pass, and the float64 reference with its budget.

    python benchmarks/oracle.py [--sweep]

Medians over CUDA events around several launches, after warm-up. ``--sweep`` times other tunings of the pass.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from itertools import product

import torch
import triton

from kerneltest.model import BF16, WGMMA_16BIT, ErrorBudget, Noise, Numerics
from kerneltest.oracle.attention import attention_budget
from kerneltest.oracle.attention_terms import Attended, attention_terms
from kerneltest.oracle.compare import compare, compare_step_by_step, narrowed
from kerneltest.oracle.fused import NOISY, PLAIN, Tuning, launch

ROWS, DIM = 2**18, 128
HEADS, TOKENS = 8, 4096
# Products of two matrices in the reference with budget: q kᵀ, |q||k|ᵀ, p v, p|v|, (p A)|v|, p² v².
PRODUCTS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name()
    print(f"{name}, CUDA {torch.version.cuda}, PyTorch {torch.__version__}, Triton {triton.__version__}, ", end="")
    print(f"Python {platform.python_version()}\n")
    comparison()
    if arguments.sweep:
        sweep()
    reference()


def timed(work: Callable[[], object], *, repeats: int = 15, launches: int = 10, waits: bool = False) -> float:
    """Milliseconds for one call: the median of ``repeats`` runs of ``launches`` calls, between CUDA events.

    It is the device's time alone, unless the work ``waits`` for the device itself.
    """
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if not waits:
            # Keeps the device busy until all calls are queued; else the host's time would be measured.
            torch.cuda._sleep(4_000_000)
        start.record()
        for _ in range(1 if waits else launches):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / (1 if waits else launches))
    return statistics.median(times)


def output(*, noise: bool) -> tuple[torch.Tensor, ErrorBudget]:
    """A bf16 output with the errors of a good kernel."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(ROWS, DIM, dtype=torch.float64, device="cuda", generator=generator)

    ref = normal()
    sigma = BF16.u / 4 * (0.2 + normal().abs())
    actual = (ref + sigma * normal()).bfloat16()
    freedom = torch.ones(ROWS, dtype=torch.float64, device="cuda")
    noisy = Noise(det=sigma / 8, sigma=sigma, freedom=freedom, along=lambda weight: (weight.sum(-1), weight.sum(-1)))
    return actual, ErrorBudget(ref=ref, hard=16 * sigma, out=BF16, noise=noisy if noise else None)


def bytes_of(actual: torch.Tensor, budget: ErrorBudget) -> int:
    """What the pass must read and write: each tensor once, the rows' energies. Only a failure writes its map."""
    noise = budget.noise
    tensors = [actual, budget.ref, budget.hard, *((noise.det, noise.sigma) if noise else ())]
    energies = 8 * actual[..., 0].numel() if noise else 0
    return sum(t.numel() * t.element_size() for t in tensors) + energies


def copied(amount: int) -> float:
    """GB/s of a copy on the device that reads and writes ``amount`` bytes in all."""
    source = torch.ones(amount // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return amount / timed(lambda: target.copy_(source)) / 1e6


# Noise or not, how hard is stored, how det and sigma are. The budgets of kerneltest.oracle are float64, and compare()
# judges bounds as they are stored; narrowed() makes float32 of hard, bfloat16 of det and sigma.
F64, F32, B16 = torch.float64, torch.float32, torch.bfloat16
VARIANTS = (
    ("no noise, hard float64: compare() today", False, F64, F64),
    ("no noise, hard float32: narrowed()", False, F32, B16),
    ("noise, all bounds float64: compare() today", True, F64, F64),
    ("noise, all bounds float32", True, F32, F32),
    ("noise, hard float32, det and sigma bfloat16: narrowed()", True, F32, B16),
    ("noise, all bounds bfloat16", True, B16, B16),
)


def comparison() -> None:
    print(f"One pass over 2^{(ROWS * DIM).bit_length() - 1} bf16 outputs [{ROWS}, {DIM}], reference float64. ", end="")
    print("Device time; the last columns are compare() with the host's part and its one wait, and narrowed() alone.\n")
    print(
        "| | MB | ms | GB/s | of copy | assert_close, ms | ratio | step by step, ms | compare(), ms | narrowed(), ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, noise, hard, spread in VARIANTS:
        actual, wide = output(noise=noise)
        budget = wide if hard == F64 else narrowed(wide, hard, spread)
        amount = bytes_of(actual, budget)
        copy = copied(amount)
        ours = timed(lambda a=actual, b=budget: launch(a, b))
        closely = timed(lambda a=actual, r=budget.ref: close(a, r), waits=True)
        steps = timed(lambda a=actual, b=budget: compare_step_by_step(a, b), repeats=5, waits=True)
        whole = timed(lambda a=actual, b=budget: compare(a, b), waits=True)
        narrow = 0.0 if hard == F64 else timed(lambda b=wide, h=hard, s=spread: narrowed(b, h, s), repeats=5)
        speed = amount / ours / 1e6
        print(f"| {name} | {amount / 1e6:.0f} | {ours:.3f} | {speed:.0f} | {speed / copy:.0%} of {copy:.0f} ", end="")
        print(f"| {closely:.2f} | {closely / ours:.1f} | {steps:.2f} | {whole:.3f} | {narrow:.2f} |", flush=True)
    print()


def close(actual: torch.Tensor, ref: torch.Tensor) -> None:
    torch.testing.assert_close(actual, ref, rtol=1.0, atol=1.0, check_dtype=False)


def sweep() -> None:
    """Each variant that compare() or narrowed() leads to, its ten fastest tunings and the usual one."""
    print("| variant | tile | warps | stages | registers | programs | ms |\n|---|---|---|---|---|---|---|")
    for name, noise, hard, spread in (VARIANTS[i] for i in (0, 1, 2, 4)):
        actual, budget = output(noise=noise)
        budget = budget if hard == F64 else narrowed(budget, hard, spread)
        usual = NOISY if noise else PLAIN
        rows = []
        for (tile, warps), stages, registers, programs in product(
            ((128, 1), (256, 2), (512, 4)),
            (2, 3, 4),
            (96, 112, 128) if noise else (64, 80, 96),
            (2112, 2640, 3168, 4224),
        ):
            tuning = Tuning(tile=tile, warps=warps, stages=stages, registers=registers, programs=programs // warps)
            rows.append((timed(lambda a=actual, b=budget, t=tuning: launch(a, b, t), repeats=5), tuning))
        rows.sort(key=lambda row: row[0])
        rows = [*rows[:10], (timed(lambda a=actual, b=budget: launch(a, b)), usual)]
        for ms, t in rows:
            print(
                f"| {name} | {t.tile} | {t.warps} | {t.stages} | {t.registers} | {t.programs} | {ms:.3f} |", flush=True
            )
    print()


def reference() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, HEADS, TOKENS, DIM, device="cuda", generator=generator).bfloat16().contiguous() for _ in range(3)
    )
    seen = torch.ones(1, TOKENS, TOKENS, dtype=torch.bool, device="cuda")
    numerics = Numerics(qk=WGMMA_16BIT, pv=WGMMA_16BIT, p=BF16, out=BF16)
    x = Attended(q=q, k=k, v=v, seen=seen, scale=DIM**-0.5)
    wide = [t.double()[0] for t in (q, k, v)]
    flops = 2 * HEADS * TOKENS * TOKENS * DIM
    weights = torch.rand(HEADS, TOKENS, TOKENS, dtype=torch.float64, device="cuda", generator=generator)
    times = {
        "q kᵀ, torch.bmm alone": (flops, timed(lambda: torch.bmm(wide[0], wide[1].mT), launches=3)),
        "p v, torch.bmm alone": (flops, timed(lambda: torch.bmm(weights, wide[2]), launches=3)),
    }
    both = [sum(column) for column in zip(*times.values(), strict=True)]
    # Two of the six have the form of q kᵀ, four that of p v.
    alone = sum(n * ms for n, (_, ms) in zip((2, 4), times.values(), strict=True))
    times["both products, torch.bmm alone"] = (both[0], both[1])
    times["the six products, torch.bmm alone"] = (PRODUCTS * flops, alone)

    def with_budget() -> None:
        attention_budget(attention_terms(x), numerics, head_dim=DIM, tier="hard")

    times["reference with budget"] = (PRODUCTS * flops, timed(with_budget, repeats=7, waits=True))
    print(f"Float64 reference of attention with budget, [1, {HEADS}, {TOKENS}, {DIM}] bf16, no mask. ", end="")
    print(f"{PRODUCTS} matrix products count, of 2·{HEADS}·{TOKENS}²·{DIM} operations each, and nothing else.\n")
    print("| | GFLOP | ms | TFLOP/s | of bmm |\n|---|---|---|---|---|")
    fastest = times["both products, torch.bmm alone"]
    for name, (work, ms) in times.items():
        share = (work / ms) / (fastest[0] / fastest[1])
        print(f"| {name} | {work / 1e9:.0f} | {ms:.2f} | {work / ms / 1e9:.1f} | {share:.0%} |")


if __name__ == "__main__":
    main()
