"""Statistics of scores: intervals, random neuron sets as a null, and paired tests of steered runs against baselines.

Everything is seeded or a closed formula, so that the same results give the same numbers. There is one bootstrap: a
matrix of resampling weights (resamples, items), the same for every quantity over so many items, and the expanded
percentile interval of its replicates (Hesterberg 2015). Cells that share their items are compared in one step; arrays
are (items, cells). Tests are the usual ones: exact McNemar, Student's paired t, Holm (1979), and for BLEU and chrF++
sacreBLEU's paired bootstrap. Means over languages resample languages and items together (Owen 2007).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.metrics.compat import corpus_scores

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0

Array = NDArray[np.float64]

# --- Intervals


@lru_cache(maxsize=4)
def resampling_weights(items: int, resamples: int = RESAMPLES) -> NDArray[np.float32]:
    """How often each resample holds each item, (resamples, items); the same for all cells with so many items.

    Raises:
        SteeringError: for no items.
    """
    if items < 1:
        raise SteeringError("a comparison over no items")
    drawn = np.random.default_rng(SEED).multinomial(items, np.full(items, 1 / items), size=resamples)
    return drawn.astype(np.float32)  # counts, so exact; sums over items keep six digits, which an interval has not


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
    tails = [(1 - level) / 2, (1 + level) / 2]
    if not np.isnan(replicates).any():
        low, high = np.quantile(replicates, tails, axis=0)
        return low, high
    flat = replicates.reshape(len(replicates), -1)
    empty = np.isnan(flat).all(axis=0)
    ends = np.full((2, flat.shape[1]), np.nan)
    if not empty.all():
        ends[:, ~empty] = np.nanquantile(flat[:, ~empty], tails, axis=0)
    return ends[0].reshape(replicates.shape[1:]), ends[1].reshape(replicates.shape[1:])


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over items; nan for one item.

    Raises:
        SteeringError: for no values.
    """
    if not len(values):
        raise SteeringError("an interval of no values")
    array = np.asarray(values, dtype=np.float64)
    replicates = resampling_weights(len(array)).astype(np.float64) @ array / len(array)
    low, high = interval_of_items(replicates[:, None], np.array([len(array)]))
    return float(low[0]), float(high[0])


def interval_low(values: Sequence[float]) -> float:
    """Aggregation: lower end of the 95 % bootstrap interval of the mean."""
    return mean_interval(values)[0]


def interval_high(values: Sequence[float]) -> float:
    """Aggregation: upper end of the 95 % bootstrap interval of the mean."""
    return mean_interval(values)[1]


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927); sensible at shares of 0 and 1, and for few trials.

    Raises:
        SteeringError: for no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or not trials:
        raise SteeringError(f"a share of {successes} in {trials} is not defined")
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-17.
    return (centre - spread) / scale if successes else 0.0, (centre + spread) / scale if successes < trials else 1.0


# --- Random neuron sets as a null


@dataclass(frozen=True)
class Null:
    """A score among the same score of matched random sets: the null of LSS (`docs/lss.md`).

    Attributes:
        score: the one in question.
        mean: of the random sets' scores.
        lowest: of them.
        highest: of them.
        share: of random sets that score at or above `score`.
        interval: of that share (Wilson), which is wide: 0 of 20 sets still allows 16 %.
        sets: how many.
    """

    score: float
    mean: float
    lowest: float
    highest: float
    share: float
    interval: tuple[float, float]
    sets: int


def against_random(score: float, random: Sequence[float]) -> Null:
    """Compare a score with those of matched random sets.

    Raises:
        SteeringError: for no sets.
    """
    if not random:
        raise SteeringError("no random sets to compare with: draw at least 20")
    above = sum(other >= score for other in random)
    return Null(
        score, sum(random) / len(random), min(random), max(random), above / len(random),
        wilson_interval(above, len(random)), len(random),
    )  # fmt: skip


