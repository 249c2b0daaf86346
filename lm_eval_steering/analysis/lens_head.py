"""The end of a model, from hidden states to logits, computed by the model itself.

Final norm, head, and what a family does to its logits (Gemma's soft-cap, Cohere's and Granite's scales) are not written
again here. The model runs on rows of one token, and its last layer's output is replaced by the hidden states in
question; all of what follows a layer works on each position by itself. The cost is one token a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lm_eval_steering.architectures import ModelSites
from lm_eval_steering.errors import ArchitectureError


class ModelHead:
    """Reads the hidden state after each layer, and turns any hidden state into logits."""

    def __init__(self, model: Any, sites: ModelSites) -> None:
        """Find the layers.

        Args:
            model: a causal language model of transformers.
            sites: of it.

        Raises:
            ArchitectureError: if no list of modules holds the layers.
        """
        self._model = model
        self.layers = _layers_of(sites)

    @contextmanager
    def states(self) -> Iterator[list[torch.Tensor]]:
        """Outputs (row, position, hidden) of every layer in the forward pass that follows, in the order of layers."""
        seen: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(lambda _m, _i, output: seen.append(_hidden(output).detach()))
            for layer in self.layers
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(state, vocabulary) logits of hidden states (state, hidden), as the model would give them.

        Raises:
            ArchitectureError: if the last layer returns something else than one hidden state a token.
        """
        device = self._model.get_input_embeddings().weight.device
        # What the layers make of these tokens is thrown away.
        ids = torch.zeros(len(states), 1, dtype=torch.long, device=device)
        handle = self.layers[-1].register_forward_hook(_replaced_by(states[:, None]))
        try:
            return self._model(ids, use_cache=False).logits[:, -1]
        finally:
            handle.remove()


def _layers_of(sites: ModelSites) -> Sequence[nn.Module]:
    """The decoder's layers: the list whose members hold one activation module each."""
    for module in sites.decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(sites.layers):
            pairs = zip(module, sites.layers, strict=True)
            if all(any(part is site.activation for part in layer.modules()) for layer, site in pairs):
                return list(module)
    raise ArchitectureError("the decoder's list of layers is not found, so no hidden state can be read")


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _replaced_by(states: torch.Tensor) -> Callable[..., Any]:
    """A hook that puts hidden states (row, 1, hidden) in the place of a layer's output."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        before = _hidden(output)
        if before.shape != states.shape:
            raise ArchitectureError(
                f"the last layer returned {tuple(before.shape)}, expected hidden states of {tuple(states.shape)}"
            )
        new = states.to(before.device)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook
