"""LAPE against the published code's own outputs (Tang et al. 2024), and right where the published code is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_eval_steering.neurons.neuron_set import union_of
from lm_eval_steering.neurons.select import activation_probability, entropy, kth_smallest, lape, lape_rates

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "lape_cases.json").read_text())


def case(letter: str) -> dict[str, Any]:
    return next(value for name, value in CASES.items() if name.startswith(f"{letter}_"))


def select(letter: str) -> list[list[list[int]]]:
    """[language][layer] lists of units, the published layout."""
    data = case(letter)
    counts = np.array(data["over_zero"])
    found = lape(counts, data["n"])
    return [[rows[rows[:, 0] == layer, 1].tolist() for layer in range(counts.shape[0])] for rows in found]


@pytest.mark.parametrize("letter", ["A", "B", "C", "F"])
def test_selection_is_the_published_one(letter: str) -> None:
    assert select(letter) == case(letter)["selected"]


@pytest.mark.parametrize("letter", ["A", "B", "C", "D", "F", "G", "I"])
def test_threshold_and_entropy_are_the_published_ones(letter: str) -> None:
    data = case(letter)
    probability = activation_probability(np.array(data["over_zero"]), data["n"])
    assert kth_smallest(probability, 0.95) == np.float32(data["threshold"])
    assert int((probability > kth_smallest(probability, 0.95)).any(-1).sum()) == data["eligible"]
    found = entropy(probability)
    for layer, unit, expected in data["entropy_sample"]:
        assert found[layer, unit] == pytest.approx(expected, abs=1e-6)


def test_a_language_without_neurons_at_the_end_keeps_its_place() -> None:
    """Published: three lists for four languages (case D), so that every later index names another language."""
    found = select("D")
    assert len(found) == 4
    assert found[:3] == case("D")["selected"]
    assert found[3] == [[], [], [], []]


def test_nothing_to_select_gives_empty_lists() -> None:
    """Published: a crash or an empty list (case E)."""
    assert select("E") == [[[], []]] * 3


def test_of_equal_entropies_the_first_are_taken() -> None:
    """Published: unspecified (case G); ours: by (entropy, layer, unit)."""
    chosen = {tuple(row) for rows in lape(np.array(case("G")["over_zero"]), case("G")["n"]) for row in rows.tolist()}
    assert chosen == {(0, unit) for unit in range(10)}


def test_the_number_of_neurons_rounds_half_to_even() -> None:
    sizes = case("H")
    for total, expected in zip(sizes["num_neurons"], sizes["top_n_at_0.01"], strict=True):
        counts = np.zeros((1, total, 2), dtype=np.int64)
        counts[0, :, 0] = np.arange(total) + 1  # all of entropy 0
        found = lape(counts, [total, total], filter_rate=0.01, bar_rate=0.01)
        assert len(found[0]) == expected


def test_a_rate_that_rounds_to_no_neuron_gives_empty_lists() -> None:
    assert select("I") == [[[]]] * 3


SWEEP: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "lape_rate_sweep_21langs.json").read_text())


@pytest.mark.parametrize("rate", SWEEP["rates"])
def test_every_rate_of_21_languages_is_the_published_one(rate: str) -> None:
    counts = np.array(SWEEP["over_zero"])
    found = lape(counts, SWEEP["n"], float(rate))
    layers = [[rows[rows[:, 0] == layer, 1].tolist() for layer in range(counts.shape[0])] for rows in found]
    assert layers == SWEEP["rates"][rate]["selected"]
    assert len(union_of(found)) == SWEEP["rates"][rate]["distinct"]


def test_entropy_and_threshold_of_small_tables_are_the_published_ones() -> None:
    rows = np.array([[[0.5, 0, 0], [0.2, 0.2, 0.2], [0.4, 0.1, 0], [0, 0, 0], [0.9, 0.05, 0.05]]], dtype=np.float32)
    assert entropy(rows)[0] == pytest.approx([0, 1.0986123, 0.5004024, 0, 0.3943977], abs=1e-6)
    values = np.linspace(0.05, 1.0, 20, dtype=np.float32)
    assert kth_smallest(values, 0.95) == np.float32(0.95)
    assert int((values > kth_smallest(values, 0.95)).sum()) == 1


def test_a_threshold_does_not_depend_on_the_order_of_the_values() -> None:
    """The published table of the 95 % value, in its own order."""
    facts = {
        "values": [
            0.1, 0.5, 0.3, 0.9, 0.7, 0.2, 0.4, 0.6, 0.8, 1.0, 0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95
        ],
        "result": 0.95,
    }  # fmt: skip
    assert kth_smallest(np.array(facts["values"], dtype=np.float32), 0.95) == np.float32(facts["result"])


@pytest.mark.parametrize("counts", [np.full((2, 5, 3), 4), np.zeros((2, 5, 3), dtype=np.int64)])
def test_neurons_that_are_all_alike_give_empty_lists(counts: np.ndarray) -> None:
    """Published: a single empty list, whatever the number of languages."""
    assert [rows.tolist() for rows in lape(counts, [10, 10, 10], 0.5)] == [[], [], []]


def test_one_in_a_hundred_of_the_published_models_is_as_many_as_published() -> None:
    sizes = {(42, 14336): 6021, (26, 9216): 2396, (28, 18944): 5304, (24, 4864): 1167, (28, 8960): 2509}
    for (layers, units), expected in sizes.items():
        counts = np.zeros((layers, units, 2), dtype=np.int64)
        counts[:, : units // 20, 0] = 1
        found = lape_rates(counts, [1, 1], [0.01])[0]
        assert found.numbers["selected"] == len(found.neurons[0]) == expected


@pytest.mark.parametrize("rate", SWEEP["rates"])
def test_all_rates_at_once_are_the_published_ones(rate: str) -> None:
    rates = [float(text) for text in SWEEP["rates"]]
    found = lape_rates(np.array(SWEEP["over_zero"]), SWEEP["n"], rates)[rates.index(float(rate))]
    assert [len(rows) for rows in found.neurons] == SWEEP["rates"][rate]["counts"]
    assert found.numbers["selected"] == SWEEP["rates"][rate]["distinct"]
