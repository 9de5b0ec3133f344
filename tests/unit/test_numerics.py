"""Formats and accumulators against facts that were not computed from them."""

from __future__ import annotations

import pytest
import torch

from kerneltest.model import BF16, FP16, FP32, IEEE_FP32, WGMMA_16BIT, AccModel, Fmt

FORMATS = pytest.mark.parametrize("fmt", [BF16, FP16, FP32], ids=lambda fmt: fmt.name)


@FORMATS
def test_a_format_is_torchs(fmt: Fmt) -> None:
    dtype = getattr(torch, fmt.name)
    info = torch.finfo(dtype)
    assert fmt.u == info.eps / 2
    assert 2.0**fmt.emin == info.smallest_normal
    integer = torch.int32 if dtype.itemsize == 4 else torch.int16
    assert fmt.eta == torch.tensor(1, dtype=integer).view(dtype).item() / 2


@FORMATS
def test_u_and_eta_are_the_worst_that_rounding_does(fmt: Fmt) -> None:
    dtype = getattr(torch, fmt.name)
    # A tie: halfway between 1 and its neighbour, and halfway between 0 and the smallest subnormal.
    ties = torch.tensor([1 + fmt.u, fmt.eta], dtype=torch.float64)
    assert (ties - ties.to(dtype).double()).tolist() == [fmt.u, fmt.eta]
    random = torch.Generator().manual_seed(0)
    # 23 bits of a float32, so that torch rounds once
    x = torch.randn(20_000, generator=random).mul(2.0**22).round().double() * 2.0**-22
    if fmt is not FP32:
        relative = ((x.to(dtype).double() - x).abs() / x.abs())[x != 0]
        assert 0.9 * fmt.u < relative.max() <= fmt.u
    tiny = x * 2.0 ** (fmt.emin - 3)
    absolute = (tiny.to(dtype).double() - tiny).abs()
    assert absolute[tiny.abs() < 2.0**fmt.emin].max() <= fmt.eta


def test_known_values() -> None:
    assert (BF16.u, FP16.u, FP32.u) == (2.0**-8, 2.0**-11, 2.0**-24)
    assert (BF16.eta, FP16.eta, FP32.eta) == (2.0**-134, 2.0**-25, 2.0**-150)


@pytest.mark.parametrize(
    ("model", "k", "expected"),
    [
        (WGMMA_16BIT, 0, 16 * 2.0**-23),
        (WGMMA_16BIT, 1, 17 * 2.0**-23),
        (WGMMA_16BIT, 16, 17 * 2.0**-23),
        (WGMMA_16BIT, 17, 18 * 2.0**-23),
        (WGMMA_16BIT, 128, 24 * 2.0**-23),
        (IEEE_FP32, 1, 17 * 2.0**-24),
        (IEEE_FP32, 128, 144 * 2.0**-24),
        # fp8 tensor cores keep about 14 bits: 4096 products are good to two decimals
        (AccModel(14, "rz", 32), 4096, 144 * 2.0**-13),
        (AccModel(14, "rne", 32), 4096, 144 * 2.0**-14),
    ],
)
def test_gamma_by_hand(model: AccModel, k: int, expected: float) -> None:
    assert model.gamma(k) == expected


def test_truncation_errs_twice_as_much_as_rounding() -> None:
    assert AccModel(24, "rz", 1).u == 2 * AccModel(24, "rne", 1).u == torch.finfo(torch.float32).eps
