"""The slopes of ALiBi, by which a key's score falls with its distance (Press, Smith and Lewis, 2108.12409)."""

from __future__ import annotations

from kerneltest.model.numerics import FP32

# Relative error of CUDA's powf: 4 units in the last place, each of up to 2u (CUDA C++ Programming Guide, table of
# mathematical functions).
POWF = 8 * FP32.u


def _exponents(heads: int) -> tuple[int, list[int]]:
    """The largest power of two n that is no more than ``heads``, and for each head an e: its slope is 2^(-4 e / n)."""
    n = 1 << (heads.bit_length() - 1)
    # The slopes of n heads, and then every other one of 2n heads, which lie between those.
    return n, [2 * (head + 1) if head < n else 2 * (head - n) + 1 for head in range(heads)]


def slopes(heads: int) -> list[float]:
    """The slope of each query head in float64: 2^(-8 h / n) with h from 1 on, where n heads are a power of two.

    For any other number, as in the authors' code, the first n are those of the power of two n below it, and the others
    are the first, third, fifth ... of 2n heads.
    """
    n, exponents = _exponents(heads)
    return [2.0 ** (-4 * e / n) for e in exponents]


def error_of_powers(heads: int) -> float:
    """The relative error of slopes that powf raises in fp32 from a rounded base: e u for an exponent e, and its own.

    FlashInfer's (utils.py:209, get_alibi_slopes) raise 2^(-8 / n) to h, and for the others 2^(-4 / n) to an odd number.
    """
    n, exponents = _exponents(heads)
    largest = max([n, *exponents[n:]])
    return (1 + FP32.u) ** largest * (1 + POWF) - 1