# --- Steered cells against their baselines, over the same items


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
        """The chosen items, (items,) bool, of each cell."""
        return Arm(self.numerator[chosen], None if self.denominator is None else self.denominator[chosen])

    def of(self, columns: NDArray[np.int64]) -> Arm:
        """The columns of these indices, (cells,); one may come more than once."""
        return Arm(self.numerator[:, columns], None if self.denominator is None else self.denominator[:, columns])

    def only(self, present: NDArray[np.bool_]) -> Arm:
        """The same with nan wherever `present` (items, cells) is False."""
        denominator = None if self.denominator is None else np.where(present, self.denominator, np.nan)
        return Arm(np.where(present, self.numerator, np.nan), denominator)

    def sums(self, weights: NDArray[Any]) -> tuple[Array, Array]:
        """Weighted sums of numerators and denominators, (resamples, cells) each, for weights (resamples, items)."""
        present = ~np.isnan(self.numerator)
        whole = bool(present.all())
        dtype = weights.dtype
        top = weights @ (self.numerator if whole else np.where(present, self.numerator, 0.0)).astype(dtype, copy=False)
        if self.denominator is not None:
            return top, weights @ np.where(present, self.denominator, 0.0).astype(dtype)
        if whole:
            return top, np.broadcast_to(weights.sum(axis=1, keepdims=True), top.shape)
        return top, weights @ present.astype(dtype)

    def ratio(self, weights: NDArray[Any]) -> Array:
        """(resamples, cells), nan where a resample holds no item."""
        top, bottom = self.sums(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(bottom != 0, top / bottom, np.nan), dtype=np.float64)

    def influence(self) -> Array:
        """(items, cells): by how much an item moves the ratio, times the number of items; its mean is 0."""
        bottom = np.where(np.isnan(self.numerator), np.nan, 1.0) if self.denominator is None else self.denominator
        with np.errstate(invalid="ignore", divide="ignore"):
            total = np.nansum(bottom, axis=0)
            ratio = np.nansum(self.numerator, axis=0) / total
            mean = total / (~np.isnan(bottom)).sum(axis=0)
            return np.asarray((self.numerator - ratio * bottom) / mean, dtype=np.float64)


@dataclass(frozen=True)
class Comparison:
    """Result of a paired comparison, one entry per cell.

    Attributes:
        baseline: scores without the intervention.
        score: scores with it.
        difference: score - baseline.
        low: lower ends of the intervals of the difference.
        high: upper ends.
        p_value: two-sided, of no difference; nan where no test applies.
        tests: name of each cell's test, or why there is no p (`NO_ITEMS`, `ONE_ITEM`, `NO_SPREAD`, `NOT_FINITE`).
        n: items that both sides have.
        replicates: (resamples, cells) of the difference.
    """

    baseline: Array
    score: Array
    difference: Array
    low: Array
    high: Array
    p_value: Array
    tests: tuple[str, ...]
    n: NDArray[np.int64]
    replicates: Array


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
    resampled, columns = baseline, baseline_of
    baseline = baseline if baseline_of is None else baseline.of(baseline_of)
    present = ~(np.isnan(baseline.numerator) | np.isnan(steered.numerator))
    if not present.all():
        baseline, steered = baseline.only(present), steered.only(present)
        resampled, columns = baseline, None  # a baseline that lacks other items for each cell is another one
    items = len(steered.numerator)
    weights, once = resampling_weights(items), np.ones((1, items))
    with np.errstate(invalid="ignore"):  # infinite values have neither difference nor p, and say so in `tests`
        before = aggregate.of_ratio(resampled.ratio(weights))
        before = before if columns is None else before[:, columns]
        replicates = aggregate.of_ratio(steered.ratio(weights)) - before
        score_before, score = (aggregate.of_ratio(arm.ratio(once))[0] for arm in (baseline, steered))
        difference = score - score_before
    n = present.sum(axis=0)
    low, high = interval_of_items(replicates, n, level)
    p_value, tests = p_values(baseline, steered)
    return Comparison(score_before, score, difference, low, high, p_value, tests, n, replicates)


# --- Tests

MCNEMAR, T_TEST = "exact McNemar", "paired t"
# Why a cell has no p.
NO_ITEMS = "no p: no items"
ONE_ITEM = "no p: one item"
NO_SPREAD = "no p: all items changed by the same amount"
NOT_FINITE = "no p: a value is not finite"


def p_values(baseline: Arm, steered: Arm) -> tuple[Array, tuple[str, ...]]:
    """Two-sided p of each cell and the name of its test: exact McNemar where every item is 0 or 1, else paired t.

    The t test of a ratio of sums is over the items' linearised differences (delta method); of a mean it is the usual
    one. A cell in which no item changed has p = 1 under both. Items that all changed by the same amount have no spread
    to hold the change against: no p, whatever its size.

    Args:
        baseline: (items, cells), nan at the same places as `steered`.
        steered: (items, cells).

    Returns:
        (cells,) p, nan where there is none, and (cells,) names or reasons.
    """
    p_value, tests = _paired_t(baseline, steered)
    values = np.concatenate([baseline.numerator, steered.numerator])
    binary = (np.isnan(values) | (values == 0) | (values == 1)).all(axis=0) & ~np.isnan(values).all(axis=0)
    if baseline.denominator is None and binary.any():
        better = (steered.numerator > baseline.numerator).sum(axis=0)
        worse = (steered.numerator < baseline.numerator).sum(axis=0)
        p_value = np.where(binary, mcnemar(better, worse), p_value)
        tests = tuple(MCNEMAR if of_shares else test for of_shares, test in zip(binary, tests, strict=True))
    return p_value, tests


