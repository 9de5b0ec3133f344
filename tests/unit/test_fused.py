"""The comparison in one pass, run by Triton's interpreter, against the comparison step by step: equal on every edge.

The interpreter is chosen when Triton is imported, so it runs in a process of its own: this file, as a program.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from kerneltest.model import BF16, FP16, FP32, ErrorBudget, Fmt, Noise
from kerneltest.oracle import compare as comparison
from kerneltest.oracle.compare import Comparison, compare_in_one_pass, compare_step_by_step, narrowed, variance
from kerneltest.oracle.rounding import half_ulp

INF, NAN = math.inf, math.nan
Sample = tuple[torch.Tensor, ErrorBudget]


def numbers_around(fmt: Fmt) -> torch.Tensor:
    """Numbers of the format where rounding is delicate, as float64: both signs, the smallest and the largest first."""
    tiny = 2.0 ** (fmt.emin - fmt.t + 1)
    steps = torch.arange(5, dtype=torch.float64)
    one, ulp = 1.0, 2.0 ** (1 - fmt.t)
    positive = torch.cat(
        [
            steps * tiny,
            2.0**fmt.emin + (steps - 2) * tiny,
            one + steps * ulp,
            one - steps * ulp / 2,
            fmt.max - steps * fmt.max * fmt.u,
            torch.tensor([INF], dtype=torch.float64),
        ]
    )
    positive = positive.to(getattr(torch, fmt.name)).double().unique()
    return torch.cat([positive, -positive, torch.tensor([NAN], dtype=torch.float64)])


def edges(fmt: Fmt) -> Sample:
    """Each of those numbers against references at it, beside it and at the ties, one float64 off them as well, with
    bounds from nothing to everything; by rising share, so that tiles hold what is all well or all just not.
    """
    value = numbers_around(fmt)
    near = value.nan_to_num(0.0, posinf=fmt.max, neginf=-fmt.max)
    gap = half_ulp(ErrorBudget(ref=near, hard=torch.zeros_like(near), out=fmt))
    steps = torch.tensor([-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3], dtype=torch.float64)
    ties = near[:, None] + steps * gap[:, None]
    infinite = torch.full_like(ties, INF)
    ends = torch.tensor([INF, -INF, 0.0, -0.0], dtype=torch.float64).expand(len(value), 4)
    refs = torch.cat([ties.nextafter(-infinite), ties, ties.nextafter(infinite), ends], -1)
    hards = [0.0, 2.0**-160, 2.0 ** (fmt.emin - fmt.t), fmt.u / 2, fmt.u, fmt.max * fmt.u, INF]
    hard = torch.tensor(hards, dtype=torch.float64).expand(*refs.shape, -1).flatten()
    ref = refs[..., None].expand(*refs.shape, len(hards)).flatten()
    actual = value.repeat_interleave(refs.shape[-1] * len(hards))
    share = (actual - ref).abs() / (hard + half_ulp(ErrorBudget(ref=ref, hard=hard, out=fmt)))
    order = share.nan_to_num(INF, posinf=INF).argsort(stable=True)
    return actual[order].to(getattr(torch, fmt.name)), ErrorBudget(ref=ref[order], hard=hard[order], out=fmt)


def after_large_shares(sample: Sample) -> Sample:
    """The same behind two tiles that use more than their budget: from then on only what is wrong is news."""
    actual, budget = sample
    wrong = torch.full((256,), 2.0)
    head = torch.ones(256, dtype=torch.float64)
    ref, hard = torch.cat([head, budget.ref]), torch.cat([0 * head, budget.hard])
    return torch.cat([wrong.to(actual.dtype), actual]), replace(budget, ref=ref, hard=hard)


def noisy(
    shape: tuple[int, ...], fmt: Fmt = BF16, dtype: torch.dtype | None = None, *, scale: float = 1.0, seed: int = 0
) -> Sample:
    """Errors that look like those of a good kernel, but larger than is likely every now and then."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    ref = scale * normal()
    sigma = scale * fmt.u * (0.2 + normal().abs())
    det = sigma * normal().abs() / 8
    hard = 60 * sigma + det
    error = sigma * normal()
    error.view(-1)[7::151] *= 16
    actual = (ref + error).to(dtype or getattr(torch, fmt.name))
    noise = Noise(
        det=det, sigma=sigma, freedom=torch.ones(shape[:-1]), along=lambda weight: (weight.sum(-1), weight.sum(-1))
    )
    return actual, ErrorBudget(ref=ref, hard=hard, out=fmt, noise=noise)


