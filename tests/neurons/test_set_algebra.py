from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lm_eval_steering.errors import NeuronSetError, SteeringError
from lm_eval_steering.neurons.neuron_set import SITES, Neurons, NeuronSet, Statistics, union_of
from lm_eval_steering.neurons.set_algebra import intersect, random_control, random_directions, subtract, union
from tests.conftest import LAYERS, UNITS, make_set, with_hidden_states

CODES = ("fra_Latn", "deu_Latn", "eng_Latn")
PAIRS = st.sets(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, UNITS - 1)), max_size=15)
SETS = st.tuples(PAIRS, PAIRS, PAIRS).map(lambda lists: whole(dict(zip(CODES, lists, strict=True))))
FRENCH = {"fra_Latn": [(0, 1), (0, 5), (2, 3)], "deu_Latn": [(0, 5), (1, 7)]}
OTHER = {"deu_Latn": [(1, 7), (1, 8)], "fra_Latn": [(0, 1), (2, 3), (2, 4)], "tur_Latn": [(0, 2)]}


def calibrated(assignments: dict[str, Neurons], languages: tuple[str, ...] = CODES) -> Statistics:
    """Statistics that depend on the neuron and the language alone, as one calibration gives them."""
    neurons = union_of(list(assignments.values()))
    columns = np.array([CODES.index(language) for language in languages])
    table = (neurons @ [1000, 10])[:, None] + columns
    return Statistics(neurons, languages, {site: {"mean": table.astype(np.float32)} for site in SITES})


def whole(lists: dict[str, set[tuple[int, int]]]) -> NeuronSet:
    plain = make_set({code: sorted(own) for code, own in lists.items()}, calibrated=False)
    return replace(plain, calibrated=calibrated(dict(plain.assignments)))


def contents(neuron_set: NeuronSet) -> dict[str, set[tuple[int, int]]]:
    return {code: set(map(tuple, rows.tolist())) for code, rows in neuron_set.assignments.items()}


def has_its_own_values(found: NeuronSet) -> bool:
    expected = calibrated(dict(found.assignments))
    statistics = found.calibrated
    return (
        statistics is not None
        and np.array_equal(statistics.neurons, expected.neurons)
        and all(np.array_equal(statistics.values[site]["mean"], expected.values[site]["mean"]) for site in SITES)
    )


@given(SETS, SETS)
def test_the_results_are_those_of_sets_of_pairs(first: NeuronSet, second: NeuronSet) -> None:
    one, other = contents(first), contents(second)
    assert contents(intersect([first, second])) == {code: one[code] & other[code] for code in CODES}
    assert contents(union([first, second])) == {code: one[code] | other[code] for code in CODES}
    assert contents(subtract(first, [second])) == {code: one[code] - other[code] for code in CODES}


@given(SETS, SETS)
def test_order_does_not_matter_to_intersection_and_union(first: NeuronSet, second: NeuronSet) -> None:
    for operation in (intersect, union):
        assert operation([first, second]).content_hash() == operation([second, first]).content_hash()


@given(SETS)
def test_a_set_with_itself_is_itself(own: NeuronSet) -> None:
    for operation in (intersect, union):
        assert operation([own, own]).content_hash() == own.content_hash()
        assert operation([own]).content_hash() == own.content_hash()
    assert subtract(own, []).content_hash() == own.content_hash()
    assert not len(subtract(own, [own]).union())


@given(SETS, SETS)
def test_what_is_taken_away_and_what_is_shared_make_the_whole(first: NeuronSet, second: NeuronSet) -> None:
    parts = [subtract(first, [second]), intersect([first, second])]
    assert union(parts).content_hash() == first.content_hash()


@given(SETS, SETS, SETS)
def test_three_sets_at_once_are_two_after_each_other(first: NeuronSet, second: NeuronSet, third: NeuronSet) -> None:
    for operation in (intersect, union):
        stepwise = operation([operation([first, second]), third])
        assert operation([first, second, third]).content_hash() == stepwise.content_hash()
    assert (
        subtract(first, [second, third]).content_hash() == subtract(subtract(first, [second]), [third]).content_hash()
    )


@given(SETS, SETS)
def test_statistics_of_one_calibration_stay_with_their_neurons(first: NeuronSet, second: NeuronSet) -> None:
    for found in (intersect([first, second]), union([first, second]), subtract(first, [second])):
        assert has_its_own_values(found)


