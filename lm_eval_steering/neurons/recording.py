"""How often each unit is active in each language: the counts that LAPE is computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lm_eval_steering.architectures import sites_of
from lm_eval_steering.errors import CorpusError, DidNotHappenError
from lm_eval_steering.neurons.corpus import Row
from lm_eval_steering.neurons.observe import Batches, observing


@dataclass(frozen=True)
class Recording:
    """Counts of one model over a corpus.

    Attributes:
        languages: order of the last axis.
        counts: (layer, unit, language) int64, tokens with activation > 0.
        n_tokens: (language,) int64, tokens counted: no padding, no special tokens.
    """

    languages: tuple[str, ...]
    counts: NDArray[np.int64]
    n_tokens: NDArray[np.int64]


@torch.inference_mode()
def record(
    model: Any, tokenizer: Any, rows: Mapping[str, Sequence[Row]], batch_size: int = 16, progress: bool = True
) -> Recording:
    """Count, for each language, the tokens on which each unit's activation is above 0.

    The model runs without its language-model head and without a KV cache. Rows begin with BOS where the tokenizer
    adds one; the model sees it and it is not counted.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        rows: language -> rows of token ids without special tokens.
        batch_size: rows a forward pass.
        progress: whether to show a bar with tokens per second and the time left.

    Raises:
        CorpusError: if a language has no tokens.
        DidNotHappenError: if a layer was not seen exactly once a forward pass.
    """
    sites = sites_of(model)
    for language, own in rows.items():
        if not any(own):
            raise CorpusError(f"{language}: no tokens to record")
    device = next(model.parameters()).device
    total = sum(len(row) for own in rows.values() for row in own)
    counts = np.zeros((sites.shape.layers, sites.shape.units, len(rows)), dtype=np.int64)
    with tqdm(total=total, unit="tok", unit_scale=True, disable=not progress, desc="recording") as bar:
        for k, (language, own) in enumerate(rows.items()):
            bar.set_postfix_str(language)
            counts[:, :, k] = _count(sites, Batches(own, tokenizer, batch_size, device), bar)
    n_tokens = np.array([sum(len(row) for row in own) for own in rows.values()], dtype=np.int64)
    return Recording(tuple(rows), counts, n_tokens)


def _count(sites: Any, batches: Batches, bar: tqdm) -> NDArray[np.int64]:
    """(layer, unit) counts of one language."""
    totals: list[torch.Tensor | None] = [None] * sites.shape.layers
    calls = [0] * sites.shape.layers

    def add(layer: int, units: torch.Tensor) -> None:
        # (row, position, unit) or already flattened to (row * position, unit): one flat view serves both.
        active = (units.reshape(-1, units.shape[-1]) > 0) & batches.counted.reshape(-1, 1).to(units.device)
        count = active.sum(0, dtype=torch.int64)
        previous = totals[layer]
        totals[layer] = count if previous is None else previous.add_(count)
        calls[layer] += 1

    forwards = 0
    with observing(sites, at_activation=add):
        for inputs in batches:
            sites.decoder(**inputs, use_cache=False)
            forwards += 1
            bar.update(batches.tokens)
    silent = [layer for layer, seen in enumerate(calls) if seen != forwards]
    if silent:
        raise DidNotHappenError(f"layers {silent}: activations seen {calls[silent[0]]} times in {forwards} forwards")
    return np.stack([total.cpu().numpy() for total in totals if total is not None])