def plain(sample: Sample) -> Sample:
    return sample[0], replace(sample[1], noise=None)


def changed(sample: Sample, change: Callable[[torch.Tensor, ErrorBudget], Any]) -> Sample:
    change(sample[0], sample[1])
    return sample


def spoiled(actual: torch.Tensor, budget: ErrorBudget) -> None:
    """NaN, Inf and zeros wherever they mean something of their own."""
    actual.view(-1)[5::97] = NAN
    actual.view(-1)[11::89] = INF
    actual.view(-1)[17::83] = -INF
    budget.ref.view(-1)[17::166] = -INF
    budget.ref.view(-1)[23::79] = INF
    budget.ref.view(-1)[29::73] = 0.0
    actual.view(-1)[29::73] = -0.0
    budget.hard.view(-1)[31::71] = INF


def blocks(values: list[float], *, columns: int = 64) -> Sample:
    """A row of equal errors for each of the values, in units of half an ulp at 1.5, where the bound is as large."""
    unit = 2.0**-8
    actual = torch.full((len(values), columns), 1.5, dtype=torch.float64)
    ref = actual - unit * torch.tensor(values, dtype=torch.float64)[:, None]
    return actual.bfloat16(), ErrorBudget(ref=ref, hard=torch.full_like(ref, unit), out=BF16)


def misread_references(fmt: Fmt) -> Sample:
    """The last bit's half is h, errors are 0.875h and all that float32 can lose of a number just below 2; little noise.

    The first rows have larger errors: the others are judged in float32.
    """
    half = fmt.u
    rounded_to = torch.full((8, 128), 2 - 8 * half, dtype=torch.float64) - 0.875 * half
    ref = rounded_to - 0.999 * 2.0**-24
    ref[:2] -= half
    noise = Noise(
        det=torch.full_like(ref, half / 64),
        sigma=torch.full_like(ref, half / 4),
        freedom=torch.ones(8),
        along=lambda weight: (weight.sum(-1), weight.sum(-1)),
    )
    actual = torch.full_like(ref, 2 - 8 * half).to(getattr(torch, fmt.name))
    return actual, ErrorBudget(ref=ref, hard=torch.full_like(ref, 2 * half), out=fmt, noise=noise)


def beside_powers_of_two(fmt: Fmt) -> Sample:
    """The far end of the interval is 1, or so near to it that float32 takes it for 1; below it half an ulp is half."""
    half = fmt.u / 2
    off = torch.tensor([-(2.0**-40), 0.0, 2.0**-40, -(2.0**-26), -(2.0**-25), -(2.0**-24), -(2.0**-23), 2.0**-24])
    ref = (1 - 4 * half) + off.double().repeat_interleave(2)[:, None].expand(16, 128).clone()
    actual = torch.full_like(ref, 1 - 6 * half)
    actual[:2] -= 2 * half
    sigma = torch.full_like(ref, half)
    noise = Noise(
        det=sigma / 8, sigma=sigma, freedom=torch.ones(16), along=lambda weight: (weight.sum(-1), weight.sum(-1))
    )
    budget = ErrorBudget(ref=ref, hard=torch.full_like(ref, 4 * half), out=fmt, noise=noise)
    return actual.to(getattr(torch, fmt.name)), budget


