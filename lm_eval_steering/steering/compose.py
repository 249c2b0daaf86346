"""Steps folded into affine maps over the neurons of one site."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.errors import InterventionError
from lm_eval_steering.neurons.neuron_set import Neurons
from lm_eval_steering.steering.fields import NORMAL, is_live
from lm_eval_steering.steering.positions import ALL
from lm_eval_steering.steering.schema import Step


@dataclass(frozen=True)
class Source:
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
    """A source and what it is multiplied with, (unit,) float32; for `mad` (unit,) bool too, whose distances count."""

    source: Source
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
    terms: dict[Source, NDArray[np.float64]] = field(default_factory=dict)
    chosen: dict[Source, NDArray[np.bool_]] = field(default_factory=dict)
    gain: Source | None = None

    @classmethod
    def identity(cls, count: int, positions: str) -> _Open:
        no = np.zeros(count, dtype=bool)
        return cls(positions, no, np.ones(count), np.zeros(count), no.copy())

    def closed(self) -> Affine:
        terms = tuple(self._term(source, values) for source, values in self.terms.items())
        gain = self._term(self.gain, np.ones(len(self.scale))) if self.gain else None
        scale, shift = _float32(self.scale), _float32(self.shift)
        return Affine(self.positions, self.touched, scale, shift, self.written, terms, gain)

    def _term(self, source: Source, values: NDArray[np.float64]) -> Term:
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

    def _map_for(self, step: Step, source: Source | None) -> _Open:
        """The open map if the step can join it: a product with a live statistic stands for itself."""
        last = self._done[-1] if self._done else None
        multiplies = step.op == "scale" and source is not None
        if last is None or last.positions != step.positions or last.gain is not None or multiplies:
            self._done.append(_Open.identity(len(self._neurons), step.positions))
            self._done[-1].gain = source if multiplies else None
        return self._done[-1]


def source_of(step: Step, number: int = 0) -> Source | None:
    """The value of a step that only the forward pass knows; None where the value is known."""
    if step.value == NORMAL:
        return Source(NORMAL, step=number, seed=step.seed)
    if not is_live(step.value):
        return None
    name = str(step.value).removeprefix("live_")
    return Source(name, step.scope == "sequence", number if name == "mad" else -1)


def _float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # the check says it better
        found = values.astype(np.float32)
    if not np.isfinite(found).all():
        raise InterventionError("the intervention's factors and values overflow float32; use smaller ones")
    return found


def positions_of(within: Neurons, neurons: Neurons) -> NDArray[np.intp]:
    """Rows of `within` that are in `neurons`; both (neuron, 2) and sorted."""
    units = 1 + max([int(rows[:, 1].max()) for rows in (within, neurons) if len(rows)], default=0)
    keys = within[:, 0] * units + within[:, 1]
    return np.flatnonzero(np.isin(keys, neurons[:, 0] * units + neurons[:, 1]))
