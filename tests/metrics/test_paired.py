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
from scipy.stats import binom, binomtest, ttest_rel
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.metrics.statistics import (  # fmt: skip
    BITS,
    MCNEMAR,
    NATS,
    PERPLEXITY,
    T_TEST,
    Arm,
    Comparison,
    compare,
    compare_corpora,
    holm,
    interval_of,
    mcnemar,
    over_languages,
    resampling_weights,
)
from lm_eval_steering.report.effects import fresh_metric, resampled

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


def test_the_interval_covers_a_known_difference_of_nats_a_token() -> None:
    generator = np.random.default_rng(3)
    tokens = generator.integers(5, 40, size=(ITEMS, SIMULATIONS)).astype(float)
    before = -tokens * generator.gamma(20, 0.1, size=tokens.shape)  # 2 nats a token
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
    assert means.test == T_TEST and FEWEST <= (means.p_value < LEVEL).mean() <= MOST
    assert shares.test == MCNEMAR and 0 < (shares.p_value < LEVEL).mean() <= MOST  # exact, so it may be below


def test_one_item_has_a_difference_and_no_interval() -> None:
    found = compare(Arm(np.array([[1.0]])), Arm(np.array([[3.0]])))
    assert found.difference == 2 and np.isnan([found.low, found.high]).all()


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


def test_resampled_corpus_scores_lie_about_the_score() -> None:
    own = resampled("bleu", "13a", REFERENCES, SYSTEM)
    score = fresh_metric("bleu", "13a", REFERENCES).corpus_score(SYSTEM, None).score
    low, high = np.quantile(own, [0.025, 0.975])
    assert low < score < high and own.std() > 0