@cache
def samples() -> dict[str, Sample]:
    """Built the same way in both processes."""
    found = {f"edges {fmt.name}": edges(fmt) for fmt in (BF16, FP16, FP32)}
    found |= {f"news at the {name}": after_large_shares(sample) for name, sample in found.items()}
    for shape in ((1,), (3, 1), (5, 7), (37, 64), (2, 3, 128), (9, 192), (3, 512), (2, 576)):
        found[f"noise {shape}"] = noisy(shape)
        found[f"plain {shape}"] = plain(noisy(shape))
        found[f"spoiled {shape}"] = changed(noisy(shape), spoiled)
    for fmt, dtype, scale in product((BF16, FP16, FP32), ("bfloat16", "float16", "float32"), (2.0**-140, 1.0)):
        found[f"{dtype} for {fmt.name} {scale:.0e}"] = noisy((9, 128), fmt, getattr(torch, dtype), scale=scale)
    found["float64 for bfloat16"] = noisy((9, 128), BF16, torch.float64)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        actual, budget = changed(noisy((40, 128)), spoiled)
        found[f"narrowed to {name}"] = actual, narrowed(budget, dtype, dtype)
    found["all exact"] = blocks([0.0] * 40)
    right = torch.tensor([[2.0, 0.0, -1.5]] * 300)
    found["all exact in float32"] = right, ErrorBudget(ref=right.double(), hard=torch.full_like(right, 1e-6), out=FP32)
    found["shares rise"] = blocks([n / 64 for n in range(40)])
    found["shares fall"] = blocks([(40 - n) / 64 for n in range(40)])
    found["many have the largest share"] = blocks([0.25, 0.5, 0.75, 0.75, 0.5, 0.75] * 10)
    found["many equals in many programs"] = blocks([0.5] * 40, columns=128)
    # One float64 apart: float32 cannot tell them apart, the verdict must.
    found["shares beyond float32"] = blocks([0.5, 0.5 + 2.0**-40, 0.5 + 2.0**-30] * 5, columns=128)
    # References that float32 rounds to the same number, whose errors it takes for 0.5.
    found["references beyond float32"] = blocks([0.5 + 0.2 * 2.0**-15] * 2 + [0.5 + 0.45 * 2.0**-15] * 4, columns=128)
    found |= {f"energies at their worst {fmt.name}": misread_references(fmt) for fmt in (BF16, FP16)}
    found |= {f"energies by a power of two {fmt.name}": beside_powers_of_two(fmt) for fmt in (BF16, FP16)}
    tiny = torch.logspace(-320, -50, 300, dtype=torch.float64)
    found["errors below float32"] = torch.zeros(300), ErrorBudget(ref=tiny, hard=0 * tiny, out=FP32)
    large = torch.tensor([0.5, 0.5, 0.8, 0.8], dtype=torch.float64).repeat_interleave(128) * 4e38
    actual, budget = noisy((9, 128), FP32)
    budget.ref[4:], budget.hard[6:] = actual[4:].double(), 0.0
    budget.noise.det[5] = budget.hard[7] = budget.noise.sigma[8] = NAN
    found["no error within no bound"] = actual, budget
    found["bounds above float32"] = torch.zeros(512), ErrorBudget(ref=large, hard=0 * large + 4e38, out=FP32)
    # Three quarters of the way to the neighbour below 1, half of the way to the one above.
    below = torch.full((512,), 1 - 0.75 * 2.0**-8, dtype=torch.float64)
    just_wrong = torch.ones(512).bfloat16(), ErrorBudget(ref=below, hard=0 * below, out=BF16)
    found["news at a power of two"] = after_large_shares(just_wrong)
    between = torch.linspace(1, 2, 512, dtype=torch.float64)
    found["news off the grid"] = after_large_shares((between.half(), replace(just_wrong[1], ref=between)))
    actual, budget = noisy((40, 128))
    actual[:2] = 9.0
    found["news in noise"] = actual, budget
    found["a stand-in for minus infinity"] = (
        torch.tensor([-INF, -6e4, -50000.1015625, -49999.0, 0.0, INF, NAN, -5e4, 0.1]),
        ErrorBudget(
            ref=torch.tensor([-INF] * 7 + [INF, 0.1], dtype=torch.float64),
            hard=torch.full((9,), 1e-3, dtype=torch.float64),
            out=FP32,
            minus_inf=-50000.1025,
        ),
    )
    actual, budget = plain(noisy((40, 128)))
    for name, where, value in (("last", -1, NAN), ("first", 0, INF), ("one outside", 2571, 9.0)):
        one = actual.clone()
        one.view(-1)[where] = value
        found[f"one bad element: {name}"] = one, budget
    transposed, whole = noisy((128, 48))
    found["not contiguous"] = transposed.T, replace(whole, ref=whole.ref.T, hard=whole.hard.T, noise=None)
    found["a scalar"] = torch.tensor(1.0), ErrorBudget(ref=torch.tensor(1.5).double(), hard=torch.tensor(0.1), out=FP32)
    actual, budget = plain(noisy((9, 128)))
    found["no bound is no pass"] = actual, replace(budget, hard=torch.full_like(budget.hard, NAN))
    return found


