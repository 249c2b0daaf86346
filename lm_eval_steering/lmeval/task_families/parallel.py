"""Sentences of two languages that mean the same: FLORES by default, or any columns or files of the user."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.sources import (
    CONVERTED,
    Hub,
    LocatedRow,
    RowsSource,
    load_rows,
    read_located,
    refuse_invalid_text,
)
from lm_eval_steering.metrics.language_id import UNKNOWN, Identified, LanguageIdentifier, in_language

# Scripts that are written without blanks between words.
UNSPACED = ("Hans", "Hant", "Jpan", "Thai", "Laoo", "Khmr", "Mymr", "Tibt")
_LANG = "{lang}"
_SIGNS = "\u0e33\u0eb3"  # Thai and Lao am: no marks for Unicode, yet part of the letter before them


@dataclass(frozen=True)
class Pair:
    """One sentence in two languages."""

    id: str
    first: str
    second: str


def flores(code: str) -> RowsSource:
    """FLORES-200 in one language; two languages are parallel by `id`."""
    split = "devtest"
    return RowsSource(
        "flores200",
        code,
        split,
        ("id", "sentence"),
        (
            # Both began as scripts, which `datasets` no longer runs: the conversion first.
            Hub("facebook/flores", split=split, revision=CONVERTED, data_files=f"{code}/{split}/*.parquet"),
            Hub("Muennighoff/flores200", split=split, revision=CONVERTED, data_files=f"{code}/{split}/*.parquet"),
            Hub("Muennighoff/flores200", code, split),
        ),
    )


def read_pairs(first: str, second: str, settings: Mapping[str, Any]) -> list[Pair]:
    """Parallel sentences of two languages.

    `parallel` in the settings names files of the user: a path with `{lang}`, one file a language with the same number
    of lines; or one file with a column a language (.tsv, .csv, .jsonl, .parquet). A language may be spelled `fra_Latn`,
    `fra` or `fr`. Without it, FLORES-200.

    Raises:
        SteeringError: naming file and line, for what is missing, empty or not parallel; and where most sentences are
            the same text on both sides.
    """
    given = settings.get("parallel")
    if given is None:
        return _by_id(first, second, settings)
    sides = [_texts_of(str(given), code) for code in (first, second)]
    if len(sides[0]) != len(sides[1]):
        raise SteeringError(
            f"parallel={given}: {len(sides[0])} lines in {first} and {len(sides[1])} in {second}; line by line, one "
            "must be the translation of the other"
        )
    pairs = []
    for number, (one, other) in enumerate(zip(*sides, strict=True), start=1):
        empty = [side for side in (one, other) if not side.text.strip()]
        if len(empty) == 1:
            raise SteeringError(f"{empty[0].where}: empty, while its counterpart in the other language is not")
        if not empty:
            pairs.append(Pair(str(number), one.text, other.text))
    return _in_two_languages(pairs, f"parallel={given}", first, second)


def _by_id(first: str, second: str, settings: Mapping[str, Any]) -> list[Pair]:
    one, other = (
        {str(row["id"]): str(row["sentence"]) for row in load_rows(flores(code), settings)} for code in (first, second)
    )
    if one.keys() != other.keys():
        raise SteeringError(
            f"FLORES in {first} and {second}: {len(one)} and {len(other)} sentences, {len(one.keys() & other.keys())} "
            "ids in both; take both from the same copy"
        )
    return _in_two_languages([Pair(id_, one[id_], other[id_]) for id_ in one], "FLORES", first, second)


# Of so many sentences the language is identified; it is one language where so large a share of both sides is that.
_LOOKED_AT, _ONE_LANGUAGE = 100, 0.9
# Languages that identifiers take for one another: Malay is mostly labelled Indonesian.
_CLOSE = ({"bos", "hrv", "srp"}, {"ind", "zsm"}, {"nno", "nob"})


def _in_two_languages(pairs: list[Pair], origin: str, first: str, second: str) -> list[Pair]:
    """The pairs, unless both sides are in one language: the same texts, or texts that are identified as one language.

    Raises:
        SteeringError: naming the language and both that were expected.
    """
    same = sum(pair.first == pair.second for pair in pairs)
    if 2 * same > len(pairs):
        raise SteeringError(
            f"{origin}: {same} of {len(pairs)} sentences are the same text in {first} and in {second}; two languages "
            "are expected, so one of the files or columns is in the wrong language"
        )
    one, other = (_main_language([getattr(pair, side) for pair in pairs[:_LOOKED_AT]]) for side in ("first", "second"))
    label = one.language
    fits_both = in_language(label, first) and in_language(label, second)  # as two kinds of Arabic
    close = any({code.partition("_")[0] for code in (first, second)} <= group for group in _CLOSE)
    shares = one.confidence, other.confidence
    if label == other.language != UNKNOWN and min(shares) >= _ONE_LANGUAGE and not fits_both and not close:
        raise SteeringError(
            f"{origin}: {shares[0]:.0%} of the sentences in {first} and {shares[1]:.0%} of those in {second} are "
            f"identified as {label}; two languages are expected, so one of the files or columns is in the wrong one"
        )
    return pairs


def _main_language(texts: list[str]) -> Identified:
    """The language that most texts are identified as, with their share as confidence; `unknown` for no texts."""
    if not texts:
        return Identified(UNKNOWN, 0.0)
    ((label, number),) = Counter(each.language for each in LanguageIdentifier().identify(texts)).most_common(1)
    return Identified(label, number / len(texts))


@dataclass(frozen=True)
class _LocatedText:
    """A sentence, and where it stands."""

    where: str
    text: str


def _texts_of(parallel: str, code: str) -> list[_LocatedText]:
    if _LANG in parallel:
        path = _spelled(parallel, code)
        if path.suffix in (".jsonl", ".parquet"):
            return [_LocatedText(row.where, _only_text(row)) for row in read_located(path)]
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return [_LocatedText(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1)]
    path = Path(parallel).expanduser()
    if not path.is_file():
        raise SteeringError(f"parallel={parallel}: no such file")
    return _column(path, code)


def _spelled(pattern: str, code: str) -> Path:
    paths = [Path(pattern.replace(_LANG, name)).expanduser() for name in languages.spellings(code)]
    existing = next((path for path in paths if path.is_file()), None)
    if existing is None:
        raise SteeringError(f"parallel={pattern}: no file for {code}; tried {', '.join(map(str, paths))}")
    return existing


def _only_text(located: LocatedRow) -> str:
    refuse_invalid_text(located.row, located.where)
    for column in ("sentence", "text"):
        if isinstance(located.row.get(column), str):
            return str(located.row[column])
    raise SteeringError(f"{located.where}: expected a column 'sentence' or 'text', got {', '.join(located.row)}")


def _column(path: Path, code: str) -> list[_LocatedText]:
    rows = read_located(path)
    spelled = languages.spellings(code)
    name = next((name for name in spelled if rows and name in rows[0].row), None)
    if name is None:
        columns = ", ".join(map(str, rows[0].row)) if rows else "no rows"
        raise SteeringError(f"{path}: no column for {code} (one of {', '.join(spelled)}); the file has {columns}")
    for located in rows:
        refuse_invalid_text({name: located.row.get(name)}, located.where)
    return [_LocatedText(located.where, str(located.row.get(name) or "")) for located in rows]


# --- cutting a sentence in two ----------------------------------------------------------------------------------------


def unspaced(code: str) -> bool:
    """Whether a language is written without blanks between words."""
    return code.split("_")[1] in UNSPACED


def joint(left: str, right: str) -> str:
    """What stands between text of one language and text of another: nothing where both are written without blanks."""
    return "" if unspaced(left) and unspaced(right) else " "


def cut(text: str, share: float, code: str) -> tuple[str, str] | None:
    """A sentence in two at a share of its words, of its characters where the script has no blanks; None if too short.

    Both parts have at least one word. A character keeps the marks that combine with it.
    """
    parts = _characters(text.strip()) if unspaced(code) else text.split()
    if len(parts) < 2:
        return None
    end = min(max(round(share * len(parts)), 1), len(parts) - 1)
    blank = "" if unspaced(code) else " "
    first, second = blank.join(parts[:end]), blank.join(parts[end:])
    return (first.strip(), second.strip()) if first.strip() and second.strip() else None


def _characters(text: str) -> list[str]:
    clusters: list[str] = []
    for character in text:
        if clusters and (character in _SIGNS or unicodedata.category(character).startswith("M")):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters
