"""An intervention compiled for one model: for each layer and site a few affine maps.

Every operation is affine in the activation and in the values that only the forward pass knows, so steps compose:
a' = gain * scale * a + shift + sum of coefficient * source. Steps that act on the same positions fold into one map; a
neuron that a `set` step has reached is written, not multiplied, so that an infinite activation cannot become a NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.errors import InterventionError
from lm_eval_steering.neurons.neuron_set import Neurons, NeuronSet, union_of
from lm_eval_steering.steering.intervention import NORMAL, RESIDUAL, SITES, Intervention, Step, is_live
from lm_eval_steering.steering.positions import ALL

# --- Steps folded into affine maps over the neurons of one site


@dataclass(frozen=True)
class LiveValue:
    """A value that only the forward pass knows.

    Attributes:
        name: of the live statistic without `live_`, or `normal`.
        sequence: over the row's whole forward pass rather than one position.
        step: number of the step where each has its own: the random numbers, and the chosen units of `mad`.
        seed: of `normal`.
    """

    name: str
    sequence: bool = False
    step: int = -1
    seed: int = 0


@dataclass(frozen=True)
class Term:
    """A live value and its coefficients, (unit,) float32; for `mad` also (unit,) bool, which units' distances count."""

    source: LiveValue
    coefficients: NDArray[np.float32]
    chosen: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Affine:
    """a' = gain * scale * a + shift + sum of terms, on the touched units, at some positions.

    Attributes:
        positions: form of `positions`.
        touched: (unit,) bool.
        scale: (unit,) float32.
        shift: (unit,) float32, in units of the activation.
        written: (unit,) bool, where the activation itself counts for nothing.
        terms: values of the forward pass that are added.
        gain: a value of the forward pass that the scale is multiplied with, on the touched units.
    """

    positions: str
    touched: NDArray[np.bool_]
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    written: NDArray[np.bool_]
    terms: tuple[Term, ...] = ()
    gain: Term | None = None

    @property
    def all_terms(self) -> tuple[Term, ...]:
        """The terms, and the gain where there is one."""
        return (*self.terms, *((self.gain,) if self.gain else ()))

    @property
    def needs_rows(self) -> bool:
        """Whether it matters where a token stands in its row."""
        return self.positions != ALL or any(term.source.name == NORMAL for term in self.all_terms)

    def cut(self, rows: NDArray[np.bool_]) -> Affine:
        """The same map on some of the units."""
        terms = tuple(cut for term in self.terms if (cut := _cut(term, rows)).coefficients.any())
        parts = {name: getattr(self, name)[rows] for name in ("touched", "scale", "shift", "written")}
        return replace(self, terms=terms, gain=_cut(self.gain, rows) if self.gain else None, **parts)


def _cut(term: Term, rows: NDArray[np.bool_]) -> Term:
    return Term(term.source, term.coefficients[rows], None if term.chosen is None else term.chosen[rows])


@dataclass
class _Open:
    """A map in the making, in float64."""

    positions: str
    touched: NDArray[np.bool_]
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    written: NDArray[np.bool_]
    terms: dict[LiveValue, NDArray[np.float64]] = field(default_factory=dict)
    chosen: dict[LiveValue, NDArray[np.bool_]] = field(default_factory=dict)
    gain: LiveValue | None = None

    @classmethod
    def identity(cls, count: int, positions: str) -> _Open:
        no = np.zeros(count, dtype=bool)
        return cls(positions, no, np.ones(count), np.zeros(count), no.copy())

    def closed(self) -> Affine:
        terms = tuple(self._term(source, values) for source, values in self.terms.items())
        gain = self._term(self.gain, np.ones(len(self.scale))) if self.gain else None
        scale, shift = _float32(self.scale), _float32(self.shift)
        return Affine(self.positions, self.touched, scale, shift, self.written, terms, gain)

    def _term(self, source: LiveValue, values: NDArray[np.float64]) -> Term:
        return Term(source, _float32(values), self.chosen.get(source))


class Maps:
    """Folds steps, in their order, over the neurons of one site; a map ends where the positions change."""

    def __init__(self, neurons: Neurons) -> None:
        """Begin; `neurons` (neuron, 2) is the union over the steps."""
        self._neurons = neurons
        self._done: list[_Open] = []

    def add(self, number: int, step: Step, chosen: Neurons, values: NDArray[np.float64]) -> None:
        """Apply one step to its neurons (neuron, 2) with the value of each."""
        rows = positions_of(self._neurons, chosen)
        source = source_of(step, number)
        now = self._map_for(step, source)
        now.touched[rows] = True
        if source is not None and source.name == "mad":
            now.chosen[source] = np.zeros(len(self._neurons), dtype=bool)
            now.chosen[source][rows] = True
        amount = step.factor * values
        if step.op == "scale":
            now.scale[rows] *= step.factor
            now.shift[rows] *= step.factor
            for coefficients in now.terms.values():
                coefficients[rows] *= step.factor
            return
        if step.op == "set":
            now.scale[rows], now.shift[rows], now.written[rows] = 0.0, 0.0, True
            for coefficients in now.terms.values():
                coefficients[rows] = 0.0
        if source is None:
            now.shift[rows] += amount
        else:
            now.terms.setdefault(source, np.zeros(len(self._neurons)))[rows] += amount

    def finish(self) -> tuple[Affine, ...]:
        """The maps, in the order in which they are to be applied.

        Raises:
            InterventionError: if a number overflows float32.
        """
        return tuple(each.closed() for each in self._done)

    def _map_for(self, step: Step, source: LiveValue | None) -> _Open:
        """The open map if the step can join it: a product with a live statistic stands for itself."""
        last = self._done[-1] if self._done else None
        multiplies = step.op == "scale" and source is not None
        if last is None or last.positions != step.positions or last.gain is not None or multiplies:
            self._done.append(_Open.identity(len(self._neurons), step.positions))
            self._done[-1].gain = source if multiplies else None
        return self._done[-1]


def source_of(step: Step, number: int = 0) -> LiveValue | None:
    """The value of a step that only the forward pass knows; None where the value is known."""
    if step.value == NORMAL:
        return LiveValue(NORMAL, step=number, seed=step.seed)
    if not is_live(step.value):
        return None
    name = str(step.value).removeprefix("live_")
    return LiveValue(name, step.scope == "sequence", number if name == "mad" else -1)


def _float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # checked below
        narrow = values.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise InterventionError("the intervention's factors and values overflow float32; use smaller ones")
    return narrow


def positions_of(within: Neurons, neurons: Neurons) -> NDArray[np.intp]:
    """Rows of `within` that are in `neurons`; both (neuron, 2) and sorted."""
    units = 1 + max([int(rows[:, 1].max()) for rows in (within, neurons) if len(rows)], default=0)
    keys = within[:, 0] * units + within[:, 1]
    return np.flatnonzero(np.isin(keys, neurons[:, 0] * units + neurons[:, 1]))


@dataclass(frozen=True)
class Edit:
    """What is done in one layer at one site.

    Attributes:
        layer: number of the decoder layer.
        site: `activation`, `product` or `residual`.
        units: (unit,) sorted indices of the units that any map touches; at `residual` of dimensions.
        maps: over those units, applied one after another; sources are taken before the first.
        dimensions: of the hidden states, at `residual`; elsewhere the model says how many units a layer has.
    """

    layer: int
    site: str
    units: NDArray[np.int64]
    maps: tuple[Affine, ...]
    dimensions: int | None = None

    @property
    def positions(self) -> tuple[str, ...]:
        """The forms of `positions` that its maps use."""
        return tuple(dict.fromkeys(each.positions for each in self.maps))


@dataclass(frozen=True)
class CompiledIntervention:
    """All edits of an intervention, and what a reader of a score wants to know about it.

    Attributes:
        intervention: with the neuron set's language codes.
        edits: by site and layer; a layer without chosen neurons has none.
        neurons: number of distinct (site, layer, unit) that are edited; at `residual` a unit is a dimension.
        shared: number of those that belong to more than one language of the steps that edit them.
    """

    intervention: Intervention
    edits: tuple[Edit, ...]
    neurons: int
    shared: int

    @property
    def lookahead(self) -> bool:
        """Whether an edit depends on later tokens of the row."""
        return self.intervention.lookahead

    @property
    def needs_rows(self) -> bool:
        """Whether it matters which positions are prompt, or where a token stands in its row."""
        return any(each.needs_rows for edit in self.edits for each in edit.maps)


def compile_intervention(
    intervention: Intervention, neuron_set: NeuronSet, allow_empty: bool = False
) -> CompiledIntervention:
    """Turn an intervention into tensors for one model.

    Args:
        intervention: any codes; they are resolved here.
        neuron_set: of the model.
        allow_empty: accept a language without neurons, which makes its step do nothing.

    Raises:
        UnknownLanguageError: if a language is not in the set.
        InterventionError: if a language has no neurons, a layer is out of range, a value overflows float32, or steps
            at two sites are written in the order that no forward pass has.
        NeuronSetError: if a statistic is absent from the set.
    """
    resolved = intervention.resolve(neuron_set.languages)
    parts = [_part(number, resolved, neuron_set, allow_empty) for number in range(len(resolved.steps))]
    _refuse_reversed_sites(parts)
    edits: list[Edit] = []
    shared = 0
    for site in SITES:
        here = [part for part in parts if part.step.site == site]
        dimensions = neuron_set.dimensions if site == RESIDUAL and here else None
        edits += _edits(site, here, dimensions)
        shared += len(union_of([part.neurons[part.owners > 1] for part in here]))
    return CompiledIntervention(resolved, tuple(edits), sum(len(edit.units) for edit in edits), shared)


@dataclass(frozen=True)
class _Part:
    """One step on its neurons (neuron, 2): the value of each, and how many of the step's languages have it."""

    number: int
    step: Step
    neurons: Neurons
    values: NDArray[np.float64]
    owners: NDArray[np.int64]


