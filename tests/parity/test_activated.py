"""Activated neurons, average precision and their overlaps against the published code's outputs (Rahmanisa et al. 2025).

Its lists hold units by layer; its activations are float16, printed to six digits, which names each of them exactly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_eval_steering.neurons.calibrate import _summaries
from lm_eval_steering.neurons.neuron_set import Neurons, NeuronSet, Provenance
from lm_eval_steering.neurons.select import Selection, activated, average_precision, average_precisions
from lm_eval_steering.neurons.set_algebra import intersect

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "tau_raw_activation_ap_maxmedian.json").read_text()
)
LAYERS, UNITS = GOLDEN["layers"], GOLDEN["neurons_per_layer"]
MEANS = np.array(GOLDEN["act"], dtype=np.float16).reshape(len(GOLDEN["act"]), -1, LAYERS, UNITS)


def layered(lists: list[Neurons], layers: int = LAYERS) -> list[list[list[int]]]:
    """[language][layer] lists of units, the published layout."""
    return [[rows[rows[:, 0] == layer, 1].tolist() for layer in range(layers)] for rows in lists]


def flat(rows: Neurons) -> list[int]:
    return (rows[:, 0] * UNITS + rows[:, 1]).tolist()


def as_set(lists: list[list[list[int]]], units: int) -> NeuronSet:
    """A neuron set of the published layout."""
    codes = ("fra_Latn", "deu_Latn", "eng_Latn")[: len(lists)]
    rows = {
        code: np.array([(layer, unit) for layer, own in enumerate(layers) for unit in own], dtype=np.int64).reshape(
            -1, 2
        )
        for code, layers in zip(codes, lists, strict=True)
    }
    return NeuronSet(codes, rows, Provenance("golden", "", "qwen2", len(lists[0]), units))


def test_neurons_active_in_every_sentence_are_the_published_ones() -> None:
    found = activated(list(MEANS))
    assert {str(place): flat(rows) for place, rows in enumerate(found.neurons)} == GOLDEN["default_flat"]
    assert layered(found.neurons) == GOLDEN["default_lsn"]


def test_neurons_of_the_largest_means_are_the_published_ones() -> None:
    found = activated(list(MEANS), top_k=6)
    assert {str(place): flat(rows) for place, rows in enumerate(found.neurons)} == {
        place: sorted(own) for place, own in GOLDEN["topk6_flat"].items()
    }


def test_overlaps_are_the_published_ones() -> None:
    overlap = as_set(layered(activated(list(MEANS)).neurons), UNITS).overlap()
    assert overlap.tolist() == GOLDEN["overlap_counts"]
    sizes = overlap.diagonal()
    assert overlap / (sizes[:, None] + sizes - overlap) == pytest.approx(np.array(GOLDEN["jaccard"]), abs=5e-7)


def test_average_precisions_are_the_published_ones() -> None:
    assert average_precisions(list(MEANS)).shape == (LAYERS, UNITS, 3)
    found = np.moveaxis(average_precisions(list(MEANS)), -1, 0)
    assert np.round(found, 6).tolist() == GOLDEN["ap"]


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("ap_threshold_0.5", average_precision(list(MEANS), threshold=0.5)),
        ("ap_threshold_0.7", average_precision(list(MEANS), threshold=0.7)),
        ("ap_top4", average_precision(list(MEANS), top_k=4)),
        ("ap_bottom4", average_precision(list(MEANS), bottom_k=4)),
        ("ap_topbottom4", average_precision(list(MEANS), top_k=4, bottom_k=4)),
    ],
)
def test_neurons_by_average_precision_are_the_published_ones(key: str, found: Selection) -> None:
    assert layered(found.neurons) == GOLDEN[key]


def test_the_intersection_is_the_published_one() -> None:
    example = GOLDEN["overlap_example"]
    found = intersect([as_set(example["a"], 10), as_set(example["b"], 10)])
    assert layered(list(found.assignments.values()), 2) == example["result"]
    assert [len(rows) for rows in as_set(example["a"], 10).assignments.values()] == example["accumulate_a"]


def test_maximum_and_lower_median_of_the_sentences_are_the_published_ones() -> None:
    for place, means in enumerate(MEANS.astype(np.float64)):
        # Sentences of one token each: the sums are the means.
        every = _summaries(means.reshape(5, -1), np.ones(5))
        four = _summaries(means[:4].reshape(4, -1), np.ones(4))
        for found, key in (
            (every["max"], "p_max"),
            (every["median"], "p_median_odd5"),
            (four["median"], "p_median_first4_sentences_lower"),
        ):
            assert np.round(found.reshape(LAYERS, UNITS), 6).tolist() == GOLDEN[key][place]
