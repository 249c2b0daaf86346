"""Where text comes from: local files or a dataset of the Hugging Face hub, one syntax for all.

    text                                            a folder with fra_Latn.txt, ind_Latn.jsonl.gz, ...
    text/{lang}/*.txt?documents=file                files by pattern, one document a file
    flores200/{lang}.devtest                        FLORES-style parallel files
    parallel.parquet?column=sentence_{lang}         one file with a column for each language
    hf:wikimedia/wikipedia?config=20231101.{lang}   a dataset of the hub, streamed

`{lang}` stands for the language as the corpus spells it: the first of `fra_Latn`, `fra-Latn`, `fra`, `fr` that exists.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from lm_eval_steering.errors import CorpusError, did_you_mean
from lm_eval_steering.files import parse_json_line, read_lines
from lm_eval_steering.languages import normalise, spellings

LINES = (".txt", ".dev", ".devtest", ".test", ".train", ".valid")  # one document a line; FLORES has its own
SUFFIXES = (*LINES, ".jsonl", ".jsonl.gz", ".parquet")
LANG = "{lang}"
_HUB = "hf:"


class TextSource(Protocol):
    """The text of one language."""

    def documents(self) -> Iterator[str]:
        """Documents in order, without those that are empty; a CorpusError names what cannot be read."""

    def identity(self) -> dict[str, Any]:
        """What tells this text from another, in values that JSON can hold; no path of this machine."""


# --- Local files: plain text, JSON lines and parquet
#
# The `datasets` library would read them too, but its errors name neither the file nor the line, it cuts text at other
# characters than newlines, and it takes a path for a pattern.


@dataclass(frozen=True)
class LocalFiles:
    """Files of one language.

    Attributes:
        language: whose text it is.
        files: read one after another.
        columns: of JSON lines and parquet; the first of these that exists.
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
            for number, line in read_lines(path, CorpusError):
                if line.strip():
                    yield self._from_json(f"{path}, line {number}", line)
        elif self.whole:
            yield "\n".join(line for _, line in read_lines(path, CorpusError))
        else:
            yield from (line for _, line in read_lines(path, CorpusError))

    def _from_json(self, where: str, line: str) -> str:
        record = parse_json_line(line, where, CorpusError)
        return as_text(record[_column(self.columns, record, where)], where)

    def _parquet(self, path: Path) -> Iterator[str]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            file = ParquetFile(path)
            column = _column(self.columns, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(columns=[column]):
                yield from (as_text(value, str(path)) for value in batch.column(0).to_pylist())
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path}: not UTF-8 ({error.reason})") from None
        except (pyarrow.ArrowException, OSError) as error:
            raise CorpusError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})") from None


def _column(wanted: Sequence[str], available: Iterable[str], where: str) -> str:
    """The first of the wanted columns that is available."""
    for column in wanted:
        if column in available:
            return column
    raise CorpusError(f"{where}: no column {wanted[0]!r}, found {', '.join(available)}; name it with ?column=NAME")