def mcnemar(better: NDArray[np.int64], worse: NDArray[np.int64]) -> Array:
    """Exact McNemar test, which is the sign test over the items that changed (two-sided), for arrays of counts."""
    from scipy.stats import binom

    changed = np.asarray(better) + np.asarray(worse)
    return np.asarray(np.minimum(1.0, 2 * binom.cdf(np.minimum(better, worse), changed, 0.5)), dtype=np.float64)


def _paired_t(baseline: Arm, steered: Arm) -> tuple[Array, tuple[str, ...]]:
    from scipy.stats import ttest_1samp

    once = np.ones((1, len(steered.numerator)))
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # cells without items or spread get a reason below
        shift = steered.ratio(once)[0] - baseline.ratio(once)[0]
        differences = steered.influence() - baseline.influence() + shift
        p_value = np.asarray(ttest_1samp(differences, 0.0, axis=0, nan_policy="omit").pvalue, dtype=np.float64)
    present = ~np.isnan(steered.numerator)
    n = present.sum(axis=0)
    changes = np.where(present, differences, 0.0)
    finite = np.isfinite(changes).all(axis=0)
    rounding = _rounding(baseline, steered, present)
    unchanged = np.abs(changes).max(axis=0, initial=0.0) <= rounding
    spread = np.where(present, changes, -np.inf).max(axis=0) - np.where(present, changes, np.inf).min(axis=0)
    conditions = [n == 0, ~finite, unchanged, n == 1, spread <= rounding]
    p_value = np.select(conditions, [math.nan, math.nan, 1.0, math.nan, math.nan], p_value)
    return p_value, tuple(np.select(conditions, [NO_ITEMS, NOT_FINITE, T_TEST, ONE_ITEM, NO_SPREAD], T_TEST).tolist())


def _rounding(baseline: Arm, steered: Arm, present: NDArray[np.bool_]) -> Array:
    """(cells,) largest rounding error of a difference of two items, in units of the ratio."""
    largest = np.maximum(
        *(np.where(present, np.abs(arm.numerator), 0.0).max(axis=0, initial=0.0) for arm in (baseline, steered))
    )
    if steered.denominator is not None:
        total = np.where(present, np.abs(steered.denominator), 0.0).sum(axis=0)
        largest = np.divide(largest * present.sum(axis=0), total, out=np.zeros_like(largest), where=total > 0)
    return np.asarray(16 * np.finfo(np.float64).eps * largest, dtype=np.float64)


