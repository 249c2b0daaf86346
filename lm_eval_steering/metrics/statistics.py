"""Intervals: for the mean of items (percentile bootstrap) and for a share (Wilson).

Both are seeded or closed formulas, so that the same results give the same interval.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


# --- Is a difference more than chance? Paired tests between a baseline and steered runs over the same items
#
# Cells that share their items are compared in one step: arrays are (items, cells), and one matrix of resampling
# weights (resamples, items) serves them all, so that a resample means the same items everywhere. The estimators are
# the usual ones: the expanded percentile bootstrap (Hesterberg 2015) with multinomial weights, the exact McNemar test,
# Student's paired t, Holm (1979), and for means over languages a bootstrap of languages and items together (Owen
# 2007). Tests come from scipy and statsmodels; those of corpus scores are in `paired_corpora.py`.

Array = NDArray[np.float64]
MCNEMAR, T_TEST, NO_TEST = "exact McNemar", "paired t", ""


@dataclass(frozen=True)
class Aggregate:
    """A score that is a function of a ratio of two sums over items.

    Attributes:
        name: for tables.
        of_ratio: from sum of numerators / sum of denominators to the score; monotone.
    """

    name: str
    of_ratio: Callable[[Array], Array]


MEAN = Aggregate("mean", lambda ratio: ratio)
NATS = Aggregate("nats", lambda ratio: -ratio)
PERPLEXITY = Aggregate("perplexity", lambda ratio: np.exp(-ratio))
BITS = Aggregate("bits", lambda ratio: -ratio / math.log(2))
OF_PAIRS = (NATS, PERPLEXITY, BITS)


@dataclass(frozen=True)
class Arm:
    """Items of several cells, as sums see them; nan where a cell has no value for an item.

    Attributes:
        numerator: (items, cells); the values themselves for a mean, log-likelihoods for a perplexity.
        denominator: (items, cells); None stands for 1 wherever there is a value.
    """

    numerator: Array
    denominator: Array | None = None

    def column(self) -> Arm:
        """One cell's items (items,) as (items, 1)."""
        return Arm(self.numerator[:, None], None if self.denominator is None else self.denominator[:, None])

    def of_items(self, chosen: NDArray[np.bool_]) -> Arm:
        """These items of each cell."""
        return Arm(self.numerator[chosen], None if self.denominator is None else self.denominator[chosen])

    def of(self, columns: NDArray[np.int64]) -> Arm:
        """These columns, in this order."""
        return Arm(self.numerator[:, columns], None if self.denominator is None else self.denominator[:, columns])

    def sums(self, weights: NDArray[Any]) -> tuple[Array, Array]:
        """Weighted sums of numerators and denominators, (resamples, cells) each, for weights (resamples, items)."""
        there = ~np.isnan(self.numerator)
        whole = bool(there.all())
        kind = weights.dtype
        top = weights @ (self.numerator if whole else np.where(there, self.numerator, 0.0)).astype(kind, copy=False)
        if self.denominator is not None:
            return top, weights @ np.where(there, self.denominator, 0.0).astype(kind)
        if whole:
            return top, np.broadcast_to(weights.sum(axis=1, keepdims=True), top.shape)
        return top, weights @ there.astype(kind)

    def ratio(self, weights: NDArray[Any]) -> Array:
        """(resamples, cells), nan where a resample holds no item."""
        top, bottom = self.sums(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(bottom != 0, top / bottom, np.nan)

    def influence(self) -> Array:
        """(items, cells): by how much an item moves the ratio, times the number of items; its mean is 0."""
        bottom = np.where(np.isnan(self.numerator), np.nan, 1.0) if self.denominator is None else self.denominator
        ratio = np.nansum(self.numerator, axis=0) / np.nansum(bottom, axis=0)
        return (self.numerator - ratio * bottom) / np.nanmean(bottom, axis=0)


@dataclass(frozen=True)
class Comparison:
    """What a paired comparison found, one entry a cell.

    Attributes:
        baseline: scores without the intervention.
        score: scores with it.
        difference: score - baseline.
        low: lower ends of the intervals of the difference.
        high: upper ends.
        p_value: two-sided, of no difference.
        test: which test gave the p-values.
        n: items that both sides have.
        replicates: (resamples, cells) of the difference.
        baseline_replicates: (resamples, cells).
    """

    baseline: Array
    score: Array
    difference: Array
    low: Array
    high: Array
    p_value: Array
    test: str
    n: NDArray[np.int64]
    replicates: Array
    baseline_replicates: Array


@lru_cache(maxsize=4)
def resampling_weights(items: int, resamples: int = RESAMPLES, seed: int = SEED) -> NDArray[np.float32]:
    """How often each resample holds each item, (resamples, items); the same for all cells with so many items.

    Raises:
        SteeringError: for no items.
    """
    if items < 1:
        raise SteeringError("a comparison over no items")
    drawn = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=resamples)
    return drawn.astype(np.float32)  # counts, so exact; sums over items keep six digits, which an interval has not


