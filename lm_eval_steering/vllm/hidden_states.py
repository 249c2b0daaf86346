"""The module that edits what a decoder layer returns: `site=residual` inside vLLM.

All dimensions can be edited at a time; with tensor parallelism each worker holds them all and edits them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch

from lm_eval_steering.errors import ArchitectureError
from lm_eval_steering.vllm.activation import AFFINE, SiteEdit, SteeredModule


class Returns(Enum):
    """What a layer of vLLM returns: (token, dimension) tensors, with one row before them where transformers runs it."""

    HIDDEN_STATES = "hidden states"
    PARTS = "a tuple of two parts of the hidden states, which the next layer adds"
    HIDDEN_STATES_AND_INPUT = "a tuple of the hidden states and its own input, which nothing reads"


class SteeredHiddenStates(SteeredModule):
    """(what a layer returns) -> the same, with the chosen dimensions of the hidden states edited.

    Where the hidden states come in two parts, the second is set to the edited sum in these dimensions and the first to
    0, so that the next layer's sum is exactly the edited one; where their types differ, the second's is the wider. All
    other dimensions, and those of an identity, stay bit-identical.
    """

    def __init__(self, returns: Returns, width: int, real: torch.Tensor) -> None:
        """Prepare; a hook on the layer calls it.

        Args:
            returns: what the layer returns.
            width: number of dimensions of the hidden states.
            real: see `SteeredModule`.
        """
        super().__init__(1, width, real)
        self.returns, self.width = returns, width

    def forward(self, output: Any) -> Any:
        """What the layer returned, edited."""
        self._check(output)
        chosen = self.kind[0] >= AFFINE
        edited, change = self._edit(0, self.hidden_states(output))
        self._count(change)
        if self.returns is Returns.HIDDEN_STATES:
            return torch.where(chosen, edited, output)
        first, second = output
        if self.returns is Returns.HIDDEN_STATES_AND_INPUT:
            return torch.where(chosen, edited, first), second
        return torch.where(chosen, 0.0, first), torch.where(chosen, edited, second)

    def hidden_states(self, output: Any) -> torch.Tensor:
        """(..., token, dimension) of what the layer returned."""
        if self.returns is Returns.HIDDEN_STATES:
            whole: torch.Tensor = output
        else:
            whole = output[0] + output[1] if self.returns is Returns.PARTS else output[0]
        return whole

    def _check(self, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        number = 1 if self.returns is Returns.HIDDEN_STATES else 2
        fits = isinstance(output, tuple) == (number == 2) and len(parts) == number
        if not fits or not all(isinstance(part, torch.Tensor) and part.shape[-1] == self.width for part in parts):
            seen = [tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__ for part in parts]
            raise ArchitectureError(
                f"site=residual: a decoder layer returned {seen}, expected {self.returns.value}, of {self.width} "
                "dimensions; start the engine with steered_residual=False, or use --model steered-hf"
            )

    def write(self, edits: Sequence[SiteEdit]) -> None:
        """Replace the numbers; the count of tokens goes on, the largest change starts anew."""
        self._put(edits, [edit.units for edit in edits])
