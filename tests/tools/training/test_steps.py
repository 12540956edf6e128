"""Learning rates, noise levels and the balance of errors over them."""

from __future__ import annotations

import pytest
import torch

from tools.training.steps import Balance, noise_levels, warm_then_decay


def test_learning_rate_warms_up_stays_and_decays() -> None:
    factors = [warm_then_decay(step, 100, warm=10, decay=0.3) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:70] == [1.0] * 60
    assert factors[99] == pytest.approx(1 / 30)
    assert factors == sorted(factors[:50]) + sorted(factors[50:], reverse=True)


def test_noise_levels_are_spread_over_all() -> None:
    torch.manual_seed(0)
    share = torch.cat([noise_levels(16) for _ in range(2000)])
    counts = torch.histc(share, bins=8, min=0, max=1) / len(share)
    print(f"shares of eighths: {counts.tolist()}")
    assert share.min() >= 0
    assert share.max() < 1
    assert (counts - torch.tensor([1 / 16] * 2 + [7 / 48] * 6)).abs().max() <= 1e-3
    assert all((noise_levels(16) < 0.25).sum() == 2 for _ in range(50))  # in every batch


def test_errors_are_balanced_over_noise_levels() -> None:
    """Errors of known typical values, 1e-4 to 1 from one level to the other, come out alike, around 1."""
    torch.manual_seed(0)
    balance = Balance()
    for step in range(300):
        share = torch.rand(32)
        errors = 10 ** (-4 * share) * torch.empty(32).log_normal_(0, 0.5)
        balanced = balance(errors, share)
        if step == 0:
            assert balanced.isfinite().all()
        if step >= 250:
            low, high = balanced[share < 0.5], balanced[share >= 0.5]
            assert 0.5 < low.log().mean().exp() < 2
            assert 0.5 < high.log().mean().exp() < 2
    wanted = 10 ** (-4 * (torch.arange(20) + 0.5) / 20)
    print(f"typical, of expected: {(balance.typical.exp() / wanted).tolist()}")
    assert (balance.typical - wanted.log()).abs().max() < 0.4


def test_balance_takes_errors_of_one_band_as_if_one_by_one() -> None:
    """With equal errors, a batch of eight moves the mean as eight batches of one do."""
    at_once, one_by_one = Balance(), Balance()
    for balance in (at_once, one_by_one):
        balance(torch.ones(1), torch.tensor([0.5]))
    at_once(torch.full((8,), 4.0), torch.full((8,), 0.5))
    for _ in range(8):
        one_by_one(torch.full((1,), 4.0), torch.tensor([0.5]))
    assert torch.allclose(at_once.typical, one_by_one.typical, equal_nan=True)
    assert at_once.typical.isfinite().sum() == 1
