"""An edit at work: its tensors on the device of its layer, and the pure functions that compute the edited units."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lm_eval_steering.architectures import check_width
from lm_eval_steering.errors import InterventionError
from lm_eval_steering.neurons.neuron_set import SITES
from lm_eval_steering.steering.compose import Affine, Source, Term
from lm_eval_steering.steering.evidence import LargestChange
from lm_eval_steering.steering.fields import NORMAL
from lm_eval_steering.steering.live import normal, statistic
from lm_eval_steering.steering.plan import Edit
from lm_eval_steering.steering.rows import ForwardRows


def affine(
    units: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    written: torch.Tensor | None,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """gain * scale * a + shift, and shift alone where written; what is None is left out, so an identity is exact.

    Args:
        units: (..., unit) in the precision to compute in.
        scale: (unit,).
        shift: (unit,) or (..., unit).
        written: (unit,) bool; by selection, since 0 times an infinite activation is not 0.
        gain: (..., 1).
    """
    result = units if scale is None else units * scale
    result = result if gain is None else result * gain
    result = result if written is None else torch.where(written, 0, result)
    return result if shift is None else result + shift


@dataclass(frozen=True)
class _Tensors:
    """An affine map on one device; None where a part does nothing."""

    scale: torch.Tensor | None
    shift: torch.Tensor | None
    written: torch.Tensor | None
    untouched: torch.Tensor | None
    coefficients: tuple[torch.Tensor, ...]
    chosen: tuple[torch.Tensor | None, ...]  # of the terms, then of the gain: indices of units, for `mad`


class EditAtWork:
    """One edit of a plan, called with a layer's units in each forward pass; it keeps no activation."""

    def __init__(self, edit: Edit, width: int) -> None:
        """Prepare; tensors go to a device when a layer there runs for the first time."""
        self.edit = edit
        self.fired_in_forward = 0
        self.fired = 0
        self._width = width
        self._index: dict[torch.device, torch.Tensor] = {}
        self._tensors: dict[torch.device, tuple[_Tensors, ...]] = {}
        self._sourced = any(each.all_terms for each in edit.maps)

    def __call__(
        self, units: torch.Tensor, rows: ForwardRows | None, changes: LargestChange, in_place: bool = False
    ) -> torch.Tensor:
        """A tensor (..., unit) with the chosen units edited at the chosen positions, every other one bit-identical.

        Args:
            units: (row, position, unit), or (row * position, unit) where the family flattens them.
            rows: of the forward pass; None where a layer runs by itself.
            changes: counts the largest.
            in_place: write into `units`, which nobody else reads; a copy of them all costs more than the edit.
        """
        check_width(units, self._width, self.edit.layer)
        rows = ForwardRows.all_prompt(units) if rows is None else rows
        if units.shape[:-1].numel() != rows.shape[0] * rows.shape[1]:
            raise InterventionError(
                f"layer {self.edit.layer}: {tuple(units.shape)} units where the decoder was given {rows.shape[0]} rows "
                f"of {rows.shape[1]} positions"
            )
        maps = self._on(units.device)
        index = self._index[units.device]
        # One rounding, at the end: half precision is computed in float32, double precision in its own.
        wide = units.index_select(-1, index).to(torch.promote_types(units.dtype, torch.float32))
        sources = self._sources(units, wide.dtype, rows) if self._sourced else {}
        after = wide
        for each, tensors in zip(self.edit.maps, maps, strict=True):
            after = self._map(each, tensors, after, sources, rows)
        after = after.to(units.dtype)
        self.fired_in_forward += 1
        self.fired += 1
        changes.add(wide.detach(), after.detach())
        return units.index_copy_(-1, index, after) if in_place else units.index_copy(-1, index, after)

    def _map(
        self,
        each: Affine,
        tensors: _Tensors,
        units: torch.Tensor,
        sources: dict[Source, torch.Tensor],
        rows: ForwardRows,
    ) -> torch.Tensor:
        """One affine map on (..., unit), at its positions and on the units that it touches."""
        shift = tensors.shift
        for term, coefficients in zip(each.terms, tensors.coefficients, strict=True):
            part = sources[term.source] * coefficients
            shift = part if shift is None else shift + part
        gain = sources[each.gain.source] if each.gain else None
        result = affine(units, tensors.scale, shift, tensors.written, gain)
        if tensors.untouched is not None:
            result = torch.where(tensors.untouched, units, result)
        mask = rows.mask(each.positions, units.device)
        return result if mask is None else torch.where(mask.reshape(*units.shape[:-1], 1), result, units)

    def _sources(self, units: torch.Tensor, dtype: torch.dtype, rows: ForwardRows) -> dict[Source, torch.Tensor]:
        """Every value that only the forward pass knows, (..., 1) or (..., unit), from the units before any step."""
        found: dict[Source, torch.Tensor] = {}
        wide: torch.Tensor | None = None
        for each, tensors in zip(self.edit.maps, self._tensors[units.device], strict=True):
            for term, chosen in zip(each.all_terms, tensors.chosen, strict=True):
                if term.source in found:
                    continue
                if term.source.name == NORMAL:
                    value = self._normal(term.source, units.device, rows)
                else:
                    wide = units.detach().to(dtype).reshape(*rows.shape, -1) if wide is None else wide
                    real = rows.real if rows.real is None else rows.real.to(units.device)
                    value = statistic(term.source.name, wide, real, term.source.sequence, chosen)
                value = value.expand(*rows.shape, -1).reshape(*units.shape[:-1], -1)
                found[term.source] = value.to(dtype)
        return found

    def _normal(self, source: Source, device: torch.device, rows: ForwardRows) -> torch.Tensor:
        if rows.tokens is None or rows.index is None:
            raise InterventionError(
                "value=normal: the random numbers depend on token ids and their places, and the model was given "
                f"{'embeddings' if rows.tokens is None else 'no two-dimensional attention mask'}"
            )
        stream = (source.step, SITES.index(self.edit.site), self.edit.layer)
        return normal(source.seed, stream, self._index[device], rows.index.to(device), rows.tokens.to(device))

    def _on(self, device: torch.device) -> tuple[_Tensors, ...]:
        if device not in self._tensors:
            self._index[device] = torch.from_numpy(self.edit.units.copy()).to(device)
            self._tensors[device] = tuple(self._moved(each, device) for each in self.edit.maps)
        return self._tensors[device]

    def _moved(self, each: Affine, device: torch.device) -> _Tensors:
        def chosen(term: Term) -> torch.Tensor | None:
            return None if term.chosen is None else torch.from_numpy(self.edit.units[term.chosen]).to(device)

        def moved(part: object, needed: bool) -> torch.Tensor | None:
            return torch.tensor(part, device=device) if needed else None

        return _Tensors(
            moved(each.scale, bool((each.scale[~each.written] != 1).any())),
            moved(each.shift, bool((each.shift != 0).any())),
            moved(each.written, bool(each.written.any())),
            moved(~each.touched, not each.touched.all()),
            tuple(torch.tensor(term.coefficients, device=device) for term in each.terms),
            tuple(chosen(term) for term in each.all_terms),
        )
