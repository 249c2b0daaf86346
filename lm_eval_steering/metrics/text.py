"""Text as the metrics see it: cleaned once, its letters and their scripts, and its words."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import regex  # type: ignore[import-untyped]

_log = logging.getLogger("lm_eval.steering")

# Blanks of every kind, control characters, and halves of surrogate pairs, which no encoder takes.
_BLANKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")

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

# Scripts written without blanks between words: there a letter with its marks stands for a word.
_UNSPACED = ("Hani", "Hira", "Kana", "Thai", "Laoo", "Khmr", "Mymr", "Tibt")
_UNSPACED_CLASS = "".join(rf"\p{{Script={name}}}" for name in _UNSPACED)
_WORD = regex.compile(rf"[{_UNSPACED_CLASS}]\p{{M}}*|[^\s{_UNSPACED_CLASS}]+")


def clean(text: str) -> str:
    """The text on one line: runs of blanks, newlines and control characters become one blank, none at the ends."""
    return _BLANKS.sub(" ", text).strip()


class _ScriptOf(dict[str, str]):
    """Character -> script of a letter, empty for what is no letter; looked up once for each character."""

    def __missing__(self, character: str) -> str:
        names = _SCRIPTS if character.isalpha() else ()
        found = next((name for name in names if _in_script(name).match(character)), NO_SCRIPT if names else "")
        self[character] = found
        return found


_script_of = _ScriptOf()


@cache
def _in_script(name: str) -> Any:
    return regex.compile(rf"\p{{Script={name}}}")


def scripts(text: str) -> Counter[str]:
    """Number of letters in each script, by Unicode's property Script; letters that many share are `Zyyy`.

    Letters are the characters of Unicode's categories L*; digits, marks, signs and emoji are none.
    """
    found = Counter(map(_script_of.__getitem__, text))
    del found[""]
    return found


def main_script(counts: Counter[str]) -> str:
    """ISO 15924 code of the script of most letters; `Jpan` for kana with or without Han, `Zyyy` without letters.

    `Hani` stands for Han alone: letters do not tell simplified from traditional.
    """
    found = counts.copy()
    found.pop(NO_SCRIPT, None)
    kana = found.pop("Hira", 0) + found.pop("Kana", 0)
    if kana:
        found["Jpan"] = kana + found.pop("Hani", 0)
    return max(found, key=lambda name: (found[name], name)) if found else NO_SCRIPT


def script_share(text: str, code: str) -> float:
    """Share of letters in one of the scripts that ISO 15924 code names (`Jpan` is three of them); 0 without letters.

    Letters that many scripts share (`Zyyy`) count for none.
    """
    found = scripts(text)
    found.pop(NO_SCRIPT, None)
    own = sum(found[name] for name in _PARTS.get(code, (code,)))
    return own / found.total() if own else 0.0


def words(text: str) -> list[str]:
    """Words between blanks; where a script is written without blanks, each letter with its marks is a word."""
    return list(_WORD.findall(text))


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

    jieba for Chinese and fugashi for Japanese where they are installed (the extra `words`), else `words`, by letters.
    """
    name, make = _SEGMENTERS.get(language.split("_", maxsplit=1)[0], ("", None))
    if make is None:
        return words
    if importlib.util.find_spec(name) is None:
        _log.warning("%s is cut into letters, not words: pip install 'lm-eval-steering[words]' for %s", language, name)
        return words
    return make()


def segmenters() -> str:
    """`zho:jieba-0.42.1,jpn:letters`: what is at hand, because the number of tokens depends on it."""
    found = {code: name for code, (name, _) in _SEGMENTERS.items() if code != "cmn"}
    here = {code: importlib.util.find_spec(name) is not None for code, name in found.items()}
    return ",".join(f"{code}:{f'{name}-{version(name)}' if here[code] else 'letters'}" for code, name in found.items())
