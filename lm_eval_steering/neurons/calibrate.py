"""How strongly chosen units are active in each language, and where its hidden states are: values of interventions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lm_eval_steering.architectures import ModelSites
from lm_eval_steering.errors import CorpusError, DidNotHappenError, NeuronSetError
from lm_eval_steering.neurons.neuron_set import SITES, Neurons, NeuronSet, Statistics, union_of
from lm_eval_steering.neurons.rows import SHORTEST, TokenRows
from lm_eval_steering.neurons.running import Batches, ModelRunner, Observer, Ranks, in_order, observing

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


def calibrated(
    neuron_sets: Sequence[NeuronSet],
    runner: ModelRunner,
    sentences: Mapping[str, TokenRows],
    source: str,
    percentiles: Sequence[int] = PERCENTILES,
    residual: bool = False,
) -> list[NeuronSet]:
    """The same sets with statistics of their neurons; all of them in one pass over the sentences.

    Args:
        neuron_sets: of the runner's model.
        runner: the model and how it is run.
        sentences: language -> one row per sentence, at least for the languages of the sets.
        source: what to call the text in the provenance.
        percentiles: which `pNN` to keep.
        residual: whether the hidden states are measured too, in another pass; those of a set stay as they are
            otherwise.

    Raises:
        NeuronSetError: if a set is of another model; or is a random control whose hidden states are to be measured.
        CorpusError: if a language has no sentence.
    """
    model = runner.model
    for neuron_set in neuron_sets:
        if residual and neuron_set.provenance.selection.get("method") == "random":
            raise NeuronSetError(
                "--residual on a random control: its mean hidden states are random directions, and measuring would put "
                "the languages' own in their place; calibrate the set that it is drawn from, then draw it"
            )
        neuron_set.check_model(model.shape.layers, model.shape.units, model.architecture, widths=model.shape.widths)
    runner.load()
    for neuron_set in neuron_sets:
        neuron_set.check_weights(model.sketch, model.name)
    union = union_of([neuron_set.union() for neuron_set in neuron_sets])
    with runner.log.timed("calibrate", neurons=len(union)):
        statistics = calibrate(runner, sentences, union, percentiles)
    hidden: dict[str, dict[str, NDArray[np.float32]]] = {}
    if residual:
        with runner.log.timed("calibrate hidden states"):
            hidden = calibrate_hidden_states(runner, sentences)
    text: dict[str, Any] = {
        "source": source,
        "sentences": {code: len(rows) for code, rows in sentences.items()},
        "sha256": {code: rows.sha256() for code, rows in sentences.items()},
        "prefix": runner.prefix_texts,
    }
    measured = {"calibration": text} | ({"residual": text} if residual else {})
    return [
        replace(
            neuron_set,
            calibrated=statistics.restrict(neuron_set.union()),
            residual=_by_statistic(hidden, neuron_set.languages) if residual else neuron_set.residual,
            provenance=replace(
                neuron_set.provenance,
                weights=neuron_set.provenance.weights or model.sketch,
                corpus={**neuron_set.provenance.corpus, **measured},
            ),
        )
        for neuron_set in neuron_sets
    ]


@torch.inference_mode()
def calibrate(
    runner: ModelRunner, sentences: Mapping[str, TokenRows], neurons: Neurons, percentiles: Sequence[int] = PERCENTILES
) -> Statistics:
    """Statistics of the given neurons at both sites, one row per sentence.

    `mean` and `token_max` are over all tokens (Gurgurov et al. 2025; the M of SAE-LAPE, Andrylie et al. 2025);
    `sentence_mean`, `median` (the lower of two middle values), `max` and `pNN` (linear interpolation) are over the
    sentences' token means (Rahmanisa et al. 2025).

    Args:
        runner: the model and how it is run.
        sentences: language -> one row of token ids per sentence.
        neurons: (neuron, 2) sorted rows (layer, unit).
        percentiles: which `pNN` to keep.

    Raises:
        CorpusError: if a language has no sentence.
        DidNotHappenError: if activations are not finite.
    """
    values: dict[str, dict[str, list[NDArray[np.float32]]]] = {site: {} for site in SITES}
    with runner.log.bar("calibrating", len(sentences), "language") as bar:
        for language, rows in sentences.items():
            if not len(rows):
                raise CorpusError(f"{language}: no sentence of at least {SHORTEST} tokens to calibrate with")
            sums, highest = _observed(runner.model.sites, runner.batches(rows), neurons, runner.ranks)
            if not all(np.isfinite(table).all() for table in sums.values()):
                raise DidNotHappenError(f"{language}: activations hold infinities or NaN; load the model in bfloat16")
            for site in SITES:
                columns = {**_summaries(sums[site], rows.lengths, percentiles), "token_max": highest[site]}
                for name, column in columns.items():
                    values[site].setdefault(name, []).append(column.astype(np.float32))
            bar.update(1)
    stacked = {
        site: {name: np.stack(columns, axis=1) for name, columns in table.items()} for site, table in values.items()
    }
    return Statistics(neurons, tuple(sentences), stacked)


def _observed(
    sites: ModelSites, batches: Batches, neurons: Neurons, ranks: Ranks
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """What the counted tokens show of the neurons at each site.

    Returns:
        site -> (sentence, neuron) sums over the sentence's tokens, accumulated in float64.
        site -> (neuron,) maximum over the tokens of all sentences.
    """
    wanted = {
        int(layer): torch.from_numpy(neurons[neurons[:, 0] == layer, 1]).to(batches.device)
        for layer in np.unique(neurons[:, 0])
    }
    sums: dict[str, dict[int, torch.Tensor]] = {site: {} for site in SITES}
    maxima: dict[str, dict[int, torch.Tensor]] = {site: {} for site in SITES}
    counted = torch.zeros(0, 0, dtype=torch.bool)

    def keep(site: str) -> Observer:
        def observer(layer: int, units: torch.Tensor) -> None:
            if layer in wanted:
                # float64 on CPU: not every accelerator has it.
                chosen = units.index_select(-1, wanted[layer].to(units.device)).cpu().double()
                chosen, real = chosen.reshape(*counted.shape, -1), counted.unsqueeze(-1)
                sums[site][layer] = torch.where(real, chosen, 0).sum(1)
                maxima[site][layer] = torch.where(real, chosen, -torch.inf).amax((0, 1))

        return observer

    def joined(parts: dict[int, torch.Tensor], *rows: int) -> NDArray[np.float64]:
        return np.concatenate([np.zeros((*rows, 0)), *(parts[layer].numpy() for layer in wanted)], axis=-1)

    sums_by_row: dict[str, dict[int, NDArray[np.float64]]] = {site: {} for site in SITES}
    highest = {site: np.full(len(neurons), -np.inf) for site in SITES}
    with observing(sites, at_activation=keep("activation"), at_product=keep("product")) as run:
        for batch in batches:
            counted = batch.counted.cpu()
            run(batch)
            for site in SITES:
                of_rows = joined(sums[site], len(batch.rows))
                sums_by_row[site] |= dict(zip(batch.rows.tolist(), of_rows, strict=True))
                highest[site] = np.maximum(highest[site], joined(maxima[site]))
    return (
        {site: in_order(ranks.gather(sums_by_row[site])) for site in SITES},
        {site: np.max(ranks.gather(highest[site]), axis=0) for site in SITES},
    )


def _summaries(
    sums: NDArray[np.float64], lengths: NDArray[Any], percentiles: Sequence[int] = PERCENTILES
) -> dict[str, NDArray[np.float64]]:
    """Statistic -> (neuron,), from (sentence, neuron) sums and (sentence,) token counts."""
    means = sums / lengths[:, None]
    ordered = np.sort(means, axis=0)
    return {
        "mean": sums.sum(axis=0) / lengths.sum(),
        "sentence_mean": means.mean(axis=0),
        "median": ordered[(len(ordered) - 1) // 2],
        "max": ordered[-1],
        **{f"p{p:02d}": np.percentile(means, p, axis=0) for p in percentiles},
    }


# --- Hidden states, for site=residual


@torch.inference_mode()
def calibrate_hidden_states(
    runner: ModelRunner, sentences: Mapping[str, TokenRows]
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Mean and standard deviation (over n) of the hidden states that each decoder layer returns.

    Over all counted tokens, as in the residual means of CLaS-Bench (Gurgurov et al. 2026) and in those of
    language-specific dimensions (arXiv 2510.07213); accumulated in float64.

    Args:
        runner: the model and how it is run.
        sentences: language -> one row of token ids per sentence.

    Returns:
        language -> `mean` and `std` -> (layer, dimension) float32.

    Raises:
        CorpusError: if a language has no sentence.
        DidNotHappenError: if hidden states are not finite.
    """
    statistics: dict[str, dict[str, NDArray[np.float32]]] = {}
    with runner.log.bar("calibrating hidden states", len(sentences), "language") as bar:
        for language, rows in sentences.items():
            if not len(rows):
                raise CorpusError(f"{language}: no sentence of at least {SHORTEST} tokens to calibrate with")
            moments = _token_moments(runner.model.sites, runner.batches(rows), runner.ranks) / rows.tokens
            if not np.isfinite(moments).all():
                raise DidNotHappenError(f"{language}: hidden states hold infinities or NaN; load the model in bfloat16")
            mean, square = moments
            deviation = np.sqrt(np.maximum(square - mean**2, 0))
            statistics[language] = {"mean": mean.astype(np.float32), "std": deviation.astype(np.float32)}
            bar.update(1)
    return statistics


