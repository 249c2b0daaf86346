"""Intervals: for the mean of items (percentile bootstrap) and for a share (Wilson).

Both are seeded or closed formulas, so that the same results give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from lm_eval_steering.errors import SteeringError

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0


def bootstrap_interval(
    values: Sequence[float], level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float]:
    """Percentile-bootstrap interval of the mean over items (Efron 1979), seeded.

    Raises:
        SteeringError: for no values.
    """
    if not len(values):
        raise SteeringError("an interval of no values")
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    # One resample at a time: thousands of items times thousands of resamples would not fit in memory.
    means = [array[generator.integers(len(array), size=len(array))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(successes: int, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927); sensible at shares of 0 and 1, and for few trials.

    Raises:
        SteeringError: for no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or not trials:
        raise SteeringError(f"a share of {successes} in {trials} is not defined")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-17.
    return (centre - spread) / scale if successes else 0.0, (centre + spread) / scale if successes < trials else 1.0


def interval_low(values: Sequence[float]) -> float:
    """Aggregation: lower end of the 95 % bootstrap interval of the mean."""
    return bootstrap_interval(values)[0]


def interval_high(values: Sequence[float]) -> float:
    """Aggregation: upper end of the 95 % bootstrap interval of the mean."""
    return bootstrap_interval(values)[1]


@dataclass(frozen=True)
class Null:
    """A score among the same score of matched random sets: the null of LSS (`docs/lss.md`).

    Attributes:
        own: the score in question.
        mean: of the random sets' scores.
        lowest: of them.
        highest: of them.
        share: of random sets that score at or above `own`.
        interval: of that share (Wilson), which is wide: 0 of 20 sets still allows 16 %.
        sets: how many.
    """

    own: float
    mean: float
    lowest: float
    highest: float
    share: float
    interval: tuple[float, float]
    sets: int


def against_random(own: float, random: Sequence[float]) -> Null:
    """Compare a score with those of matched random sets.

    Raises:
        SteeringError: for no sets.
    """
    if not random:
        raise SteeringError("no random sets to compare with: draw at least 20")
    above = sum(score >= own for score in random)
    return Null(
        own, sum(random) / len(random), min(random), max(random), above / len(random),
        wilson_interval(above, len(random)), len(random),
    )  # fmt: skip
