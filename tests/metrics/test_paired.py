"""The statistics of paired comparisons against known answers."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, ttest_rel
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.metrics.statistics import (  # fmt: skip
    BITS,
    CORPUS_TEST,
    MCNEMAR,
    MEAN,
    NATS,
    NO_ITEMS,
    NO_SPREAD,
    NOT_FINITE,
    ONE_ITEM,
    PERPLEXITY,
    T_TEST,
    Arm,
    Comparison,
    compare,
    compare_corpora,
    holm,
    interval_of,
    mcnemar,
    mean_interval,
    over_languages,
    resampling_weights,
)
from lm_eval_steering.report.effects import fresh_metric

SIMULATIONS, ITEMS, LEVEL = 2000, 150, 0.05


def differing(effect: float, seed: int, items: int = ITEMS) -> Comparison:
    """Simulations as cells: correlated scores, steered above the baseline by `effect` on average."""
    generator = np.random.default_rng(seed)
    hardness = generator.normal(size=(items, SIMULATIONS))
    before, after = (hardness + generator.normal(size=hardness.shape) for _ in range(2))
    return compare(Arm(before), Arm(after + effect))


def accuracies(effect: float, seed: int, items: int = ITEMS) -> Comparison:
    """Right and wrong, with a share `effect` more right after steering."""
    generator = np.random.default_rng(seed)
    hardness = generator.uniform(size=(items, SIMULATIONS))
    chance = [hardness * 0.6 + 0.1, hardness * 0.6 + 0.1 + effect]
    before, after = (Arm((generator.uniform(size=hardness.shape) < own).astype(float)) for own in chance)
    return compare(before, after)


def test_the_interval_covers_a_known_difference_of_means() -> None:
    found = differing(0.3, 1)
    assert 0.93 <= ((found.low <= 0.3) & (found.high >= 0.3)).mean() <= 0.97


def test_the_interval_covers_a_known_difference_of_accuracies() -> None:
    found = accuracies(0.15, 2)
    assert 0.93 <= ((found.low <= 0.15) & (found.high >= 0.15)).mean() <= 0.97


def test_the_interval_covers_a_known_difference_of_nats_per_token() -> None:
    generator = np.random.default_rng(3)
    tokens = generator.integers(5, 40, size=(ITEMS, SIMULATIONS)).astype(float)
    before = -tokens * generator.gamma(20, 0.1, size=tokens.shape)  # 2 nats per token
    after = before - tokens * generator.gamma(4, 0.05, size=tokens.shape)  # 0.2 more
    found = compare(Arm(before, tokens), Arm(after, tokens), NATS)
    assert 0.93 <= ((found.low <= 0.2) & (found.high >= 0.2)).mean() <= 0.97


def test_the_interval_over_languages_covers_their_mean() -> None:
    generator = np.random.default_rng(4)
    languages, covered = [f"l{place}" for place in range(30)], []
    effects = generator.normal(0.2, 0.3, size=(600, 30))
    for own in effects:
        before = generator.normal(size=(40, 30))
        arm = Arm(before + own + generator.normal(scale=0.5, size=before.shape))
        replicates = resampling_weights(40, 500) @ (arm.numerator - before) / 40
        drawn = over_languages(replicates, languages, languages, {"self": np.ones(30, dtype=bool)})
        low, high = interval_of(drawn["self"])
        covered.append(low <= 0.2 <= high)
    assert 0.92 <= np.mean(covered) <= 0.98  # item noise counts twice, a little, so it may be wide


# Rejections at the level in so many simulations lie between these with 99 % probability: 0.0374 and 0.0626.
FEWEST, MOST = (LEVEL + sign * 2.576 * math.sqrt(LEVEL * (1 - LEVEL) / SIMULATIONS) for sign in (-1, 1))


@pytest.mark.parametrize(("simulate", "items"), [(differing, 20), (differing, ITEMS), (accuracies, ITEMS)])
def test_without_an_effect_the_interval_misses_zero_as_often_as_the_level(
    simulate: Callable[..., Comparison], items: int
) -> None:
    found = simulate(0.0, 5, items)
    assert FEWEST <= ((found.low > 0) | (found.high < 0)).mean() <= MOST


def test_without_an_effect_the_t_test_rejects_at_its_level_and_mcnemar_not_above() -> None:
    means, shares = differing(0.0, 5), accuracies(0.0, 5)
    assert set(means.tests) == {T_TEST} and FEWEST <= (means.p_value < LEVEL).mean() <= MOST
    assert set(shares.tests) == {MCNEMAR} and 0 < (shares.p_value < LEVEL).mean() <= MOST  # exact, so it may be below


def test_one_item_has_a_difference_and_no_interval() -> None:
    found = compare(Arm(np.array([[1.0]])), Arm(np.array([[3.0]])))
    assert found.difference == 2 and np.isnan([found.low, found.high, found.p_value]).all()
    assert found.tests == (ONE_ITEM,)


def test_after_holm_a_family_of_nulls_is_rejected_as_often_as_the_level() -> None:
    families = accuracies(0.0, 6).p_value.reshape(200, 10), differing(0.0, 7).p_value.reshape(200, 10)
    for found in families:
        wrong = sum(bool((holm(own) < LEVEL).any()) for own in found)
        assert wrong <= binom.ppf(0.99, 200, LEVEL)


def test_mcnemar_is_that_of_statsmodels_and_the_sign_test_of_scipy() -> None:
    better, worse = np.array([0, 3, 10, 25, 1]), np.array([0, 9, 2, 25, 0])
    found = mcnemar(better, worse)
    for place in range(len(better)):
        table = [[5, worse[place]], [better[place], 5]]
        assert found[place] == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue)
        changed = better[place] + worse[place]
        expected = binomtest(int(better[place]), int(changed)).pvalue if changed else 1.0
        assert found[place] == pytest.approx(expected)


def test_p_of_a_mean_is_that_of_the_paired_t_test() -> None:
    generator = np.random.default_rng(8)
    before, after = generator.normal(size=(2, 30, 4))
    assert compare(Arm(before), Arm(after)).p_value == pytest.approx(ttest_rel(after, before).pvalue)


def test_holm_is_that_of_statsmodels_and_an_absent_p_is_no_comparison() -> None:
    p_value = np.array([0.01, np.nan, 0.04, 0.03, 0.005])
    found = holm(p_value)
    there = ~np.isnan(p_value)
    assert found[there].tolist() == multipletests(p_value[there], method="holm")[1].tolist()
    assert found[there] == pytest.approx([0.03, 0.06, 0.06, 0.02])  # by hand, four comparisons
    assert np.isnan(found[1])


def test_scores_are_those_of_sums_and_an_item_counts_where_both_sides_have_it() -> None:
    before = Arm(np.array([[-10.0], [-30.0], [np.nan]]), np.array([[5.0], [10.0], [7.0]]))
    after = Arm(np.array([[-16.0], [-29.0], [-50.0]]), np.array([[5.0], [10.0], [7.0]]))
    nats, perplexity, bits = (compare(before, after, how) for how in (NATS, PERPLEXITY, BITS))
    assert (nats.n, nats.baseline, nats.score) == (2, pytest.approx(40 / 15), pytest.approx(45 / 15))
    assert perplexity.difference == pytest.approx(np.exp(3) - np.exp(40 / 15))
    assert bits.score == pytest.approx(3 / np.log(2))
    assert nats.p_value == pytest.approx(perplexity.p_value)


def test_nothing_changed_is_no_evidence() -> None:
    same = Arm(np.arange(12.0).reshape(6, 2))
    found = compare(same, same)
    assert found.p_value.tolist() == [1, 1] and not found.low.any() and not found.high.any()


def test_a_baseline_that_cells_share_is_that_of_each() -> None:
    generator = np.random.default_rng(9)
    before, after = generator.normal(size=(30, 2)), generator.normal(size=(30, 5))
    of = np.array([0, 1, 1, 0, 1])
    for hole in (False, True):
        after[4, 2] = np.nan if hole else after[4, 2]  # then the baselines of cells 1, 2 and 4 differ
        shared, own = compare(Arm(before), Arm(after), baseline_of=of), compare(Arm(before[:, of]), Arm(after))
        for name in ("baseline", "difference", "low", "high", "p_value", "n", "replicates"):
            assert getattr(shared, name) == pytest.approx(getattr(own, name), nan_ok=True)


def test_no_items_are_refused() -> None:
    with pytest.raises(SteeringError, match="no items"):
        resampling_weights(0)


def test_languages_are_drawn_in_both_roles_and_missing_cells_are_not_there() -> None:
    steered, evaluated = ["a", "a", "b", "b"], ["a", "b", "a", "b"]
    replicates = np.tile([1.0, 10.0, np.nan, 3.0], (400, 1))
    own = np.array([True, False, False, True])
    found = over_languages(replicates, steered, evaluated, {"self": own, "cross": ~own})
    assert set(found["self"]) == {1.0, 2.0, 3.0}  # a twice, one of each, b twice
    both = found["cross"][~np.isnan(found["cross"])]
    assert set(both) == {10.0} and len(both) == (found["self"] == 2).sum()


REFERENCES = [f"the cat number {place} sat on the mat and looked at dog {place % 7}" for place in range(60)]
BASELINE = [text.replace("sat", "sits") if place % 3 else text for place, text in enumerate(REFERENCES)]
SYSTEM = [text.replace("mat", "rug") if place % 5 < 3 else text for place, text in enumerate(REFERENCES)]


@pytest.mark.parametrize(("name", "options"), [("bleu", []), ("chrf++", ["--chrf-word-order", "2"])])
def test_paired_corpus_scores_are_those_of_sacrebleus_command(tmp_path: Path, name: str, options: list[str]) -> None:
    for file, lines in (("ref", REFERENCES), ("base", BASELINE), ("system", SYSTEM)):
        (tmp_path / file).write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", "base", "system", "-m", name[:4], *options]
    # Not as JSON, which the command cannot write for chrF++ (a float32).
    done = subprocess.run(
        [*command, "--paired-bs", "--paired-bs-n", "500", "--format", "text", "-w", "4"], cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    baseline, score = (float(number) for number in re.findall(r"│ +([\d.]+) \(", done.stdout))
    (p_value,) = re.findall(r"\(p = ([\d.]+)\)", done.stdout)
    metric = fresh_metric(name, "13a", REFERENCES)
    found = compare_corpora(metric, BASELINE, {"system": SYSTEM}, REFERENCES, resamples=500)["system"]
    assert found.baseline == pytest.approx(baseline, abs=1e-3)
    assert found.score == pytest.approx(score, abs=1e-3)
    assert found.p_value == pytest.approx(float(p_value), abs=1e-4)
    assert "seed:12345" in found.signature


@pytest.mark.parametrize("name", ["bleu", "chrf++"])
def test_resampled_differences_lie_about_the_difference(name: str) -> None:
    (compared,) = compare_corpora(fresh_metric(name, "13a", REFERENCES), BASELINE, {"s": SYSTEM}, REFERENCES).values()
    low, high = np.quantile(compared.replicates, [0.025, 0.975])
    assert low < compared.score - compared.baseline < high and compared.replicates.std() > 0


# --- degenerate inputs, every test


def corpora(name: str, baseline: list[str], system: list[str], references: list[str]) -> tuple[float, float, str]:
    metric = fresh_metric(name, "13a", references)
    (compared,) = compare_corpora(metric, baseline, {"system": system}, references, resamples=200).values()
    return compared.score - compared.baseline, compared.p_value, compared.test


SEGMENTS = st.lists(
    st.sampled_from(["", "the cat", "the cat is here today", "dogs run fast in parks", "x"]), min_size=1
)


@pytest.mark.parametrize("name", ["bleu", "chrf++"])
@settings(max_examples=25, deadline=None)
@given(texts=SEGMENTS)
def test_the_same_corpus_twice_has_p_1(name: str, texts: list[str]) -> None:
    references = [f"the cat is here today {number}" for number in range(len(texts))]
    assert corpora(name, texts, texts, references) == (0, 1, CORPUS_TEST)


@pytest.mark.parametrize("name", ["bleu", "chrf++"])
@settings(max_examples=25, deadline=None)
@given(texts=SEGMENTS, other=SEGMENTS)
def test_a_corpus_p_is_a_probability_whichever_way_it_is_asked(name: str, texts: list[str], other: list[str]) -> None:
    number = min(len(texts), len(other))
    references = [f"the cat is here today {place}" for place in range(number)]
    difference, p_value, test = corpora(name, texts[:number], other[:number], references)
    back = corpora(name, other[:number], texts[:number], references)
    assert back[0] == -difference and back[1:] == (pytest.approx(p_value, nan_ok=True), test)
    if difference == 0:
        assert (p_value, test) == (1, CORPUS_TEST)
    elif number == 1:
        assert math.isnan(p_value) and test == ONE_ITEM
    else:
        assert 0 < p_value <= 1 and test == CORPUS_TEST


@pytest.mark.parametrize("name", ["bleu", "chrf++"])
def test_two_systems_that_both_score_0_have_p_1(name: str) -> None:
    for texts in (["zzz", "www"], ["", ""]):
        assert corpora(name, ["xxx", "yyy"], texts, ["aaa bbb", "ccc ddd"]) == (0, 1, CORPUS_TEST)


def test_one_segment_is_no_evidence() -> None:
    difference, p_value, test = corpora("chrf++", ["the cat"], ["the cat sat"], ["the cat sat"])
    assert difference > 0 and math.isnan(p_value) and test == ONE_ITEM
    with pytest.raises(SteeringError, match="no segments"):
        compare_corpora(fresh_metric("bleu", "13a", []), [], {}, [])


def test_a_corpus_p_is_sacrebleus_unless_a_resample_ties() -> None:
    from sacrebleu.significance import PairedTest

    systems = {f"every {step}": [b if n % step else s for n, (b, s) in enumerate(zip(BASELINE, SYSTEM, strict=True))]
               for step in (1, 2, 3, 7)}  # fmt: skip
    for name in ("bleu", "chrf++"):
        compared = compare_corpora(fresh_metric(name, "13a", REFERENCES), BASELINE, systems, REFERENCES, 300)
        named = [("baseline", BASELINE), *systems.items()]
        metric = fresh_metric(name, "13a", REFERENCES)
        signatures, results = PairedTest(named, {"m": metric}, [REFERENCES], test_type="bs", n_samples=300)()
        (key,) = (key for key in results if key != "System")
        for (system, ours), theirs in zip(compared.items(), results[key][1:], strict=True):
            assert ours.score == pytest.approx(theirs.score)
            equal = ours.score == ours.baseline  # "every 7": other outputs with the same BLEU are no difference
            assert ours.p_value == pytest.approx(1 if equal else theirs.p_value, abs=1e-9), system
            assert ours.signature == str(signatures[key])


WHOLE = st.integers(-3, 3).map(float)
VALUES = st.lists(WHOLE, min_size=1, max_size=8)


def pairs(values: list[float], tokens: bool) -> Callable[[np.ndarray], Arm]:
    counts = np.arange(2.0, len(values) + 2)[:, None]
    return lambda of: Arm(of[:, None] * (counts if tokens else 1), counts if tokens else None)


@given(VALUES, st.booleans())
def test_no_change_has_p_1_whatever_the_values(values: list[float], tokens: bool) -> None:
    arm = pairs(values, tokens)(np.array(values))
    compared = compare(arm, Arm(arm.numerator.copy(), arm.denominator), NATS if tokens else MEAN)
    assert compared.p_value.tolist() == [1] and compared.difference.tolist() == [0]
    assert compared.tests[0] in (T_TEST, MCNEMAR)


@given(VALUES.filter(lambda values: len(values) > 1 and not set(values) <= {0, 1}),
       st.sampled_from([0.1, -0.3, 1.0, 1e-6, 1e6]), st.booleans())  # fmt: skip
def test_the_same_change_of_every_item_has_no_p_and_says_why(values: list[float], change: float, tokens: bool) -> None:
    arm = pairs(values, tokens)
    compared = compare(arm(np.array(values)), arm(np.array(values) + change), NATS if tokens else MEAN)
    assert np.isnan(compared.p_value).all() and compared.tests == (NO_SPREAD,)
    assert abs(compared.difference[0]) == pytest.approx(abs(change), rel=1e-6)


@given(WHOLE, WHOLE)
def test_one_item_has_a_p_only_where_a_count_gives_it(before: float, after: float) -> None:
    compared = compare(Arm(np.array([[before]])), Arm(np.array([[after]])))
    if before == after or {before, after} <= {0, 1}:
        assert compared.p_value.tolist() == [1]  # one of one that changed: two-sided 2 * 0.5
    else:
        assert np.isnan(compared.p_value).all() and compared.tests == (ONE_ITEM,)


@given(st.integers(1, 5), st.booleans())
def test_cells_without_items_or_with_infinite_ones_have_no_p(items: int, tokens: bool) -> None:
    numerator = np.full((items, 3), np.nan)
    numerator[:, 1], numerator[:, 2] = 2.0, -np.inf
    steered = numerator.copy()
    steered[:, 1] += np.arange(items)
    counts = np.full((items, 3), 4.0) if tokens else None
    compared = compare(Arm(numerator, counts), Arm(steered, counts), NATS if tokens else MEAN)
    assert compared.tests[0] == NO_ITEMS and compared.tests[2] == NOT_FINITE
    assert np.isnan(compared.p_value[[0, 2]]).all() and np.isnan(compared.low[0]) and compared.n[0] == 0
    assert compared.p_value[1] == pytest.approx(1 if items == 1 else compare(
        Arm(numerator[:, [1]], None if counts is None else counts[:, [1]]),
        Arm(steered[:, [1]], None if counts is None else counts[:, [1]]), NATS if tokens else MEAN).p_value[0],
        nan_ok=True)  # fmt: skip


@given(st.lists(st.tuples(WHOLE, WHOLE), min_size=2, max_size=12))
def test_every_p_is_a_probability_and_the_usual_one_where_there_is_spread(items: list[tuple[float, float]]) -> None:
    before, after = np.array(items).T
    compared = compare(Arm(before[:, None]), Arm(after[:, None]))
    (p_value,), (test,) = compared.p_value, compared.tests
    if test == T_TEST and (before != after).any():
        assert p_value == pytest.approx(ttest_rel(after, before).pvalue, rel=1e-6) and 0 < p_value <= 1
    elif test == MCNEMAR:
        better, worse = int((after > before).sum()), int((after < before).sum())
        expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
        assert p_value == pytest.approx(expected)
    else:
        assert (test == NO_SPREAD and math.isnan(p_value)) or p_value == 1


def test_a_cells_test_does_not_depend_on_the_other_cells() -> None:
    before, after = np.array([[0.0, 0.5], [1.0, 0.2], [0.0, 0.1]]), np.array([[1.0, 0.4], [1.0, 0.9], [1.0, 0.3]])
    assert compare(Arm(before), Arm(after)).tests == (MCNEMAR, T_TEST)


def test_the_interval_of_a_mean_is_that_of_a_comparison_with_zeros() -> None:
    values = np.random.default_rng(10).normal(size=40)
    compared = compare(Arm(np.zeros((40, 1))), Arm(values[:, None]))
    assert mean_interval(values.tolist()) == pytest.approx((compared.low[0], compared.high[0]), abs=1e-6)
    assert all(math.isnan(end) for end in mean_interval([3.0]))
    with pytest.raises(SteeringError, match="no values"):
        mean_interval([])