def as_text(value: Any, where: str) -> str:
    """A document; None is an empty one, and what is not text is refused rather than converted.

    Raises:
        CorpusError: naming `where` and the type.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(f"{where}: expected text, got {type(value).__name__}; name another column with ?column=NAME")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where}: not text that UTF-8 can hold ({error.reason})") from None
    return value


def find_files(location: str, language: str, names: Sequence[str], per_file: bool) -> tuple[Path, ...]:
    """The files that a folder, a pattern with `{lang}`, or one file for all languages has for a language.

    Args:
        location: folder, pattern or file.
        language: code of the form fra_Latn.
        names: how the corpus may spell it, the most exact first.
        per_file: whether a file holds one language, so that `{lang}` must tell which.

    Raises:
        CorpusError: if there is none, several could be meant, or none is of a kind that can be read.
    """
    path = str(Path(location).expanduser())
    if re.search(r"\{lang\}[*?\[\w]", path):
        raise CorpusError(
            f"corpus {location!r}: {LANG} needs a separator after it, or fr* would take Frisian for French"
        )
    fixed = Path(re.split(r"[^/]*[*?\[{]", path)[0] or ".")  # what stands before the first sign of a pattern
    expected = (
        f"expected a folder with a file for each language, a path with {LANG} in it, one file with {LANG} in its "
        "column, or hf:DATASET"
    )
    if not fixed.exists():
        raise CorpusError(f"corpus {location!r}: {fixed} does not exist; {expected}{_way_to_the_hub(location)}")
    if Path(path).is_dir() and LANG not in path:
        files = _one_of([f"{glob.escape(path)}/{LANG}{suffix}" for suffix in SUFFIXES], language, names)
    elif LANG in path or not per_file:
        files = _one_of([path], language, names)
    else:
        raise CorpusError(f"corpus {location!r}: {expected}")
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise CorpusError(f"{file}: cannot be read as text; expected one of {', '.join(SUFFIXES)}")
    return files


def _way_to_the_hub(location: str) -> str:
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", location)
    return f"; a dataset of the hub is written hf:{location}" if is_hub_id else ""


def _one_of(patterns: list[str], language: str, names: Sequence[str]) -> tuple[Path, ...]:
    """Files of the first spelling of the language that any pattern finds."""
    for name in names:
        hits = [files for pattern in patterns if (files := sorted(glob.glob(pattern.replace(LANG, name))))]  # noqa: PTH207
        if len(hits) > 1:
            raise CorpusError(
                f"corpus for {language}: both {hits[0][0]} and {hits[1][0]} exist; name one as a path with {LANG}"
            )
        if found := tuple(Path(file) for file in (hits[0] if hits else ()) if Path(file).is_file()):
            return found
    tried = patterns[0].replace(LANG, names[0])
    raise CorpusError(f"corpus for {language}: no file {tried} (nor {', '.join(names[1:])} for {names[0]})")


def _identity(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# --- What the user writes


@dataclass(frozen=True)
class Corpus:
    """Text in several languages: files or a dataset.

    Attributes:
        location: path, pattern, or `hf:` and the id of a dataset.
        column: name of the text's column in JSON lines, parquet and datasets; may hold `{lang}`.
        documents: in a plain text file, one document a `line` or a `file`.
        config: of a dataset; may hold `{lang}`.
        split: of a dataset.
        revision: of a dataset.
        names: how the corpus spells a language where no rule leads to it, `zho_Hans:zh-cn+por_Latn:pt-br`.
    """

    location: str
    column: str = "text"
    documents: str = "line"
    config: str = LANG
    split: str = "train"
    revision: str = "main"
    names: str = ""

    @classmethod
    def parse(cls, text: str) -> Corpus:
        """From `LOCATION?option=value&option=value`.

        Raises:
            CorpusError: for an option that is not known.
        """
        location, _, query = str(text).partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        known = [field.name for field in fields(cls) if field.name != "location"]
        for name in options:
            if name not in known:
                raise CorpusError(f"corpus {text!r}: unknown option {name!r}{did_you_mean(name, known)}")
        corpus = cls(location, **options)
        if corpus.documents not in {"line", "file"}:
            raise CorpusError(f"corpus {text!r}: documents={corpus.documents!r}, expected line or file")
        of_datasets = {"config", "split", "revision"} & set(options)
        if of_datasets and not corpus.is_dataset:
            raise CorpusError(f"corpus {text!r}: {sorted(of_datasets)[0]}= belongs to hf:DATASET, this is a local text")
        if corpus.is_dataset and LANG not in corpus.config + corpus.split + corpus.column:
            raise CorpusError(f"corpus {text!r}: one text for every language; put {LANG} in config=, split= or column=")
        corpus.spellings("eng_Latn")  # a mistake in names= is found here
        return corpus

    @property
    def is_dataset(self) -> bool:
        """Whether the text is a dataset of the hub."""
        return self.location.startswith(_HUB)

    def spellings(self, language: str) -> tuple[str, ...]:
        """How the corpus may spell a language: as `names` has it, else by the rules.

        Raises:
            CorpusError: if `names` is not CODE:NAME joined by `+`.
        """
        given = {}
        for pair in filter(None, self.names.split("+")):
            code, colon, name = pair.partition(":")
            if not colon or not name:
                raise CorpusError(f"corpus {self.location}: names={self.names!r}, expected CODE:NAME joined by +")
            given[normalise(code)] = name
        return (given[language],) if language in given else spellings(language)

    @property
    def name(self) -> str:
        """What to call it in an artefact: never a path of this machine."""
        return self.location if self.is_dataset else Path(self.location).name

    def identity(self, language: str) -> dict[str, Any]:
        """What tells this text from another, without a network.

        Files are hashed; a dataset is known by what was asked for.
        """
        if not self.is_dataset:
            return self.source(language).identity()
        # `place` is the name that recordings on disk have.
        return {
            "place" if field.name == "location" else field.name: getattr(self, field.name) for field in fields(self)
        }

    def source(self, language: str) -> TextSource:
        """The text of one language.

        Raises:
            CorpusError: if there is none.
        """
        names = self.spellings(language)
        columns = tuple(dict.fromkeys(self.column.replace(LANG, name) for name in names))
        if self.is_dataset:
            return HubDataset.find(self, language, columns)
        files = find_files(self.location, language, names, LANG not in self.column)
        return LocalFiles(language, files, columns, self.documents == "file")


@dataclass(frozen=True)
class HubDataset:
    """One language of a dataset that the `datasets` library streams.

    Attributes:
        language: whose text it is.
        path: id of the dataset, or a folder that holds one.
        config: its configuration.
        splits: names that its split may have.
        revision: the commit, where the hub can be asked for it.
        columns: names that the text's column may have.
    """

    language: str
    path: str
    config: str
    splits: tuple[str, ...]
    revision: str
    columns: tuple[str, ...]

    @classmethod
    def find(cls, corpus: Corpus, language: str, columns: tuple[str, ...]) -> HubDataset:
        """The configuration of a dataset that holds a language.

        Raises:
            CorpusError: if the dataset is unavailable, or has no such configuration.
        """
        import datasets

        path = corpus.location.removeprefix(_HUB)
        try:
            available = datasets.get_dataset_config_names(path, revision=corpus.revision)
        except Exception as error:  # the library raises a dozen classes of its own and of its network layers
            raise CorpusError(f"corpus {corpus.location}: {_first_line(error)}") from error
        names = corpus.spellings(language)
        wanted = [corpus.config.replace(LANG, name) for name in names]
        if LANG in corpus.column + corpus.split and len(available) == 1:  # every language in one configuration
            wanted.append(available[0])
        for config in wanted:
            if config in available:
                splits = tuple(corpus.split.replace(LANG, name) for name in names)
                commit = _commit(path, corpus.revision)
                return cls(language, path, config, tuple(dict.fromkeys(splits)), commit, columns)
        hint = did_you_mean(wanted[0], available)
        raise CorpusError(f"corpus {corpus.location} for {language}: no configuration {' or '.join(wanted)}{hint}")

    def documents(self) -> Iterator[str]:
        """Documents in order, streamed."""
        import datasets

        where = f"corpus hf:{self.path}, configuration {self.config}"
        try:
            dataset = datasets.load_dataset(self.path, self.config, revision=self.revision, streaming=True)
            split = next((name for name in self.splits if name in dataset), None)
            if split is None:
                raise CorpusError(f"{where}: no split {self.splits[0]!r}, found {', '.join(dataset)}")
            for row in dataset[split]:
                if text := as_text(row[_column(self.columns, row, where)], where).strip():
                    yield text
        except CorpusError:
            raise
        except Exception as error:
            raise CorpusError(f"{where}: {_first_line(error)}") from error

    def identity(self) -> dict[str, Any]:
        """Id, configuration, splits and commit."""
        return {"dataset": self.path, "config": self.config, "splits": list(self.splits), "commit": self.revision}


def _commit(path: str, revision: str) -> str:
    """The commit that a branch is at now, so that every language is read from the same one."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(path, revision=revision).sha or revision)
    except Exception:  # a folder, or no network: what was asked for
        return revision


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:297]}..."