@given(SETS, SETS, st.permutations(CODES))
def test_order_of_languages_does_not_matter(first: NeuronSet, second: NeuronSet, order: list[str]) -> None:
    assignments = {code: second.assignments[code] for code in order}
    shuffled = NeuronSet(tuple(order), assignments, second.provenance, calibrated(assignments, tuple(order)))
    for found in (intersect([first, shuffled]), union([first, shuffled]), subtract(first, [shuffled])):
        assert found.languages == CODES
        assert has_its_own_values(found)
    assert contents(intersect([shuffled, first])) == contents(intersect([first, second]))


def test_languages_are_the_first_sets_or_those_of_all() -> None:
    first, other = make_set(FRENCH, calibrated=False), make_set(OTHER, calibrated=False)
    assert intersect([first, other]).languages == ("fra_Latn", "deu_Latn")
    assert union([first, other]).languages == ("fra_Latn", "deu_Latn", "tur_Latn")
    assert contents(subtract(other, [first])) == {"deu_Latn": {(1, 8)}, "fra_Latn": {(2, 4)}, "tur_Latn": {(0, 2)}}
    with pytest.raises(NeuronSetError, match="set number 1 lacks tur_Latn"):
        intersect([other, first])


def test_the_result_says_what_it_was_made_of() -> None:
    first, other = whole({"fra_Latn": {(0, 1)}}), whole({"fra_Latn": {(0, 1), (1, 1)}})
    lape = {"method": "lape", "rate": 0.01}
    first = replace(first, provenance=replace(first.provenance, selection=lape, corpus={"sha256": "a"}, revision="r"))
    other = replace(other, provenance=replace(other.provenance, corpus={"sha256": "b"}, revision="r"))
    found = intersect([first, other]).provenance
    assert found.selection == {
        "method": "intersect",
        "of": [{"sha256": first.content_hash(), "selection": lape}, {"sha256": other.content_hash(), "selection": {}}],
    }
    assert (found.corpus, found.revision) == ({}, "r"), "what the sets differ in is left out"
    assert subtract(first, [other]).provenance.corpus == {"sha256": "a"}
    assert union([first, other]).provenance.selection["method"] == "union"


def test_statistics_that_do_not_belong_together_are_dropped() -> None:
    first = whole({"fra_Latn": {(0, 1)}, "deu_Latn": {(2, 2)}})
    values = {site: {"mean": first.calibrated.values[site]["mean"] + 1} for site in SITES}
    recalibrated = replace(first, calibrated=replace(first.calibrated, values=values))
    renamed = {site: {"median": first.calibrated.values[site]["mean"]} for site in SITES}
    uncalibrated = replace(whole({"fra_Latn": {(1, 1)}, "deu_Latn": set()}), calibrated=None)
    fewer = replace(first, calibrated=calibrated(dict(first.assignments), CODES[:2]))
    for other in (recalibrated, replace(first, calibrated=replace(first.calibrated, values=renamed)), fewer):
        assert intersect([first, other]).calibrated is None
        assert union([first, other]).calibrated is None
        assert subtract(first, [other]).calibrated is not None
    assert union([first, uncalibrated]).calibrated is None, "a neuron that nobody calibrated"
    assert has_its_own_values(intersect([first, uncalibrated]))
    turkish = make_set({"tur_Latn": [(0, 1)]}, calibrated=False)
    assert union([first, turkish]).calibrated is None, "a language that nobody calibrated"


def test_sets_of_different_models_are_refused() -> None:
    first = make_set(FRENCH)
    larger = replace(first, provenance=replace(first.provenance, model="large", layers=LAYERS + 1))
    for operation in (intersect, union, lambda sets: subtract(sets[0], sets[1:])):
        with pytest.raises(
            NeuronSetError, match=r"tiny \(llama, 3 layers .* and large \(llama, 4 layers of 24 units\)"
        ):
            operation([first, larger])
        with pytest.raises(NeuronSetError, match=r"tiny \(llama.* and tiny \(gpt2"):
            operation([first, make_set(FRENCH, "gpt2")])
    for operation in (intersect, union):
        with pytest.raises(NeuronSetError, match="give at least one"):
            operation([])


def test_sets_of_different_checkpoints_are_refused() -> None:
    unknown = make_set(FRENCH)
    one, other = (
        replace(unknown, provenance=replace(unknown.provenance, model=name, weights=weights))
        for name, weights in (("base", (0.5, 1.0)), ("tuned", (0.9, 1.0)))
    )
    assert union([unknown, one]).provenance.weights == (0.5, 1.0)
    with pytest.raises(NeuronSetError, match=r"base \(.* and tuned \(.* do not have the same weights"):
        union([unknown, one, other])


