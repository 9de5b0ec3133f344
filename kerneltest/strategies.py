"""Hypothesis strategies that suites share. A leaf: it knows Hypothesis and nothing of this package."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from functools import cache
from typing import TypeVar

from hypothesis import strategies as st

T = TypeVar("T", bound=Hashable)


def weighted(weights: Mapping[T, int]) -> st.SearchStrategy[T]:
    """One of the keys, each as often as its number says. Shrinks towards the first.

    Made once for equal arguments, as :func:`edges`.
    """
    return _weighted(tuple(weights.items()))


@cache
def _weighted(weights: tuple[tuple[T, int], ...]) -> st.SearchStrategy[T]:
    return st.sampled_from([value for value, weight in weights for _ in range(weight)])


@cache
def edges(limit: int, *tiles: int, minimum: int = 0) -> st.SearchStrategy[int]:
    """Lengths from ``minimum`` to ``limit`` that crowd around the tile edges, where kernels change their path.

    A draw is uniform, or one of 0, 1 and some primes, or a multiple of one of the tiles or its neighbour.
    Shrinks towards 1: the simplest length is an ordinary one, and 0 a special case. Made once for equal arguments:
    Hypothesis validates every strategy that is new to it, which costs more than to draw from it.
    """
    if not 0 <= minimum <= limit or limit < 1:
        raise ValueError(f"expected 0 <= minimum <= limit and limit >= 1, got {minimum} and {limit}")
    near = [{0, 1, *_primes(limit)}]
    near += [{multiple + off for multiple in (tile, 2 * tile, 4 * tile) for off in (-1, 0, 1)} for tile in tiles]
    # A branch for each tile: in one common set, the edges of a page of 16 would drown among those of all others.
    edge = [sorted(n for n in group if minimum <= n <= limit) for group in near]
    return st.one_of(st.integers(max(minimum, 1), limit), *(st.sampled_from(group) for group in edge if group))


def _primes(limit: int) -> Iterable[int]:
    # A few are enough: what matters is a length that no tile, page or vector width divides.
    return (p for p in (3, 7, 13, 31, 61, 113, 251, 509, 1021, 4093) if p <= limit)
