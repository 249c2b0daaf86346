"""Strict readers of generated answers: one answer that the text commits to, or none.

Gurgurov et al. 2025 take any first letter for an answer ("Because" is B, "Apple" is A) and the first label found ("not
entailment but contradiction" is entailment; "12" is 1). Here a text that names no option, or two, has no answer and
counts as wrong; the share of texts with an answer is reported beside the accuracy.
"""

from __future__ import annotations

import re
import unicodedata

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
    found = set()
    for match in [*([opening] if opening else []), *_ANSWER.finditer(stripped), *_OPTION.finditer(stripped)]:
        found.add(match[1].upper())
        if second := _SECOND.match(stripped, match.end(1)):
            found.add(second[1])
    return found.pop() if len(found) == 1 else None


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
    found = {name for name, stem in _STEMS.items() if stem.search(_DENIED.sub(" ", lower))}
    numbers = _opening_numbers(lower)
    if any(number not in (1, 2, 3) for number in numbers):
        return None
    found |= {RELATIONS[number - 1] for number in numbers}
    if not found and not _DENIED.search(lower):
        found = {name for name, word in _WORDS if word.match(lower)}
    return found.pop() if len(found) == 1 else None


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