@given(SETS, st.integers(0, 100), st.booleans())
def test_random_controls_match_each_layer_and_avoid_the_set(own: NeuronSet, seed: int, disjoint: bool) -> None:
    whole = own.union()
    assume(not disjoint or (np.bincount(whole[:, 0], minlength=1) <= UNITS // 2).all())
    drawn = random_control(own.assignments, UNITS, seed, disjoint)
    again = random_control(own.assignments, UNITS, seed, disjoint)
    for code in CODES:
        rows, matched = drawn[code], own.assignments[code]
        assert np.array_equal(rows, again[code])
        assert np.array_equal(np.bincount(rows[:, 0]), np.bincount(matched[:, 0]))
        assert np.array_equal(rows, union_of([rows])), "unsorted, or drew a unit twice"
        assert not disjoint or len(union_of([rows, whole])) == len(rows) + len(whole), "overlaps"
    control = NeuronSet(CODES, drawn, own.provenance)
    assert np.array_equal(control.overlap(), own.overlap())
    assert np.array_equal(np.bincount(control.union()[:, 0]), np.bincount(whole[:, 0]))


def test_another_seed_draws_other_neurons() -> None:
    own = {"fra_Latn": np.array([[0, unit] for unit in range(8)])}
    first, second = (random_control(own, UNITS, seed) for seed in (0, 1))
    assert not np.array_equal(first["fra_Latn"], second["fra_Latn"])


@given(st.integers(2, 5), st.integers(0, 100), st.integers(1, 12))
def test_random_directions_keep_norms_angles_and_the_top_dimensions_values(codes: int, seed: int, top: int) -> None:
    means = np.random.default_rng(seed + 1).normal(size=(3, 12, codes)).astype(np.float32)
    means[:, 2] *= 50  # as hidden states have dimensions that are much larger than others
    residual = {"mean": means, "std": np.abs(means)}
    drawn = random_directions(residual, seed)
    again = random_directions(residual, seed)
    assert np.array_equal(drawn["mean"], again["mean"]) and drawn["mean"].dtype == np.float32
    assert drawn["std"] is residual["std"]

    def apart(table: np.ndarray) -> np.ndarray:
        """(layer, dimension, language) mean minus the average of the other languages'."""
        wide = table.astype(np.float64)
        return (wide - wide.mean(axis=2, keepdims=True)) * codes / (codes - 1)

    own, control = apart(means), apart(drawn["mean"])
    scale = np.abs(own).max()
    assert np.allclose(drawn["mean"].mean(axis=2), means.mean(axis=2), atol=1e-5 * scale)
    for layer in range(3):
        # One orthogonal map of all languages: products of every two stay.
        assert np.allclose(own[layer].T @ own[layer], control[layer].T @ control[layer], atol=1e-4 * scale**2)
        for code in range(codes):
            sizes = [np.sort(np.abs(table[layer, :, code]))[-top:] for table in (own, control)]
            assert np.allclose(*sizes, atol=1e-5 * scale)


def test_other_seeds_and_layers_draw_other_directions() -> None:
    means = np.tile(np.arange(64, dtype=np.float32)[None, :, None] * [1, -1], (2, 1, 1)).astype(np.float32)
    first, second = (random_directions({"mean": means}, seed)["mean"] for seed in (0, 1))
    assert not np.array_equal(first, second) and not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, means)
    assert random_directions({}, 0) == {}


def test_statistics_of_hidden_states_are_kept_where_they_agree() -> None:
    first = with_hidden_states(make_set(FRENCH))
    renamed = replace(first, languages=first.languages[::-1], residual={
        name: table[:, :, ::-1] for name, table in first.residual.items()
    })  # fmt: skip
    plain = replace(first, residual={})
    for made in (union([first, renamed]), intersect([plain, first]), subtract(first, [plain])):
        assert made.languages == first.languages
        assert all(np.array_equal(made.residual[name], table) for name, table in first.residual.items())
    other = replace(first, residual={name: table + 1 for name, table in first.residual.items()})
    assert union([first, other]).residual == {} and subtract(plain, [first]).residual == {}
    german = with_hidden_states(make_set({"deu_Latn": [(1, 1)], "tur_Latn": []}))
    assert union([first, german]).residual == {}, "of other languages, on which diffmean depends"


def test_more_than_half_a_layer_needs_a_draw_that_may_overlap() -> None:
    own = {"fra_Latn": np.array([[1, unit] for unit in range(UNITS // 2 + 1)])}
    with pytest.raises(SteeringError, match=r"layer 1 has 11 units outside the set's 13.*disjoint=False"):
        random_control(own, UNITS, 0)
    assert len(random_control(own, UNITS, 0, disjoint=False)["fra_Latn"]) == UNITS // 2 + 1
