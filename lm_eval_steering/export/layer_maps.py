"""A static intervention as a map of the inputs of each MLP's last linear layer: the algebra of the export.

With the activation a, the up projection's output u (1 in a plain MLP), their product p = a * u and the last linear
layer's columns W[:, i], an intervention makes of unit i

    p' = product * p + lift * u + constant

since site `activation` gives (s1 * a + t1) * u and site `product` then s2 * (...) + t2: product = s1 * s2,
lift = s2 * t1, constant = t2. `product` scales W[:, i], `constant` is a bias; `lift` needs a unit whose activation is
constant. In a plain MLP u = 1, so that the lift is part of the constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.errors import InterventionError
from lm_eval_steering.steering.compiled import Affine, CompiledIntervention
from lm_eval_steering.steering.intervention import NORMAL, RESIDUAL, Intervention, Step, is_live
from lm_eval_steering.steering.positions import ALL

_WAY_OUT = "evaluate it with `--model steered-hf`"


@dataclass(frozen=True)
class LayerMap:
    """The map of the edited units of one layer, p' = product * p + lift * u + constant.

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
        """(unit,) bool, where the activation has no influence on p'."""
        return self.product == 0

    @property
    def appended(self) -> NDArray[np.int64]:
        """Units whose activation and lift both count, so that the lift needs an appended unit."""
        return self.units[(self.lift != 0) & ~self.silent]


def refuse_dynamic(intervention: Intervention) -> None:
    """Refuse what cannot be written into weights, which treat every token of every text alike.

    Raises:
        InterventionError: naming the step and the reason.
    """
    for number, step in enumerate(intervention.steps, start=1):
        if reason := _dynamic(step):
            raise InterventionError(f"step {number} cannot be written into weights: {reason}; {_WAY_OUT}")


def _dynamic(step: Step) -> str | None:
    if step.site == RESIDUAL:
        return (
            "site=residual edits the hidden states between decoder layers, where a checkpoint has neither weights nor "
            "a bias"
        )
    if step.positions != ALL:
        return (
            f"positions={step.positions} acts on some tokens of a text, and weights treat every token alike "
            "(positions=all is static)"
        )
    if is_live(step.value):
        return (
            f"value={step.value} is a statistic of the current activations, known only while the model runs (the "
            "calibrated statistics are static)"
        )
    if step.value == NORMAL:
        return "value=normal is drawn anew for every token"
    return None


def layer_maps(plan: CompiledIntervention, gated: bool) -> dict[int, LayerMap]:
    """Layer -> the map of its units.

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
    edits = [edit for edit in plan.edits if edit.layer == layer]
    units = np.unique(np.concatenate([edit.units for edit in edits]))
    product, lift, constant = np.ones(len(units)), np.zeros(len(units)), np.zeros(len(units))
    for edit in edits:  # site `activation` before `product`, the order of a forward pass
        rows = np.searchsorted(units, edit.units)
        for each in edit.maps:
            scale, shift = _numbers(each)
            product[rows] *= scale
            lift[rows] *= scale
            constant[rows] *= scale
            (lift if edit.site == "activation" and gated else constant)[rows] += shift
    return LayerMap(layer, units, product, lift, constant)


def _numbers(each: Affine) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(unit,) scale and shift of one map: the float32 numbers that the hooks use."""
    scale = np.where(each.touched & each.written, 0.0, each.scale.astype(np.float64))
    return np.where(each.touched, scale, 1.0), np.where(each.touched, each.shift.astype(np.float64), 0.0)


def uniform_scale(maps: dict[int, LayerMap]) -> float | None:
    """The factor of every unit; None where factors differ."""
    values = np.unique(np.concatenate([each.product for each in maps.values()]))
    return float(values[0]) if len(values) == 1 else None
