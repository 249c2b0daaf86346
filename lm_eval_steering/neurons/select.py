"""Which neurons belong to which language: by activation probability entropy (LAPE), or because they are active."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.neurons.neuron_set import Neurons, union_of

HISTOGRAM_BINS = 64
_BLOCK = 4_000_000  # values worked on in float64 at a time: what keeps 48 million probabilities under 2 GB


@dataclass(frozen=True)
class Selection:
    """What a method chose.

    Attributes:
        neurons: for each language, in the order given, its (neuron, 2) sorted rows (layer, unit); empty ones included.
        numbers: plain JSON values for `Provenance.selection`: the method, its arguments, and what came of them.
    """

    neurons: list[Neurons]
    numbers: dict[str, Any]


def activation_probability(counts: NDArray[np.int64], n_tokens: ArrayLike) -> NDArray[np.float32]:
    """P[l, j, k] = share of language k's tokens with a positive activation, in float32 as published.

    Args:
        counts: (layer, unit, language) number of tokens with activation > 0.
        n_tokens: (language,) number of tokens that were counted.

    Raises:
        SteeringError: if a language has no tokens or fewer than it has positive ones.
    """
    tokens = np.asarray(n_tokens, dtype=np.int64)
    if counts.ndim != 3 or counts.shape[-1:] != tokens.shape:
        raise SteeringError(f"counts of shape {counts.shape} and {tokens.shape} token counts: the languages must match")
    if (tokens <= 0).any():
        raise SteeringError(f"language number {int(np.argmin(tokens))} has no tokens")
    if (counts > tokens).any() or (counts < 0).any():
        raise SteeringError("a neuron is active on more tokens than were counted")
    return np.divide(counts.astype(np.float32), tokens.astype(np.float32), dtype=np.float32)


def entropy(probability: NDArray[np.float32]) -> NDArray[np.float64]:
    """H[l, j] in nats of the distribution over languages; 0 where a neuron is never active.

    Source: Tang et al. 2024 (LAPE), section 2.2. Computed in float64.
    """
    share = probability.astype(np.float64)
    total = share.sum(axis=-1, keepdims=True)
    share = np.divide(share, total, out=np.zeros_like(share), where=total > 0)
    logarithm = np.log(share, out=np.zeros_like(share), where=share > 0)
    total_entropy: NDArray[np.float64] = -(share * logarithm).sum(axis=-1)
    return total_entropy


def kth_smallest(probability: NDArray[np.float32], rate: float) -> np.float32:
    """The round(rate * size)-th smallest value, 1-based, half to even, without interpolation."""
    k = min(max(round(probability.size * rate), 1), probability.size)
    return np.float32(np.partition(probability, k - 1, axis=None)[k - 1])


def lape(
    counts: NDArray[np.int64],
    n_tokens: ArrayLike,
    rate: float = 0.01,
    filter_rate: float = 0.95,
    bar_rate: float = 0.95,
) -> list[Neurons]:
    """Language-specific neurons by language activation probability entropy (Tang et al. 2024, section 2.2).

    Neurons without any probability above the `filter_rate` value are out; of the rest the round(rate * layers *
    units) of lowest entropy are taken, ties broken by (entropy, layer, unit); each belongs to every language whose
    probability is above the `bar_rate` value (both strict).

    Args:
        counts: (layer, unit, language) int64, tokens with activation > 0.
        n_tokens: (language,) tokens counted.
        rate: share of all neurons to select, in (0, 1].
        filter_rate: which smallest probability is the threshold of eligibility, in (0, 1].
        bar_rate: the same for membership.

    Returns:
        For each language, in the order given, its (neuron, 2) sorted rows (layer, unit); empty ones included.

    Raises:
        SteeringError: if a rate is outside (0, 1] or the counts are impossible.
    """
    return lape_rates(counts, n_tokens, [rate], filter_rate, bar_rate)[0].neurons


def lape_rates(
    counts: NDArray[np.int64],
    n_tokens: ArrayLike,
    rates: Sequence[float],
    filter_rate: float = 0.95,
    bar_rate: float = 0.95,
) -> list[Selection]:
    """`lape` at several rates for the work of one: a larger rate's neurons contain a smaller one's.

    The numbers of each selection: `probability_threshold` and `bar` (the two probabilities), `eligible` and
    `selected` (neurons; where bar_rate > filter_rate some of the selected may belong to no language),
    `entropy_threshold` (nats, the largest that was selected, None where nothing was), `entropy_histogram` of the
    eligible neurons (`edges` from 0 to ln K, `counts`), `languages_without_neurons` (places in the order given).

    Raises:
        SteeringError: if a rate is outside (0, 1] or the counts are impossible.
    """
    for name, value in (*(("rate", rate) for rate in rates), ("filter_rate", filter_rate), ("bar_rate", bar_rate)):
        check_rate(name, value)
    # One layout, so that entropies are summed in one order however the counts lie in memory.
    probability = np.ascontiguousarray(activation_probability(counts, n_tokens))
    threshold = kth_smallest(probability, filter_rate)
    bar = threshold if bar_rate == filter_rate else kth_smallest(probability, bar_rate)
    eligible, entropies = _eligible(probability, threshold)
    order = np.argsort(entropies, kind="stable")
    common = {
        "filter_rate": float(filter_rate),
        "bar_rate": float(bar_rate),
        "probability_threshold": float(threshold),
        "bar": float(bar),
        "eligible": len(eligible),
        "entropy_histogram": _histogram(entropies, probability.shape[-1]),
    }
    neurons = probability.shape[0] * probability.shape[1]
    selections = []
    for rate in rates:
        first = order[: round(rate * neurons)]
        lists = _members(probability, eligible[first], bar)
        numbers = {
            "method": "lape",
            "rate": float(rate),
            **common,
            "selected": len(first),
            "entropy_threshold": float(entropies[first[-1]]) if len(first) else None,
            "languages_without_neurons": without_neurons(lists),
        }
        selections.append(Selection(lists, numbers))
    return selections


def activated(sentence_means: Sequence[NDArray[Any]], top_k: int | None = None) -> Selection:
    """Language-activated neurons: those whose mean activation is above 0 in every calibration sentence.

    Source: the baseline of Rahmanisa et al. 2025 (`raw_act_neurons.py`, methods `default` and `topk`). Sets overlap
    and differ in size.

    Args:
        sentence_means: for each language (sentence, layer, unit) means over the tokens of a sentence, of any
            floating-point type; read a layer at a time.
        top_k: take instead the k neurons of the largest mean over sentences (float64; ties by (layer, unit)).

    Raises:
        SteeringError: if a language has no sentences, the shapes differ, a mean is not finite, or top_k is not
            between 1 and the number of neurons.
    """
    layers, units = check_sentence_means(sentence_means)
    check_k("top_k", top_k, layers * units)
    kind = np.bool_ if top_k is None else np.float64
    scores: NDArray[Any] = np.empty((len(sentence_means), layers, units), dtype=kind)
    for layer in range(layers):
        for number, means in enumerate(layer_means(sentence_means, layer)):
            scores[number, layer] = (means > 0).all(axis=0) if top_k is None else means.mean(axis=0, dtype=np.float64)
    if top_k is None:
        lists = [np.argwhere(active).astype(np.int64) for active in scores]
    else:
        lists = [rows_of(largest(means.ravel(), top_k), units) for means in scores]
    return Selection(lists, {"method": "activated", "top_k": top_k, **summary(sentence_means, lists)})


def check_rate(name: str, value: float) -> None:
    """Raise SteeringError unless a share is in (0, 1]."""
    if not 0 < value <= 1:
        raise SteeringError(f"{name}={value}: expected a number in (0, 1]")


def check_k(name: str, value: int | None, neurons: int) -> None:
    """Raise SteeringError unless a number of neurons, where one is given, is between 1 and all of them."""
    if value is not None and not 1 <= value <= neurons:
        raise SteeringError(f"{name}={value}: expected a number between 1 and the {neurons} neurons of the model")


def check_sentence_means(sentence_means: Sequence[NDArray[Any]]) -> tuple[int, int]:
    """(layers, units) of per-sentence means, (sentence, layer, unit) for each language.

    Raises:
        SteeringError: if there is no language, one has no sentences, or the shapes differ.
    """
    if not len(sentence_means):
        raise SteeringError("no language: expected per-sentence means of at least one")
    for number, means in enumerate(sentence_means):
        if means.ndim != 3 or means.shape[1:] != sentence_means[0].shape[1:]:
            raise SteeringError(
                f"language number {number} has means of shape {means.shape}, language number 0 of shape "
                f"{sentence_means[0].shape}; expected (sentence, layer, unit) with the same layers and units"
            )
        if not len(means):
            raise SteeringError(f"language number {number} has no calibration sentences: give it at least one")
    return int(sentence_means[0].shape[1]), int(sentence_means[0].shape[2])


def layer_means(sentence_means: Sequence[NDArray[Any]], layer: int) -> Iterator[NDArray[Any]]:
    """One layer's (sentence, unit) means for each language in turn.

    Raises:
        SteeringError: if one is not a finite number.
    """
    for number, means in enumerate(sentence_means):
        values = np.asarray(means[:, layer])
        wrong = ~np.isfinite(values)
        if wrong.any():
            sentence, unit = np.argwhere(wrong)[0]
            raise SteeringError(
                f"language number {number}: the mean of sentence {sentence}, layer {layer}, unit {unit} is "
                f"{values[sentence, unit]}; expected a finite number: record the sentences again, in a wider dtype"
            )
        yield values


def largest(scores: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """Sorted places of the k largest values; of equal ones the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:k])


