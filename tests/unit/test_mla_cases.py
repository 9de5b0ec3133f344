"""Which cases of MLA are drawn."""

from __future__ import annotations

from typing import Any

from mla_cases import paged

from kerneltest.engine.chase import draw
from kerneltest.engine.profile import PROFILES
from kerneltest.model import Case, Device

GPU = Device(kind="cuda", ordinal=0, name="NVIDIA H200", sm=(9, 0), units=132)
TILE = 64


def first_keys(case: Case[Any]) -> list[int]:
    """Queries whose heads lie in two tiles of 64 rows, and which are the first to see a key of a tile of 64."""
    heads, found = case.axes.heads, []
    for request in case.axes.requests:
        before = request.kv_len - request.qo_len
        ends = range(TILE, request.qo_len * heads, TILE)
        split = (end // heads for end in ends if end % heads and heads < TILE)
        found += [query for query in split if before >= 0 and (before + query) % TILE == 0]
    return found


def test_a_query_in_two_tiles_may_be_the_first_to_see_a_tile_of_keys() -> None:
    # A bound that is rounded down there loses a key. Where lengths alone are drawn, 8 of 1,000 cases have such a query.
    drawn: set[Case[Any]] = set()
    draw(paged.mla_paged_attention.cases(PROFILES["default"].size(GPU)), drawn.add, 2000, 1)
    met = sum(case.axes.causal and bool(first_keys(case)) for case in drawn)
    assert met > 0.015 * len(drawn)
