"""Draws by inverse transform, each held against the random number that it was made from.

A kernel that says which random number a draw used has no freedom left: the token is the first whose running sum is
above it. That shows in a single draw what statistics need thousands for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kerneltest.model import Rejection

FLOAT64 = 2.0**-53


def check_inverse(
    tokens: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    numbers: torch.Tensor,
    *,
    gamma: float,
    error: torch.Tensor,
    output: str = "tokens",
) -> Iterator[Rejection]:
    """What is wrong with ``tokens`` [n], the n-th of which must invert the running sums of ``weights[rows[n]]``.

    ``weights``: float64 [rows, V], not negative, in the order in which they are added up. ``numbers``: float64 [n],
    what they are inverted at, each known up to ``error`` [n]. ``gamma``: the relative error of a running sum of the
    kernel's. A token is right if the sum before it may be at or below the number, and that through it above; the last
    of any weight also where all of them are not enough. Tokens are in range, and of rows with some weight.
    """
    tokens, rows = tokens.long().to(weights.device), rows.to(weights.device)
    sums = weights.cumsum(-1)
    own, through, total = weights[rows, tokens], sums[rows, tokens], sums[rows, -1]
    relative = gamma + weights.shape[-1] * FLOAT64
    before = through - own
    last = through >= total * (1 - relative)
    too_far = before - relative * through > numbers + error
    too_near = (through + relative * through <= numbers - error) & ~last
    wrong = too_far | too_near
    if not bool(wrong.any()):
        return
    n = int(wrong.nonzero()[0])
    row, number = int(rows[n]), float(numbers[n])
    meant = int(torch.searchsorted(sums[row], numbers[n : n + 1], right=True).clamp(max=weights.shape[-1] - 1))
    yield Rejection(
        kind="Mismatch",
        output=output,
        what=f"{int(wrong.sum())} of {len(tokens)} draws are not what their random numbers say",
        details=(
            f"draw {n} is token {int(tokens[n])} of row {row}, of the running sums from {float(before[n]):.9g} to "
            f"{float(through[n]):.9g}; its random number is {number:.9g}, which is token {meant}",
        ),
    )