def compare(
    baseline: Arm,
    steered: Arm,
    aggregate: Aggregate = MEAN,
    level: float = LEVEL,
    baseline_of: NDArray[np.int64] | None = None,
) -> Comparison:
    """Paired comparison of cells with their baselines; an item counts where both sides have it.

    Args:
        baseline: (items, baselines).
        steered: (items, cells), the same items in the same order.
        aggregate: how items become the score.
        level: of the interval.
        baseline_of: (cells,), which baseline a cell is compared with; by default each has its own.

    Raises:
        SteeringError: if there are no items.
    """
    shared, alone = baseline, baseline_of
    baseline = baseline if baseline_of is None else baseline.of(baseline_of)
    if np.isnan(baseline.numerator).any() or np.isnan(steered.numerator).any():
        baseline, steered = _common(baseline, steered)
        shared, alone = baseline, None  # a baseline that lacks other items beside each cell is another one
    items = len(steered.numerator)
    weights, once = resampling_weights(items), np.ones((1, items))
    before = aggregate.of_ratio(shared.ratio(weights))
    before = before if alone is None else before[:, alone]
    replicates = aggregate.of_ratio(steered.ratio(weights)) - before
    point = [aggregate.of_ratio(arm.ratio(once))[0] for arm in (baseline, steered)]
    n = (~np.isnan(steered.numerator)).sum(axis=0)
    low, high = interval_of_items(replicates, n, level)
    p_value, test = p_values(baseline, steered)
    return Comparison(point[0], point[1], point[1] - point[0], low, high, p_value, test, n, replicates, before)


def _common(baseline: Arm, steered: Arm) -> tuple[Arm, Arm]:
    there = ~(np.isnan(baseline.numerator) | np.isnan(steered.numerator))
    return tuple(  # type: ignore[return-value]
        Arm(
            np.where(there, arm.numerator, np.nan),
            None if arm.denominator is None else np.where(there, arm.denominator, np.nan),
        )
        for arm in (baseline, steered)
    )


def interval_of_items(replicates: Array, n: NDArray[np.int64], level: float = LEVEL) -> tuple[Array, Array]:
    """Expanded percentile interval of each cell (Hesterberg 2015, "What Teachers Should Know about the Bootstrap").

    The plain percentile interval is too short for few items: replicates spread by sqrt((n - 1) / n) too little, and as
    if the spread of the items were known. Taking them at Phi(sqrt(n / (n - 1)) * t) with t of n - 1 degrees of freedom
    mends both.

    Args:
        replicates: (resamples, cells).
        n: (cells,) items.
        level: of the interval.

    Returns:
        Lower and upper ends, (cells,) each; nan for a cell of one item, which says nothing about a spread.
    """
    from scipy.stats import norm, t

    ends = np.full((2, len(n)), np.nan)
    for size in np.unique(n[n > 1]):
        tail = norm.cdf(math.sqrt(size / (size - 1)) * t.ppf((1 - level) / 2, size - 1))
        ends[:, n == size] = interval_of(replicates[:, n == size], float(1 - 2 * tail))
    return ends[0], ends[1]


def interval_of(replicates: Array, level: float = LEVEL) -> tuple[Array, Array]:
    """Percentile interval over the first axis; nan replicates (nothing drawn) are left out."""
    ends = [(1 - level) / 2, (1 + level) / 2]
    if not np.isnan(replicates).any():
        low, high = np.quantile(replicates, ends, axis=0)
        return low, high
    flat = replicates.reshape(len(replicates), -1)
    empty = np.isnan(flat).all(axis=0)
    found = np.full((2, flat.shape[1]), np.nan)
    if not empty.all():
        found[:, ~empty] = np.nanquantile(flat[:, ~empty], ends, axis=0)
    return found[0].reshape(replicates.shape[1:]), found[1].reshape(replicates.shape[1:])


def p_values(baseline: Arm, steered: Arm) -> tuple[Array, str]:
    """Two-sided p of each cell: exact McNemar where every item is right or wrong, else a paired t test.

    The t test of a ratio of sums is over the items' linearised differences (delta method); of a mean it is the usual
    one. A cell in which no item changed has p = 1.
    """
    both = [arm.numerator[~np.isnan(arm.numerator)] for arm in (baseline, steered)]
    if baseline.denominator is None and all(np.isin(values, (0.0, 1.0)).all() for values in both):
        better = (steered.numerator > baseline.numerator).sum(axis=0)
        worse = (steered.numerator < baseline.numerator).sum(axis=0)
        return mcnemar(better, worse), MCNEMAR
    return _paired_t(baseline, steered), T_TEST


