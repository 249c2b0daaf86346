"""The module that stands in the place of an MLP's activation: the same output, with the chosen units edited.

Its numbers stand in buffers at fixed addresses, so that compiled code and captured graphs read what was written last.
The layout of the buffers and the computation are one with what vLLM has compiled: whoever changes them raises `LAYOUT`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lm_eval_steering.errors import ArchitectureError, InterventionError

# Part of the key of vLLM's compile cache, as is the capacity.
LAYOUT = 3
SITES = ("activation", "product")  # of an MLP
# What is done to a unit at a site. Identities are touched, but their output is the original module's own.
UNTOUCHED, IDENTITY, AFFINE, WRITTEN = range(4)


@dataclass(frozen=True)
class SiteEdit:
    """Numbers for some units at one site of a module.

    Attributes:
        site: index in SITES of a `SteeredActivation`; 0 of a `SteeredHiddenStates`, whose units are dimensions.
        units: (unit,) int64, counted from the worker's first one.
        scale: (unit,) float32.
        shift: (unit,) float32.
        written: (unit,) bool, where the activation itself counts for nothing.
    """

    site: int
    units: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    written: torch.Tensor


class SteeredModule(nn.Module):
    """Numbers in buffers, the edit that they define at each site, and counters on the device.

    scale * a + shift is computed in float32 and rounded once at each site.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    kind: torch.Tensor
    active: torch.Tensor
    tokens: torch.Tensor
    largest: torch.Tensor
    real: torch.Tensor

    def __init__(self, sites: int, slots: int, real: torch.Tensor) -> None:
        """Begin with no edit, on the device of `real`.

        Args:
            sites: number of sites.
            slots: number of units that can be edited at a time, at each site.
            real: (1,) int64, number of tokens of the forward pass in progress that are no padding, 0 in warm-up; the
                worker writes it, all layers share it.
        """
        super().__init__()
        device = real.device
        self._buffer("scale", torch.ones(sites, slots, dtype=torch.float32, device=device))
        self._buffer("shift", torch.zeros(sites, slots, dtype=torch.float32, device=device))
        self._buffer("kind", torch.zeros(sites, slots, dtype=torch.uint8, device=device))
        self._buffer("active", torch.zeros(1, dtype=torch.int64, device=device))  # whether a unit is touched
        self._buffer("tokens", torch.zeros(1, dtype=torch.int64, device=device))  # counted while active
        self._buffer("largest", torch.zeros(1, dtype=torch.float32, device=device))  # |a' - a| since the last `write`
        self._buffer("real", real)

    def _buffer(self, name: str, value: torch.Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def _edit(self, site: int, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., unit) every unit as if it were edited at a site, and (..., unit) float32 |a' - a| of those that are."""
        wide = units.to(torch.float32)
        # By selection, since 0 times an infinite activation is not 0.
        kept = torch.where(self.kind[site] == WRITTEN, 0.0, wide * self.scale[site])
        edited = (kept + self.shift[site]).to(units.dtype)
        # What was infinite before is no change of ours: there wide - wide is not a number, which counts as 0.
        change = (edited.to(torch.float32) - wide + (wide - wide)).abs().nan_to_num(0.0, math.inf)
        return edited, torch.where(self.kind[site] >= AFFINE, change, 0.0)

    def _count(self, change: torch.Tensor) -> None:
        """Count the tokens of this forward pass and the largest change in them; padding is left out."""
        number = change.shape[-2]
        real = torch.arange(number, device=change.device).unsqueeze(-1) < self.real
        self.largest.copy_(torch.maximum(self.largest, torch.where(real, change, 0.0).amax()))
        self.tokens.add_(self.active * self.real.clamp(max=number))

    def _put(self, edits: Sequence[SiteEdit], slots: Sequence[torch.Tensor]) -> None:
        """Replace the numbers by those of some edits, of which each has its slots; the largest change starts anew."""
        scale, shift = torch.ones(self.scale.shape), torch.zeros(self.shift.shape)
        kind = torch.full(self.kind.shape, UNTOUCHED, dtype=torch.uint8)
        for edit, of_edit in zip(edits, slots, strict=True):
            unchanged = (edit.scale == 1) & (edit.shift == 0)
            scale[edit.site, of_edit], shift[edit.site, of_edit] = edit.scale, edit.shift
            kind[edit.site, of_edit] = torch.where(edit.written, WRITTEN, torch.where(unchanged, IDENTITY, AFFINE)).to(
                torch.uint8
            )
        self.scale.copy_(scale)
        self.shift.copy_(shift)
        self.kind.copy_(kind)
        self.active.fill_(int(bool(edits)))
        self.largest.zero_()

    def write(self, edits: Sequence[SiteEdit]) -> None:
        """Replace the numbers; the count of tokens goes on, the largest change starts anew.

        Raises:
            InterventionError: if there is no room for the edits; nothing was written.
        """
        raise NotImplementedError

    def touched(self) -> int:
        """Number of (site, unit) that are edited, identities included; reads the device."""
        return int((self.kind != UNTOUCHED).sum())


class SteeredActivation(SteeredModule):
    """function(gate) * up of a gated MLP, or the activation function of a plain one, edited at two sites.

    The units that an intervention touches are gathered, edited and put back into the original module's own output.
    """

    units: torch.Tensor

    def __init__(
        self,
        original: nn.Module,
        width: int,
        capacity: int,
        function: Callable[[torch.Tensor], torch.Tensor] | None,
        real: torch.Tensor,
    ) -> None:
        """Take the place of a module.

        Args:
            original: (..., 2 * unit) -> (..., unit) where the MLP is gated, else (..., unit) -> (..., unit).
            width: number of units that this worker holds.
            capacity: number of units that can be edited at a time; at most the width.
            function: of a gated MLP, on the first half of the input; None where the MLP is plain.
            real: see `SteeredModule`.
        """
        super().__init__(len(SITES), min(capacity, width), real)
        self.capacity = min(capacity, width)
        self.original, self.width, self.function = original, width, function
        self._buffer("units", torch.zeros(self.capacity, dtype=torch.int64, device=real.device))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., token, unit), edited."""
        output = self.original(inputs)
        if not output.is_floating_point() or output.shape[-1] != self.width:
            raise ArchitectureError(
                f"{type(self.original).__name__} gave {tuple(output.shape)} {output.dtype}, expected {self.width} "
                "floating-point units: a fused quantised activation cannot be steered; use --model steered-hf"
            )
        unedited = output.index_select(-1, self.units)
        if self.function is None:
            edited, change = self._edit(0, unedited)
        else:
            gate = inputs[..., : self.width].index_select(-1, self.units)
            up = inputs[..., self.width :].index_select(-1, self.units)
            edited, change = self._edit(0, self.function(gate))
            edited = edited * up
        after = torch.where(self.kind[0] >= AFFINE, edited, unedited)
        edited, more = self._edit(1, after)
        after = torch.where(self.kind[1] >= AFFINE, edited, after)
        self._count(torch.maximum(change, more))
        return output.index_copy(-1, self.units, after)

    def write(self, edits: Sequence[SiteEdit]) -> None:
        """Replace the numbers; the count of tokens goes on, the largest change starts anew.

        Raises:
            InterventionError: if the edits touch more units than there is room for; nothing was written.
        """
        chosen = torch.unique(torch.cat([torch.empty(0, dtype=torch.int64), *(edit.units for edit in edits)]))
        if len(chosen) > self.capacity:
            raise InterventionError(f"{len(chosen)} units are to be edited, there is room for {self.capacity}")
        # Slots that are left write a unit's own value: of one that is not chosen, or it would undo its edit.
        free = torch.ones(self.width, dtype=torch.bool)
        free[chosen] = False
        spare = free.nonzero()[:1, 0].expand(self.capacity - len(chosen))
        self.units.copy_(torch.cat([chosen, spare]))
        self._put(edits, [torch.searchsorted(chosen, edit.units) for edit in edits])
