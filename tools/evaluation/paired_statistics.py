"""Confidence intervals of 95 % for measures on the same captions and seeds, and verdicts on claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959964  # 95 % of a standard normal variable lie within -Z and Z
RESAMPLES = 10_000
CHUNK = 500  # resamples held in memory at a time
LEAST_PAIRS = 6  # with 5 pairs, all on one side is not rare enough: 2 * 0.5^5 > 0.05
VERDICTS = ("confirmed", "not", "undecided")
INTERVALS = (
    "Intervals of 95 %: Wilson 1927 for shares, Tango 1998 for paired differences of shares, "
    "paired bootstrap (percentiles, Efron and Tibshirani 1993) for the others."
)


class Estimate(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __neg__(self) -> Estimate:
        return Estimate(-self.value, -self.high, -self.low)


def wilson(successes: int, trials: int) -> Estimate:
    """A share, with the score interval of Wilson 1927. Raises ``ValueError`` unless 0 <= successes <= trials > 0."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials, expected 1 or more trials and no more successes")
    share = successes / trials
    center = (share + Z * Z / (2 * trials)) / (1 + Z * Z / trials)
    half = Z / (1 + Z * Z / trials) * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials**2))
    return Estimate(share, max(0.0, min(share, center - half)), min(1.0, max(share, center + half)))  # rounding


def paired_shares(ours: Sequence[bool], theirs: Sequence[bool]) -> Estimate:
    """Our share less theirs, on the same trials, with the score interval of Tango 1998 (Statistics in Medicine 17:891).

    The interval holds the differences that McNemar's test, generalized from no difference to any, does not reject. It
    is also sound if nearly all pairs agree, where resampling would give an interval of zero width. Raises
    ``ValueError`` for no trials and for unequal numbers of them.
    """
    n = len(ours)
    if n == 0 or len(theirs) != n:
        raise ValueError(f"there are {n} and {len(theirs)} trials, expected 1 or more, the same ones")
    b = sum(one and not other for one, other in zip(ours, theirs, strict=True))
    c = sum(other and not one for one, other in zip(ours, theirs, strict=True))

    def score(delta: float) -> float:
        # The share of pairs in which they alone succeed, at its most likely under a difference of delta.
        half = (2 * n - b + c) * delta - b - c
        only_theirs = (math.sqrt(max(0.0, half * half + 8 * n * c * delta * (1 - delta))) - half) / (4 * n)
        variance = n * (2 * only_theirs + delta * (1 - delta))
        gap = b - c - n * delta
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0

    found = (b - c) / n
    return Estimate(found, _crossing(score, -1.0, found, Z), _crossing(score, found, 1.0, -Z))


def _crossing(score: Callable[[float], float], low: float, high: float, level: float) -> float:
    """Where the falling ``score`` crosses ``level`` between ``low`` and ``high``; one of the ends if it does not."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if score(middle) > level else (low, middle)
    return (low + high) / 2


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """A mean, with the percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    For paired differences this is the paired bootstrap. The same values give the same interval. An infinite value makes
    all three numbers infinite. Raises ``ValueError`` for no values and for NaN.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0 or np.isnan(data).any():
        raise ValueError(f"values are {list(values)[:5]}, expected one or more numbers")
    mean = float(data.mean())
    if math.isinf(mean):
        return Estimate(mean, mean, mean)
    rng = np.random.default_rng(seed)
    means = [data[rng.integers(0, data.size, (CHUNK, data.size))].mean(axis=1) for _ in range(RESAMPLES // CHUNK)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Estimate(mean, float(low), float(high))


def verdict(advantage: Estimate, pairs: int) -> str:
    """Whether an advantage over another preset confirms the claim of being better: one of ``VERDICTS``.

    ``confirmed`` if the interval lies above 0, ``not`` if it lies below 0, ``undecided`` if it holds 0. Fewer pairs
    than ``LEAST_PAIRS`` are ``undecided`` too, because resampling gives too narrow an interval.
    """
    if pairs < LEAST_PAIRS:
        return "undecided"
    if advantage.low > 0:
        return "confirmed"
    return "not" if advantage.high < 0 else "undecided"