def interpreted(file: Path, *bugs: Path) -> dict[str, dict[str, Comparison]]:
    """Comparisons in one pass by the name of the file of Triton's code, "" for ours, and by that of the sample."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__, str(file), *map(str, bugs)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Comparison]] = pickle.loads(file.read_bytes())
    return found


@pytest.fixture(scope="module")
def one_pass(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Comparison]:
    return interpreted(tmp_path_factory.mktemp("fused") / "comparisons")[""]


def energy_error(energy: torch.Tensor, sample: Sample) -> torch.Tensor:
    """How far the row energies of the pass may be off: see the proof at the top of fused.py."""
    actual, budget = sample
    t = budget.out.t
    if t > FP16.t or actual.dtype != getattr(torch, budget.out.name):
        return 1e-13 * energy
    return 2.0 ** (t - 22) * energy.sqrt() + 4.0 ** (t - 23) + 2.0**-19 * energy


def difference(got: Comparison, sample: Sample) -> list[str]:
    """What step by step says differently of the sample: a list of names. NaN is NaN."""
    expected = compare_step_by_step(*sample)
    names = ("total", "nonfinite", "outside", "unlikely", "first", "worst", "used", "actual", "expected", "bound")
    found = [name for name in names if repr(getattr(got, name)) != repr(getattr(expected, name))]
    assert got.nonfinite_map is not None
    assert expected.nonfinite_map is not None
    if got.nonfinite_map.dtype != torch.bool or not torch.equal(got.nonfinite_map, expected.nonfinite_map):
        found.append("nonfinite_map")
    one, other = got.row_energy, expected.row_energy
    if (one is None) != (other is None):
        found.append("row_energy")
    elif one is not None and other is not None:
        same = ((one - other).abs() <= energy_error(other, sample)) | (one.isnan() & other.isnan())
        found += [] if one.shape == other.shape and bool(same.all()) else ["row_energy"]
    return found


@pytest.mark.parametrize("name", samples())
def test_one_pass_says_the_same(name: str, one_pass: dict[str, Comparison]) -> None:
    assert difference(one_pass[name], samples()[name]) == []


@pytest.mark.parametrize("fmt", [BF16, FP16])
def test_the_bound_on_energies_is_as_good_as_reached(fmt: Fmt, one_pass: dict[str, Comparison]) -> None:
    name = f"energies at their worst {fmt.name}"
    got, exact = one_pass[name].row_energy, compare_step_by_step(*samples()[name]).row_energy
    assert got is not None
    assert exact is not None
    used = (got - exact).abs() / energy_error(exact, samples()[name])
    # The first two rows are news, and news is judged in float64.
    assert float(used[:2].max()) < 1e-6
    assert 0.7 < float(used[2:].min()) <= float(used[2:].max()) <= 1


def test_the_samples_are_worth_comparing() -> None:
    seen = {name: compare_step_by_step(*sample) for name, sample in samples().items()}
    for name in ("edges bfloat16", "edges float16", "edges float32"):
        one = seen[name]
        inside = one.total - one.nonfinite - one.outside
        assert min(one.nonfinite, one.outside, inside) > 1000
    assert 0 < seen["spoiled (37, 64)"].unlikely < 1000
    assert 0 < seen["noise (37, 64)"].unlikely < 100
    assert seen["noise (37, 64)"].outside == 0
    assert seen["shares beyond float32"].worst == (2, 0)
    assert seen["many have the largest share"].worst == (2, 0)
    assert (seen["all exact"].used, seen["all exact"].worst) == (0.0, (0, 0))
    assert seen["no bound is no pass"].outside == 9 * 128
    assert seen["references beyond float32"].worst == (2, 0)
    one = seen["no error within no bound"]
    assert one.outside == 128
    assert one.unlikely >= 3 * 128
    for fmt in (BF16, FP16):
        # Just below and just above the power of two, errors have another unit.
        energy = seen[f"energies by a power of two {fmt.name}"].row_energy
        assert energy is not None
        assert float(energy[6] / energy[2]) > 1.7


# What is right, what a bug makes of it, and the samples that see it.
PLANTED = {
    "flag": (
        "nonfinites += tl.sum(nonfinite.to(tl.int32))",
        "nonfinites += tl.sum(outside.to(tl.int32))",
        ["spoiled (37, 64)"],
    ),
    "ties": ("rounded = (x + shift) - shift", "rounded = (x + shift / 2) - shift / 2", ["edges float16"]),
    "subnormals": ("tl.maximum(exponent, (EMIN + 1023) << 20)", "exponent", ["edges float16"]),
    "overflow": ("tl.where(tl.abs(rounded) > largest, ", "tl.where(tl.abs(rounded) < 0.0, ", ["edges float16"]),
    "powers_of_two": ("tl.abs(value) * (1 - 2.0**-24)", "tl.abs(value)", ["news at a power of two"]),
    "slack": ("tl.constexpr(1 - 2.0**-20)", "tl.constexpr(1 + 2.0**-10)", ["shares beyond float32"]),
    "large_bounds": ("sure = sure & (far32 < LARGE)", "", ["bounds above float32"]),
    "no_errors": ("sure | ((error == 0)", "sure | ((size <= SLACK_ABS)", ["errors below float32"]),
    "equal_shares": ("largest > most, tl.min(", "largest >= most, tl.min(", ["many have the largest share"]),
    "equal_programs": (
        "share == most, tl.minimum(worst, place), worst",
        "share == most, place, worst",
        ["many equals in many programs"],
    ),
    "likely": ("LIKELY * SLACK_REL", "4 * LIKELY", ["news in noise"]),
    "judged": ("energies = tl.where(judged, ", "energies = tl.where(here, ", ["spoiled (37, 64)"]),
    "no_bound": (" & (reach < tl.where(most >= 0, LARGE, -1.0))", "", ["no error within no bound"]),
    "nothing_seen": ("tl.where(most >= 0, LARGE, -1.0)", "LARGE", ["all exact in float32"]),
    "short_references": ("2.0 ** (T - 21) if SIXTEEN else 0.0", "0.0", ["references beyond float32"]),
    "powers_of_two_in_float32": (
        "(((far_bits + 4) & 0x007FFFF8) != 0)",
        "(far_bits != 0)",
        [f"energies by a power of two {fmt}" for fmt in ("bfloat16", "float16")],
    ),
    "unit_of_energy": ("4.0 ** (1 - T) / 3", "4.0 ** (2 - T) / 3", ["noise (37, 64)"]),
    "subnormal_energy": ("((EMIN + 127) << 23) + 16", "16", ["bfloat16 for bfloat16 7e-43"]),
    "grid": ("fmt.t <= budget.out.t and ", "", ["news off the grid"]),
    "minus_infinity": (
        "value <= tl.full([], MINUS_INF, tl.float64)",
        "value <= tl.full([], MINUS_INF, tl.float32)",
        ["a stand-in for minus infinity"],
    ),
}


@pytest.fixture(scope="module")
def with_bugs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Comparison]]:
    folder = tmp_path_factory.mktemp("bugs")
    source = (Path(comparison.__file__).parent / "fused.py").read_text()
    for name, (right, wrong, _) in PLANTED.items():
        assert source.count(right) == 1, right
        (folder / f"{name}.py").write_text(source.replace(right, wrong))
    return interpreted(folder / "comparisons", *(folder / f"{name}.py" for name in PLANTED))


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_seen(bug: str, with_bugs: dict[str, dict[str, Comparison]]) -> None:
    for name, got in with_bugs[bug].items():
        assert difference(got, samples()[name]) != []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrowed_bounds_are_bounds(dtype: torch.dtype) -> None:
    _, budget = noisy((40, 128))
    budget.hard.view(-1)[:4] = torch.tensor([0.0, INF, 2.0**-140, 3.5e38])
    low = narrowed(budget, dtype, dtype)
    assert budget.noise is not None
    assert low.noise is not None
    for wide, narrow in (
        (budget.hard, low.hard),
        (budget.noise.det, low.noise.det),
        (budget.noise.sigma, low.noise.sigma),
    ):
        assert narrow.dtype == dtype
        assert bool((narrow.double() >= wide).all())
        usual = (wide > 2.0**-120) & (wide < 2.0**120)
        step = 2.0 ** (-23 if dtype == torch.float32 else -7)
        assert bool((narrow.double() <= wide * (1 + step))[usual].all())
        # A number that needs no rounding stays.
        assert torch.equal(narrowed(ErrorBudget(ref=wide, hard=narrow.double(), out=BF16), dtype).hard, narrow)
    assert narrowed(budget).hard.dtype == torch.float32
    # What is computed from it is computed in float64.
    assert variance(low, low.noise).dtype == comparison.likely(low, low.noise).dtype == torch.float64


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("on_grid", [True, False])
@pytest.mark.parametrize("fmt", [BF16, FP32])
def test_every_variant_compiles(fmt: Fmt, on_grid: bool, noise: bool) -> None:
    """The interpreter runs code that the compiler refuses."""
    triton = pytest.importorskip("triton")
    kernel = importlib.import_module("kerneltest.oracle.fused")._compare_kernel
    constants = {
        "T": fmt.t,
        "EMIN": fmt.emin,
        "EMAX": fmt.emax,
        "MINUS_INF": -INF,
        "LIKELY": 11.5,
        "NOISE": noise,
        "ON_GRID": on_grid,
        "SIXTEEN": on_grid and fmt is BF16,
        "ROWS": 1,
        "COLS": 128,
        "STAGES": 3,
    }
    types = {"actual_ptr": "*bf16" if fmt is BF16 else "*fp32", "table_ptr": "*i64", "sigma_ptr": "*bf16"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp64" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = triton.compiler.ASTSource(kernel, signature, constants)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    options = {"num_warps": 1, "maxnreg": 128, "enable_fp_fusion": False}
    assert triton.compile(source, target=target, options=options).asm["cubin"]


def test_without_a_gpu_it_goes_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    actual, budget = plain(noisy((5, 7)))
    monkeypatch.setattr(comparison, "compare_in_one_pass", None)
    assert comparison.compare(actual, budget).total == 35


def main(file: str, *bugs: str) -> None:
    found = {}
    for path in bugs or ("",):
        name = Path(path).stem
        if path:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            fused = importlib.util.module_from_spec(spec)
            sys.modules[name] = sys.modules["kerneltest.oracle.fused"] = fused
            spec.loader.exec_module(fused)
        else:
            fused = importlib.import_module("kerneltest.oracle.fused")
        few, many = replace(fused.PLAIN, programs=2), fused.PLAIN
        fused.COLUMNS = 16
        found[name] = {}
        for sample in PLANTED[name][2] if path else samples():
            # A program learns from its first tiles what the others need not be looked at for.
            fused.PLAIN = fused.NOISY = many if "many programs" in sample else few
            found[name][sample] = compare_in_one_pass(*samples()[sample])
    Path(file).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
