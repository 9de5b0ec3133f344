"""The comparison in one pass, compiled for the device, says what the comparison step by step says on the host."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kerneltest.model import BF16, FP16, FP32, ErrorBudget, Noise  # noqa: E402
from kerneltest.oracle import compare as comparison  # noqa: E402
from kerneltest.oracle.compare import compare, compare_step_by_step, narrowed  # noqa: E402
from kerneltest.oracle.fused import NOISY  # noqa: E402
from kerneltest.oracle.verdict import judge  # noqa: E402

pytestmark = pytest.mark.gpu


def sample(shape, fmt=BF16, *, spoil=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ref, error, width = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
    # Subnormal numbers of the format among the others.
    ref.view(-1)[3::31] *= 2.0 ** (fmt.emin - 2)
    sigma = (fmt.u * (0.2 + width.abs())).clamp(max=ref.abs() + 2.0 ** (fmt.emin - fmt.t))
    det = sigma / 8
    actual = (ref + sigma * error).to(getattr(torch, fmt.name))
    if spoil:
        actual.view(-1)[5::1013] = torch.nan
        actual.view(-1)[7::1019] = torch.inf
        ref.view(-1)[7::2038] = torch.inf
        ref.view(-1)[11::1021] = -torch.inf
        actual.view(-1)[13::4099] = 9.0
    noise = Noise(
        det=det,
        sigma=sigma,
        freedom=torch.ones(shape[:-1], dtype=torch.float64),
        along=lambda w: (w.sum(-1), w.sum(-1)),
    )
    return actual, ErrorBudget(ref=ref, hard=16 * sigma, out=fmt, noise=noise)


def on_device(budget):
    noise = budget.noise
    if noise is not None:
        noise = replace(noise, det=noise.det.cuda(), sigma=noise.sigma.cuda(), freedom=noise.freedom.cuda())
    return replace(budget, ref=budget.ref.cuda(), hard=budget.hard.cuda(), noise=noise)


def assert_same(got, expected, t=24):
    """``t``: significant bits of the output's format. The proof of the bound on energies is at the top of fused.py."""
    for name in ("total", "nonfinite", "outside", "unlikely", "first", "worst", "used", "actual", "expected", "bound"):
        assert repr(getattr(got, name)) == repr(getattr(expected, name)), name
    assert torch.equal(got.nonfinite_map.cpu(), expected.nonfinite_map)
    if expected.row_energy is not None:
        energy = expected.row_energy
        bound = 1e-12 * energy if t > 11 else 2.0 ** (t - 22) * energy.sqrt() + 4.0 ** (t - 23) + 2.0**-19 * energy
        assert bool(((got.row_energy.cpu() - energy).abs() <= bound).all())


# Every dtype of one shape, every shape of one dtype: a kernel is compiled for each.
KINDS = [
    *(((2000, 128), fmt, dtype) for fmt in (BF16, FP16, FP32) for dtype in (torch.float64, torch.float32)),
    ((2000, 128), BF16, torch.bfloat16),
    *((shape, BF16, torch.float32) for shape in ((1,), (5, 7), (3, 512), (2, 576), (20000, 64))),
]


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("spoil", [True, False])
@pytest.mark.parametrize(("shape", "fmt", "dtype"), KINDS)
def test_the_device_says_the_same(shape, fmt, dtype, spoil, noise):
    actual, budget = sample(shape, fmt, spoil=spoil)
    if dtype != torch.float64:
        budget = narrowed(budget, dtype, dtype)
    if not noise:
        budget = replace(budget, noise=None)
    assert_same(compare(actual.cuda(), on_device(budget)), compare_step_by_step(actual, budget), fmt.t)


def test_narrowed_budgets_of_mixed_dtypes():
    actual, budget = sample((20000, 128), spoil=True)
    budget = narrowed(budget)
    assert_same(compare(actual.cuda(), on_device(budget)), compare_step_by_step(actual, budget), BF16.t)


@pytest.mark.parametrize("fmt", [BF16, FP16])
def test_float32_energies_are_as_good_as_proven_and_no_better(fmt):
    """Where errors are half an ulp and the reference is just below 2, float32 loses most of what the proof allows."""
    half = fmt.u
    ref = torch.full((3 * NOISY.programs, 128), 2 - 8.875 * half - 0.999 * 2.0**-24, dtype=torch.float64)
    # The first row of every program has the largest share and is news.
    ref[: NOISY.programs] -= half
    freedom = torch.ones(len(ref), dtype=torch.float64)
    noise = Noise(
        det=0 * ref + half / 64, sigma=0 * ref + half / 4, freedom=freedom, along=lambda w: (w.sum(-1), w.sum(-1))
    )
    budget = ErrorBudget(ref=ref, hard=0 * ref + 2 * half, out=fmt, noise=noise)
    actual = torch.full_like(ref, 2 - 8 * half).to(getattr(torch, fmt.name))
    got, expected = compare(actual.cuda(), on_device(budget)), compare_step_by_step(actual, budget)
    assert_same(got, expected, fmt.t)
    off = (got.row_energy.cpu() - expected.row_energy).abs()
    assert float(off[: NOISY.programs].max()) < 1e-12
    assert float(off[NOISY.programs :].min()) > 0.7 * 2.0 ** (fmt.t - 22) * float(expected.row_energy[-1]) ** 0.5


def test_a_single_bad_element_is_found_where_it_is():
    actual, budget = sample((20000, 128))
    budget = on_device(budget)
    for flat in (0, 127, 128, 1_280_000, 20000 * 128 - 1):
        for wrong, counts in ((torch.nan, (1, 0)), (9.0, (0, 1))):
            one = actual.clone()
            one.view(-1)[flat] = wrong
            seen = compare(one.cuda(), budget)
            assert (seen.nonfinite, seen.outside, seen.first) == (*counts, divmod(flat, 128))


def test_it_is_used_and_has_no_memory_of_the_last(monkeypatch):
    actual, budget = sample((20000, 128), spoil=True)
    moved = actual.cuda(), on_device(budget)
    first, second = compare(*moved), compare(*moved)
    assert_same(first, replace(second, nonfinite_map=second.nonfinite_map.cpu(), row_energy=second.row_energy.cpu()))
    assert torch.equal(first.row_energy, second.row_energy)
    monkeypatch.setattr(comparison, "compare_step_by_step", None)
    assert judge(*moved).comparison.nonfinite == first.nonfinite


def test_the_host_may_hold_the_output():
    actual, budget = sample((1000, 64))
    assert_same(compare(actual, on_device(budget)), compare_step_by_step(actual, budget), BF16.t)


def test_without_triton_it_goes_step_by_step(monkeypatch):
    actual, budget = sample((1000, 64), spoil=True)
    monkeypatch.setattr(comparison, "_has_triton", lambda: False)
    monkeypatch.setattr(comparison, "compare_in_one_pass", None)
    got = compare(actual.cuda(), on_device(budget))
    assert (got.nonfinite, got.outside) == (compare_step_by_step(actual, budget).nonfinite, got.outside)
