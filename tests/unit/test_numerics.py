"""Formats and accumulators against facts that were not computed from them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from kerneltest.model import BF16, FP16, FP32, IEEE_FP32, SUM_FP32, WGMMA_8BIT, WGMMA_16BIT, AccModel, Fmt, Numerics
from kerneltest.model.numerics import E4M3, E5M2

FORMATS = pytest.mark.parametrize("fmt", [BF16, FP16, FP32, E4M3, E5M2], ids=lambda fmt: fmt.name)


@FORMATS
def test_a_format_is_torchs(fmt: Fmt) -> None:
    dtype = getattr(torch, fmt.name)
    info = torch.finfo(dtype)
    assert fmt.u == info.eps / 2
    assert 2.0**fmt.emin == info.smallest_normal
    assert fmt.max == info.max
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
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
        relative = ((x.to(dtype).double() - x).abs() / x.abs())[x.abs() >= 2.0**fmt.emin]
        # The worst is a tie between 1 and its neighbour.
        assert 0.9 * fmt.u / (1 + fmt.u) < relative.max() <= fmt.u / (1 + fmt.u)
    tiny = x * 2.0 ** (fmt.emin - 3)
    absolute = (tiny.to(dtype).double() - tiny).abs()
    assert absolute[tiny.abs() < 2.0**fmt.emin].max() <= fmt.eta


def test_known_values() -> None:
    assert (BF16.u, FP16.u, FP32.u) == (2.0**-8, 2.0**-11, 2.0**-24)
    assert (BF16.eta, FP16.eta, FP32.eta) == (2.0**-134, 2.0**-25, 2.0**-150)


@pytest.mark.parametrize(
    ("model", "k", "expected"),
    [
        (WGMMA_16BIT, 0, 2 * 2.0**-23),
        (WGMMA_16BIT, 1, 7.25 * 2.0**-23),
        (WGMMA_16BIT, 16, 7.25 * 2.0**-23),
        (WGMMA_16BIT, 17, 12.5 * 2.0**-23),
        (WGMMA_16BIT, 128, 44 * 2.0**-23),
        (IEEE_FP32, 1, 3 * 2.0**-24),
        (IEEE_FP32, 128, 130 * 2.0**-24),
        # 17 addends lose a quarter of a rounding each, and their sum one: 5.25 for each of 8 steps
        # fp8 tensor cores keep 14 bits: at worst, nothing is left of 4096 products
        (WGMMA_8BIT, 4096, (128 * 34 + 2) * 2.0**-13),
        (AccModel(14, "rne", 32), 4096, 130 * 2.0**-14),
        # ... unless they are promoted to fp32 every 128: 4 steps short, 32 additions and the extra two long
        (AccModel(14, "rz", 32, promote=128), 4096, 4 * 2.0**-13 + 34 * 2.0**-24),
        (AccModel(14, "rz", 32, promote=128), 128, 6 * 2.0**-13),
        # seven numbers are summed by six additions; one more is the bound of a fold that begins at 0
        (SUM_FP32, 7, 7 * 2.0**-24),
    ],
)
def test_gamma_by_hand(model: AccModel, k: int, expected: float) -> None:
    assert model.gamma(k) == expected


def test_truncation_errs_twice_as_much_as_rounding() -> None:
    assert AccModel(24, "rz", 1).u == 2 * AccModel(24, "rne", 1).u == torch.finfo(torch.float32).eps


PLAIN = {"qk": IEEE_FP32, "pv": IEEE_FP32, "p": BF16, "out": BF16}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"p": BF16, "out": FP16}, "p is bfloat16, narrower than the output's float16"),
        ({"p": FP32, "out": FP32, "partial": FP16}, "partial is float16, narrower than the output's float32"),
        ({"lse_base": "10"}, "lse_base must be 'e', '2' or None, got '10'"),
        ({"l_from": "p"}, "l_from must be 'fp32' or 'rounded_p', got 'p'"),
        ({"tile": 0}, "tile must be at least 1, got 0"),
        ({"exp_rel": 1.0}, "must lie in"),
        ({"tanh_rel": -0.5}, "must lie in"),
        ({"slope_rel": 1.0}, "slope_rel must lie in [0, 1), got 1.0"),
        ({"slack": 0.5}, "slack must be at least 1 and finite, got 0.5"),
        ({"slack": float("inf")}, "slack must be at least 1 and finite"),
    ],
)
def test_impossible_numerics_are_refused(wrong: dict[str, Any], message: str) -> None:
    Numerics(**PLAIN)
    with pytest.raises(ValueError, match=re.escape(message)):
        Numerics(**PLAIN | wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((24, "up", 16), "rounding must be 'rz' or 'rne', got 'up'"),
        ((1, "rz", 16), "bits must be 2 to 53, got 1"),
        ((24, "rz", 0), "k_step must be at least 1"),
        ((14, "rz", 32, 16), "promote must be at least k_step, got 16 and 32"),
        ((24, "rz", 16, None, -1), "extra at least 0"),
        ((24, "rz", 16, None, 2, -1), "align must be at least 0, got -1"),
    ],
)
def test_impossible_accumulators_are_refused(wrong: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        AccModel(*wrong)
