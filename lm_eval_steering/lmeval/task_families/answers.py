"""Answers read out of generated text, and exact match and F1 of extractive question answering.

Letters and relations are read strictly: one answer that the text commits to, or none. Gurgurov et al. 2025 take any
first letter for an answer ("Because" is B, "Apple" is A) and the first label ("not entailment but contradiction" is
entailment; "12" is 1). Here a text that names no option, or two, has no answer and counts as wrong; the share of texts
with an answer is reported beside the accuracy.

Exact match and F1 come in the three normalisations that are in use:

`squad`     SQuAD 1.1 (Rajpurkar et al. 2016): English articles and ASCII punctuation go; lm-eval's for XQuAD.
`mlqa`      MLQA's official script (Lewis et al. 2020): all Unicode punctuation and the answer language's articles
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

# --- Letters and relations -------------------------------------------------------------------------------------------

LETTERS = "ABCD"
RELATIONS = ("entailment", "neutral", "contradiction")

# What may stand between a letter and the rest of a text; an apostrophe within a word (c'est, d'après) is no end.
_MARK = r"(?:[)\].:,、。：*]|[\"'](?!\w))"
# A letter that opens the text and is closed by a mark, the end of the line, or "is" (an English article is not).
_OPENING = re.compile(rf"[\"'(\[*\s]*([A-D])(?=\s*$|\s*\n|\s*{_MARK}|\s+is\b)", re.IGNORECASE)
# "Answer: C", "the answer is (C)", in any language after a colon; the letter ends there.
_ANSWER = re.compile(rf"(?:(?i:\banswer\s+is\b)\s*[:：]?|[:：])\s*[\"'(\[*]*([A-D])(?=\s*$|\s*\n|\s*{_MARK})")
_OPTION = re.compile(r"(?<!\w)\(?([A-D])\)(?!\w)")  # "I think B)"
_SECOND = re.compile(
    r"[)\]\"'*]*\s*(?:[,/&、]\s*(?:(?:and|or)\b)?|\b(?:and|or)\b)\s*[(\[*\"']*([A-D])(?![\w'’])"
)  # what goes on with another letter: "A, B", "A or (B)"


def letter(text: str) -> str | None:
    """The one letter A to D that a text answers with, or None.

    A letter is an answer where it opens the text and is closed by a mark, a line's end or "is"; where it ends a line
    after a colon or "answer is"; or where it is written as an option, `B)`. Different letters: no answer.
    """
    stripped = text.strip()
    opening = _OPENING.match(stripped)
    letters = set()
    for match in [*([opening] if opening else []), *_ANSWER.finditer(stripped), *_OPTION.finditer(stripped)]:
        letters.add(match[1].upper())
        if second := _SECOND.match(stripped, match.end(1)):
            letters.add(second[1])
    return letters.pop() if len(letters) == 1 else None


_STEMS = {
    "entailment": re.compile(r"\bentail(?:s|ed|ment)?\b"),
    "neutral": re.compile(r"\bneutral\b"),
    "contradiction": re.compile(r"\bcontradict(?:s|ed|ion|ory)?\b"),
}
_DENIED = re.compile(
    r"(?:\bnon-|\b(?:not|no|neither|nor|never|cannot|can't|isn't|doesn't|don't|didn't|won't)\s+(?:\w+\s+){0,3}?)"
    r"(?:entail|neutral|contradict)\w*"
)
_WORDS = (
    ("entailment", re.compile(r"(?:yes|true|correct)\b")),
    ("contradiction", re.compile(r"(?:no|false|incorrect)\b")),
)


def relation(text: str) -> str | None:
    """The one relation that a text answers with, or None.

    The number of an option that opens the text (a whole number, in any script's digits) and the names found in it must
    agree; a denied name ("not entailment") is no answer. Without either, an opening yes/true/correct is entailment
    and no/false/incorrect contradiction, as in the paper.
    """
    lower = text.strip().lower()
    relations = {name for name, stem in _STEMS.items() if stem.search(_DENIED.sub(" ", lower))}
    numbers = _opening_numbers(lower)
    if any(number not in (1, 2, 3) for number in numbers):
        return None
    relations |= {RELATIONS[number - 1] for number in numbers}
    if not relations and not _DENIED.search(lower):
        relations = {name for name, word in _WORDS if word.match(lower)}
    return relations.pop() if len(relations) == 1 else None


def _opening_numbers(text: str) -> list[int]:
    """The numbers that open a text: `[0, 1]` for "0 1", `[12]` for "12"."""
    opening = re.match(r"[(\[]?\d+(?:\W+\d+)*(?=$|\W)", text)
    if not opening:
        return []
    return [
        int("".join(str(unicodedata.digit(digit)) for digit in number)) for number in re.findall(r"\d+", opening[0])
    ]


def score_answer(answer: str | None, gold: str) -> dict[str, float]:
    """Right or not, and whether there was an answer at all."""
    return {"acc": float(answer == gold), "parsed": float(answer is not None)}


# --- Exact match and F1 -----------------------------------------------------------------------------------------------

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
