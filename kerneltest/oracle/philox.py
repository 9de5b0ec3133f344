"""Philox4x32-10, and cuRAND's uniform numbers made of it: what a kernel drew, to be drawn again.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUNDS = 10
# Of the paper, section 3.3: multipliers of the words 0 and 2, and the Weyl constants that are added to the key.
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """The blocks of four words for counters, both uint32 [n, 4], and a key of two words."""
    low, shift = np.uint64(WORD), np.uint64(32)
    words = counter.astype(np.uint64)
    for turn in range(ROUNDS):
        k = [np.uint64((key[i] + turn * WEYL[i]) & WORD) for i in (0, 1)]
        first, second = words[:, 0] * MULTIPLIERS[0], words[:, 2] * MULTIPLIERS[1]
        words = np.stack(
            [
                (second >> shift) ^ words[:, 1] ^ k[0],
                second & low,
                (first >> shift) ^ words[:, 3] ^ k[1],
                first & low,
            ],
            axis=1,
        )
    return words.astype(np.uint32)


def curand_uniform(seed: int, subsequences: NDArray[np.uint64], offset: int = 0) -> NDArray[np.float64]:
    """The first ``curand_uniform`` behind ``curand_init(seed, subsequence, offset)``, in (0, 1], for each subsequence.

    Seed and offset have 64 bits, and a negative one is the number that its bits say.

    The seed is the key; the counter has the number of the block in its lower half and the subsequence in its upper one
    (curand_philox4x32_x.h); a word x becomes x 2^-32 + 2^-33 in float32 (curand_uniform.h). Exact, as float64.
    """
    block, place = divmod(offset % 2**64, 4)
    counter = np.empty((len(subsequences), 4), dtype=np.uint32)
    counter[:, 0], counter[:, 1] = block & WORD, (block >> 32) & WORD
    counter[:, 2] = subsequences & np.uint64(WORD)
    counter[:, 3] = subsequences >> np.uint64(32)
    words = philox(counter, (seed & WORD, (seed >> 32) & WORD))[:, place]
    return (words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)).astype(np.float64)
