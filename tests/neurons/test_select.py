from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.neurons import select
from lm_eval_steering.neurons.neuron_set import union_of
from lm_eval_steering.neurons.select import (
    Selection,
    activated,
    activation_probability,
    average_precision,
    average_precisions,
    entropy,
    lape,
    lape_rates,
)

LAYERS, UNITS = 2, 3


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
    with pytest.raises(SteeringError, match="expected a number in"):
        lape_rates(counts, tokens, [0.01, rate])


def test_impossible_counts_are_refused() -> None:
    counts, tokens = random_counts(0)
    with pytest.raises(SteeringError, match="more tokens than were counted"):
        lape(counts + 1000, tokens)
    with pytest.raises(SteeringError, match="has no tokens"):
        lape(counts, tokens * 0)


def plain_lape(
    counts: np.ndarray, tokens: np.ndarray, rate: float, filter_rate: float, bar_rate: float
) -> list[list[list[int]]]:
    """Neuron by neuron, from the definition."""
    probability = activation_probability(counts, tokens)
    values = np.sort(probability, axis=None)
    threshold, bar = (values[max(round(values.size * share), 1) - 1] for share in (filter_rate, bar_rate))
    neurons = [(layer, unit) for layer in range(counts.shape[0]) for unit in range(counts.shape[1])]
    entropies = entropy(probability)
    eligible = [neuron for neuron in neurons if (probability[neuron] > threshold).any()]
    chosen = sorted(eligible, key=lambda neuron: (entropies[neuron], neuron))[: round(rate * len(neurons))]
    return [
        [list(neuron) for neuron in sorted(chosen) if probability[neuron][language] > bar]
        for language in range(len(tokens))
    ]


@given(
    arrays(np.int64, (3, 7, 3), elements=st.integers(0, 5)),
    st.sampled_from([0.05, 0.3, 1.0]),
    st.sampled_from([(0.95, 0.95), (0.5, 0.9), (0.9, 0.5)]),
    st.sampled_from([1, 50, 10**6]),
)
def test_blocks_of_layers_select_what_the_definition_does(
    counts: np.ndarray, rate: float, shares: tuple[float, float], block: int
) -> None:
    tokens = np.array([5, 6, 9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_BLOCK", block)
        found = lape(counts, tokens, rate, *shares)
    assert [rows.tolist() for rows in found] == plain_lape(counts, tokens, rate, *shares)
    assert all(rows.dtype == np.int64 and rows.shape[1:] == (2,) for rows in found)


@given(st.integers(0, 10_000))
def test_several_rates_are_each_rate_on_its_own(seed: int) -> None:
    counts, tokens = random_counts(seed)
    rates = [0.2, 0.004, 0.05]
    for rate, found in zip(rates, lape_rates(counts, tokens, rates, 0.9, 0.8), strict=True):
        assert all(map(np.array_equal, found.neurons, lape(counts, tokens, rate, 0.9, 0.8)))
        assert found.numbers == lape_rates(counts, tokens, [rate], 0.9, 0.8)[0].numbers


def test_counts_select_the_same_however_they_lie_in_memory() -> None:
    counts, tokens = random_counts(3)
    for other in (np.asfortranarray(counts), counts[:, :, ::-1].copy()[:, :, ::-1], counts.astype(np.int32)):
        assert all(map(np.array_equal, lape(counts, tokens, 0.1), lape(other, tokens, 0.1)))


def test_the_numbers_are_json_and_say_what_was_selected() -> None:
    counts, tokens = random_counts(5)
    found = lape_rates(counts, tokens, [0.1])[0]
    numbers = found.numbers
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    probability = activation_probability(counts, tokens)
    chosen = union_of(found.neurons)
    assert numbers["method"] == "lape"
    assert (numbers["rate"], numbers["filter_rate"], numbers["bar_rate"]) == (0.1, 0.95, 0.95)
    assert numbers["probability_threshold"] == numbers["bar"] == np.sort(probability, axis=None)[456 - 1]
    eligible = (probability > numbers["bar"]).any(axis=-1)
    assert numbers["eligible"] == eligible.sum() >= numbers["selected"] == len(chosen) == 12
    entropies = entropy(probability)
    assert numbers["entropy_threshold"] == entropies[tuple(chosen.T)].max()
    edges, counted = numbers["entropy_histogram"]["edges"], numbers["entropy_histogram"]["counts"]
    assert (len(edges), edges[0], edges[-1]) == (65, 0.0, math.log(4))
    assert counted == np.histogram(entropies[eligible], bins=64, range=(0, math.log(4)))[0].tolist()


def test_nothing_selected_has_no_entropy_threshold() -> None:
    numbers = lape_rates(np.ones((1, 10, 3), dtype=np.int64), [2, 2, 2], [0.5])[0].numbers
    assert (numbers["eligible"], numbers["selected"], numbers["entropy_threshold"]) == (0, 0, None)
    assert sum(numbers["entropy_histogram"]["counts"]) == 0
    assert numbers["languages_without_neurons"] == [0, 1, 2]


def test_entropies_at_both_ends_are_in_the_histogram() -> None:
    counts = np.zeros((1, 40, 3), dtype=np.int64)
    counts[0, 0, 0] = counts[0, 1] = 9  # one language alone, and all alike
    found = lape_rates(counts, [10, 10, 10], [1.0], filter_rate=0.9, bar_rate=0.9)[0]
    counted = found.numbers["entropy_histogram"]["counts"]
    assert (counted[0], counted[-1], sum(counted)) == (1, 1, 2)
    one = lape_rates(counts[:, :, :1], [10], [0.01])[0].numbers
    assert str(one["entropy_threshold"]) == "None", "0.01 of 40 rounds to none"
    assert str(lape_rates(counts[:, :, :1], [10], [0.05], 0.9)[0].numbers["entropy_threshold"]) == "0.0"


# --- from the means of calibration sentences ------------------------------------------------------------------

# Few values, so that there are ties within a language and between languages.
VALUES = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 6e-8])
MEANS = st.lists(
    st.integers(1, 4).flatmap(lambda sentences: arrays(np.float16, (sentences, LAYERS, UNITS), elements=VALUES)),
    min_size=2,
    max_size=4,
)


