"""Which neurons tell a language's sentences from those of the others: one-vs-rest average precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.neurons.neuron_set import Neurons
from lm_eval_steering.neurons.select import (
    Selection,
    check_k,
    check_sentence_means,
    largest,
    layer_means,
    rows_of,
    summary,
)

_BLOCK = 2_000_000  # values ranked at a time; the temporaries are about 60 bytes a value


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
        lists = [_extremes(own, top_k, bottom_k, units) for own in precisions.T]
        numbers |= {"top_k": top_k, "bottom_k": bottom_k}
    else:
        passes = precisions > threshold
        alone = passes.sum(axis=1) == 1
        lists = [rows_of(np.flatnonzero(own & alone), units) for own in passes.T]
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
    found = np.empty((layers, units, len(sentence_means)))
    step = max(_BLOCK // int(ends[-1]), 1)
    for layer in range(layers):
        values = np.concatenate(list(layer_means(sentence_means, layer)))
        for first in range(0, units, step):
            block = slice(first, first + step)
            ranks = _ranks(np.ascontiguousarray(values[:, block].T))
            for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
                found[layer, block, place] = _precision(ranks[:, start:end])
    return found


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
    places = np.arange(values.shape[1], dtype=np.int32)
    begins = np.zeros(values.shape, dtype=np.int32)
    np.multiply(places[1:], ordered[:, 1:] != ordered[:, :-1], out=begins[:, 1:])
    begins = np.maximum.accumulate(begins, axis=1)  # where the run of equal values begins
    ranks = np.empty(values.shape, dtype=np.int32)
    np.put_along_axis(ranks, order, len(places) - begins, axis=1)
    return ranks


def _precision(ranks: NDArray[np.int32]) -> NDArray[np.float64]:
    """(row,) average precision of the sentences of one language, from their (row, sentence) ranks among all."""
    ordered = np.sort(ranks, axis=1)
    count = ranks.shape[1]
    among_own = np.full(ranks.shape, count, dtype=np.int32)
    # The last of a run of equal ranks says how many of the language's own sentences score at least as high.
    ends = np.arange(1, count, dtype=np.int32)
    among_own[:, :-1] = np.where(ordered[:, 1:] != ordered[:, :-1], ends, count)
    among_own = np.minimum.accumulate(among_own[:, ::-1], axis=1)[:, ::-1]
    return (among_own / ordered).mean(axis=1)


def _extremes(precisions: NDArray[np.float64], top_k: int | None, bottom_k: int | None, units: int) -> Neurons:
    top = largest(precisions, top_k or 0)
    bottom = largest(-precisions, bottom_k or 0)
    return rows_of(np.union1d(top, bottom), units)