def mcnemar(better: NDArray[np.int64], worse: NDArray[np.int64]) -> Array:
    """Exact McNemar test, which is the sign test over the items that changed (two-sided), for arrays of counts."""
    from scipy.stats import binom

    changed = np.asarray(better) + np.asarray(worse)
    return np.minimum(1.0, 2 * binom.cdf(np.minimum(better, worse), changed, 0.5))


def _paired_t(baseline: Arm, steered: Arm) -> Array:
    from scipy.stats import ttest_1samp

    once = np.ones((1, len(steered.numerator)))
    shift = steered.ratio(once)[0] - baseline.ratio(once)[0]
    differences = steered.influence() - baseline.influence() + shift
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # items that all moved by the same amount have no spread
        found = np.asarray(ttest_1samp(differences, 0.0, axis=0, nan_policy="omit").pvalue, dtype=np.float64)
    unchanged = np.nanmax(np.abs(differences), axis=0, initial=0.0) == 0
    return np.where(unchanged, 1.0, found)


def holm(p_value: Array) -> Array:
    """Holm's correction over one family of comparisons (statsmodels); nan stays nan and is no comparison."""
    from statsmodels.stats.multitest import multipletests

    found = np.full(len(p_value), np.nan)
    there = ~np.isnan(p_value)
    if there.any():
        gc.freeze()  # statsmodels collects garbage at each call: a quarter of a second with torch's objects about
        found[there] = multipletests(p_value[there], method="holm")[1]
        gc.unfreeze()
    return found


def over_languages(
    replicates: Array,
    steered: Sequence[str],
    evaluated: Sequence[str],
    groups: Mapping[str, NDArray[np.bool_]],
    seed: int = SEED,
) -> dict[str, Array]:
    """Replicates of the mean over cells, with languages drawn anew beside the items.

    A draw of languages gives each its count w; a cell counts w(steered) * w(evaluated) times, a self cell w times, so
    that both roles of a language are drawn together (the pigeonhole bootstrap, Owen 2007). Missing cells are simply
    not there. A draw without any cell of a group is nan.

    Args:
        replicates: (resamples, cells), item resampling of each cell.
        steered: language of each cell.
        evaluated: language of each cell; that of `steered` where its items are in several.
        groups: name -> which cells.
        seed: of the draws.

    Returns:
        Name -> (resamples,).
    """
    codes = sorted({*steered, *evaluated})
    place = {code: number for number, code in enumerate(codes)}
    rows, columns = ([place[code] for code in own] for own in (steered, evaluated))
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(codes), np.full(len(codes), 1 / len(codes)), size=len(replicates))
    same = np.array(rows) == np.array(columns)
    counts = np.where(same, drawn[:, rows], drawn[:, rows] * drawn[:, columns]).astype(np.float64)
    counts[np.isnan(replicates)] = 0.0
    values = np.nan_to_num(replicates)
    found = {}
    for name, chosen in groups.items():
        total = counts[:, chosen].sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = (counts[:, chosen] * values[:, chosen]).sum(axis=1) / total
        found[name] = np.where(total > 0, mean, np.nan)
    return found


# --- Is a difference of BLEU or chrF++ more than chance? sacreBLEU's own paired test


@dataclass(frozen=True)
class CorpusComparison:
    """One system against the baseline by sacreBLEU's paired bootstrap (Koehn 2004).

    Attributes:
        baseline: score.
        score: of the system.
        p_value: of no difference.
        signature: sacreBLEU's, with the number of resamples and the seed.
    """

    baseline: float
    score: float
    p_value: float
    signature: str


def compare_corpora(
    metric: Any,
    baseline: Sequence[str],
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    resamples: int = RESAMPLES,
) -> dict[str, CorpusComparison]:
    """sacreBLEU's `--paired-bs` for several systems; its seed is that of the command (`SACREBLEU_SEED`, or 12345).

    Args:
        metric: a fresh `sacrebleu.metrics.BLEU` or `CHRF`, made with `references=[references]`.
        baseline: its hypotheses.
        systems: name -> hypotheses.
        references: one for each hypothesis.
        resamples: number of bootstrap resamples.
    """
    import logging

    from sacrebleu.significance import PairedTest

    logging.getLogger("sacrebleu").setLevel(logging.WARNING)  # it announces every resampling
    named: list[tuple[str, Sequence[str]]] = [("baseline", list(baseline)), *systems.items()]
    test = PairedTest(named, {"metric": metric}, [list(references)], test_type="bs", n_samples=resamples)
    signatures, results = test()
    (key,) = (key for key in results if key != "System")
    scored: list[Any] = results[key]  # its stubs also allow names here, which stand only under "System"
    first, *others = scored
    said = str(signatures[key])
    return {
        name: CorpusComparison(float(first.score), float(own.score), float(own.p_value), said)
        for name, own in zip(systems, others, strict=True)
    }
