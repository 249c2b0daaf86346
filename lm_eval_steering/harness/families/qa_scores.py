"""Exact match and F1 of extractive question answering, in the three normalisations that are in use.

`squad`     SQuAD 1.1 (Rajpurkar et al. 2016): English articles and ASCII punctuation go; lm-eval's for XQuAD.
`mlqa`      MLQA's official script (Lewis et al. 2020): all Unicode punctuation and the answer language's own articles
            go, Chinese is split into characters. lm-eval's for MLQA. For languages that the script does not know,
            nothing is known to be an article; Thai, which writes no blanks either, is split likewise, each
            combining mark staying with its letter.
`gurgurov`  Gurgurov et al. 2025: ASCII punctuation goes, articles stay. Their F1 counts a repeated word once above the
            fraction line and each time below it, so that "new york new york" scores 0.5 against itself; here it is 1.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache

Normalise = Callable[[str], list[str]]

_ASCII = str.maketrans("", "", string.punctuation)
_ARTICLES = {
    "eng_Latn": r"\b(a|an|the)\b",
    "spa_Latn": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "vie_Latn": r"\b(của|là|cái|chiếc|những)\b",
    "deu_Latn": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "arb_Arab": r"(?:^|\s)ال",
}
_HAN = re.compile(r"[\u4e00-\u9fa5]")
_THAI = re.compile(r"[\u0e00-\u0e7f]")


@cache
def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def squad(text: str) -> list[str]:
    """Words of SQuAD 1.1."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_ASCII)).split()


def gurgurov(text: str) -> list[str]:
    """Words of Gurgurov et al. 2025."""
    return text.lower().translate(_ASCII).split()


def mlqa(language: str) -> Normalise:
    """Words of MLQA in one language."""

    def words(text: str) -> list[str]:
        bare = "".join(character for character in text.lower() if not _is_punctuation(character))
        if language in _ARTICLES:
            bare = re.sub(_ARTICLES[language], " ", bare)
        if language == "tha_Thai":
            return _split(bare, _THAI)
        return _split(bare, _HAN) if language in ("zho_Hans", "zho_Hant") else bare.split()

    return words


def _split(text: str, letters: re.Pattern[str]) -> list[str]:
    """Each letter of an unspaced script a word of its own, with the marks that sit on it: 北京abc is 北 京 abc."""
    pieces: list[str] = []
    alone = False  # whether the last character was such a letter
    for character in text:
        if unicodedata.category(character) == "Mn":  # belongs to the character before it
            pieces.append(character)
            continue
        is_letter = bool(letters.match(character))
        pieces.append(f" {character}" if is_letter or alone else character)
        alone = is_letter
    return "".join(pieces).split()


def exact_match(prediction: str, references: Iterable[str], normalise: Normalise) -> float:
    """1 where the normalised prediction is one of the references."""
    words = normalise(prediction)
    return float(any(words == normalise(reference) for reference in references))


def f1(prediction: str, references: Iterable[str], normalise: Normalise, both_empty: float = 1.0) -> float:
    """The best word-overlap F1 over the references, counting repeated words.

    Args:
        prediction: What the model wrote.
        references: At least one right answer.
        normalise: How a text becomes words.
        both_empty: The score where neither has a word left: 1 for SQuAD, 0 for MLQA's official script.
    """
    words = normalise(prediction)
    return max(_overlap(words, normalise(reference), both_empty) for reference in references)


def _overlap(prediction: list[str], reference: list[str], both_empty: float) -> float:
    if not prediction and not reference:
        return both_empty
    same = sum((Counter(prediction) & Counter(reference)).values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(reference)
    return 2 * precision * recall / (precision + recall)
