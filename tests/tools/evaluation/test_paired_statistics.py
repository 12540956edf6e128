"""Intervals against published ones, scipy's, and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize_scalar

from tools.evaluation.paired_statistics import Estimate, bootstrap_mean, paired_shares, verdict, wilson


def pairs(both: int, ours: int, theirs: int, neither: int) -> tuple[list[bool], list[bool]]:
    counts = ((True, True, both), (True, False, ours), (False, True, theirs), (False, False, neither))
    rows = [(one, other) for one, other, count in counts for _ in range(count)]
    return [one for one, _ in rows], [other for _, other in rows]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],  # Newcombe 1998, table I, method 3
)
def test_interval_of_a_share_is_wilsons(successes: int, trials: int, low: float, high: float) -> None:
    found = wilson(successes, trials)
    print(f"{successes} of {trials}: {found.low:.4f} to {found.high:.4f}, there {low} to {high}")
    assert found[1:] == pytest.approx((low, high), abs=1e-4)
    peer = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert found[1:] == pytest.approx((peer.low, peer.high), abs=1e-7)


@pytest.mark.parametrize("trials", range(1, 200))
def test_a_share_of_none_or_all_is_within_its_interval(trials: int) -> None:
    for successes in (0, trials):
        found = wilson(successes, trials)
        assert 0 <= found.low <= found.value <= found.high <= 1  # plots refuse bars of less than no length


TABLES = [(36, 12, 2, 0), (1, 1, 7, 12), (400, 30, 18, 52), (0, 5, 0, 27), (3, 0, 0, 29), (0, 0, 0, 32), (10, 0, 0, 0)]


@pytest.mark.parametrize("table", TABLES)
def test_difference_of_shares_is_where_the_likelihoods_score_test_rejects(table: tuple[int, int, int, int]) -> None:
    """The score test by brute force: the nuisance share maximizes the likelihood numerically."""
    _, b, c, _ = table
    n = sum(table)
    found = paired_shares(*pairs(*table))
    assert found.value == pytest.approx((b - c) / n)

    def statistic(delta: float) -> float:
        def cost(share: float) -> float:  # of the pairs in which they alone succeed; ours alone: share + delta
            terms = ((b, share + delta), (c, share), (n - b - c, 1 - 2 * share - delta))
            return -math.fsum(k * math.log(max(p, 1e-300)) for k, p in terms if k)

        low, high = max(0.0, -delta), (1 - delta) / 2
        share = minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
        return float((b - c - n * delta) / math.sqrt(n * (2 * share + delta - delta**2)))

    for end, level in ((found.low, stats.norm.ppf(0.975)), (found.high, stats.norm.ppf(0.025))):
        if abs(end) < 1 - 1e-9:
            error = abs(statistic(end) - level)
            print(f"{table}: end {end:+.4f}, score test {statistic(end):+.4f}, error {error:.1e}")
            assert error < 1e-3
    assert found.low <= found.value <= found.high


def test_published_interval() -> None:
    """Fagerland, Lydersen and Laake 2014 (Statistics in Medicine 33:2850), airway hyper-responsiveness, Tango."""
    found = paired_shares(*pairs(1, 1, 7, 12))
    print(f"{found}")
    assert found == pytest.approx((-0.286, -0.517, -0.026), abs=6e-4)


@pytest.mark.parametrize("table", [(20, 9, 1, 2), (20, 9, 2, 1), (20, 9, 3, 0), (100, 30, 14, 3), (100, 30, 16, 3)])
def test_zero_is_outside_just_where_mcnemars_test_rejects(table: tuple[int, int, int, int]) -> None:
    _, b, c, _ = table
    rejects = stats.chi2.sf((b - c) ** 2 / (b + c), df=1) < 0.05
    found = paired_shares(*pairs(*table))
    assert (found.low > 0 or found.high < 0) == rejects


def test_swapping_turns_the_difference_round() -> None:
    ours, theirs = pairs(7, 5, 2, 9)
    assert paired_shares(theirs, ours) == pytest.approx(-paired_shares(ours, theirs), abs=1e-12)


def test_bootstrap_interval_is_scipys() -> None:
    values = np.random.default_rng(5).exponential(size=80)
    found = bootstrap_mean(values.tolist())
    peer = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1))
    low, high = peer.confidence_interval
    print(f"ours {found.low:.4f} to {found.high:.4f}, scipy's {low:.4f} to {high:.4f}")
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found[1:] == pytest.approx((low, high), abs=0.05 * (high - low))  # what resampling leaves to chance
    assert bootstrap_mean(values.tolist()) == found


def test_infinite_values_and_none() -> None:
    assert bootstrap_mean([1.0, math.inf]) == (math.inf, math.inf, math.inf)
    for bad in ([], [math.nan]):
        with pytest.raises(ValueError, match="expected one or more numbers"):
            bootstrap_mean(bad)
    with pytest.raises(ValueError, match="0 trials"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="1 and 2 trials"):
        paired_shares([True], [True, False])


def test_verdicts() -> None:
    for advantage, expected in (
        (Estimate(0.2, 0.1, 0.3), "confirmed"),
        (Estimate(-0.2, -0.3, -0.1), "not"),
        (Estimate(0.1, -0.1, 0.3), "undecided"),
        (Estimate(0.0, 0.0, 0.0), "undecided"),
    ):
        assert verdict(advantage, 32) == expected
        assert verdict(advantage, 5) == "undecided"
    assert stats.binomtest(5, 5).pvalue > 0.05 > stats.binomtest(6, 6).pvalue
