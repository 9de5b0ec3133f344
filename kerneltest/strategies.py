"""Hypothesis strategies that suites share. A leaf: it knows Hypothesis and nothing of this package."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st


def edges(limit: int, *tiles: int, minimum: int = 0) -> st.SearchStrategy[int]:
    """Lengths from ``minimum`` to ``limit`` that crowd around the tile edges, where kernels change their path.

    Half of the draws are 0, 1, primes, and multiples of each tile with their two neighbours; the other half is uniform.
    Shrinks towards 1: the simplest length is an ordinary one, and 0 a special case.
    """
    if not 0 <= minimum <= limit or limit < 1:
        raise ValueError(f"expected 0 <= minimum <= limit and limit >= 1, got {minimum} and {limit}")
    near = {0, 1, *_primes(limit)}
    for tile in tiles:
        near.update(multiple + off for multiple in (tile, 2 * tile, 4 * tile) for off in (-1, 0, 1))
    return st.integers(max(minimum, 1), limit) | st.sampled_from(sorted(n for n in near if minimum <= n <= limit))


def _primes(limit: int) -> Iterable[int]:
    # A few are enough: what matters is a length that no tile, page or vector width divides.
    return (p for p in (3, 7, 13, 31, 61, 113, 251, 509, 1021, 4093) if p <= limit)
