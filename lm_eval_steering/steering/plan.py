"""What an intervention comes to on one model: one affine map a layer and site, compiled once.

Static steps compose into a' = scale * a + shift for each neuron; a neuron that a `set` step has reached is written,
not multiplied, so that an infinite activation cannot turn into a NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.errors import InterventionError
from lm_eval_steering.neurons.neuron_set import SITES, Neurons, NeuronSet, union_of
from lm_eval_steering.steering.intervention import Intervention, Step


@dataclass(frozen=True)
class Edit:
    """The affine map of one layer at one site.

    Attributes:
        layer: number of the decoder layer.
        site: `activation` or `product`.
        units: (unit,) sorted indices.
        scale: (unit,) float32.
        shift: (unit,) float32, in units of the activation.
        written: (unit,) bool, where the result is `shift` whatever the activation was.
    """

    layer: int
    site: str
    units: NDArray[np.int64]
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    written: NDArray[np.bool_]


@dataclass(frozen=True)
class Plan:
    """All edits of an intervention, and what a reader of a score wants to know about it.

    Attributes:
        intervention: with the neuron set's language codes.
        edits: by site and layer; a layer without chosen neurons has none.
        neurons: number of distinct (site, layer, unit) that are edited.
        shared: number of those that belong to more than one language of the steps that edit them.
    """

    intervention: Intervention
    edits: tuple[Edit, ...]
    neurons: int
    shared: int


def compile_plan(intervention: Intervention, neuron_set: NeuronSet, allow_empty: bool = False) -> Plan:
    """Turn an intervention into tensors for one model.

    Args:
        intervention: any codes; they are resolved here.
        neuron_set: of the model.
        allow_empty: accept a language without neurons, which makes its step do nothing.

    Raises:
        UnknownLanguageError: if a language is not in the set.
        InterventionError: if a language has no neurons, a layer is out of range, or a value overflows float32.
        NeuronSetError: if a statistic is absent from the set.
    """
    resolved = intervention.resolve(neuron_set.languages)
    parts = [_part(number, resolved, neuron_set, allow_empty) for number in range(len(resolved.steps))]
    edits: list[Edit] = []
    shared = 0
    for site in SITES:
        here = [(step, *part) for step, part in zip(resolved.steps, parts, strict=True) if step.site == site]
        neurons = union_of([chosen for _, chosen, _, _ in here])
        edits += _edits(site, neurons, _compose(neurons, [(step, chosen, values) for step, chosen, values, _ in here]))
        often = [chosen[owners > 1] for _, chosen, _, owners in here]
        shared += len(union_of(often))
    return Plan(resolved, tuple(edits), sum(len(edit.units) for edit in edits), shared)


_Part = tuple[Neurons, NDArray[np.float64], NDArray[np.int64]]


def _part(number: int, intervention: Intervention, neuron_set: NeuronSet, allow_empty: bool) -> _Part:
    """(neurons, value of each, number of the step's languages that own each) of one step."""
    step = intervention.steps[number]
    lists = _own(step, neuron_set, allow_empty)
    chosen = union_of(list(lists.values()))
    values, owners = np.zeros(len(chosen)), np.zeros(len(chosen), dtype=np.int64)
    for language, neurons in lists.items():
        rows = _positions(chosen, neurons)
        owners[rows] += 1
        values[rows] += _values(step, neurons, language, neuron_set)
    values = np.divide(values, owners, out=values, where=owners > 0)
    if step.deactivation and step.keep_shared:
        later = [s for s in intervention.steps[number + 1 :] if not s.deactivation]
        kept = union_of([n for s in later for n in _own(s, neuron_set, allow_empty).values()])
        stays = np.ones(len(chosen), dtype=bool)
        stays[_positions(chosen, kept)] = False
        if not stays.any() and not allow_empty:
            raise InterventionError(
                f"deactivating {'+'.join(step.languages)} would do nothing: the steering step uses all its neurons; "
                "allow_empty=true to go on"
            )
        return chosen[stays], values[stays], owners[stays]
    return chosen, values, owners


def _own(step: Step, neuron_set: NeuronSet, allow_empty: bool) -> dict[str, Neurons]:
    """Language -> its neurons in the step's layers."""
    layers = sorted(step.chosen_layers(neuron_set.provenance.layers))
    lists = {}
    for language in step.languages:
        neurons = neuron_set.neurons(language)
        lists[language] = neurons[np.isin(neurons[:, 0], layers)]
        if not len(lists[language]) and not allow_empty:
            where = f" in layers {step.layers}" if step.layers else ""
            raise InterventionError(f"{language} has no neurons{where} in the neuron set; allow_empty=true to go on")
    return lists


def _values(step: Step, neurons: Neurons, language: str, neuron_set: NeuronSet) -> NDArray[np.float64]:
    if not isinstance(step.amount, str):
        return np.full(len(neurons), step.amount)
    if neuron_set.statistics is None:
        raise InterventionError(f"value={step.amount}: the neuron set holds no calibrated statistics")
    return neuron_set.statistics.lookup(neurons, language, step.site, step.amount).astype(np.float64)


def _positions(within: Neurons, neurons: Neurons) -> NDArray[np.intp]:
    """Rows of `within` that are in `neurons`; both sorted."""
    units = 1 + max([int(rows[:, 1].max()) for rows in (within, neurons) if len(rows)], default=0)
    keys = within[:, 0] * units + within[:, 1]
    return np.flatnonzero(np.isin(keys, neurons[:, 0] * units + neurons[:, 1]))


_Affine = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]


def _compose(neurons: Neurons, steps: Iterable[tuple[Step, Neurons, NDArray[np.float64]]]) -> _Affine:
    """(scale, shift, written) of each neuron after all steps in their order."""
    scale, shift, written = np.ones(len(neurons)), np.zeros(len(neurons)), np.zeros(len(neurons), dtype=bool)
    for step, chosen, values in steps:
        rows = _positions(neurons, chosen)
        if step.op == "scale":
            scale[rows] *= step.factor
            shift[rows] *= step.factor
        elif step.op == "add":
            shift[rows] += step.factor * values
        else:
            scale[rows], shift[rows], written[rows] = 0.0, step.factor * values, True
    return scale, shift, written


def _edits(site: str, neurons: Neurons, affine: _Affine) -> list[Edit]:
    with np.errstate(over="ignore"):  # the check below says it better
        scale, shift = (part.astype(np.float32) for part in affine[:2])
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        raise InterventionError("the intervention's factors and values overflow float32; use smaller ones")
    edits = []
    for layer in np.unique(neurons[:, 0]):
        rows = neurons[:, 0] == layer
        edits.append(Edit(int(layer), site, neurons[rows, 1], scale[rows], shift[rows], affine[2][rows]))
    return edits
