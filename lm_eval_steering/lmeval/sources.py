"""Where a family's rows come from: local files of the user first, then the hub, in a stated order; and their checks.

A folder of files is named by `--metadata '{"data_dir": "DIR"}'` or the environment variable STEERING_DATA. In it the
rows of one language and split are looked for as (LANGUAGE also in the hub's spelling, then in shorter ones)

    DIR/FAMILY/LANGUAGE.SPLIT.jsonl     the layout that `lm-eval-steering fetch-data --out DIR` writes
    DIR/FAMILY/LANGUAGE/SPLIT.jsonl     the layout of most repositories on the hub
    DIR/FAMILY/LANGUAGE.jsonl           where there is only one split

each also as .parquet; FAMILY is also tried as the last part of the hub id (`flores200` for `Muennighoff/flores200`).
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval_steering import languages
from lm_eval_steering.errors import SteeringError, UnknownLanguageError
from lm_eval_steering.files import parse_json_line, read_lines, write_json_lines

log = logging.getLogger(__name__)

VARIABLE = "STEERING_DATA"
ENDINGS = (".jsonl", ".parquet")
CONVERTED = "refs/convert/parquet"  # the branch on which the hub keeps every data set as parquet, scripts included
DatasetRows = list[dict[str, Any]]


@dataclass(frozen=True)
class LocatedRow:
    """A row, and where it stands: `FILE, line 3`, or `FILE, row 3` where a file has no lines."""

    where: str
    row: dict[str, Any]


class DataError(SteeringError):
    """Rows that are unavailable, or not what their family needs."""


@dataclass(frozen=True)
class Hub:
    """One location on the hub, in the words of `datasets.load_dataset`."""

    path: str
    name: str | None = None
    split: str = "test"
    revision: str | None = None
    data_files: str | None = None

    def __str__(self) -> str:
        parts = [self.path, self.name or "", self.data_files or "", f"split {self.split}"]
        return " ".join(part for part in parts if part) + (f" at {self.revision}" if self.revision else "")


@dataclass(frozen=True)
class RowsSource:
    """The rows of one family, language and split.

    Attributes:
        family: Folder of local files.
        language: A FLORES code, or a pair `eng_Latn-fra_Latn`.
        split: In the hub's words.
        columns: What every row must have.
        hub: Where to look where there is no local file, in this order.
        skip_incomplete: Leave rows out, with a warning, whose value in a column is null; refused otherwise.
        may_be_empty: Columns whose text may be empty, such as one of four options.
    """

    family: str
    language: str
    split: str
    columns: tuple[str, ...]
    hub: tuple[Hub, ...] = ()
    skip_incomplete: bool = False
    may_be_empty: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.family} {self.language} {self.split}"

    def at_split(self, split: str | None) -> RowsSource:
        """The same rows of another split (`--metadata '{"split": "validation"}'`)."""
        if split is None or split == self.split:
            return self
        return replace(self, split=split, hub=tuple(_hub_at(hub, self.split, split) for hub in self.hub))


def _hub_at(hub: Hub, old: str, new: str) -> Hub:
    files = hub.data_files.replace(old, new) if hub.data_files else None
    return replace(hub, split=new, data_files=files)


def hub_copies(path: str, name: str, split: str, *copies: str) -> tuple[Hub, ...]:
    """The usual order: the repository as it is, its parquet conversion, then other copies."""
    return (
        Hub(path, name, split),
        Hub(path, split=split, revision=CONVERTED, data_files=f"{name}/{split}/*.parquet"),
        *(Hub(copy, name, split) for copy in copies),
    )


def load_rows(source: RowsSource, settings: Mapping[str, Any]) -> DatasetRows:
    """The rows, each with at least the source's columns.

    Args:
        source: Which rows.
        settings: lm-eval's metadata and model arguments, as a `custom_dataset` function gets them; `data_dir` names
            the user's folder, `split` another split.

    Raises:
        DataError: if they are nowhere (the message names all locations that were tried and the file to provide), or if
            what is there first is not what the family needs; see `checked_rows`.
    """
    source = source.at_split(settings.get("split"))
    folder = data_folder(settings)
    path = find_file(folder, source) if folder else None
    if path is not None:
        located, origin = read_located(path), str(path)
    else:
        rows, origin = _first_on_hub(source, folder)
        located = [LocatedRow(f"{origin}, row {number}", row) for number, row in enumerate(rows, start=1)]
    checked = checked_rows(located, source, origin)
    log.info("%s: %d rows from %s", source, len(checked), origin)
    for observed_rows in _observers:
        observed_rows.append((source, checked))
    return checked


_observers: list[list[tuple[RowsSource, DatasetRows]]] = []


@contextmanager
def observed() -> Iterator[list[tuple[RowsSource, DatasetRows]]]:
    """Collects what is loaded meanwhile, so that `fetch-data` needs to know nothing of any family."""
    collected: list[tuple[RowsSource, DatasetRows]] = []
    _observers.append(collected)
    try:
        yield collected
    finally:
        _observers.remove(collected)


def data_folder(settings: Mapping[str, Any]) -> Path | None:
    """The user's folder: `data_dir` of the settings before the environment variable STEERING_DATA."""
    for name, value in (("data_dir", settings.get("data_dir")), (VARIABLE, os.environ.get(VARIABLE))):
        if value:
            folder = Path(str(value)).expanduser()
            if not folder.is_dir():
                raise DataError(f"{name}={value}: no such folder")
            return folder
    return None