def test_activated_neurons_are_above_zero_in_every_sentence() -> None:
    french = np.array([[[1, 0, 6e-8]], [[2, 1, 1]]], dtype=np.float16)
    german = np.array([[[-1, 0, -0.0]]], dtype=np.float16)
    found = activated([french, german])
    assert [rows.tolist() for rows in found.neurons] == [[[0, 0], [0, 2]], []]
    assert found.numbers == {
        "method": "activated",
        "top_k": None,
        "sentences": [2, 1],
        "selected": 2,
        "languages_without_neurons": [1],
    }


@given(MEANS, st.integers(1, LAYERS * UNITS))
def test_the_most_activated_neurons_are_those_of_the_definition(means: list[np.ndarray], k: int) -> None:
    found = activated(means, top_k=k)
    neurons = [[layer, unit] for layer in range(LAYERS) for unit in range(UNITS)]
    for own, rows in zip(means, found.neurons, strict=True):
        average = own.astype(np.float64).mean(axis=0)
        best = sorted(neurons, key=lambda neuron: (-average[neuron[0], neuron[1]], neuron))[:k]
        assert rows.tolist() == sorted(best)


def test_means_are_read_a_layer_at_a_time(tmp_path: Path) -> None:
    means = [np.random.default_rng(place).normal(size=(4, LAYERS, UNITS)).astype(np.float32) for place in range(2)]
    maps = []
    for place, own in enumerate(means):
        np.save(tmp_path / f"{place}.npy", own)
        maps.append(np.load(tmp_path / f"{place}.npy", mmap_mode="r"))
    assert np.array_equal(average_precisions(maps), average_precisions(means))
    assert all(map(np.array_equal, activated(maps, 2).neurons, activated(means, 2).neurons))


@pytest.mark.parametrize("method", [activated, lambda means: average_precision(means, top_k=1)])
def test_means_that_cannot_be_used_are_refused(method: Callable[[list[np.ndarray]], Selection]) -> None:
    whole = np.ones((2, LAYERS, UNITS), dtype=np.float16)
    for value in (np.nan, np.inf):
        broken = whole.copy()
        broken[1, 1, 2] = value
        with pytest.raises(
            SteeringError, match=rf"language number 1: the mean of sentence 1, layer 1, unit 2 is {value}"
        ):
            method([whole, broken])
    with pytest.raises(SteeringError, match="language number 1 has no calibration sentences"):
        method([whole, whole[:0]])
    with pytest.raises(SteeringError, match=r"language number 1 has means of shape \(2, 2, 1\)"):
        method([whole, whole[:, :, :1]])
    with pytest.raises(SteeringError, match=r"no language|at least"):
        method([])


@pytest.mark.parametrize("k", [0, -1, LAYERS * UNITS + 1])
def test_a_number_of_neurons_out_of_range_is_refused(k: int) -> None:
    means = [np.ones((2, LAYERS, UNITS))] * 2
    for call in (
        lambda: activated(means, top_k=k),
        lambda: average_precision(means, top_k=k),
        lambda: average_precision(means, bottom_k=k),
    ):
        with pytest.raises(SteeringError, match=rf"_k={k}: expected a number between 1 and the 6 neurons"):
            call()


