"""The matrix products that are calibrated, and the accumulator that kerneltest declares for each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.calibration.bound import Product
from benchmarks.calibration.probes import BF16, E4M3, FP16, FP32, Dots, Operand
from kerneltest.model import IEEE_FP32, WGMMA_8BIT, WGMMA_16BIT, AccModel

# So large that cuBLAS has enough tiles without sharing a dot product among several of them.
_LIBRARY_ROWS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """``declared`` is what a suite would declare for a kernel that multiplies so.

    ``instructions``, filled by the first product, are those that the compiled kernel multiplies with.
    """

    name: str
    operand: Operand
    declared: AccModel
    product: Product
    instructions: set[str] = field(default_factory=set)


def subjects() -> tuple[Subject, ...]:
    """All of them. Nothing is compiled before a product is asked for."""
    return (
        _triton("bf16 tl.dot M=64", BF16, WGMMA_16BIT, block_m=64),
        _triton("fp16 tl.dot M=64", FP16, WGMMA_16BIT, block_m=64),
        _triton("bf16 tl.dot M=16", BF16, WGMMA_16BIT, block_m=16),
        _triton("fp16 tl.dot M=16", FP16, WGMMA_16BIT, block_m=16),
        _library("bf16 torch.mm", BF16, WGMMA_16BIT, _mm),
        _library("fp16 torch.mm", FP16, WGMMA_16BIT, _mm),
        _triton("e4m3 tl.dot M=64", E4M3, WGMMA_8BIT, block_m=64),
        # Small tiles of e4m3 go through fp16.
        _triton("e4m3 tl.dot M=16", E4M3, WGMMA_16BIT, block_m=16),
        _triton("e4m3 tl.dot M=64 imprecise=64", E4M3, replace(WGMMA_8BIT, promote=64), block_m=64, imprecise=64),
        _library("e4m3 torch._scaled_mm fast", E4M3, WGMMA_8BIT, lambda a, b: _scaled_mm(a, b, fast=True)),
        _library(
            "e4m3 torch._scaled_mm",
            E4M3,
            replace(WGMMA_8BIT, promote=128),
            lambda a, b: _scaled_mm(a, b, fast=False),
        ),
        Subject(name="fp32 FMA", operand=FP32, declared=IEEE_FP32, product=_fma),
        _library("fp32 torch.mm", FP32, IEEE_FP32, _mm),
    )


def diagonal(product: Product, device: str) -> Dots:
    """Dot products of rows with rows, as the diagonal of a matrix product: the rest is computed and dropped."""
    return lambda a, b: product(a.to(device), b.to(device)).diagonal()


def _fit(x: Tensor, operand: Operand, rows: int, k: int) -> Tensor:
    """Zeros appended to x [n, K] up to multiples of ``rows`` and ``k``, in the operand's dtype."""
    return pad(x, (0, -x.shape[1] % k, 0, -x.shape[0] % rows)).to(operand.dtype).contiguous()


def _triton(name: str, operand: Operand, declared: AccModel, *, block_m: int, imprecise: int | None = None) -> Subject:
    instructions: set[str] = set()
    block_n, block_k = 64, 128

    def product(a: Tensor, b: Tensor) -> Tensor:
        from benchmarks.calibration.triton_dot import dot_kernel

        rows, columns = len(a), len(b)
        a, b = _fit(a, operand, block_m, block_k), _fit(b, operand, block_n, block_k)
        c = torch.empty(len(a), len(b), dtype=torch.float32, device=a.device)
        grid = (len(a) // block_m, len(b) // block_n)
        compiled = dot_kernel[grid](a, b, c, a.shape[1], block_m, block_n, block_k, imprecise, num_warps=4)
        instructions.update(multiply_instructions(compiled.asm["ptx"]))
        return c[:rows, :columns].double()

    return Subject(name=name, operand=operand, declared=declared, product=product, instructions=instructions)


def multiply_instructions(ptx: str) -> set[str]:
    """The names of the tensor-core instructions in a PTX text, such as wgmma.mma_async.sync.aligned.m64n64k16..."""
    return set(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync\.[\w.]*\w", ptx))


def _library(name: str, operand: Operand, declared: AccModel, multiply: Callable[[Tensor, Tensor], Tensor]) -> Subject:
    def product(a: Tensor, b: Tensor) -> Tensor:
        rows, columns = len(a), len(b)
        c = multiply(_fit(a, operand, _LIBRARY_ROWS, 16), _fit(b, operand, _LIBRARY_ROWS, 16))
        return c[:rows, :columns].double()

    return Subject(name=name, operand=operand, declared=declared, product=product)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.float32:
        torch.set_float32_matmul_precision("highest")  # no TF32
        return torch.mm(a, b.T)
    return torch.mm(a, b.T, out_dtype=torch.float32)


def _scaled_mm(a: Tensor, b: Tensor, *, fast: bool) -> Tensor:
    one = torch.ones((), dtype=torch.float32, device=a.device)
    return torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=fast)


def _fma(a: Tensor, b: Tensor) -> Tensor:
    from benchmarks.calibration import cuda

    rows, columns, k = len(a), len(b), a.shape[1]
    c = torch.empty(rows, columns, dtype=torch.float32, device=a.device)
    grid = (-(-columns // 128), rows)
    cuda.launch("dot.cu", "fma_product", grid, 128, a.float().contiguous(), b.float().contiguous(), c, rows, columns, k)
    return c.double()
