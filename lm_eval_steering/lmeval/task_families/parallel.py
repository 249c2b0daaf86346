"""Sentences of two languages that mean the same: FLORES by default, or any columns or files of the user's own."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.sources import CONVERTED, Hub, RowsSource, load_rows, read_file

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


def flores(code: str, split: str = "devtest") -> RowsSource:
    """FLORES-200 in one language; two languages are parallel by `id`."""
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

    `parallel` in the settings names the user's own: a path with `{lang}`, one file a language with the same number of
    lines; or one file with a column a language (.tsv, .csv, .jsonl, .parquet). A language may be spelled `fra_Latn`,
    `fra` or `fr`. Without it, FLORES-200.

    Raises:
        SteeringError: for what is missing, empty or not parallel.
    """
    own = settings.get("parallel")
    if own is None:
        return _by_id(first, second, settings)
    texts = [_own_texts(str(own), code) for code in (first, second)]
    if len(texts[0]) != len(texts[1]):
        raise SteeringError(
            f"parallel={own}: {len(texts[0])} lines in {first} and {len(texts[1])} in {second}; line by line, one "
            "must be the translation of the other"
        )
    pairs = enumerate(zip(*texts, strict=True), start=1)
    return [Pair(str(number), *both) for number, both in pairs if all(text.strip() for text in both)]


def _by_id(first: str, second: str, settings: Mapping[str, Any]) -> list[Pair]:
    one, other = (
        {str(row["id"]): str(row["sentence"]) for row in load_rows(flores(code), settings)} for code in (first, second)
    )
    if one.keys() != other.keys():
        raise SteeringError(
            f"FLORES in {first} and {second}: {len(one)} and {len(other)} sentences, {len(one.keys() & other.keys())} "
            "ids in both; take both from the same copy"
        )
    return [Pair(id_, one[id_], other[id_]) for id_ in one]


def _own_texts(parallel: str, code: str) -> list[str]:
    if _LANG in parallel:
        path = _spelled(parallel, code)
        if path.suffix in (".jsonl", ".parquet"):
            return [_only_text(row, path) for row in read_file(path)]
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    path = Path(parallel).expanduser()
    if not path.is_file():
        raise SteeringError(f"parallel={parallel}: no such file")
    return _column(path, code)


def _spelled(pattern: str, code: str) -> Path:
    paths = [Path(pattern.replace(_LANG, name)).expanduser() for name in languages.spellings(code)]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise SteeringError(f"parallel={pattern}: no file for {code}; tried {', '.join(map(str, paths))}")
    return found


def _only_text(row: Mapping[str, Any], path: Path) -> str:
    for column in ("sentence", "text"):
        if isinstance(row.get(column), str):
            return str(row[column])
    raise SteeringError(f"{path}: expected a column 'sentence' or 'text', found {', '.join(row)}")


def _column(path: Path, code: str) -> list[str]:
    rows = _table(path)
    spelled = languages.spellings(code)
    name = next((name for name in spelled if rows and name in rows[0]), None)
    if name is None:
        found = ", ".join(map(str, rows[0])) if rows else "no rows"
        raise SteeringError(f"{path}: no column for {code} (one of {', '.join(spelled)}); found {found}")
    return [str(row.get(name) or "") for row in rows]


def _table(path: Path) -> list[dict[str, Any]]:
    if path.suffix in (".jsonl", ".parquet"):
        return read_file(path)
    if path.suffix not in (".tsv", ".csv"):
        raise SteeringError(f"{path}: expected .tsv, .csv, .jsonl or .parquet, or {_LANG} in the name")
    plain = path.suffix == ".tsv"
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(
            lines, delimiter="\t" if plain else ",", quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
        )
        return [dict(row) for row in reader]


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
    place = min(max(round(share * len(parts)), 1), len(parts) - 1)
    blank = "" if unspaced(code) else " "
    first, second = blank.join(parts[:place]), blank.join(parts[place:])
    return (first.strip(), second.strip()) if first.strip() and second.strip() else None


def _characters(text: str) -> list[str]:
    clusters: list[str] = []
    for character in text:
        if clusters and (character in _SIGNS or unicodedata.category(character).startswith("M")):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters
