"""How strongly chosen units are active in each language: the values that `add` and `set` interventions use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lm_eval_steering.architectures import ModelSites, sites_of
from lm_eval_steering.errors import CorpusError
from lm_eval_steering.neurons.corpus import Row
from lm_eval_steering.neurons.neuron_set import SITES, Neurons, Statistics
from lm_eval_steering.neurons.observe import Batches, observing

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
SENTENCES = 100  # a language, by default
SHORTEST = 5  # tokens; shorter sentences are left out


@torch.inference_mode()
def calibrate(
    model: Any,
    tokenizer: Any,
    rows: Mapping[str, Sequence[Row]],
    neurons: Neurons,
    batch_size: int = 16,
    progress: bool = True,
) -> Statistics:
    """Statistics of the given neurons at both sites, one row a sentence.

    `mean` is over all tokens (Gurgurov et al. 2025); `sentence_mean`, `median` (the lower of two middle values),
    `max` and `pNN` (linear interpolation) are over the sentences' token means (Rahmanisa et al. 2025).

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        rows: language -> one row of token ids a sentence.
        neurons: (neuron, 2) sorted rows (layer, unit).
        batch_size: rows a forward pass.
        progress: whether to show a bar.

    Raises:
        CorpusError: if a language has no sentence.
    """
    sites = sites_of(model)
    device = next(model.parameters()).device
    values: dict[str, dict[str, list[NDArray[np.float32]]]] = {site: {} for site in SITES}
    for language, own in tqdm(rows.items(), unit="language", disable=not progress, desc="calibrating"):
        if not own:
            raise CorpusError(f"{language}: no sentence of at least {SHORTEST} tokens to calibrate with")
        sums = _sentence_sums(sites, Batches(own, tokenizer, batch_size, device), neurons)
        lengths = np.array([len(row) for row in own], dtype=np.float64)
        for site in SITES:
            for name, column in _summaries(sums[site], lengths).items():
                values[site].setdefault(name, []).append(column.astype(np.float32))
    stacked = {
        site: {name: np.stack(columns, axis=1) for name, columns in table.items()} for site, table in values.items()
    }
    return Statistics(neurons, tuple(rows), stacked)


def _sentence_sums(sites: ModelSites, batches: Batches, neurons: Neurons) -> dict[str, NDArray[np.float64]]:
    """site -> (sentence, neuron) sums over the sentence's tokens, accumulated in float64."""
    wanted = {
        int(layer): torch.from_numpy(neurons[neurons[:, 0] == layer, 1]).to(batches.device)
        for layer in np.unique(neurons[:, 0])
    }
    pieces: dict[str, dict[int, torch.Tensor]] = {site: {} for site in SITES}

    def keep(site: str) -> Any:
        def observer(layer: int, units: torch.Tensor) -> None:
            if layer in wanted:
                # float64 on the CPU: not every accelerator has it.
                chosen = units.index_select(-1, wanted[layer].to(units.device)).cpu().double()
                chosen = chosen.reshape(*batches.counted.shape, -1)
                pieces[site][layer] = (chosen * batches.counted.unsqueeze(-1).cpu()).sum(1)

        return observer

    done: dict[str, list[NDArray[np.float64]]] = {site: [] for site in SITES}
    with observing(sites, at_activation=keep("activation"), at_product=keep("product")):
        for inputs in batches:
            sites.decoder(**inputs, use_cache=False)
            for site in SITES:
                parts = [pieces[site][layer].numpy() for layer in wanted]
                empty = np.zeros((len(inputs["input_ids"]), 0))
                done[site].append(np.concatenate([empty, *parts], axis=1))
    return {site: np.concatenate(parts) for site, parts in done.items()}


def _summaries(sums: NDArray[np.float64], lengths: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Statistic -> (neuron,), from (sentence, neuron) sums and (sentence,) token counts."""
    means = sums / lengths[:, None]
    ordered = np.sort(means, axis=0)
    return {
        "mean": sums.sum(axis=0) / lengths.sum(),
        "sentence_mean": means.mean(axis=0),
        "median": ordered[(len(ordered) - 1) // 2],
        "max": ordered[-1],
        **{f"p{p:02d}": np.percentile(means, p, axis=0) for p in PERCENTILES},
    }