def rows_of(flat: NDArray[np.intp], units: int) -> Neurons:
    """(neuron, 2) rows (layer, unit) of places in a flattened (layer, unit) table."""
    return np.column_stack([flat // units, flat % units]).astype(np.int64)


def summary(sentence_means: Sequence[NDArray[Any]], lists: Sequence[Neurons]) -> dict[str, Any]:
    """What every selection from per-sentence means says of itself."""
    return {
        "sentences": [len(means) for means in sentence_means],
        "selected": len(union_of(lists)),
        "languages_without_neurons": without_neurons(lists),
    }


def without_neurons(lists: Sequence[Neurons]) -> list[int]:
    """Places of the empty lists."""
    return [number for number, neurons in enumerate(lists) if not len(neurons)]


def _eligible(probability: NDArray[np.float32], threshold: np.float32) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Places of the eligible neurons in the flattened (layer, unit) table, and their entropies."""
    layers, units, languages = probability.shape
    step = max(_BLOCK // max(units * languages, 1), 1)
    positions, entropies = [np.zeros(0, dtype=np.intp)], [np.zeros(0)]
    for start in range(0, layers, step):
        block = probability[start : start + step]
        eligible = np.flatnonzero((block > threshold).any(axis=-1))
        positions.append(eligible + start * units)
        entropies.append(entropy(block.reshape(-1, languages)[eligible]))
    # Adding 0 turns the -0.0 of a neuron of one language into 0.0.
    return np.concatenate(positions), np.concatenate(entropies) + 0.0


def _members(probability: NDArray[np.float32], chosen: NDArray[np.intp], bar: np.float32) -> list[Neurons]:
    units, languages = probability.shape[1:]
    chosen = np.sort(chosen)
    member = probability.reshape(-1, languages)[chosen] > bar
    return [rows_of(chosen[member[:, k]], units) for k in range(languages)]


def _histogram(entropies: NDArray[np.float64], languages: int) -> dict[str, Any]:
    edges = np.linspace(0, math.log(languages), HISTOGRAM_BINS + 1)
    # Equal shares can come out a last bit above ln K.
    counts, _ = np.histogram(np.clip(entropies, edges[0], edges[-1]), bins=edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


# --- Which neurons tell a language's sentences from those of the others: one-vs-rest average precision

_UNITS_AT_ONCE = 2_000_000  # values ranked at a time; the temporaries are about 60 bytes a value


def average_precision(
    sentence_means: Sequence[NDArray[Any]],
    *,
    top_k: int | None = None,
    bottom_k: int | None = None,
    threshold: float | None = None,
) -> Selection:
    """Neurons by average precision, as in Kojima et al. 2024 and `get_map_neurons.py` of Rahmanisa et al. 2025.

    Give `threshold` alone, or `top_k`, or `bottom_k`, or both of these (their union).

    Args:
        sentence_means: for each of at least two languages (sentence, layer, unit) means over the tokens of a
            sentence; read a layer at a time, so an array that lies on a disk will do.
        top_k: for each language the k neurons of highest average precision; ties by (layer, unit).
        bottom_k: for each language the k of lowest, those that are least active in it; ties by (layer, unit).
        threshold: for each language the neurons above it (strict), in [0, 1); those that pass for more than one
            language are removed from all, and counted as `removed_shared`.

    Raises:
        SteeringError: for another combination of arguments, one out of its range, or means that
            `average_precisions` refuses.
    """
    layers, units = _check_means(sentence_means)
    if (threshold is None) == (top_k is None and bottom_k is None):
        raise SteeringError(
            f"average precision with threshold={threshold}, top_k={top_k}, bottom_k={bottom_k}: "
            "give the threshold alone, or top_k, bottom_k or both"
        )
    if threshold is not None and not 0 <= threshold < 1:
        raise SteeringError(f"threshold={threshold}: expected a number in [0, 1)")
    check_k("top_k", top_k, layers * units)
    check_k("bottom_k", bottom_k, layers * units)
    precisions = average_precisions(sentence_means).reshape(layers * units, -1)
    numbers: dict[str, Any] = {"method": "average-precision"}
    if threshold is None:
        lists = [_extremes(column, top_k, bottom_k, units) for column in precisions.T]
        numbers |= {"top_k": top_k, "bottom_k": bottom_k}
    else:
        passes = precisions > threshold
        alone = passes.sum(axis=1) == 1
        lists = [rows_of(np.flatnonzero(column & alone), units) for column in passes.T]
        numbers |= {"threshold": float(threshold), "removed_shared": int((passes.any(axis=1) & ~alone).sum())}
    return Selection(lists, numbers | summary(sentence_means, lists))


def average_precisions(sentence_means: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """(layer, unit, language): how well a neuron's mean tells one language's sentences from all the others'.

    The average precision of scikit-learn (`average_precision_score`): the mean over the language's sentences of the
    precision among all sentences that score at least as high. Equal means, also over languages, count together.

    Raises:
        SteeringError: if there are fewer than two languages, one has no sentences, the shapes differ, or a mean is
            not a finite number.
    """
    layers, units = _check_means(sentence_means)
    ends = np.cumsum([len(means) for means in sentence_means])
    starts = ends - [len(means) for means in sentence_means]
    precisions = np.empty((layers, units, len(sentence_means)))
    step = max(_UNITS_AT_ONCE // int(ends[-1]), 1)
    for layer in range(layers):
        values = np.concatenate(list(layer_means(sentence_means, layer)))
        for first in range(0, units, step):
            block = slice(first, first + step)
            ranks = _ranks(np.ascontiguousarray(values[:, block].T))
            for language, (start, end) in enumerate(zip(starts, ends, strict=True)):
                precisions[layer, block, language] = _precision(ranks[:, start:end])
    return precisions


def _check_means(sentence_means: Sequence[NDArray[Any]]) -> tuple[int, int]:
    shape = check_sentence_means(sentence_means)
    if len(sentence_means) < 2:
        raise SteeringError("average precision tells one language from the others: give means of at least two")
    return shape


def _ranks(values: NDArray[Any]) -> NDArray[np.int32]:
    """For each value how many of its row are as large or larger, itself included; (row, value) like the input."""
    # numpy sorts float32 much faster than float16, and the order is the same.
    wide = values.astype(np.float32) if values.dtype == np.float16 else values
    order = np.argsort(wide, axis=1)
    ordered = np.take_along_axis(wide, order, axis=1)
    positions = np.arange(values.shape[1], dtype=np.int32)
    begins = np.zeros(values.shape, dtype=np.int32)
    np.multiply(positions[1:], ordered[:, 1:] != ordered[:, :-1], out=begins[:, 1:])
    begins = np.maximum.accumulate(begins, axis=1)  # where the run of equal values begins
    ranks = np.empty(values.shape, dtype=np.int32)
    np.put_along_axis(ranks, order, len(positions) - begins, axis=1)
    return ranks


def _precision(ranks: NDArray[np.int32]) -> NDArray[np.float64]:
    """(row,) average precision of the sentences of one language, from their (row, sentence) ranks among all."""
    ordered = np.sort(ranks, axis=1)
    count = ranks.shape[1]
    among_own = np.full(ranks.shape, count, dtype=np.int32)
    # The last of a run of equal ranks is the number of the language's sentences that score at least as high.
    ends = np.arange(1, count, dtype=np.int32)
    among_own[:, :-1] = np.where(ordered[:, 1:] != ordered[:, :-1], ends, count)
    among_own = np.minimum.accumulate(among_own[:, ::-1], axis=1)[:, ::-1]
    precisions: NDArray[np.float64] = (among_own / ordered).mean(axis=1)
    return precisions


def _extremes(precisions: NDArray[np.float64], top_k: int | None, bottom_k: int | None, units: int) -> Neurons:
    top = largest(precisions, top_k or 0)
    bottom = largest(-precisions, bottom_k or 0)
    return rows_of(np.union1d(top, bottom), units)
