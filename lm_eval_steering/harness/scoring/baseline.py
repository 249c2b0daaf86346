"""Unsteered answers that are kept for the next intervention on the same requests."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from lm_eval_steering.harness.scoring.tree import Row

Answer = tuple[float, bool]  # (summed log-probability, greedy match)
Numbered = tuple[int, Answer]  # with the number of the request
# About 200 MB: an answer is two tuples, a float and an int. LSS in 20 languages of 1,000 items has 40,000.
ANSWERS = 1_000_000


class Baseline:
    """Answers by batch: of the same rows in the same batch they are bit-equal.

    Where there are more than `limit` answers, those of the batches go that were not asked for longest; they are
    computed again when they are needed, so that a score never depends on it.
    """

    def __init__(self, limit: int = ANSWERS) -> None:
        """Nothing is kept yet.

        Args:
            limit: number of answers that may be kept; those of the last batch are, however many they are.
        """
        self._limit = limit
        self._batches: OrderedDict[bytes, list[Numbered]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        """Number of answers."""
        return self._size

    def get(self, key: bytes) -> list[Numbered] | None:
        """Answers of the batch with this `digest_of`, if they are kept."""
        if key in self._batches:
            self._batches.move_to_end(key)
        return self._batches.get(key)

    def keep(self, key: bytes, answers: list[Numbered]) -> None:
        """Keep the answers of a batch that `get` did not find."""
        self._batches[key] = answers
        self._size += len(answers)
        while self._size > self._limit and len(self._batches) > 1:
            self._size -= len(self._batches.popitem(last=False)[1])

    def clear(self) -> None:
        """Keep nothing."""
        self._batches.clear()
        self._size = 0


def digest_of(batch: Sequence[Row]) -> bytes:
    """What a batch is: tokens and depths tell the trees."""
    told = [(row.tokens, row.depths, row.scored) for row in batch]
    return hashlib.sha256(repr(told).encode()).digest()
