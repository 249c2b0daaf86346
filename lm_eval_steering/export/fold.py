"""The tensors of one MLP with a map folded in: computed in float64 and rounded once; other values are unchanged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_steering.export.layer_maps import LayerMap
from lm_eval_steering.export.layouts import GATE_BIAS


@dataclass(frozen=True)
class Fold:
    """One layer's map, and the constant units that its lift needs.

    Where `lift` is not 0, a constant unit emits the up projection's output: the unit itself where its `product` is 0,
    else a unit that is appended. The gate row of a constant unit is 0 and its gate bias is GATE_BIAS; its up row is
    divided by `gate_value`, so that its product is the up projection's output exactly.

    Attributes:
        map: of the layer.
        units: of the model.
        width: units of the export.
        gate_value: what the activation function makes of GATE_BIAS.
    """

    map: LayerMap
    units: int
    width: int
    gate_value: float

    @property
    def _lifted(self) -> NDArray[np.bool_]:
        return self.map.lift != 0

    @property
    def _constant_units(self) -> NDArray[np.int64]:
        """(lifted unit,) index of the constant unit of each."""
        silent = self.map.silent[self._lifted]
        indices = self.map.units[self._lifted].copy()
        indices[~silent] = self.units + np.arange(int((~silent).sum()))
        return indices

    def gate(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Weight of the layer before the activation in a gated MLP, a matrix of units (`axis`) and hidden features."""
        grown = _grown(tensor, axis, self.width)
        return _written(grown, axis, [*self.map.units[self.map.silent], *self._constant_units], 0.0)

    def gate_bias(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its bias, (unit,)."""
        return _written(self.gate(tensor, 0), 0, self._constant_units, GATE_BIAS)

    def up(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Weight of the up projection, units along `axis`, or its bias, (unit,) with `axis` 0."""
        lifted = tensor.index_select(axis, _index(self.map.units[self._lifted])).double() / self.gate_value
        grown = _written(_grown(tensor, axis, self.width), axis, self.map.units[self.map.silent], 0.0)
        return _written(grown, axis, self._constant_units, lifted)

    def silenced(self, tensor: torch.Tensor, axis: int, copies: int = 1) -> torch.Tensor:
        """Weight or bias before the activation in a plain MLP, or of gate and up in one layer (`copies` 2).

        Rows of units whose `product` is 0 become 0: an infinite activation times a column of zeros would be NaN.
        """
        units = self.map.units[self.map.silent]
        return _written(tensor.clone(), axis, np.concatenate([units + self.units * k for k in range(copies)]), 0.0)

    def down(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Weight of the last linear layer, a matrix of units (`axis`) and hidden features."""
        columns = tensor.index_select(axis, _index(self.map.units)).double()
        grown = _grown(tensor, axis, self.width)
        grown = _written(grown, axis, self.map.units, columns * _along(self.map.product, axis))
        lifted = columns.index_select(axis, _index(np.flatnonzero(self._lifted)))
        return _written(grown, axis, self._constant_units, lifted * _along(self.map.lift[self._lifted], axis))

    def down_bias(self, tensor: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
        """Bias of the last linear layer, (hidden,), from the model's own weight."""
        columns = weight.index_select(axis, _index(self.map.units)).double()
        added = (columns * _along(self.map.constant, axis)).sum(axis)
        return (tensor.double() + added).to(tensor.dtype)


def _grown(tensor: torch.Tensor, axis: int, width: int) -> torch.Tensor:
    """A copy with zeros up to `width` along an axis."""
    shape = list(tensor.shape)
    units, shape[axis] = shape[axis], width
    grown = tensor.new_zeros(shape)
    grown.narrow(axis, 0, units).copy_(tensor)
    return grown


def _written(
    tensor: torch.Tensor, axis: int, units: NDArray[np.int64] | list[np.int64], values: torch.Tensor | float
) -> torch.Tensor:
    """The tensor, changed in place, with the slices of some units replaced."""
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
