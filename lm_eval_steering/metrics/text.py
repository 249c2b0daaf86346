"""Text as the metrics see it: cleaned once, its letters and their scripts, and its words."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import regex  # type: ignore[import-untyped]

_log = logging.getLogger("lm_eval.steering")

# Version of the rules of `clean`, part of an identifier's signature: a change of them is a change of labels.
CLEANING = 2

# Blanks of every kind, control characters, and halves of surrogate pairs, which no encoder takes.
_BLANKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
# fastText ends a line at `</s>` and takes words that begin with `__label__` for labels; the others are markers of
# language models, and bytes that no character came of.
_MARKERS = re.compile(
    r"</?s>|__label__|<\|[^<>|\s]{1,40}\|>|<(?:pad|unk|bos|eos|mask|eot|(?:start|end)_of_turn|0x[0-9A-Fa-f]{2})>"
)
_REPLACEMENT = "\ufffd"
# Letters and digits that are another form of the usual ones: full width, Latin ligatures, Arabic presentation forms,
# half-width kana, and mathematical alphabets.
_FORMS = re.compile(r"[０-９Ａ-Ｚａ-ｚ\ufb00-\ufb06\ufb50-\ufdff\ufe70-\ufefc\uff66-\uff9f\U0001d400-\U0001d7ff]+")
# A word of two or more letters, all of them capitals; the second pattern is of what may hold one, and is quick.
_CAPITALS = regex.compile(r"(?<![\p{L}\p{M}])(?:\p{Lu}\p{M}*){2,}(?![\p{L}\p{M}])")
_MAYBE_CAPITALS = re.compile(r"[A-ZÀ-ÞĀ-ɏΆ-ΫЀ-ЯѠ-ԯԱ-Ֆ]{2}")

NO_SCRIPT = "Zyyy"
# ISO 15924: scripts that languages of today are written in, the most frequent first, because they are tried in turn.
_SCRIPTS = (
    "Latn", "Cyrl", "Hani", "Arab", "Hira", "Kana", "Hang", "Deva", "Grek", "Hebr", "Thai", "Beng", "Taml", "Telu",
    "Gujr", "Guru", "Knda", "Mlym", "Orya", "Sinh", "Geor", "Armn", "Ethi", "Khmr", "Laoo", "Mymr", "Tibt", "Mong",
    "Olck", "Tfng", "Thaa", "Syrc", "Cher", "Cans", "Bopo", "Copt", "Nkoo", "Vaii", "Yiii", "Mtei", "Bali", "Java",
    "Sund", "Bugi", "Batk", "Lana", "Talu", "Tale", "Lisu", "Cham", "Lepc", "Limb", "Rjng", "Saur", "Adlm", "Rohg",
    "Hmnp", "Osge", "Wcho", "Cakm", "Newa", "Mroo", "Shaw", "Goth",
)  # fmt: skip
# Codes for a way of writing that uses several scripts, or one part of a script.
_PARTS = {
    "Jpan": ("Hira", "Kana", "Hani"), "Kore": ("Hang", "Hani"), "Hans": ("Hani",), "Hant": ("Hani",),
    "Aran": ("Arab",),
}  # fmt: skip

# Scripts written without blanks between words: in a language that uses one of them, a letter with its marks stands for
# a word. Korean, which uses Hani too, is written with blanks.
_UNSPACED = ("Hani", "Hira", "Kana", "Thai", "Laoo", "Khmr", "Mymr", "Tibt")
_UNSPACED_CODES = frozenset({*_UNSPACED, "Hans", "Hant", "Jpan"})
_UNSPACED_CLASS = "".join(rf"\p{{Script={name}}}" for name in _UNSPACED)
_LETTER_OR_WORD = regex.compile(rf"[{_UNSPACED_CLASS}]\p{{M}}*|[^\s{_UNSPACED_CLASS}]+")


def clean(text: str) -> str:
    """The text on one line, as an identifier can read it.

    Markers (`</s>`, `__label__`, `<|im_end|>`, `<0xE4>`) become a blank; U+FFFD goes; full-width letters and other
    forms of letters and digits become the usual ones (NFKC); words in capitals alone become lower-case; runs of
    blanks, newlines and control characters become one blank, with none at the ends.
    """
    line = _BLANKS.sub(" ", usual_letters(without_markers(text))).strip()
    if _MAYBE_CAPITALS.search(line):
        line = line.lower() if line.isupper() else _CAPITALS.sub(lambda word: word[0].lower(), line)
    return line


def without_markers(text: str) -> str:
    """The text without markers of models, each of which becomes a blank, and without U+FFFD; lines stay."""
    return _MARKERS.sub(" ", text.replace(_REPLACEMENT, ""))


def usual_letters(text: str) -> str:
    """Full-width, half-width and mathematical letters and digits, ligatures and presentation forms in usual form."""
    return text if text.isascii() else _FORMS.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)


class _ScriptOf(dict[str, str]):
    """Character -> script of a letter, empty for what is no letter; looked up once for each character."""

    def __missing__(self, character: str) -> str:
        names = _SCRIPTS if character.isalpha() else ()
        script = next((name for name in names if _in_script(name).match(character)), NO_SCRIPT if names else "")
        self[character] = script
        return script


_script_of = _ScriptOf()


@cache
def _in_script(name: str) -> Any:
    return regex.compile(rf"\p{{Script={name}}}")


def scripts(text: str) -> Counter[str]:
    """Number of letters in each script, by Unicode's property Script; letters that many share are `Zyyy`.

    Letters are the characters of Unicode's categories L*; digits, marks, signs and emoji are none.
    """
    counts = Counter(map(_script_of.__getitem__, text))
    del counts[""]
    return counts


def main_script(counts: Counter[str]) -> str:
    """ISO 15924 code of the script of most letters; `Jpan` for kana with or without Han, `Zyyy` without letters.

    `Hani` stands for Han alone: letters do not tell simplified from traditional.
    """
    letters = counts.copy()
    letters.pop(NO_SCRIPT, None)
    kana = letters.pop("Hira", 0) + letters.pop("Kana", 0)
    if kana:
        letters["Jpan"] = kana + letters.pop("Hani", 0)
    return max(letters, key=lambda name: (letters[name], name)) if letters else NO_SCRIPT


def is_main_script(counts: Counter[str], code: str) -> bool:
    """Whether no other script has more letters than the scripts that an ISO 15924 code stands for, and they have some.

    Kana count as one script where the code is not `Jpan`.
    """
    letters = Counter({**counts, "Kana": counts["Hira"] + counts["Kana"], "Hira": 0, NO_SCRIPT: 0})
    parts = _PARTS.get(code, (code,))
    written = sum(letters[name] for name in parts)
    return written > 0 and all(written >= count for name, count in letters.items() if name not in parts)


def script_share(text: str, code: str) -> float:
    """Share of letters in one of the scripts that ISO 15924 code names (`Jpan` is three of them); 0 without letters.

    Letters that many scripts share (`Zyyy`) count for none.
    """
    counts = scripts(text)
    counts.pop(NO_SCRIPT, None)
    written = sum(counts[name] for name in _PARTS.get(code, (code,)))
    return written / counts.total() if written else 0.0


def letters_or_words(text: str) -> list[str]:
    """Words between blanks; where a script is written without blanks, each letter with its marks is a word."""
    return list(_LETTER_OR_WORD.findall(text))


def _jieba() -> Callable[[str], list[str]]:
    jieba: Any = importlib.import_module("jieba")
    jieba.setLogLevel(logging.WARNING)
    return lambda line: [word for word in jieba.cut(line) if word.strip()]


def _fugashi() -> Callable[[str], list[str]]:
    fugashi: Any = importlib.import_module("fugashi")
    tagger = fugashi.Tagger("-O wakati -b 50000")
    return lambda line: tagger.parse(line).split()


_SEGMENTERS = {"zho": ("jieba", _jieba), "cmn": ("jieba", _jieba), "jpn": ("fugashi", _fugashi)}


@cache
def segmenter(language: str) -> Callable[[str], list[str]]:
    """What cuts a line of a language into words.

    jieba for Chinese and fugashi for Japanese where they are installed (the extra `words`), else letters; letters for
    the other languages written without blanks; `str.split` for all others.

    Args:
        language: code such as `kor_Hang`.
    """
    base, _, script = language.partition("_")
    name, make = _SEGMENTERS.get(base, ("", None))
    if make is None:
        return letters_or_words if script in _UNSPACED_CODES else str.split
    if importlib.util.find_spec(name) is None:
        _log.warning("%s is cut into letters, not words: pip install 'lm-eval-steering[words]' for %s", language, name)
        return letters_or_words
    return make()


def segmenters() -> str:
    """`zho:jieba-0.42.1,jpn:letters`: what is installed, because the number of tokens depends on it."""
    names = {code: name for code, (name, _) in _SEGMENTERS.items() if code != "cmn"}
    installed = {code: importlib.util.find_spec(name) is not None for code, name in names.items()}
    return ",".join(
        f"{code}:{f'{name}-{version(name)}' if installed[code] else 'letters'}" for code, name in names.items()
    )
