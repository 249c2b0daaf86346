"""The module that stands in the place of an MLP's activation: the same output, with the chosen units edited.

Its numbers stand in buffers at fixed addresses, so that compiled code and captured graphs read what was written last.
The layout of the buffers and the computation are one with what vLLM has compiled: whoever changes them raises `LAYOUT`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from lm_eval_steering.errors import ArchitectureError

# Part of the key of vLLM's compile cache.
LAYOUT = 1
SITES = ("activation", "product")
# What is done to a unit at a site. Identities are touched, but their output is the original module's own.
UNTOUCHED, IDENTITY, AFFINE, WRITTEN = range(4)


class SteeredActivation(nn.Module):
    """function(gate) * up of a gated MLP, or the activation function of a plain one, edited at two sites.

    Units that no step touches come from the original module's own output. scale * a + shift is computed in float32 and
    rounded once at each site.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    kind: torch.Tensor
    active: torch.Tensor
    tokens: torch.Tensor
    largest: torch.Tensor
    real: torch.Tensor

    def __init__(
        self,
        original: nn.Module,
        width: int,
        function: Callable[[torch.Tensor], torch.Tensor] | None,
        real: torch.Tensor,
    ) -> None:
        """Take the place of a module, on the device of `real`.

        Args:
            original: (..., 2 * unit) -> (..., unit) where the MLP is gated, else (..., unit) -> (..., unit).
            width: number of units that this worker holds.
            function: of a gated MLP, on the first half of the input; None where the MLP is plain.
            real: (1,) int64, number of tokens of the forward pass in progress that are no padding, 0 in warm-up; the
                worker writes it, all layers share it.
        """
        super().__init__()
        self.original, self.width, self.function = original, width, function
        sites, device = len(SITES), real.device

        def buffer(name: str, value: torch.Tensor) -> None:
            self.register_buffer(name, value, persistent=False)

        buffer("scale", torch.ones(sites, width, dtype=torch.float32, device=device))
        buffer("shift", torch.zeros(sites, width, dtype=torch.float32, device=device))
        buffer("kind", torch.zeros(sites, width, dtype=torch.uint8, device=device))
        buffer("active", torch.zeros(1, dtype=torch.int64, device=device))  # whether a unit is touched
        buffer("tokens", torch.zeros(1, dtype=torch.int64, device=device))  # counted while active
        buffer("largest", torch.zeros(1, dtype=torch.float32, device=device))  # |a' - a| since the last `write`
        buffer("real", real)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., token, unit), edited."""
        output = self.original(inputs)
        if not output.is_floating_point() or output.shape[-1] != self.width:
            raise ArchitectureError(
                f"{type(self.original).__name__} gave {tuple(output.shape)} {output.dtype}, expected {self.width} "
                "floating-point units: a fused quantised activation cannot be steered; use --model steered-hf"
            )
        if self.function is None:
            first, changed = self._edit(0, output)
            after = torch.where(self.kind[0] >= AFFINE, first, output)
        else:
            before = self.function(inputs[..., : self.width])
            first, changed = self._edit(0, before)
            after = torch.where(self.kind[0] >= AFFINE, first * inputs[..., self.width :], output)
        second, more = self._edit(1, after)
        after = torch.where(self.kind[1] >= AFFINE, second, after)
        self._count(torch.maximum(changed, more))
        return after

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

    def write(
        self, site: int, units: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, written: torch.Tensor
    ) -> None:
        """Put numbers for some of this worker's units into the buffers.

        Args:
            site: number in SITES.
            units: (unit,) int64, counted from this worker's first one.
            scale: (unit,) float32.
            shift: (unit,) float32.
            written: (unit,) bool, where the activation itself counts for nothing.
        """
        device = self.scale.device
        kind = torch.where(written, WRITTEN, torch.where((scale == 1) & (shift == 0), IDENTITY, AFFINE))
        where = units.to(device)
        self.scale[site, where] = scale.to(device)
        self.shift[site, where] = shift.to(device)
        self.kind[site, where] = kind.to(device=device, dtype=torch.uint8)
        self.active.fill_(int((self.kind != UNTOUCHED).any()))

    def clear(self) -> None:
        """No unit is edited; the count of tokens goes on, the largest change starts anew."""
        self.scale.fill_(1.0)
        self.shift.zero_()
        self.kind.zero_()
        self.active.zero_()
        self.largest.zero_()

    def touched(self) -> int:
        """Number of (site, unit) that are edited, identities included; reads the device."""
        return int((self.kind != UNTOUCHED).sum())
