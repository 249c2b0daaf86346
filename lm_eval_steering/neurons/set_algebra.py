"""Neuron sets made of others: intersection, union, difference, and the matched random controls of every claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.architectures import shape_text
from lm_eval_steering.architectures.weights import same_weights
from lm_eval_steering.errors import NeuronSetError, SteeringError
from lm_eval_steering.neurons.neuron_set import Neurons, NeuronSet, Provenance, Statistics, union_of


def intersect(sets: Sequence[NeuronSet]) -> NeuronSet:
    """Of each language of the first set the neurons that it has in all of them.

    LAPE intersected with average precision is `maplape` (Rahmanisa et al. 2025). Statistics stay where all
    sets that have some agree on them (same languages, names and values); otherwise the result has none.

    Raises:
        NeuronSetError: if the sets are of different models, or one lacks a language of the first.
    """
    _check(sets)
    for number, other in enumerate(sets[1:], start=1):
        absent = [language for language in sets[0].languages if language not in other.assignments]
        if absent:
            raise NeuronSetError(
                f"set number {number} lacks {', '.join(absent)}; an intersection needs every language of the "
                "first set in all of them: put the set with the fewest languages first"
            )
    assignments = {
        language: reduce(_common, [neuron_set.assignments[language] for neuron_set in sets])
        for language in sets[0].languages
    }
    return _result("intersect", sets, assignments, sets)


def union(sets: Sequence[NeuronSet]) -> NeuronSet:
    """Of each language of any set, in order of first appearance, the neurons that it has in any.

    Statistics stay where all sets that have some agree on them (same languages, names and values) and they cover every
    neuron and language of the result; otherwise it has none.

    Raises:
        NeuronSetError: if the sets are of different models.
    """
    _check(sets)
    languages = dict.fromkeys(language for neuron_set in sets for language in neuron_set.languages)
    assignments = {
        language: union_of(
            [neuron_set.assignments[language] for neuron_set in sets if language in neuron_set.assignments]
        )
        for language in languages
    }
    return _result("union", sets, assignments, sets)


def subtract(first: NeuronSet, others: Sequence[NeuronSet]) -> NeuronSet:
    """Of each language of the first set the neurons that it has in none of the others.

    A language that another set lacks loses nothing to it. Statistics, corpus and versions are the first set's.

    Raises:
        NeuronSetError: if the sets are of different models.
    """
    sets = [first, *others]
    _check(sets)
    assignments = {}
    for language, neurons in first.assignments.items():
        taken = union_of([other.assignments[language] for other in others if language in other.assignments])
        assignments[language] = neurons[~_contains(taken, neurons)]
    return _result("subtract", sets, assignments, [first])


def random_control(
    assignments: Mapping[str, Neurons], widths: int | Sequence[int], seed: int, disjoint: bool = True
) -> dict[str, Neurons]:
    """Random neurons for each neuron of a set, in the same layer: a copy of the set with other units.

    Each neuron has one image, whichever languages it belongs to, so that a control has the overlaps of its set: what
    is done to several languages edits as many neurons in each layer as it does with the set itself.

    Args:
        assignments: language -> (neuron, 2) sorted rows (layer, unit), the neurons to match.
        widths: MLP units per layer; a list where layers differ.
        seed: of the draw.
        disjoint: leave out the neurons of all languages of the set; otherwise they may be drawn like any other.

    Raises:
        SteeringError: if a layer has too few units outside the set.
    """
    neurons = union_of(list(assignments.values()))
    images = np.zeros(len(neurons), dtype=np.int64)
    for layer in np.unique(neurons[:, 0]):
        here = neurons[:, 0] == layer
        taken = neurons[here, 1]
        units = np.arange(widths if isinstance(widths, int) else widths[layer])
        free = np.setdiff1d(units, taken) if disjoint else units
        if len(free) < len(taken):
            raise SteeringError(
                f"layer {layer} has {len(free)} units outside the set's {len(taken)}, too few for a matched random "
                "control; select at a lower rate, or draw with disjoint=False"
            )
        images[here] = np.random.default_rng([seed, int(layer)]).choice(free, size=len(taken), replace=False)
    return {language: _replaced(rows, neurons, images) for language, rows in assignments.items()}


def random_directions(residual: Mapping[str, NDArray[np.float32]], seed: int) -> dict[str, NDArray[np.float32]]:
    """Mean hidden states with other directions between the languages: the control of an edit at site=residual.

    In each layer the deviations of the languages from the mean over languages have their dimensions permuted and their
    signs flipped at random, alike for all languages: one orthogonal map. So every difference between languages keeps
    its norm and its angles to the others, the top K of |diffmean| are K random dimensions with the same values up to
    signs, and the mean over languages stays. `value=mean` itself, which is mostly that mean, does not keep its norm
    exactly. Other statistics stay.

    Args:
        residual: statistic -> (layer, dimension, language).
        seed: of the draw.
    """
    if "mean" not in residual:
        return dict(residual)
    means = residual["mean"].astype(np.float64)
    common = means.mean(axis=2, keepdims=True)
    deviations = means - common
    for layer, of_layer in enumerate(deviations):
        generator = np.random.default_rng([seed, layer])
        signs = generator.choice([-1.0, 1.0], size=len(of_layer))
        deviations[layer] = of_layer[generator.permutation(len(of_layer))] * signs[:, None]
    return {**residual, "mean": (common + deviations).astype(np.float32)}


def _replaced(rows: Neurons, neurons: Neurons, images: NDArray[np.int64]) -> Neurons:
    units = 1 + int(neurons[:, 1].max(initial=0))
    positions = np.searchsorted(neurons[:, 0] * units + neurons[:, 1], rows[:, 0] * units + rows[:, 1])
    return union_of([np.column_stack([rows[:, 0], images[positions]])])


def _check(sets: Sequence[NeuronSet]) -> None:
    """Refuse sets of different models; every pair, because a sketch may be known of some alone."""
    if not sets:
        raise NeuronSetError("no neuron set: give at least one")
    for first, second in combinations([neuron_set.provenance for neuron_set in sets], 2):
        if _shape(first) != _shape(second):
            raise NeuronSetError(
                f"neuron sets of different models: {_name(first)} and {_name(second)}; combine sets of one model"
            )
        if first.weights and second.weights and not same_weights(first.weights, second.weights):
            raise NeuronSetError(
                f"neuron sets of different checkpoints: {_name(first)} and {_name(second)} do not have the same "
                "weights; combine sets of one model"
            )


def _shape(provenance: Provenance) -> tuple[str, int, int, tuple[int, ...]]:
    return provenance.architecture, provenance.layers, provenance.units, tuple(provenance.widths)


def _name(provenance: Provenance) -> str:
    shape = shape_text(provenance.layers, provenance.units, provenance.widths)
    return f"{provenance.model} ({provenance.architecture}, {shape})"


def _result(
    method: str, sets: Sequence[NeuronSet], assignments: dict[str, Neurons], sources: Sequence[NeuronSet]
) -> NeuronSet:
    """The new set; `sources` are the sets that its neurons, statistics and provenance come from."""
    provenance = replace(
        _agreed([neuron_set.provenance for neuron_set in sources]),
        # A sketch of any will do, for they are of one model.
        weights=next((neuron_set.provenance.weights for neuron_set in sets if neuron_set.provenance.weights), ()),
        selection={
            "method": method,
            "of": [
                {"sha256": neuron_set.content_hash(), "selection": dict(neuron_set.provenance.selection)}
                for neuron_set in sets
            ],
        },
    )
    languages = tuple(assignments)
    residual = _agreed_residual([neuron_set for neuron_set in sources if neuron_set.residual], languages)
    statistics = _merged([neuron_set.calibrated for neuron_set in sources if neuron_set.calibrated is not None])
    return NeuronSet(languages, assignments, provenance, _covering(statistics, languages, assignments), residual)


def _agreed(provenances: Sequence[Provenance]) -> Provenance:
    """What all say; the model's name is the first's, and what they differ in is left empty."""
    first = provenances[0]
    empty = Provenance(first.model, "", first.architecture, first.layers, first.units, widths=first.widths)
    values: dict[str, Any] = {
        field.name: getattr(first, field.name)
        for field in fields(Provenance)
        if field.name != "model"
        and all(getattr(other, field.name) == getattr(first, field.name) for other in provenances)
    }
    return replace(empty, **values)


def _merged(several: Sequence[Statistics]) -> Statistics | None:
    """The statistics of several sets as one; None where they do not belong together.

    They must be of the same languages and names, and equal to the bit wherever two hold the same neuron: other values
    come from other calibration sentences, and `diffmean` from other languages. None rather than a choice among them:
    an intervention that asks for a statistic is then refused, and the set can be calibrated anew.
    """
    if not several:
        return None
    first = several[0]
    if any(set(other.languages) != set(first.languages) or _tables(other) != _tables(first) for other in several):
        return None
    rows = np.concatenate([statistics.neurons for statistics in several])
    neurons, first_rows, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)  # numpy 2.0 gave it a second axis
    columns = [[statistics.languages.index(language) for language in first.languages] for statistics in several]
    values: dict[str, dict[str, NDArray[np.float32]]] = {}
    for site, name in sorted(_tables(first)):
        stacked = np.concatenate(
            [statistics.values[site][name][:, order] for statistics, order in zip(several, columns, strict=True)]
        )
        if not np.array_equal(stacked[first_rows][inverse], stacked):
            return None
        values.setdefault(site, {})[name] = stacked[first_rows]
    return Statistics(neurons, first.languages, values)


def _tables(statistics: Statistics) -> set[tuple[str, str]]:
    return {(site, name) for site, tables in statistics.values.items() for name in tables}


def _agreed_residual(sources: Sequence[NeuronSet], languages: Sequence[str]) -> Mapping[str, NDArray[np.float32]]:
    """The hidden states' statistics where all sets that have some agree, and they are of exactly these languages.

    None otherwise, for the reasons of `_merged`.
    """
    if not sources or any(set(each.languages) != set(languages) for each in sources):
        return {}
    tables = [
        {name: table[:, :, [each.languages.index(code) for code in languages]] for name, table in each.residual.items()}
        for each in sources
    ]
    same = all(
        each.keys() == tables[0].keys() and all(np.array_equal(table, each[name]) for name, table in tables[0].items())
        for each in tables
    )
    return tables[0] if same else {}


def _covering(
    statistics: Statistics | None, languages: Sequence[str], assignments: Mapping[str, Neurons]
) -> Statistics | None:
    """The statistics of exactly the assigned neurons, or None where one of them or a language has none."""
    neurons = union_of(list(assignments.values()))
    if statistics is None or not set(languages) <= set(statistics.languages):
        return None
    return statistics.restrict(neurons) if _contains(statistics.neurons, neurons).all() else None


def _common(first: Neurons, second: Neurons) -> Neurons:
    return first[_contains(second, first)]


def _contains(neurons: Neurons, wanted: Neurons) -> NDArray[np.bool_]:
    """(wanted,) whether each row is among the neurons."""
    width = 1 + max((int(rows[:, 1].max()) for rows in (neurons, wanted) if len(rows)), default=0)
    return np.isin(wanted[:, 0] * width + wanted[:, 1], neurons[:, 0] * width + neurons[:, 1])
