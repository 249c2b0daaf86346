"""The tensors of one MLP with a map folded in: computed in float64 and rounded once; the rest stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_steering.export.layer_maps import LayerMap
from lm_eval_steering.export.layouts import PULSE

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
