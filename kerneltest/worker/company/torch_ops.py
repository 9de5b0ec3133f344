"""Operations of torch as neighbours: what runs between two launches of a kernel in any model.

What they stream through L1 stays in what is the next kernel's shared memory, for both are the same SRAM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kerneltest.model import Data

ROW = 256


def _matmul(x: torch.Tensor) -> torch.Tensor:
    half = x.to(torch.bfloat16)
    return half @ half.mT


def _attention(x: torch.Tensor) -> torch.Tensor:
    q = x.to(torch.bfloat16).view(1, -1, 4, 64).transpose(1, 2)[:, :, :1024]
    return torch.nn.functional.scaled_dot_product_attention(q, q, q)


def _gather(x: torch.Tensor) -> torch.Tensor:
    return x[torch.arange(x.shape[0] - 1, -1, -1, device=x.device)]


# Each takes fp32 [rows, ROW].
OPS: Mapping[str, Callable[[torch.Tensor], object]] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "matmul": _matmul,
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (ROW,)),
    "cos": torch.cos,
    "sort": lambda x: torch.sort(x, -1),
    "cumsum": lambda x: torch.cumsum(x, -1),
    "topk": lambda x: torch.topk(x, 8, -1),
    "fft": torch.fft.rfft,
    "silu": torch.nn.functional.silu,
    "add": lambda x: x + x,
    "sum": lambda x: x.sum(-1),
    "gather": _gather,
    "transpose": lambda x: x.mT.contiguous(),
    "attention": _attention,
}


def numbers(elements: int, data: Data, device: str) -> torch.Tensor:
    """Standard normal fp32 [rows, ROW] of at least ``elements``, soiled as ``data`` says; the same ones every time."""
    rows = max(1, elements // ROW)
    x = torch.randn(rows, ROW, generator=torch.Generator().manual_seed(elements))
    soil(x, data)
    return x.to(device)


def soil(tensor: torch.Tensor, data: Data) -> None:
    """Replace every fourth element of a floating-point tensor on the host by NaN or ±Inf."""
    if data is Data.FINITE or not tensor.is_floating_point():
        return
    flat = tensor.view(-1)
    if data is Data.NAN:
        flat[::4] = float("nan")
    else:
        flat[::8], flat[4::8] = float("inf"), float("-inf")
