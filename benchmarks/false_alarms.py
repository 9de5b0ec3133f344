"""Does the oracle ever accuse a right kernel? Many small requests of trusted attention kernels, judged by every tier.

    python benchmarks/false_alarms.py --json FILE [--requests 1000000] [--seed 0] [--library flashinfer=FOLDER]

Each kernel runs in a process of its own, all of them side by side. A request of a batch counts as one case. The file
holds, per kernel: cases, outputs judged, false alarms (with the case), and per input strategy the largest share of the
hard budget and the mean energy, the fingerprint of the kernel's arithmetic.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from kerneltest import discovery
from kerneltest.model import Case, Kernel, Pattern, Unsupported, encode

BATCH = 1024
KERNELS = (
    "flashinfer.paged_prefill[fa2]",
    "flashinfer.paged_prefill[fa3]",
    "torch.paged_prefill[sdpa]",
    "triton.paged_prefill[online]",
)
# Independent random data exercise every tier, so they are most of the cases; the rest share what is left.
GENERIC_SHARE = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=1_000_000, help="over all kernels together")
    parser.add_argument("--seconds", type=float, default=480.0, help="stop after that long, with what there is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--library", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--kernel", action="append", choices=KERNELS)
    arguments = parser.parse_args()
    sys.path[:0] = [text.partition("=")[2] for text in arguments.library]
    names = arguments.kernel or list(KERNELS)
    share = -(-arguments.requests // len(names))
    jobs = [
        (name, share, arguments.seed, arguments.device, arguments.batch, arguments.seconds, list(sys.path))
        for name in names
    ]
    with multiprocessing.get_context("spawn").Pool(len(jobs)) as pool:
        results = {}
        for result in pool.imap_unordered(judge_kernel, jobs):
            results[result["kernel"]] = result
            print(line(result), flush=True)
    total = sum(result["cases"] for result in results.values())
    alarms = sum(len(result["false_alarms"]) for result in results.values())
    kept = {
        "schema": "kerneltest.false_alarms/1",
        "command": " ".join(sys.argv),
        "cases": total,
        "false_alarms": alarms,
        "kernels": [results[name] for name in names],
    }
    arguments.json.write_text(json.dumps(kept, indent=2) + "\n")
    print(f"{total} cases, {alarms} false alarms")
    raise SystemExit(1 if alarms else 0)


def line(result: dict[str, Any]) -> str:
    if result.get("unmet"):
        return f"{result['kernel']}: {result['unmet']}"
    shares = ", ".join(f"{name} {share:.2f}" for name, share in result["used"].get("generic", {}).items())
    energy = ", ".join(f"{name} {value:.3f}" for name, value in result["energy"].items())
    alarms = len(result["false_alarms"])
    return (
        f"{result['kernel']}: {result['cases']} cases, {result['outputs']} outputs, {alarms} false alarms, "
        f"share on generic inputs {shares}; energy {energy}; {result['seconds']:.0f} s"
    )


def draw(rng: random.Random, operator: Any, batch: int) -> Case[Any]:
    """A batch of small requests; a few longer ones among them."""
    paged = sys.modules[f"{discovery.PACKAGE}.attention.paged_prefill"]
    generic = [s.name for s in operator.inputs if s.tier == "generic"]
    others = [s.name for s in operator.inputs if s.tier != "generic"]
    inputs = rng.choice(generic if rng.random() < GENERIC_SHARE else others)
    causal = rng.random() < 0.5
    requests = []
    for _ in range(batch):
        qo_len = rng.choice((1, 1, 1, 2, 3, 7))
        kv_len = round(2 ** rng.uniform(0, 6.5)) if rng.random() < 0.98 else rng.randint(100, 1500)
        requests.append(paged.Request(qo_len=qo_len, kv_len=max(kv_len, qo_len) if causal else kv_len))
    axes = paged.PagedPrefill(
        requests=tuple(requests),
        dtype=rng.choice(("bfloat16", "float16")),
        head_dim=rng.choice((64, 128)),
        kv_heads=1,
        group=rng.choice((1, 4, 8)),
        page_size=rng.choice((1, 16)),
        causal=causal,
        shuffled=rng.random() < 0.5,
        spare_pages=0,
        sm_scale=paged.LN_2 if inputs == "dyadic" else None,
    )
    return Case(operator=operator.name, axes=axes, inputs=inputs, seed=rng.getrandbits(32))


def judge_kernel(job: tuple[str, int, int, str, int, float, list[str]]) -> dict[str, Any]:
    name, wanted, seed, device_name, batch, seconds, path = job
    sys.path[:] = path
    import torch

    if device_name == "cpu" or not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    from kerneltest.worker.device import open_device
    from kerneltest.worker.execution import Execution
    from kerneltest.worker.rig import Rig

    torch.set_num_threads(2)
    root = discovery.builtin_root()
    discovery.use_roots([root])
    kernel = find(root, name)
    device = open_device(device_name)
    if reason := kernel.unmet(device, {}):
        return {"kernel": name, "unmet": reason, "cases": 0, "outputs": 0, "false_alarms": []}
    rig, rng = Rig(device), random.Random(f"{seed}/{name}")
    begun, cases, outputs, launches = time.monotonic(), 0, 0, 0
    by_inputs: dict[str, int] = defaultdict(int)
    unsupported: dict[str, int] = defaultdict(int)
    used: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    energies: dict[str, list[float]] = defaultdict(list)
    largest = {"energy of a row": 0.0, "z of a row": 0.0, "z of a batch": 0.0}
    alarms: list[dict[str, Any]] = []
    while cases < wanted and time.monotonic() - begun < seconds:
        case = draw(rng, kernel.operator, batch)
        if reason := kernel.unsupported(case, device):
            unsupported[reason] += 1
            continue
        execution = Execution(kernel, case, rig)
        try:
            execution.observations.append(execution.observe(execution.uniform(Pattern.FINITE)))
        except Unsupported as refused:
            unsupported[str(refused)] += 1
            continue
        launches += 1
        cases += batch
        by_inputs[case.inputs] += batch
        for output, verdict in execution.verdicts.items():
            outputs += verdict.comparison.total
            used[case.inputs][output] = max(used[case.inputs][output], verdict.used)
            if verdict.energy is not None:
                energies[case.inputs].append(verdict.energy)
                largest["energy of a row"] = max(largest["energy of a row"], verdict.worst_energy)
                largest["z of a row"] = max(largest["z of a row"], verdict.z_row)
                largest["z of a batch"] = max(largest["z of a batch"], verdict.z_case)
            if verdict.failed is not None:
                what = f"{output}: {verdict.failed.value}, share {verdict.used:.3g}"
                alarms.append({"what": what, "case": encode(case)})
    return {
        "kernel": name,
        "device": encode(device),
        "torch": torch.__version__,
        "cases": cases,
        "launches": launches,
        "outputs": outputs,
        "cases_by_inputs": dict(by_inputs),
        "refused_batches": dict(unsupported),
        "false_alarms": alarms,
        "used": {inputs: dict(shares) for inputs, shares in used.items()},
        "energy": {inputs: sum(values) / len(values) for inputs, values in sorted(energies.items())},
        "largest": largest,
        "seconds": round(time.monotonic() - begun, 1),
    }


def find(root: Path, name: str) -> Kernel:
    for path in discovery.suite_files(root):
        for kernel in discovery.load_kernels(path).values():
            if kernel.name == name:
                return kernel
    raise SystemExit(f"no kernel {name}")


if __name__ == "__main__":
    main()
