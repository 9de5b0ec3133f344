"""The checkers in common use, each as its project writes it, and each so that NaN fails.

All of them compare ``out`` alone, but for FlashMLA's, which looks at the log-sum-exp as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kerneltest.model import BF16
from kerneltest.oracle.attention_terms import Attended
from kerneltest.power.problems import by_token

# FlashMLA, tests/test_flash_mla_dense_decoding.py.
FLASH_MLA_ABS, FLASH_MLA_REL, FLASH_MLA_COS, FLASH_MLA_LSE = 8e-4, 2.01 / 128, 5e-6, 8.01 / 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a checker may look at: ``out`` and ``lse`` as the kernel wrote them, the float64 reference of both,
    and ``plain``, what the same formula gives in unfused bfloat16. ``out``: [tokens, heads, v_dim].
    """

    out: torch.Tensor
    lse: torch.Tensor
    ref: torch.Tensor
    ref_lse: torch.Tensor
    plain: torch.Tensor
    softcap: bool = False

    def of(self, tokens: slice) -> Answers:
        """The answers of some tokens."""
        return Answers(
            out=self.out[tokens],
            lse=self.lse[tokens],
            ref=self.ref[tokens],
            ref_lse=self.ref_lse[tokens],
            plain=self.plain[tokens],
            softcap=self.softcap,
        )


def _close(atol: float, rtol: float) -> Callable[[Answers], bool]:
    def accepts(x: Answers) -> bool:
        return bool(((x.out.double() - x.ref).abs() <= atol + rtol * x.ref.abs()).all())

    return accepts


def _two_ulp(x: Answers) -> bool:
    _, exponent = torch.frexp(x.ref.abs().clamp(min=2.0**BF16.emin))
    ulp = torch.ldexp(torch.ones_like(x.ref), exponent - BF16.t)
    return bool(((x.out.double() - x.ref).abs() <= 2 * ulp).all())


def _flash_attention(x: Answers) -> bool:
    """``(out - ref).abs().max() <= rtol * (plain - ref).abs().max() + atol`` of flash-attention's hopper tests."""
    ref = x.ref.bfloat16()
    atol = 2 * (ref + 0.3 - 0.3 - ref).abs().max().double()
    rtol = 3 if x.softcap else 2
    worst, plain = ((y.double() - ref.double()).abs().max() for y in (x.out, x.plain))
    return bool(worst <= rtol * plain + atol)


def _flash_mla(x: Answers) -> bool:
    error, ref = (x.out.double() - x.ref).abs(), x.ref.abs()
    close = (error < FLASH_MLA_ABS) | (error / (ref + 1e-6) < FLASH_MLA_REL)
    lse = (x.lse.double() - x.ref_lse).abs()
    # A row without keys is -Inf on both sides.
    close_lse = (x.lse.double() == x.ref_lse) | (lse < 1e-6) | (lse / (x.ref_lse.abs() + 1e-6) < FLASH_MLA_LSE)
    return bool(close.all()) and _difference(x) < FLASH_MLA_COS and bool(close_lse.all())


def _difference(x: Answers) -> float:
    """1 - 2 Σxy / Σ(x² + y²), DeepGEMM's ``calc_diff``; 0 where both are nothing but zeros."""
    out = x.out.double()
    total = float((out.square() + x.ref.square()).sum())
    return float(1 - 2 * (out * x.ref).sum() / total) if total else 0.0


def _cosine(x: Answers) -> bool:
    out = x.out.double()
    norms = (out.square().sum() * x.ref.square().sum()).sqrt()
    return bool((out * x.ref).sum() > 0.99 * norms) or torch.equal(out, x.ref)


CHECKERS: dict[str, Callable[[Answers], bool]] = {
    "fixed 1e-2": _close(1e-2, 1e-2),
    "fixed 1e-3": _close(1e-3, 1e-3),
    "torch bf16": _close(1e-5, 1.6e-2),
    "2 ulp": _two_ulp,
    "FA 2x": _flash_attention,
    "FlashMLA": _flash_mla,
    "diff 1e-3": lambda x: _difference(x) < 1e-3,
    "diff 1e-5": lambda x: _difference(x) < 1e-5,
    "cos 0.99": _cosine,
}


def plain_bfloat16(x: Attended) -> torch.Tensor:
    """Attention as a few lines of PyTorch do it in bfloat16, every intermediate result rounded.

    [tokens, heads, v_dim], bfloat16. The baseline of flash-attention's tests, which multiply the scale into k.
    """
    batch, heads, rows, dim = x.q.shape
    q = x.q.reshape(batch, x.k.shape[1], -1, dim)
    s = (q @ (x.k * x.scale).bfloat16().float().mT).bfloat16()
    if x.softcap:
        s = (s / x.softcap).tanh() * x.softcap
    seen = x.seen.repeat(1, heads // x.k.shape[1], 1).unsqueeze(1)
    p = s.float().masked_fill_(~seen, -torch.inf).softmax(-1).bfloat16()
    return by_token((p.float() @ x.v).reshape(batch, heads, rows, -1).bfloat16())