def _part(number: int, intervention: Intervention, neuron_set: NeuronSet, allow_empty: bool) -> _Part:
    step = intervention.steps[number]
    lists = _neurons_of(step, neuron_set, allow_empty)
    chosen = union_of(list(lists.values()))
    values, owners = np.zeros(len(chosen)), np.zeros(len(chosen), dtype=np.int64)
    for language, neurons in lists.items():
        rows = positions_of(chosen, neurons)
        owners[rows] += 1
        values[rows] += _values(step, neurons, language, neuron_set)
    values = np.divide(values, owners, out=values, where=owners > 0)
    if step.deactivation and step.keep_shared:
        # Dimensions of hidden states are no neurons, whatever their numbers.
        later = [s for s in intervention.steps[number + 1 :] if not s.deactivation and s.site != RESIDUAL]
        kept = union_of([n for s in later for n in _neurons_of(s, neuron_set, allow_empty).values()])
        stays = np.ones(len(chosen), dtype=bool)
        stays[positions_of(chosen, kept)] = False
        if not stays.any() and not allow_empty:
            raise InterventionError(
                f"deactivating {'+'.join(step.languages)} would do nothing: the steering step uses all its neurons; "
                "allow_empty=true to go on"
            )
        chosen, values, owners = chosen[stays], values[stays], owners[stays]
    return _Part(number, step, chosen, values, owners)


def _neurons_of(step: Step, neuron_set: NeuronSet, allow_empty: bool) -> dict[str, Neurons]:
    """Language -> its neurons in the step's layers; at `residual` rows (layer, dimension)."""
    layers = sorted(step.chosen_layers(neuron_set.provenance.layers))
    if step.site == RESIDUAL:
        return {language: _dimensions_of(step, layers, language, neuron_set) for language in step.languages}
    lists = {}
    for language in step.languages:
        neurons = neuron_set.neurons(language)
        lists[language] = neurons[np.isin(neurons[:, 0], layers)]
        if not len(lists[language]) and not allow_empty:
            where = f" in layers {step.layers}" if step.layers else ""
            raise InterventionError(f"{language} has no neurons{where} in the neuron set; allow_empty=true to go on")
    return lists


def _dimensions_of(step: Step, layers: Sequence[int], language: str, neuron_set: NeuronSet) -> Neurons:
    """(dimension, 2) sorted rows of (layer, dimension): all, or of each layer those with the largest |diffmean|.

    Ties go to the dimension of the lower number.
    """
    total = neuron_set.dimensions
    if step.dimensions is None:
        chosen = np.broadcast_to(np.arange(total), (len(layers), total))
    elif step.dimensions > total:
        raise InterventionError(f"dimensions={step.dimensions}: the hidden states have {total}, give a smaller number")
    else:
        sizes = np.abs(neuron_set.hidden_states(language, "diffmean")[layers])
        chosen = np.sort(np.argsort(-sizes, axis=1, kind="stable")[:, : step.dimensions], axis=1)
    return np.column_stack([np.repeat(layers, chosen.shape[1]), chosen.reshape(-1)]).astype(np.int64)


def _values(step: Step, neurons: Neurons, language: str, neuron_set: NeuronSet) -> NDArray[np.float64]:
    """(neuron,) what the factor is multiplied with; 1 where a source is, which only the forward pass knows."""
    if source_of(step) is not None:
        return np.ones(len(neurons))
    if not isinstance(step.amount, str):
        return np.full(len(neurons), step.amount)
    if step.site == RESIDUAL:
        return neuron_set.hidden_states(language, step.amount, step.source)[neurons[:, 0], neurons[:, 1]]
    if neuron_set.calibrated is None:
        raise InterventionError(
            f"value={step.amount}: the neuron set holds no calibrated statistics; `lm-eval-steering calibrate` adds "
            "them"
        )
    return neuron_set.calibrated.lookup(neurons, language, step.site, step.amount).astype(np.float64)


def _refuse_reversed_sites(parts: Sequence[_Part]) -> None:
    """A forward pass reaches `activation` before `product`; the other order, on one neuron, cannot be what happens.

    Dimensions of hidden states are edited where the forward pass has them, after the units of their layer and before
    those of the next one, in whatever order the steps are written.
    """
    for number, part in enumerate(parts, start=1):
        for later in parts[number:]:
            reversed_ = (part.step.site, later.step.site) == ("product", "activation")
            if reversed_ and len(positions_of(part.neurons, later.neurons)):
                raise InterventionError(
                    f"step {number} at site=product comes before a step at site=activation on the same neurons, but "
                    "a forward pass reaches activation first; write that step first"
                )


def _edits(site: str, parts: Sequence[_Part], dimensions: int | None) -> list[Edit]:
    neurons = union_of([part.neurons for part in parts])
    maps = Maps(neurons)
    for part in parts:
        maps.add(part.number, part.step, part.neurons, part.values)
    composed = maps.finish()
    edits = []
    for layer in np.unique(neurons[:, 0]):
        rows = neurons[:, 0] == layer
        of_layer = tuple(each.cut(rows) for each in composed if each.touched[rows].any())
        edits.append(Edit(int(layer), site, neurons[rows, 1], of_layer, dimensions))
    return edits
