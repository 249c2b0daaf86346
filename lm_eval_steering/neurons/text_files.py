"""Text in local files: plain text, JSON lines and parquet, read with errors that name the file and the line."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import CorpusError

LINES = (".txt", ".dev", ".devtest", ".test", ".train", ".valid")  # one document a line; FLORES has its own
SUFFIXES = (*LINES, ".jsonl", ".jsonl.gz", ".parquet")
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
        """Names and hashes of the files."""
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
        where = f"{path}, line {number}"
        return as_text(record[self._column(list(record), where)], where)

    def _parquet(self, path: Path) -> Iterator[str]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            file = ParquetFile(path)
            column = self._column(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(columns=[column]):
                yield from (as_text(value, str(path)) for value in batch.column(0).to_pylist())
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path}: not UTF-8 ({error.reason})") from None
        except (pyarrow.ArrowException, OSError) as error:
            raise CorpusError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})") from None

    def _column(self, there: list[str], where: str) -> str:
        for column in self.columns:
            if column in there:
                return column
        raise CorpusError(
            f"{where}: no column {self.columns[0]!r}, found {', '.join(there)}; say which with ?column=NAME"
        )


def as_text(value: Any, where: str) -> str:
    """A document; nothing is none, and what is not text is refused rather than written out.

    Raises:
        CorpusError: naming the place and the type.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(f"{where}: expected text, found {type(value).__name__}; another column with ?column=NAME")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where}: not text that UTF-8 can hold ({error.reason})") from None
    return value


def find_files(place: str, language: str, names: Sequence[str], per_file: bool) -> tuple[Path, ...]:
    """The files that a folder, a pattern with `{lang}`, or one file for all languages has for a language.

    Args:
        place: folder, pattern or file.
        language: code of the form fra_Latn.
        names: how the place may spell it, the most exact first.
        per_file: whether a file holds one language, so that `{lang}` must tell which.

    Raises:
        CorpusError: if there is none, it is not clear which, or none of a kind that can be read.
    """
    path = str(Path(place).expanduser())
    if re.search(r"\{lang\}[*?\[\w]", path):
        raise CorpusError(f"corpus {place!r}: {_LANG} needs a separator after it, or fr* would take Frisian for French")
    if Path(path).is_dir() and _LANG not in path:
        found = _one_of([f"{glob.escape(path)}/{_LANG}{suffix}" for suffix in SUFFIXES], language, names)
    elif _LANG in path or not per_file:
        found = _one_of([path], language, names)
    else:
        raise CorpusError(
            f"corpus {place!r}: expected a folder with a file for each language, a path with {_LANG} in it, one file "
            f"with {_LANG} in its column, or hf:DATASET"
        )
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise CorpusError(f"{file}: cannot be read as text; expected one of {', '.join(SUFFIXES)}")
    return found


def _one_of(patterns: list[str], language: str, names: Sequence[str]) -> tuple[Path, ...]:
    """Files of the first spelling of the language that any pattern finds."""
    for name in names:
        found = {pattern: sorted(glob.glob(pattern.replace(_LANG, name))) for pattern in patterns}  # noqa: PTH207
        hits = [files for files in found.values() if files]
        if len(hits) > 1:
            raise CorpusError(
                f"corpus for {language}: both {hits[0][0]} and {hits[1][0]} are there; name one as a path with {_LANG}"
            )
        files = tuple(Path(file) for file in hits[0] if Path(file).is_file()) if hits else ()
        if files:
            return files
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
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path}: cannot be read ({error})") from None


def _identity(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
