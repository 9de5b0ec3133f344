"""How subjects are drawn: as often as strategies say, each of its own, and the same ones again from a seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import reject
from hypothesis import strategies as st

from kerneltest.engine.chase import Found, draw
from kerneltest.strategies import weighted

NUMBERS = st.integers(0, 2**32)
# A recipe with as many parts of one kind as Hypothesis likes to copy to each other.
RECIPES = st.tuples(NUMBERS, NUMBERS, *[weighted({"": 17, "rare": 2, "other": 1})] * 4)


def drawn(strategy: st.SearchStrategy[object], examples: int, seed: int = 1, bred: int = 0) -> list[object]:
    seen: list[object] = []
    draw(strategy, seen.append, examples, seed, bred)
    return seen


@pytest.mark.parametrize("seed", range(5))
def test_what_is_rare_is_there_as_often_as_its_weight_says(seed: int) -> None:
    parts = Counter(part for recipe in set(drawn(RECIPES, 200, seed)) for part in recipe[2:])  # type: ignore[index]
    # Of 800 parts, 80 and 40 are meant; a tenth of the recipes is plainer than that.
    assert 45 <= parts["rare"] <= 110
    assert 20 <= parts["other"] <= 65


@pytest.mark.parametrize("bred", [0, 15])
def test_there_are_as_many_different_ones_as_were_asked_for(bred: int) -> None:
    assert len(set(drawn(RECIPES, 60, bred=bred))) in range(60 - bred, 61)


def test_a_seed_gives_the_same_ones_again() -> None:
    first, again, other = (drawn(RECIPES, 50, seed, bred=10) for seed in (1, 1, 2))
    assert first == again
    assert set(first) != set(other)


def test_what_there_are_few_of_ends() -> None:
    assert set(drawn(st.sampled_from("abc"), 100)) == set("abc")


def test_what_is_rarely_accepted_is_looked_for() -> None:
    accepted = set()

    def check(number: int) -> None:
        if number % 40:
            reject()
        accepted.add(number)

    assert draw(NUMBERS, check, 20, 1)
    assert len(accepted) >= 10


def test_nothing_accepted_is_said() -> None:
    def check(number: int) -> None:
        reject()

    assert not draw(NUMBERS, check, 50, 1, bred=10)


@pytest.mark.parametrize("bred", [0, 10])
def test_the_first_that_is_found_is_shrunk_and_the_last_that_is_drawn(bred: int) -> None:
    found: list[int] = []

    def check(number: int) -> None:
        if number > 1000:
            found.append(number)
            raise Found

    assert draw(NUMBERS, check, 40, 1, bred)
    assert found[-1] == 1001