# --- average precision -----------------------------------------------------------------------------------------


def plain_precision(own: list[float], others: list[float]) -> float:
    """Step by step down the distinct scores: sum of (gain in recall) x precision."""
    total, reached = 0.0, 0.0
    for score in sorted({*own, *others}, reverse=True):
        hits, shown = sum(value >= score for value in own), sum(value >= score for value in [*own, *others])
        total += (hits / len(own) - reached) * hits / shown
        reached = hits / len(own)
    return total


@given(MEANS, st.sampled_from([1, 20, 10**6]))
def test_average_precisions_are_those_of_the_definition_with_ties(means: list[np.ndarray], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_BLOCK", block)
        found = average_precisions(means)
    for place, own in enumerate(means):
        others = np.concatenate([other for number, other in enumerate(means) if number != place])
        for layer in range(LAYERS):
            for unit in range(UNITS):
                expected = plain_precision(own[:, layer, unit].tolist(), others[:, layer, unit].tolist())
                assert found[layer, unit, place] == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 1000), st.sampled_from([np.float16, np.float32, np.float64]))
def test_average_precisions_are_scikit_learns(seed: int, dtype: type) -> None:
    generator = np.random.default_rng(seed)
    means = [generator.normal(size=(count, LAYERS, UNITS)).round(1).astype(dtype) for count in (7, 30, 12)]
    found = average_precisions(means)
    scores = np.concatenate(means).reshape(49, -1)
    labels = np.repeat([0, 1, 2], [7, 30, 12])
    for place in range(3):
        expected = [average_precision_score(labels == place, column) for column in scores.T]
        assert found[:, :, place].ravel() == pytest.approx(expected, abs=1e-12)


@given(MEANS, st.integers(1, LAYERS * UNITS), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_sets_by_average_precision_are_those_of_the_definition(
    means: list[np.ndarray], k: int, threshold: float
) -> None:
    table = average_precisions(means)
    neurons = [(layer, unit) for layer in range(LAYERS) for unit in range(UNITS)]
    passing = {neuron: [place for place in range(len(means)) if table[neuron][place] > threshold] for neuron in neurons}
    above = average_precision(means, threshold=threshold)
    for place in range(len(means)):
        ranked = sorted(neurons, key=lambda neuron: (-table[neuron][place], neuron))
        lowest = sorted(neurons, key=lambda neuron: (table[neuron][place], neuron))
        for rows, expected in (
            (average_precision(means, top_k=k).neurons[place], ranked[:k]),
            (average_precision(means, bottom_k=k).neurons[place], lowest[:k]),
            (average_precision(means, top_k=k, bottom_k=1).neurons[place], {*ranked[:k], *lowest[:1]}),
            (above.neurons[place], [neuron for neuron in neurons if passing[neuron] == [place]]),
        ):
            assert list(map(tuple, rows.tolist())) == sorted(expected)
    assert above.numbers["removed_shared"] == sum(len(places) > 1 for places in passing.values())


def test_the_numbers_of_average_precision_are_json() -> None:
    means = [np.ones((2, 1, 3)), np.zeros((1, 1, 3))]
    assert average_precision(means, top_k=1, bottom_k=2).numbers == {
        "method": "average-precision",
        "top_k": 1,
        "bottom_k": 2,
        "sentences": [2, 1],
        "selected": 2,
        "languages_without_neurons": [],
    }
    numbers = average_precision(means, threshold=0.9).numbers
    assert json.loads(json.dumps(numbers)) == numbers
    assert (numbers["threshold"], numbers["removed_shared"], numbers["languages_without_neurons"]) == (0.9, 0, [1])


def test_average_precision_takes_one_way_of_choosing() -> None:
    means = [np.ones((2, LAYERS, UNITS))] * 2
    for wrong in ({}, {"threshold": 0.5, "top_k": 1}, {"threshold": 0.5, "top_k": 1, "bottom_k": 1}):
        with pytest.raises(SteeringError, match="give the threshold alone, or top_k, bottom_k or both"):
            average_precision(means, **wrong)
    for threshold in (-0.1, 1.0, float("nan")):
        with pytest.raises(SteeringError, match=r"expected a number in \[0, 1\)"):
            average_precision(means, threshold=threshold)
    with pytest.raises(SteeringError, match="at least two"):
        average_precision(means[:1], top_k=1)
