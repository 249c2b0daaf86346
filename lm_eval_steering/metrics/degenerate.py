"""Outputs that say nothing: empty, without letters, or one thing over and over."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.metrics.text import clean, letters_or_words, without_markers

COPIES = 3
CHARACTERS = 20  # a run of characters shorter than this may be a number or a word: 100000, Hmmm

# Three line breaks or more with nothing but blanks about them.
_BLANK_LINES = re.compile(r"[^\S\n]*\n(?:[^\S\n]*\n){2,}[^\S\n]*")
# A word with a colon and nothing after it: `Q：`, `Answer:`.
_LABEL = re.compile(r"\W*\w{1,10}\s*[:：]\W*")
_CLAUSE_ENDS = re.compile(r"[,;.!?:，；。！？：、،؛؟।|\n]+")
_GOES_ON = re.compile(r"[,;:，；：、،؛\-]\s*$")


def degenerate(text: str) -> bool:
    """Whether an output says nothing or repeats itself: our own rule. Any of these is enough:

    1. No letters: nothing, signs, or digits alone, which are in no language.
    2. All letters are the same one, three or more of them.
    3. One or more words, the same each time, stand at least three times in a row, and that run is more than half of
       the words, or half of them at the end of the output; or the same is true of characters, in a run of at least 20.
       Where a script is written without blanks, a letter with its marks is a word.
    4. At least three line breaks in a row, with nothing but blanks between them, are more than half of the output.
    5. More than half of the lines are a label with nothing after it, such as `Q：`.
    6. At least half of three or more clauses are copies of an earlier one; or the output is one clause twice and breaks
       off at a comma. A clause stands between punctuation marks or line breaks; only copies of at least two words
       and four letters count, so that `No, no.` is none.

    Capital letters do not matter, and markers of models (`</s>`) and U+FFFD are left out (`text.clean`).
    """
    line = clean(text).casefold()
    letters = [character for character in line if character.isalpha()]
    if not letters or (len(letters) >= COPIES and len(set(letters)) == 1):
        return True
    lines = without_markers(text).casefold()
    # A blank at the end makes the last copy as long as the others.
    return (
        longest_run(letters_or_words(line)) > 0
        or longest_run(f"{line} ") >= CHARACTERS
        or _is_blank_lines(lines)
        or _is_labels(lines)
        or _is_repeated_clauses(lines)
    )


def longest_run(items: Sequence[str]) -> int:
    """Length of a run of at least three equal copies that fills more than half of the items; 0 where there is none.

    At the end of the items half is enough. The last copy of a run may be cut short, as at the end of an answer.
    """
    numbers: dict[str, int] = {}
    array = np.array([numbers.setdefault(item, len(numbers)) for item in items])
    for period in range(1, len(array) // COPIES + 1):
        # Shifted by its period, a run equals itself; (COPIES - 1) periods of equality are COPIES copies.
        equal = array[:-period] == array[period:]
        copies = (COPIES - 1) * period
        half = (len(array) + 1) // 2 - period
        if np.count_nonzero(equal) < max(copies, half):
            continue
        if (longest := _longest_true(equal)) >= max(copies, len(array) // 2 + 1 - period):
            return longest + period
        if (last := _true_at_the_end(equal)) >= max(copies, half):
            return last + period
    return 0


def _longest_true(flags: NDArray[np.bool_]) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False]))))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def _true_at_the_end(flags: NDArray[np.bool_]) -> int:
    false = np.flatnonzero(~flags)
    return len(flags) - 1 - int(false[-1]) if len(false) else len(flags)


def _is_blank_lines(text: str) -> bool:
    longest = max((len(run[0]) for run in _BLANK_LINES.finditer(text)), default=0)
    return 2 * longest > len(text)


def _is_labels(text: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip()]
    return 2 * sum(bool(_LABEL.fullmatch(line)) for line in lines) > len(lines)


def _is_repeated_clauses(text: str) -> bool:
    clauses = [clause for part in _CLAUSE_ENDS.split(text) if (clause := " ".join(part.split()))]
    seen: set[str] = set()
    copies = 0
    for clause in clauses:
        copies += clause in seen and _can_be_a_copy(clause)
        seen.add(clause)
    if len(clauses) == 2:
        return copies == 1 and bool(_GOES_ON.search(text))
    return copies > 0 and 2 * copies >= len(clauses)


def _can_be_a_copy(clause: str) -> bool:
    return len(letters_or_words(clause)) > 1 and sum(character.isalpha() for character in clause) > 3