def _token_moments(sites: ModelSites, batches: Batches, ranks: Ranks) -> NDArray[np.float64]:
    """(2, layer, dimension) sums of the hidden states and of their squares over the counted tokens of all processes."""
    sums: dict[int, torch.Tensor] = {}
    counted = torch.zeros(0, dtype=torch.bool)

    def add(layer: int, hidden: torch.Tensor) -> None:
        # float64 on CPU: not every accelerator has it.
        wide = hidden[counted.to(hidden.device)].cpu().double()
        both = torch.stack([wide.sum(0), (wide * wide).sum(0)])
        sums[layer] = sums[layer] + both if layer in sums else both

    with observing(sites, at_residual=add) as run:
        for batch in batches:
            counted = batch.counted.reshape(-1)
            run(batch)
    of_process = torch.stack([sums[layer] for layer in sorted(sums)], 1).numpy() if sums else None
    parts = [part for part in ranks.gather(of_process) if part is not None]  # a process may have had no batch
    total: NDArray[np.float64] = np.sum(parts, axis=0)
    return total


def _by_statistic(
    hidden: Mapping[str, Mapping[str, NDArray[np.float32]]], languages: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """statistic -> (layer, dimension, language), as a neuron set keeps it."""
    return {name: np.stack([hidden[language][name] for language in languages], axis=-1) for name in ("mean", "std")}
