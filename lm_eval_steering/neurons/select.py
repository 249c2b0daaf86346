"""Which neurons belong to which language: LAPE, and the matched random controls that every claim needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.neurons.neuron_set import Neurons


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
    return -(share * logarithm).sum(axis=-1)


def kth_smallest(probability: NDArray[np.float32], rate: float) -> np.float32:
    """The round(rate * size)-th smallest value, 1-based, half to even, without interpolation."""
    k = min(max(round(probability.size * rate), 1), probability.size)
    return np.partition(probability, k - 1, axis=None)[k - 1]


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
    for name, value in (("rate", rate), ("filter_rate", filter_rate), ("bar_rate", bar_rate)):
        check_rate(name, value)
    probability = activation_probability(counts, n_tokens)
    eligible = (probability > kth_smallest(probability, filter_rate)).any(axis=-1).ravel()
    order = np.argsort(np.where(eligible, entropy(probability).ravel(), np.inf), kind="stable")
    chosen = order[: min(round(rate * eligible.size), int(eligible.sum()))]
    member = probability.reshape(-1, probability.shape[-1])[chosen] > kth_smallest(probability, bar_rate)
    units = counts.shape[1]
    return [_rows(np.sort(chosen[member[:, k]]), units) for k in range(counts.shape[-1])]


def check_rate(name: str, value: float) -> None:
    """Raise SteeringError unless a share is in (0, 1]."""
    if not 0 < value <= 1:
        raise SteeringError(f"{name}={value}: expected a number in (0, 1]")


def random_control(
    assignments: Mapping[str, Neurons], languages: Sequence[str], units: int, seed: int
) -> dict[str, Neurons]:
    """Random neurons for each language: as many in each layer as it has, drawn without replacement, reproducibly.

    The draw of a language depends on the seed and on its place in `languages` alone, and leaves out its own neurons.
    """
    controls = {}
    for place, language in enumerate(languages):
        generator = np.random.default_rng([seed, place])
        own = assignments[language]
        rows = [np.zeros((0, 2), dtype=np.int64)]
        for layer in np.unique(own[:, 0]):
            taken = own[own[:, 0] == layer, 1]
            free = np.setdiff1d(np.arange(units), taken)
            if len(free) < len(taken):
                raise SteeringError(f"{language}: layer {layer} has too few other units for a matched random control")
            drawn = np.sort(generator.choice(free, size=len(taken), replace=False))
            rows.append(np.column_stack([np.full(len(drawn), layer), drawn]))
        controls[language] = np.concatenate(rows).astype(np.int64)
    return controls


def _rows(flat: NDArray[np.intp], units: int) -> Neurons:
    return np.column_stack([flat // units, flat % units]).astype(np.int64)
