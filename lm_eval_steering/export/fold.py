"""The tensors of one MLP with a map folded in: computed in float64 and rounded once; the rest stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_steering.errors import InterventionError
from lm_eval_steering.export.layouts import PULSE
from lm_eval_steering.steering.compiled import Affine, CompiledIntervention
from lm_eval_steering.steering.intervention import NORMAL, Intervention, Step, is_live
from lm_eval_steering.steering.positions import ALL

# --- What a static intervention comes to at the last linear layer of each MLP: the algebra that an export rests on
#
# With the activation a, the up projection's output u (1 in a plain MLP) and the last linear layer's columns W[:, i], a
# plan makes of unit i, whose product is p = a * u,
#
#     p' = product * p + lift * u + constant
#
# since site `activation` gives (s1 * a + t1) * u and site `product` then s2 * (...) + t2: product = s1 * s2, lift = s2
# * t1, constant = t2. The first is a scaling of W[:, i], the last a bias; a lift needs a unit whose activation is
# constant. In a plain MLP u = 1, so that a lift is a constant too.

_WAY_OUT = "evaluate it with `--model steered-hf`"


@dataclass(frozen=True)
class LayerMap:
    """What is made of the edited units of one layer, p' = product * p + lift * u + constant.

    Attributes:
        layer: number of the decoder layer.
        units: (unit,) sorted indices.
        product: (unit,) float64.
        lift: (unit,) float64, all 0 in a plain MLP.
        constant: (unit,) float64, in units of p.
    """

    layer: int
    units: NDArray[np.int64]
    product: NDArray[np.float64]
    lift: NDArray[np.float64]
    constant: NDArray[np.float64]

    @property
    def scales_only(self) -> bool:
        """Whether nothing is added to any unit."""
        return not self.lift.any() and not self.constant.any()

    @property
    def silent(self) -> NDArray[np.bool_]:
        """(unit,) bool, where the unit's own activation counts for nothing."""
        return self.product == 0

    @property
    def appended(self) -> NDArray[np.int64]:
        """Units that are kept and lifted too, so that the lift needs a unit of its own beside them."""
        return self.units[(self.lift != 0) & ~self.silent]


def refuse_dynamic(intervention: Intervention) -> None:
    """Refuse what weights cannot say: they do the same to every token of every text.

    Raises:
        InterventionError: naming the step and what it depends on.
    """
    for number, step in enumerate(intervention.steps, start=1):
        if reason := _dynamic(step):
            raise InterventionError(f"step {number} cannot be written into weights: {reason}; {_WAY_OUT}")


def _dynamic(step: Step) -> str | None:
    if step.positions != ALL:
        return (
            f"positions={step.positions} acts on some tokens of a text, and weights treat every token alike "
            "(positions=all is static)"
        )
    if is_live(step.value):
        return (
            f"value={step.value} is a statistic of the activations in hand, known only while the model runs (the "
            "calibrated statistics are static)"
        )
    if step.value == NORMAL:
        return "value=normal is drawn anew for every token"
    return None


def layer_maps(plan: CompiledIntervention, gated: bool) -> dict[int, LayerMap]:
    """Layer -> what a plan makes of its units.

    Args:
        plan: compiled for the model.
        gated: whether the MLP multiplies the activation with an up projection.

    Raises:
        InterventionError: if the plan is not static.
    """
    refuse_dynamic(plan.intervention)
    layers = sorted({edit.layer for edit in plan.edits})
    return {layer: _layer_map(plan, layer, gated) for layer in layers}


def _layer_map(plan: CompiledIntervention, layer: int, gated: bool) -> LayerMap:
    here = [edit for edit in plan.edits if edit.layer == layer]
    units = np.unique(np.concatenate([edit.units for edit in here]))
    product, lift, constant = np.ones(len(units)), np.zeros(len(units)), np.zeros(len(units))
    for edit in here:  # `activation` before `product`, as a forward pass reaches them
        rows = np.searchsorted(units, edit.units)
        for each in edit.maps:
            scale, shift = _numbers(each)
            product[rows] *= scale
            lift[rows] *= scale
            constant[rows] *= scale
            (lift if edit.site == "activation" and gated else constant)[rows] += shift
    return LayerMap(layer, units, product, lift, constant)


