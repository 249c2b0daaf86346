from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.neurons import select as precision_module
from lm_eval_steering.neurons.select import average_precision, average_precisions
from tests.neurons.test_select import LAYERS, MEANS, UNITS


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
        patch.setattr(precision_module, "_BLOCK", block)
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
