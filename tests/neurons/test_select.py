from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.neurons.neuron_set import union_of
from lm_eval_steering.neurons.select import lape, random_control


def random_counts(seed: int, layers: int = 3, units: int = 40, languages: int = 4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(500, 1000, size=languages)
    shares = generator.beta(0.3, 1.0, size=(layers, units, languages))
    return (shares * tokens).astype(np.int64), tokens


@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.05, 0.2]))
def test_order_of_languages_does_not_matter(seed: int, rate: float) -> None:
    counts, tokens = random_counts(seed)
    order = np.random.default_rng(seed).permutation(len(tokens))
    plain, shuffled = lape(counts, tokens, rate), lape(counts[:, :, order], tokens[order], rate)
    # Entropies are sums over languages: only a tie at the last bit could tell the orders apart.
    assert sum(map(len, plain)) == sum(map(len, shuffled))
    for place, language in enumerate(order):
        assert np.array_equal(plain[language], shuffled[place])


@given(st.integers(0, 10_000))
def test_a_larger_rate_contains_the_smaller_one(seed: int) -> None:
    counts, tokens = random_counts(seed)
    for small, large in zip(lape(counts, tokens, 0.02), lape(counts, tokens, 0.1), strict=True):
        assert set(map(tuple, small)) <= set(map(tuple, large))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan")])
def test_a_rate_outside_its_range_is_refused(rate: float) -> None:
    counts, tokens = random_counts(0)
    with pytest.raises(SteeringError, match="expected a number in"):
        lape(counts, tokens, rate)


def test_impossible_counts_are_refused() -> None:
    counts, tokens = random_counts(0)
    with pytest.raises(SteeringError, match="more tokens than were counted"):
        lape(counts + 1000, tokens)
    with pytest.raises(SteeringError, match="has no tokens"):
        lape(counts, tokens * 0)


@given(st.integers(0, 10_000), st.integers(0, 100))
def test_random_controls_match_each_layer_and_avoid_the_set(seed: int, control_seed: int) -> None:
    counts, tokens = random_counts(seed)
    codes = ("a", "b", "c", "d")
    own = dict(zip(codes, lape(counts, tokens, 0.1), strict=True))
    drawn = random_control(own, codes, counts.shape[1], control_seed)
    again = random_control(own, codes, counts.shape[1], control_seed)
    for code in codes:
        assert np.array_equal(drawn[code], again[code])
        assert np.array_equal(np.bincount(drawn[code][:, 0]), np.bincount(own[code][:, 0]))
        assert len(union_of([drawn[code], own[code]])) == 2 * len(own[code]), "overlaps, or drew a unit twice"


def test_another_seed_draws_other_neurons() -> None:
    counts, tokens = random_counts(1)
    own = dict(zip("abcd", lape(counts, tokens, 0.2), strict=True))
    first, second = (random_control(own, tuple("abcd"), 40, seed) for seed in (0, 1))
    assert any(not np.array_equal(first[code], second[code]) for code in "abcd")
