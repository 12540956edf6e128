"""Seeds: whole numbers of up to 64 bits, and the random generator that each stands for."""

from __future__ import annotations

import numpy as np
import torch

SEEDS = 2**64  # how many there are
# Where the state of torch's CPU generator has the 624 words of its Mersenne Twister, each in 8 bytes.
WORDS = slice(24, 24 + 624 * 8)


def check_seed(seed: int) -> int:
    """``seed``, unless it is outside 0..2**64 - 1: then ``ValueError``."""
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed is {seed}, expected 0 to {SEEDS - 1}")
    return seed


def generator(seed: int) -> torch.Generator:
    """A CPU generator. Raises ``ValueError`` as :func:`check_seed`.

    torch seeds its Mersenne Twister with the low 32 bits alone: 2**32 would give the picture of seed 0. So a larger
    seed sets the state that the generator's authors derive from several words (``init_by_array``), here the low and the
    high half, which is the state of ``numpy.random.RandomState([low, high])``.
    """
    high, low = divmod(check_seed(seed), 2**32)
    made = torch.Generator().manual_seed(low)
    if high:
        words = np.random.RandomState([low, high]).get_state(legacy=False)["state"]["key"]
        state = made.get_state()
        state[WORDS] = torch.from_numpy(words.astype("<u8").view(np.uint8))
        made.set_state(state)
    return made
