"""Rows in batches: sorted by length, as many as fit a budget of tokens and of scored positions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lm_eval_steering.harness.scoring.tree import Row

# Logits in hand at once, in numbers: 32 MB in float32 on a processor, 256 MB in bfloat16 elsewhere.
LOGITS = {"cpu": 2**23}
LOGITS_ELSEWHERE = 2**27
# Tokens of a batch, beyond which its activations leave a processor's cache (`benchmarks.rolling`).
TOKENS = {"cpu": 768}
# Pads of a batch, in tokens, at which a forward pass more costs less.
PADS = {"cpu": 48}
PADS_ELSEWHERE = 1024
Item = TypeVar("Item")


@dataclass(frozen=True)
class Budget:
    """What one forward pass may hold; a single row may be more.

    Attributes:
        tokens: padded ones.
        positions: at which logits are made.
        pads: among the tokens.
    """

    tokens: int
    positions: int
    pads: int

    @classmethod
    def like(cls, batch_size: int, longest: int, vocabulary: int, device: str) -> Budget:
        """The tokens that lm-eval's own first batch would hold, `batch_size` rows of the longest request, or fewer."""
        positions = LOGITS.get(device, LOGITS_ELSEWHERE) // vocabulary
        tokens = min(batch_size * longest, TOKENS.get(device, sys.maxsize))
        return cls(tokens, max(1, positions), PADS.get(device, PADS_ELSEWHERE))

    @classmethod
    def of_prompts(cls, device: str) -> Budget:
        """For prompts of one of lm-eval's batches, of which each needs the logits of its last token."""
        return cls(TOKENS.get(device, sys.maxsize), sys.maxsize, PADS.get(device, PADS_ELSEWHERE))

    @classmethod
    def unlimited(cls) -> Budget:
        """For requests that are few."""
        return cls(sys.maxsize, sys.maxsize, sys.maxsize)

    @classmethod
    def half_of(cls, batch: Sequence[Row]) -> Budget:
        """Half of what a batch holds."""
        tokens = len(batch) * max(len(row.tokens) for row in batch) // 2
        return cls(tokens, max(1, sum(row.positions for row in batch) // 2), tokens)


def batches(rows: Iterable[Row], budget: Budget) -> list[list[Row]]:
    """Batches of rows of similar length, longest first; rows that branch, and need a mask, are kept apart."""
    apart: dict[bool, list[Row]] = {False: [], True: []}
    for row in rows:
        apart[row.branches].append(row)
    return [batch for kind in apart.values() for batch in alike(kind, _length, lambda row: row.positions, budget)]


def _length(row: Row) -> int:
    return len(row.tokens)


def alike(
    items: Iterable[Item], length: Callable[[Item], int], positions: Callable[[Item], int], budget: Budget
) -> list[list[Item]]:
    """Groups of items of similar length within a budget, longest first.

    Args:
        items: of any kind.
        length: of one, in tokens.
        positions: of one, at which logits are made.
        budget: of each group.
    """
    found: list[list[Item]] = []
    logits = pads = 0
    for item in sorted(items, key=lambda item: -length(item)):
        if found:
            longest = length(found[-1][0])
            tokens = (len(found[-1]) + 1) * longest
            logits, pads = logits + positions(item), pads + longest - length(item)
            if tokens <= budget.tokens and logits <= budget.positions and pads <= budget.pads:
                found[-1].append(item)
                continue
        found.append([item])
        logits, pads = positions(item), 0
    return found
