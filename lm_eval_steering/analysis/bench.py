"""A loaded model on the bench: token rows, forward passes in every layout, and what hooks see while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import nn

from lm_eval_steering.architectures import ModelSites, Shape, text_config_of
from lm_eval_steering.errors import NeuronSetError
from lm_eval_steering.neurons.neuron_set import NeuronSet, Provenance
from lm_eval_steering.steering.attach import Steering, steer

ROW_LENGTHS = (12, 9, 7, 12)  # tokens; two rows of one length, so that a batch without padding can be made
_SHARE = 0.01  # of each layer's units that a random set takes, as LAPE's default rate


@dataclass
class Bench:
    """A model, a neuron set that fits it, and where its units are.

    Attributes:
        model: a causal language model of transformers in evaluation mode.
        neurons: at least one language of it has neurons.
        sites: of the model.
        override: where the units are, as the user said it.
        seed: of the token rows.
    """

    model: Any
    neurons: NeuronSet
    sites: ModelSites
    override: str | None = None
    seed: int = 0

    @cached_property
    def languages(self) -> tuple[str, str]:
        """The two languages with most neurons; the same one twice where only one has any.

        Raises:
            NeuronSetError: if none has.
        """
        sizes = {code: len(self.neurons.neurons(code)) for code in self.neurons.languages}
        ordered = [code for code in sorted(sizes, key=lambda code: (-sizes[code], code)) if sizes[code]]
        if not ordered:
            raise NeuronSetError("no language of the neuron set has neurons, so there is nothing to try out")
        return ordered[0], ordered[min(1, len(ordered) - 1)]

    def steer(self, language: str | None = None, **arguments: Any) -> Steering:
        """The public `steer`, for the first language by default; that the set fits was checked already."""
        return steer(
            self.model, self.neurons, language or self.languages[0], force=True, sites=self.override, **arguments
        )

    @cached_property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def rows(self) -> tuple[torch.Tensor, ...]:
        """Seeded rows (token,) of ordinary tokens, ROW_LENGTHS long."""
        text = text_config_of(self.model.config)
        special = {
            number
            for config in (self.model.config, text)
            for name, number in vars(config).items()
            if name.endswith("_token_id") and isinstance(number, int)
        }
        size = min(int(text.vocab_size), len(self.model.get_input_embeddings().weight))
        usual = np.array([number for number in range(size) if number not in special])
        generator = np.random.default_rng(self.seed)
        return tuple(
            torch.from_numpy(generator.choice(usual, length)).to(self.device) for length in ROW_LENGTHS
        )  # fmt: skip

    @property
    def row(self) -> torch.Tensor:
        """The first row as a batch (1, token)."""
        return self.rows[0][None]

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **inputs: Any) -> Any:
        """The model's output; with a mask (row, position) the places of the tokens are given too.

        Args:
            ids: (row, token).
            mask: 1 for real tokens, over the cached ones as well.
            inputs: what else the model takes.
        """
        if mask is not None:
            inputs["attention_mask"] = mask
            # BLOOM and MPT place tokens by distance and take no positions.
            if "position_ids" in self._parameters:
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(ids, **inputs)

    def logits(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
        """(row, position, vocabulary)."""
        return self.forward(ids, mask, **inputs).logits

    def padded(self, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows as one batch, (ids, mask) of shape (row, position), padded on this side."""
        longest = max(ROW_LENGTHS) + 3  # the first row is padded too
        ids = self.rows[0].new_full((len(self.rows), longest), int(self.rows[0][0]))
        mask = torch.zeros_like(ids)
        for number, row in enumerate(self.rows):
            place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
            ids[number, place], mask[number, place] = row, 1
        return ids, mask

    def prefill_and_decode(self, ids: torch.Tensor, mask: torch.Tensor, decoded: int) -> torch.Tensor:
        """Logits (row, position, vocabulary) of a prompt at once, and of its last tokens one at a time."""
        start = ids.shape[1] - decoded
        output = self.forward(ids[:, :start], mask[:, :start], use_cache=True)
        parts = [output.logits]
        for place in range(start, ids.shape[1]):
            output = self.forward(
                ids[:, place : place + 1], mask[:, : place + 1],
                past_key_values=output.past_key_values, use_cache=True,
            )  # fmt: skip
            parts.append(output.logits)
        return torch.cat(parts, 1)

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(signature(self.model.forward).parameters)

    # --- what hooks see -----------------------------------------------------------------------------------------

    def path(self, module: nn.Module) -> str:
        """Name of a module, as `model.named_modules()` has it."""
        return next((path for path, found in self.model.named_modules() if found is module), type(module).__name__)

    @contextmanager
    def watching(self, site: str) -> Iterator[list[torch.Tensor]]:
        """The units of every layer at this site as they are when these hooks' turn comes: [(..., unit)] by layer."""
        seen: list[torch.Tensor] = []
        handles = []
        for layer in self.sites.layers:
            if site == "activation":
                handles.append(layer.activation.register_forward_hook(lambda _m, _i, out: seen.append(out.clone())))
            else:
                handles.append(layer.down.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].clone())))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def hooks(self) -> int:
        """Number of hooks on all modules."""
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in self.model.modules())


def random_neurons(shape: Shape, architecture: str, seed: int) -> NeuronSet:
    """A seeded set of two made-up languages: 1 % of the units, one in every layer, one in every other layer.

    Args:
        shape: of the model.
        architecture: its `model_type`.
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)
    count = max(1, round(_SHARE * shape.units))
    every = {"eng_Latn": range(shape.layers), "fra_Latn": range(0, shape.layers, 2)}
    assignments = {
        code: np.array(
            [(layer, unit) for layer in layers for unit in sorted(generator.choice(shape.units, count, replace=False))],
            dtype=np.int64,
        )
        for code, layers in every.items()
    }
    provenance = Provenance(
        "random", "", architecture, shape.layers, shape.units, selection={"method": "random", "seed": seed}
    )
    return NeuronSet(tuple(assignments), assignments, provenance)
