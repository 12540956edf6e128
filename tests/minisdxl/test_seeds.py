"""Seeds of up to 64 bits, against torch's own seeding and numpy's Mersenne Twister."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from minisdxl.seeds import check_seed, generator


def noise(seed: int) -> Tensor:
    return torch.randn(64, generator=generator(seed))


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1])
def test_seeds_of_32_bits_are_torchs_own(seed: int) -> None:
    assert torch.equal(noise(seed), torch.randn(64, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(generator(seed).get_state(), torch.Generator().manual_seed(seed).get_state())


@pytest.mark.parametrize("seed", [2**32, 2**32 + 42, 2**63, 2**64 - 1, 0x123456789ABCDEF0])
def test_larger_seeds_key_the_twister_by_both_halves(seed: int) -> None:
    """The same 32-bit words as numpy's generator, beyond the first 624, after which the state is renewed."""
    drawn = torch.rand(2000, generator=generator(seed)) * 2**24  # of each word the low 24 bits
    twister = np.random.RandomState([seed % 2**32, seed // 2**32])
    expected = twister.randint(0, 2**32, 2000, dtype=np.uint32) % 2**24
    assert drawn.long().tolist() == expected.tolist()
    again = torch.randn(5000, generator=generator(seed))
    print(f"seed {seed}: mean {again.mean():.3f}, deviation {again.std():.3f} of 5000 normal numbers")
    assert abs(float(again.mean())) < 0.06
    assert abs(float(again.std()) - 1) < 0.05


def test_no_two_seeds_give_the_same_noise() -> None:
    draw = random.Random(0)
    large = [draw.randrange(2**32, 2**64) for _ in range(300)]
    halves = [half for seed in large for half in (seed % 2**32, seed // 2**32)]
    swapped = [(seed % 2**32) * 2**32 + seed // 2**32 for seed in large]
    seeds = {*range(300), *large, *halves, *swapped, *(2**32 + seed for seed in range(300)), 2**64 - 1}
    print(f"{len(seeds)} seeds, {len(large)} of them of 64 random bits")
    assert len({tuple(noise(seed)[:4].tolist()) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
def test_other_numbers_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed is {seed}, expected 0 to 18446744073709551615"):
        check_seed(seed)
    with pytest.raises(ValueError, match="expected 0 to"):
        generator(seed)


def test_torch_drops_the_high_half() -> None:
    """The reason for all this; if torch changes it, this module can go."""
    draws = [torch.randn(64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 2**32)]
    assert torch.equal(*draws)