def holm(p_value: Array) -> Array:
    """Holm's correction (1979) over one family of comparisons; nan stays nan and is no comparison."""
    corrected = np.full(len(p_value), np.nan)
    tested = np.flatnonzero(~np.isnan(p_value))
    order = tested[np.argsort(p_value[tested], kind="stable")]
    steps = p_value[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


# --- Means over languages


def over_languages(
    replicates: Array,
    steered: Sequence[str],
    evaluated: Sequence[str],
    groups: Mapping[str, NDArray[np.bool_]],
) -> dict[str, Array]:
    """Replicates of the mean over cells, with languages resampled together with the items.

    A resample of languages gives each its count w; a cell counts w(steered) * w(evaluated) times, a self cell w times,
    so that both roles of a language are drawn together (the pigeonhole bootstrap, Owen 2007). Missing cells do not
    count. A resample without any cell of a group is nan.

    Args:
        replicates: (resamples, cells), item resampling of each cell.
        steered: language of each cell.
        evaluated: language of each cell; that of `steered` where its items are in several.
        groups: name -> which cells.

    Returns:
        Name -> (resamples,).
    """
    codes = sorted({*steered, *evaluated})
    number_of = {code: number for number, code in enumerate(codes)}
    rows, columns = ([number_of[code] for code in role] for role in (steered, evaluated))
    drawn = resampling_weights(len(codes), len(replicates))
    same = np.array(rows) == np.array(columns)
    counts = np.where(same, drawn[:, rows], drawn[:, rows] * drawn[:, columns]).astype(np.float64)
    counts[np.isnan(replicates)] = 0.0
    values = np.nan_to_num(replicates)
    means = {}
    for name, chosen in groups.items():
        total = counts[:, chosen].sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = (counts[:, chosen] * values[:, chosen]).sum(axis=1) / total
        means[name] = np.where(total > 0, mean, np.nan)
    return means


# --- Corpus scores: BLEU and chrF++

CORPUS_TEST = "sacreBLEU paired bootstrap"


@dataclass(frozen=True)
class CorpusComparison:
    """One system against the baseline by the paired bootstrap (Koehn 2004), as sacreBLEU has it.

    Attributes:
        baseline: score.
        score: of the system.
        p_value: of no difference; nan for one segment.
        test: its name, or why there is no p.
        replicates: (resamples,) of the difference.
        signature: sacreBLEU's, with the number of resamples and the seed.
    """

    baseline: float
    score: float
    p_value: float
    test: str
    replicates: Array
    signature: str


def compare_corpora(
    metric: Any,
    baseline: Sequence[str],
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    resamples: int = RESAMPLES,
) -> dict[str, CorpusComparison]:
    """Paired bootstrap of several systems against one baseline, on the resamples of sacreBLEU's `--paired-bs`.

    p = (#{|d*| - mean |d*| >= |d|} + 1) / (R + 1), d the difference of the scores, d* that of a resample, and 1 where d
    is 0. sacreBLEU counts strictly greater resamples alone, so that two systems that never differ get its smallest p;
    where no resample is equal to the bound, the two agree.

    Args:
        metric: a fresh `sacrebleu.metrics.BLEU` or `CHRF`, made with `references=[references]`.
        baseline: its hypotheses.
        systems: name -> hypotheses.
        references: one for each hypothesis.
        resamples: number of bootstrap resamples; the seed is that of the command (`SACREBLEU_SEED`, or 12345).

    Raises:
        SteeringError: if there are no segments.
    """
    if not len(references):
        raise SteeringError("a comparison over no segments")
    weights = _corpus_weights(len(references), resamples)
    before, before_replicates = corpus_scores(metric, baseline, weights)
    signature = metric.get_signature()
    signature.update("seed", _corpus_seed())
    signature.update("bs", resamples)
    compared = {}
    for name, hypotheses in systems.items():
        score, replicates = corpus_scores(metric, hypotheses, weights)
        p_value, test = _shifted_p(score - before, replicates - before_replicates, len(references))
        compared[name] = CorpusComparison(before, score, p_value, test, replicates - before_replicates, str(signature))
    return compared


def corpus_half_width(metric: Any, hypotheses: Sequence[str], references: Sequence[str], resamples: int) -> float:
    """Half the width of the 95 % percentile interval of one corpus's score, as sacreBLEU's; nan for one segment.

    Args:
        metric: `sacrebleu.metrics.BLEU` or `CHRF`.
        hypotheses: one for each reference.
        references: of the corpus.
        resamples: number of bootstrap resamples, drawn as for `compare_corpora`.
    """
    if len(hypotheses) == 1:
        return math.nan
    _, replicates = corpus_scores(metric, hypotheses, _corpus_weights(len(hypotheses), resamples), references)
    ordered, tail = np.sort(replicates), resamples // 40
    return float(ordered[resamples - tail - 1] - ordered[tail]) / 2


def _corpus_seed() -> str:
    return os.environ.get("SACREBLEU_SEED", "12345").lower()


def _corpus_weights(segments: int, resamples: int) -> Array:
    """How often each of sacreBLEU's resamples holds each segment, (resamples, segments)."""
    seed = _corpus_seed()
    generator = np.random.default_rng(None if seed == "none" else int(seed) or None)
    drawn = generator.choice(segments, size=(resamples, segments), replace=True)
    weights = np.zeros((resamples, segments))
    np.add.at(weights, (np.arange(resamples)[:, None], drawn), 1)
    return weights


def _shifted_p(difference: float, replicates: Array, segments: int) -> tuple[float, str]:
    if difference == 0:
        return 1.0, CORPUS_TEST
    if segments == 1:
        return math.nan, ONE_ITEM
    sizes = np.abs(replicates)
    at_least = int((sizes - sizes.mean() >= abs(difference)).sum())
    return (at_least + 1) / (len(replicates) + 1), CORPUS_TEST
