"""Philox against its published answers, and draws against the random numbers that they were made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling_cases import draws

from kerneltest.oracle.inversion import check_inverse
from kerneltest.oracle.philox import curand_uniform, philox

WORD = 0xFFFFFFFF
WEIGHTS = torch.tensor([[0.125, 0.0, 0.5, 0.25, 0.125], [0.0, 0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([WORD] * 4, (WORD, WORD), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: list[int], key: tuple[int, int], answer: list[int]) -> None:
    """Those of the authors' library Random123 (kat_vectors)."""
    assert philox(np.array([counter] * 2, dtype=np.uint32), key).tolist() == [answer] * 2


def test_uniform_numbers_are_words_of_the_block_that_the_offset_names() -> None:
    for offset in (0, 1, 6, (1 << 34) + 3):
        counter = np.array([[offset // 4 & WORD, offset // 4 >> 32, 7, 1]], dtype=np.uint32)
        word = int(philox(counter, (5, 2))[0, offset % 4])
        (number,) = curand_uniform((2 << 32) + 5, np.array([(1 << 32) + 7], dtype=np.uint64), offset)
        assert number == np.float32(np.float32(word) * 2.0**-32 + 2.0**-33)
    # A tensor of the device has the bits of a negative number.
    one = np.array([7], dtype=np.uint64)
    assert curand_uniform(-1, one, -1) == curand_uniform(2**64 - 1, one, 2**64 - 1)
    last = int(philox(np.array([[WORD, WORD >> 2, 7, 0]], dtype=np.uint32), (WORD, WORD))[0, 3])
    assert curand_uniform(-1, one, -1) == np.float32(np.float32(last) * 2.0**-32 + 2.0**-33)
    numbers = curand_uniform(1, np.arange(100_000, dtype=np.uint64))
    assert 0 < numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() <= 1
    assert abs(numbers.mean() - 0.5) < 0.005


def said(tokens: list[int], numbers: list[float], *, gamma: float = 0.0, error: float = 0.0, row: int = 0) -> list[str]:
    at, rows = torch.tensor(numbers, dtype=torch.float64), torch.full((len(tokens),), row)
    found = check_inverse(torch.tensor(tokens), rows, WEIGHTS, at, gamma=gamma, error=torch.full_like(at, error))
    return [line for rejection in found for line in (rejection.what, *rejection.details)]


def test_the_first_token_whose_sum_is_above_the_number_is_right_and_no_other() -> None:
    for number, right in ((0.1, 0), (0.126, 2), (0.6, 2), (0.626, 3), (0.8, 3), (0.876, 4), (0.999, 4)):
        for token in range(5):
            assert bool(said([token], [number])) == (token != right), (number, token)
    assert said([2, 4], [0.5, 0.5]) == [
        "1 of 2 draws are not what their random numbers say",
        "draw 1 is token 4 of row 0, of the running sums from 0.875 to 1; its random number is 0.5, which is token 2",
    ]


def test_a_number_that_all_sums_are_below_is_that_of_the_last_token_of_any_weight() -> None:
    assert not said([4], [1.0])
    assert said([3], [1.0])
    assert not said([3], [1.0], row=1)
    assert said([2], [1.0], row=1)


def test_what_is_not_known_is_left_open_and_nothing_else() -> None:
    assert not said([0, 2], [0.125 - 1e-6, 0.125 - 1e-6], gamma=1e-5)
    assert not said([0, 2], [0.125 + 1e-6, 0.125 + 1e-6], gamma=1e-5)
    assert said([0], [0.125 + 1e-5], gamma=1e-5)
    assert said([2], [0.125 - 1e-5], gamma=1e-5)
    assert not said([0, 2], [0.126, 0.126], error=2e-3)
    assert not said([0, 1, 2, 3, 4], [0.5] * 5, error=torch.inf)


@given(st.integers(2, 3000), st.integers(0, 2**32 - 1))
@draws(60)
def test_sums_in_fp32_are_never_accused_and_other_numbers_are(vocabulary: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weights = torch.rand(1, vocabulary, generator=random) ** 4
    weights = (weights / weights.sum()).double()
    rows = torch.zeros(64, dtype=torch.long)
    numbers = torch.from_numpy(curand_uniform(seed, np.arange(64, dtype=np.uint64)))
    sums = weights.float().cumsum(-1)[0]
    tokens = torch.searchsorted(sums, numbers.float(), right=True).clamp(max=int(weights.nonzero()[-1, 1]))
    gamma, exact = vocabulary * 2.0**-24, torch.zeros_like(numbers)
    assert not list(check_inverse(tokens, rows, weights, numbers, gamma=gamma, error=exact))
    if float(weights.max()) < 0.5:
        assert list(check_inverse(tokens, rows, weights, numbers.roll(1), gamma=gamma, error=exact))
