"""Text in local files: plain text, JSON lines and parquet, read with errors that name the file and the line."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import CorpusError
from lm_eval_steering.languages import spellings

LINES = (".txt", ".dev", ".devtest", ".test", ".train", ".valid")  # one document a line; FLORES has its own
SUFFIXES = (*LINES, ".jsonl", ".jsonl.gz", ".parquet")
_EDGE = 1 << 20  # bytes at each end of a file that tell it from another
_LANG = "{lang}"


@dataclass(frozen=True)
class LocalFiles:
    """Files of one language.

    Attributes:
        language: whose text it is.
        files: read one after another.
        columns: of JSON lines and parquet; the first of these that is there.
        whole: whether a plain text file is one document.
    """

    language: str
    files: tuple[Path, ...]
    columns: tuple[str, ...]
    whole: bool

    def documents(self) -> Iterator[str]:
        """Documents in order, without those that are empty.

        Raises:
            CorpusError: for what is not UTF-8, not JSON, without the column, or without any text.
        """
        empty = True
        for path in self.files:
            for document in self._read(path):
                if text := document.strip():
                    empty = False
                    yield text
        if empty:
            raise CorpusError(f"corpus for {self.language}: {self.files[0]} is empty")

    def identity(self) -> dict[str, Any]:
        """Names, sizes, and a hash over the first and last mebibyte of each file."""
        return {"files": [_identity(path) for path in self.files], "columns": list(self.columns), "whole": self.whole}

    def _read(self, path: Path) -> Iterator[str]:
        if path.name.endswith(".parquet"):
            yield from self._parquet(path)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            for number, line in _lines(path):
                if line.strip():
                    yield self._from_json(path, number, line)
        elif self.whole:
            yield "\n".join(line for _, line in _lines(path))
        else:
            yield from (line for _, line in _lines(path))

    def _from_json(self, path: Path, number: int, line: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise CorpusError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
        return str(record[self._column(list(record), f"{path}, line {number}")] or "")

    def _parquet(self, path: Path) -> Iterator[str]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            file = ParquetFile(path)
            column = self._column(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(columns=[column]):
                yield from (str(value or "") for value in batch.column(0).to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            raise CorpusError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})") from None

    def _column(self, there: list[str], where: str) -> str:
        for column in self.columns:
            if column in there:
                return column
        raise CorpusError(
            f"{where}: no column {self.columns[0]!r}, found {', '.join(there)}; say which with ?column=NAME"
        )


def find_files(place: str, language: str, per_file: bool) -> tuple[Path, ...]:
    """The files that a folder, a pattern with `{lang}`, or one file for all languages has for a language.

    Args:
        place: folder, pattern or file.
        language: code of the form fra_Latn.
        per_file: whether a file holds one language, so that `{lang}` must tell which.

    Raises:
        CorpusError: if there is none, it is not clear which, or none of a kind that can be read.
    """
    path = str(Path(place).expanduser())
    if Path(path).is_dir() and _LANG not in path:
        found = _one_of([f"{glob.escape(path)}/{_LANG}{suffix}" for suffix in SUFFIXES], language)
    elif _LANG in path or not per_file:
        found = _one_of([path], language)
    else:
        raise CorpusError(
            f"corpus {place!r}: expected a folder with a file for each language, a path with {_LANG} in it, one file "
            f"with {_LANG} in its column, or hf:DATASET"
        )
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise CorpusError(f"{file}: cannot be read as text; expected one of {', '.join(SUFFIXES)}")
    return found


def _one_of(patterns: list[str], language: str) -> tuple[Path, ...]:
    """Files of the first spelling of the language that any pattern finds."""
    names = spellings(language)
    for name in names:
        found = {pattern: sorted(glob.glob(pattern.replace(_LANG, name))) for pattern in patterns}  # noqa: PTH207
        hits = [files for files in found.values() if files]
        if len(hits) > 1:
            raise CorpusError(
                f"corpus for {language}: both {hits[0][0]} and {hits[1][0]} are there; name one as a path with {_LANG}"
            )
        if hits:
            return tuple(Path(file) for file in hits[0] if Path(file).is_file())
    tried = patterns[0].replace(_LANG, names[0])
    raise CorpusError(f"corpus for {language}: no file {tried} (nor {', '.join(names[1:])} for {names[0]})")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a plain or gzipped file.

    Only a newline ends a line: `str.splitlines` would also cut at characters that text may hold.
    """
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise CorpusError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
    except (OSError, EOFError) as error:
        raise CorpusError(f"{path}: cannot be read ({error})") from None


def _identity(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_EDGE))
        file.seek(max(_EDGE, size - _EDGE))
        digest.update(file.read())
    return {"name": path.name, "bytes": size, "sha256_of_ends": digest.hexdigest()}
