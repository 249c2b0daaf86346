"""Outputs that say nothing: empty, or one thing over and over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm_eval_steering.metrics.text import clean, words

COPIES = 3
CHARACTERS = 20  # a run of characters shorter than this may be a number or a word: 100000, Hmmm


def degenerate(text: str) -> bool:
    """Whether an output is empty or repeats itself: our own rule.

    Empty: nothing but blanks and control characters. Repeats: one or more words, the same each time, stand at least
    three times in a row, and that run is more than half of the words; or the same is true of characters, in a run of
    at least 20. Capital letters do not matter.
    """
    line = clean(text).casefold()
    if not line:
        return True
    # A blank at the end makes the last copy as long as the others.
    return longest_run(words(line)) > 0 or longest_run(f"{line} ") >= CHARACTERS


def longest_run(items: Sequence[str]) -> int:
    """Length of a run of at least three equal copies that fills more than half of the items; 0 where there is none.

    The last copy of a run may be cut short, as at the end of an answer.
    """
    numbers: dict[str, int] = {}
    array = np.array([numbers.setdefault(item, len(numbers)) for item in items])
    for period in range(1, len(array) // COPIES + 1):
        # Shifted by its period, a run equals itself; (COPIES - 1) periods of equality are COPIES copies.
        equal = array[:-period] == array[period:]
        needed = max((COPIES - 1) * period, len(array) // 2 + 1 - period)
        if np.count_nonzero(equal) >= needed and (found := _longest_true(equal)) >= needed:
            return found + period
    return 0


def _longest_true(flags: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False]))))
    return int((edges[1::2] - edges[::2]).max(initial=0))
