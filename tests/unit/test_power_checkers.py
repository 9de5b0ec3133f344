"""The usual checkers: they accept the truth, reject what is grossly wrong, and NaN never passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kerneltest.power.checkers import CHECKERS, Answers, plain_bfloat16
from kerneltest.power.problems import FAMILIES, STRATEGIES, draw, generator

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def exact() -> Answers:
    random = torch.Generator().manual_seed(0)
    ref = torch.randn(3, 4, 64, generator=random).bfloat16()
    lse = torch.randn(3, 4, generator=random)
    return Answers(out=ref, lse=lse, ref=ref.double(), ref_lse=lse.double(), plain=ref)


@pytest.mark.parametrize("name", CHECKERS)
def test_the_truth_passes(exact: Answers, name: str) -> None:
    assert CHECKERS[name](exact)


@pytest.mark.parametrize("name", CHECKERS)
def test_one_nan_fails(exact: Answers, name: str) -> None:
    out = exact.out.clone()
    out[1, 2, 3] = torch.nan
    assert not CHECKERS[name](replace(exact, out=out))


@pytest.mark.parametrize("name", CHECKERS)
def test_a_wrong_sign_everywhere_fails(exact: Answers, name: str) -> None:
    assert not CHECKERS[name](replace(exact, out=-exact.out))


@pytest.mark.parametrize("name", CHECKERS)
def test_nothing_but_zeros_on_both_sides_passes(exact: Answers, name: str) -> None:
    zeros = torch.zeros_like(exact.out)
    assert CHECKERS[name](replace(exact, out=zeros, ref=zeros.double(), plain=zeros))


def test_only_flash_mla_looks_at_the_lse(exact: Answers) -> None:
    wrong = replace(exact, lse=exact.lse / 0.693)
    assert [name for name, accepts in CHECKERS.items() if not accepts(wrong)] == ["FlashMLA"]
    no_key = torch.full_like(exact.lse, -torch.inf)
    assert CHECKERS["FlashMLA"](replace(exact, lse=no_key, ref_lse=no_key.double()))


def test_twice_the_error_of_the_baseline_is_the_limit(exact: Answers) -> None:
    ref = torch.ones_like(exact.ref)
    x = replace(exact, ref=ref, plain=(ref + 0.25).bfloat16(), out=(ref + 0.5).bfloat16())
    assert CHECKERS["FA 2x"](x)
    assert not CHECKERS["FA 2x"](replace(x, out=(ref + 0.625).bfloat16()))
    assert CHECKERS["FA 2x"](replace(x, out=(ref + 0.625).bfloat16(), softcap=True))


def test_the_baseline_is_attention() -> None:
    x = draw(FAMILIES["mla"], STRATEGIES["normal"], generator("baseline")).attended()
    s = (x.q @ x.k.mT * x.scale).masked_fill(~x.seen[:, None], -torch.inf)
    expected = (s.softmax(-1) @ x.v).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(plain_bfloat16(x).float(), expected, rtol=0.05, atol=0.05)