def file_names(source: RowsSource) -> Iterator[str]:
    """Where the rows may lie inside a folder, without the ending, the most exact first."""
    families = dict.fromkeys([source.family, *(hub.path.rsplit("/", maxsplit=1)[-1] for hub in source.hub)])
    names = dict.fromkeys([source.language, *(hub.name for hub in source.hub if hub.name), *_short(source.language)])
    for pattern in ("{}/{}.{}", "{}/{}/{}", "{}/{}"):
        for family in families:
            for name in names:
                yield pattern.format(family, name, source.split)


def _short(language: str) -> tuple[str, ...]:
    try:
        return languages.spellings(language)
    except (UnknownLanguageError, ValueError):  # a pair
        return ()


def find_file(folder: Path, source: RowsSource) -> Path | None:
    """The first file of a folder that holds the rows."""
    candidates = (folder / f"{name}{ending}" for name in file_names(source) for ending in ENDINGS)
    return next((path for path in candidates if path.is_file()), None)


def read_located(path: Path) -> list[LocatedRow]:
    """All rows of a .jsonl, .parquet, .csv or .tsv file, each with the line or row that it stands in.

    A .tsv file knows no quotes: a tab ends a value, whatever stands between.

    Raises:
        DataError: naming the file and, where there is one, the line: not JSON, no object, no parquet, not UTF-8; and
            another kind of file.
    """
    if path.suffix in (".csv", ".tsv"):
        return _read_table(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: expected a .jsonl, .parquet, .csv or .tsv file")
    if path.suffix == ".parquet":
        return [LocatedRow(f"{path}, row {number}", row) for number, row in enumerate(_read_parquet(path), start=1)]
    lines = ((f"{path}, line {number}", line) for number, line in read_lines(path, DataError) if line.strip())
    return [LocatedRow(where, parse_json_line(line, where, DataError)) for where, line in lines]


def _read_table(path: Path) -> list[LocatedRow]:
    plain = path.suffix == ".tsv"
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(
                lines, delimiter="\t" if plain else ",", quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
            )
            return [LocatedRow(f"{path}, line {reader.line_num}", dict(row)) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a table of text ({error})") from None


def _read_parquet(path: Path) -> DatasetRows:
    import pyarrow
    from pyarrow import parquet

    try:
        return list(parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({error})") from None


# --- Content of rows --------------------------------------------------------------------------------------------------


def checked_rows(rows: Sequence[LocatedRow], source: RowsSource, origin: str) -> DatasetRows:
    """The rows that have every column.

    Raises:
        DataError: naming file and line, for no rows at all, a row without a column, an empty text in one, a text that
            is not Unicode (a lone surrogate, which no tokenizer and no Arrow table takes), and an `id` that two rows
            have.
    """
    if not rows:
        raise DataError(f"{origin}: no rows for {source}")
    complete, incomplete = [], []
    for located in rows:
        refuse_invalid_text(located.row, located.where)
        missing = [column for column in source.columns if located.row.get(column) is None]
        if not missing:
            refuse_empty_texts(located.row, source, located.where)
            complete.append(located)
        elif source.skip_incomplete and all(column in located.row for column in missing):
            incomplete.append(located)
        else:
            columns = ", ".join(key for key, value in located.row.items() if value is not None)
            raise DataError(
                f"{located.where}: no {' and no '.join(map(repr, missing))}, which {source.family} needs; "
                f"columns with a value: {columns}"
            )
    if not complete:
        raise DataError(f"{origin}: no row for {source} has all of {', '.join(source.columns)}")
    if incomplete:
        lines = ", ".join(located.where.rsplit(" ", maxsplit=1)[-1] for located in incomplete)
        log.warning("%s: left out %d of %d rows that lack a value: %s", origin, len(incomplete), len(rows), lines)
    _refuse_duplicate_ids(complete)
    return [located.row for located in complete]


def refuse_invalid_text(row: Mapping[str, Any], where: str) -> None:
    """Raises DataError for a lone surrogate (half of a character, as a text that was cut in JSON's escapes has)."""
    for column, value in row.items():
        for text in _texts(value):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{where}: the text of {column!r} holds a lone surrogate, half of a character: "
                    f"U+{ord(text[error.start]):04X} at character {error.start + 1}; write it again from its source"
                ) from None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def refuse_empty_texts(row: Mapping[str, Any], source: RowsSource, where: str) -> None:
    """Raises DataError for a text without a character that is not a blank, in a column that must have one."""
    for column in source.columns:
        if column not in source.may_be_empty and any(not text.strip() for text in _texts(row[column])):
            raise DataError(
                f"{where}: the text of {column!r} is empty, which {source.family} cannot score; give it a text or "
                "leave the row out"
            )


def _refuse_duplicate_ids(rows: Sequence[LocatedRow]) -> None:
    first: dict[str, str] = {}
    for located in rows:
        if located.row.get("id") is not None:
            key = str(located.row["id"])
            if key in first:
                raise DataError(f"{located.where}: the id {key!r} is that of {first[key]} too; each row needs another")
            first[key] = located.where


def _first_on_hub(source: RowsSource, folder: Path | None) -> tuple[DatasetRows, str]:
    tried = [f"{folder}/{source.family} (no file of that name)" if folder else f"no local folder ({VARIABLE} not set)"]
    for hub in source.hub:
        try:
            rows = [dict(row) for row in _from_hub(hub)]
            if len(tried) > 1:
                log.warning("%s is read from %s, since this failed: %s", source, hub, "; ".join(tried[1:]))
            return rows, str(hub)
        except Exception as error:  # whatever the hub or its client answers, the next location may have the rows
            tried.append(f"{hub} ({type(error).__name__}: {_first_line(error)})")
    offline = " (offline: HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set)" if _offline() else ""
    raise DataError(
        f"no rows for {source}{offline}. Tried: {'; '.join(tried)}. To provide them: put "
        f"{source.family}/{source.language}.{source.split}.jsonl with the fields {', '.join(source.columns)} in a "
        f"folder and name it by {VARIABLE} or --metadata '{{\"data_dir\": ...}}'; where there is a network, "
        f"`lm-eval-steering fetch-data --tasks ... --out DIR` writes it"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


def _offline() -> bool:
    return any(os.environ.get(name, "0").upper() in {"1", "TRUE", "YES", "ON"} for name in _OFFLINE)


_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@lru_cache(maxsize=8)  # tasks that share their rows (the domains of INCLUDE) follow one another
def _from_hub(hub: Hub) -> tuple[dict[str, Any], ...]:
    from datasets import load_dataset

    if hub.data_files:  # a pattern alone would be called split `train`
        files = {hub.split: hub.data_files}
        return tuple(load_dataset(hub.path, data_files=files, split=hub.split, revision=hub.revision))
    return tuple(load_dataset(hub.path, hub.name, split=hub.split, revision=hub.revision))


def write_rows(folder: Path, source: RowsSource, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows where `load_rows` looks first; complete or not at all."""
    path = folder / source.family / f"{source.language}.{source.split}.jsonl"
    write_json_lines(path, map(dict, rows))
    return path


def as_dataset(documents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What lm-eval expects of a `custom_dataset` function, always under the split name `test`."""
    from datasets import Dataset

    return {"test": Dataset.from_list([dict(document) for document in documents])}
