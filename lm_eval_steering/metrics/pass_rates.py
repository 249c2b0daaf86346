"""Line- and word-level pass rates: whole responses in the wrong language, and English words inside the right one.

Source: Marchisio et al. 2024, "Understanding and Mitigating Language Confusion in LLMs", section 3.2, and the authors'
compute_metrics.py, which is followed where the paper is silent: ASCII punctuation is deleted, a line has at least five
tokens to count, a guess of the identifier counts above 0.3, an English word is a lower-case word of the list with more
than three letters, and the word rate is for scripts other than Latin. Where we differ:

* their list of words is unavailable; ours is the American list of SCOWL, 63,189 such words;
* blanks that jieba returns are no tokens;
* Chinese, Japanese, Thai, ... are cut into letters where no segmenter is installed (`signature` says which);
* markers of models (`</s>`) and U+FFFD are removed first, and a guess in another script than the line's is wrong;
* nothing is cut at "\\nQ:", which belongs to one prompt of theirs;
* the word rate is given for every script but Latin, theirs for six languages.
"""

from __future__ import annotations

import gzip
import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from lm_eval_steering.metrics.language_id import LanguageIdentifier, in_language
from lm_eval_steering.metrics.text import segmenter, segmenters, without_markers

TOKENS = 5
LINE_THRESHOLD = 0.3
LATIN = "Latn"

_DELETED = str.maketrans({**dict.fromkeys(string.punctuation + "،", ""), "—": " "})


@dataclass(frozen=True)
class Passes:
    """What one response contributes.

    Attributes:
        lines: whether every line that counts is in a wanted language; None where no line counts.
        words: whether no English word is in them; None where the lines did not pass, or the script is Latin.
    """

    lines: bool | None
    words: bool | None


def passes(text: str, wanted: Sequence[str], identifier: LanguageIdentifier) -> Passes:
    """Judge one response.

    Args:
        text: the response.
        wanted: codes of the languages that it may be in; the first one's rules cut it into tokens.
        identifier: its model is asked about each line; the threshold is the paper's, not the identifier's.
    """
    cut = segmenter(wanted[0])
    lines = [(line, tokens) for line in _normalised(text) if len(tokens := cut(line)) >= TOKENS]
    if not lines:
        return Passes(None, None)
    guesses = identifier.guess(line for line, _ in lines)
    right = all(
        guess.confidence > LINE_THRESHOLD and any(in_language(guess.language, code) for code in wanted)
        for guess in guesses
    )
    if not right or not has_word_rate(wanted):
        return Passes(right, None)
    english = english_words()
    return Passes(True, not any(token in english for _, tokens in lines for token in tokens))


def has_word_rate(wanted: Sequence[str]) -> bool:
    """Whether English words can be told apart: none of the wanted languages is written in Latin letters."""
    return not any(code.endswith(f"_{LATIN}") for code in wanted)


def harmonic_mean(items: Sequence[tuple[float, float | None]]) -> float:
    """LCPR = 2 LPR WPR / (LPR + WPR) over (lines, words) of all items; 0 where no response passed by its lines."""
    line_rate = sum(lines for lines, _ in items) / len(items)
    judged = [words for _, words in items if words is not None]
    word_rate = sum(judged) / len(judged) if judged else 0.0
    total = line_rate + word_rate
    return 2 * line_rate * word_rate / total if total else 0.0


def _normalised(text: str) -> list[str]:
    return without_markers(text).strip().translate(_DELETED).split("\n")


@cache
def english_words() -> frozenset[str]:
    """Lower-case English words of four letters and more (english_words.LICENSE.txt says where they are from)."""
    return frozenset(gzip.decompress(_word_file()).decode().split())


def signature() -> str:
    """What these rates depend on beside the identifier: `zho:jieba-0.42.1,jpn:letters,english:1a2b3c4d`."""
    return f"{segmenters()},english:{hashlib.sha256(_word_file()).hexdigest()[:8]}"


@cache
def _word_file() -> bytes:
    return (files("lm_eval_steering.metrics") / "english_words.txt.gz").read_bytes()
