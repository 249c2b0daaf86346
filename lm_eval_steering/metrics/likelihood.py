"""Log-likelihoods that know how they were made; perplexity, and the shift of which LSS counts the positive ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

from lm_eval_steering.errors import SteeringError

# A document with this key set has its requests scored a second time, without the intervention.
NEEDS_UNSTEERED_SCORE = "needs_unsteered_score"
# A document with this key was made for these target languages and no others.
MADE_FOR = "made_for"


class Score(tuple[float, bool]):
    """What lm-eval expects of a log-likelihood request, (summed log-probability, greedy match), and where it is from.

    Attributes:
        tokens: number of tokens of the continuation.
        unsteered: summed log-probability of the same row, in the same batch, without the intervention; None where
            it was not asked for.
        targets: codes of the languages steered to.
    """

    tokens: int
    unsteered: float | None
    targets: tuple[str, ...]

    def __new__(
        cls,
        answer: tuple[float, bool],
        tokens: int,
        unsteered: float | None = None,
        targets: Sequence[str] = (),
    ) -> Self:
        """lm-eval's answer, with what is known about it."""
        made = super().__new__(cls, answer)
        made.tokens, made.unsteered, made.targets = tokens, unsteered, tuple(targets)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (tuple(self), self.tokens, self.unsteered, self.targets)


class RollingScore(float):
    """Summed log-probability of a whole text, in nats, and how many tokens it is of.

    Attributes:
        tokens: number of tokens that were predicted.
    """

    tokens: int

    def __new__(cls, value: float, tokens: int) -> Self:
        """A float for lm-eval, with the number of tokens beside it."""
        made = super().__new__(cls, value)
        made.tokens = tokens
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (float(self), self.tokens)


def token_perplexity(items: Sequence[tuple[float, int]]) -> float:
    """exp of the mean negative log-likelihood per token, over (summed log-probability, tokens) of all items."""
    return math.exp(nats_per_token(items))


def nats_per_token(items: Sequence[tuple[float, int]]) -> float:
    """Mean negative log-likelihood in nats per token, over (summed log-probability, tokens) of all items."""
    return -sum(lp for lp, _ in items) / sum(tokens for _, tokens in items)


def preference_shift(base: Score, target: Score) -> float:
    """D_steered - D_unsteered of one item, in nats, where D = lp(target object) - lp(base object).

    Source: Rahmanisa et al. 2025, whose Language Steering Shift is the share of items with a shift above 0. It is
    exactly 0 for an identity intervention, because both passes score the same rows in the same batches.

    Raises:
        SteeringError: if a score has no unsteered score.
    """
    if base.unsteered is None or target.unsteered is None:
        raise SteeringError(
            "LSS needs the unsteered scores of the same rows; this score came from a --use_cache file that another "
            "task with the same request has filled: use another file for LSS"
        )
    return (target[0] - base[0]) - (target.unsteered - base.unsteered)