def _numbers(each: Affine) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(unit,) scale and shift of one map, as the hooks read them: the float32 numbers."""
    scale = np.where(each.touched & each.written, 0.0, each.scale.astype(np.float64))
    return np.where(each.touched, scale, 1.0), np.where(each.touched, each.shift.astype(np.float64), 0.0)


def uniform_scale(maps: dict[int, LayerMap]) -> float | None:
    """The one number that every unit is multiplied with; None where they differ."""
    values = np.unique(np.concatenate([each.product for each in maps.values()]))
    return float(values[0]) if len(values) == 1 else None


Read = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Fold:
    """One layer's map with the places of its constant units.

    A lifted unit needs a gate that is constant: the unit itself where its own activation counts for nothing, else one
    that is appended. Its gate row is 0 and its gate bias PULSE; its up row is divided by what the activation makes of
    PULSE, so that the product is the up projection's output exactly.

    Attributes:
        map: of the layer.
        before: units of the model.
        width: units of the export.
        pulse: what the activation function makes of PULSE.
    """

    map: LayerMap
    before: int
    width: int
    pulse: float

    @property
    def _lifted(self) -> NDArray[np.bool_]:
        return self.map.lift != 0

    @property
    def _places(self) -> NDArray[np.int64]:
        """(lifted unit,) where each one's constant unit stands."""
        silent = self.map.silent[self._lifted]
        places = self.map.units[self._lifted].copy()
        places[~silent] = self.before + np.arange(int((~silent).sum()))
        return places

    def gate(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Weight of the layer before the activation in a gated MLP; units along `axis`."""
        grown = _grown(tensor, axis, self.width)
        return _written(grown, axis, [*self.map.units[self.map.silent], *self._places], 0.0)

    def gate_bias(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its bias, (unit,)."""
        return _written(self.gate(tensor, 0), 0, self._places, PULSE)

    def up(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Weight or bias of the up projection."""
        lifted = tensor.index_select(axis, _index(self.map.units[self._lifted])).double() / self.pulse
        grown = _written(_grown(tensor, axis, self.width), axis, self.map.units[self.map.silent], 0.0)
        return _written(grown, axis, self._places, lifted)

    def silenced(self, tensor: torch.Tensor, axis: int, copies: int = 1) -> torch.Tensor:
        """Weight or bias before the activation in a plain MLP, or of gate and up kept in one (`copies` 2).

        A unit that counts for nothing is not computed, so that it cannot be infinite either.
        """
        units = self.map.units[self.map.silent]
        return _written(tensor.clone(), axis, np.concatenate([units + self.before * k for k in range(copies)]), 0.0)

    def down(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Weight of the last linear layer; units along `axis`."""
        columns = tensor.index_select(axis, _index(self.map.units)).double()
        grown = _grown(tensor, axis, self.width)
        grown = _written(grown, axis, self.map.units, columns * _along(self.map.product, axis))
        lifted = columns.index_select(axis, _index(np.flatnonzero(self._lifted)))
        return _written(grown, axis, self._places, lifted * _along(self.map.lift[self._lifted], axis))

    def down_bias(self, tensor: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
        """Bias of the last linear layer, (hidden,), from the model's own weight."""
        columns = weight.index_select(axis, _index(self.map.units)).double()
        added = (columns * _along(self.map.constant, axis)).sum(axis)
        return (tensor.double() + added).to(tensor.dtype)


def _grown(tensor: torch.Tensor, axis: int, width: int) -> torch.Tensor:
    """A copy with zeros up to `width` along an axis."""
    shape = list(tensor.shape)
    have, shape[axis] = shape[axis], width
    grown = tensor.new_zeros(shape)
    grown.narrow(axis, 0, have).copy_(tensor)
    return grown


def _written(
    tensor: torch.Tensor, axis: int, units: NDArray[np.int64] | list[np.int64], values: torch.Tensor | float
) -> torch.Tensor:
    """The tensor, of ours, with the slices of some units replaced."""
    index = _index(np.asarray(units, dtype=np.int64))
    if isinstance(values, torch.Tensor):
        return tensor.index_copy_(axis, index, values.to(tensor.dtype))
    return tensor.index_fill_(axis, index, values)


def _index(units: NDArray[np.int64] | NDArray[np.intp]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(units, dtype=np.int64))


def _along(values: NDArray[np.float64], axis: int) -> torch.Tensor:
    """(unit,) numbers as a factor of a matrix with units along `axis`."""
    column = torch.from_numpy(np.ascontiguousarray(values))
    return column[:, None] if axis == 0 else column
