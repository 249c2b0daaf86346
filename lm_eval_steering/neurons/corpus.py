"""Where text comes from: local files or a dataset of the Hugging Face hub, one syntax for all.

    text                                            a folder with fra_Latn.txt, ind_Latn.jsonl.gz, ...
    text/{lang}/*.txt?documents=file                files by pattern, one document a file
    flores200/{lang}.devtest                        FLORES-style parallel files
    parallel.parquet?column=sentence_{lang}         one file with a column for each language
    hf:wikimedia/wikipedia?config=20231101.{lang}   a dataset of the hub, streamed

`{lang}` stands for the language as the place spells it: `fra_Latn`, `fra-Latn`, `fra` or `fr`, the first that is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from lm_eval_steering.errors import CorpusError, did_you_mean
from lm_eval_steering.languages import spellings
from lm_eval_steering.neurons.text_files import LocalFiles, find_files

LANG = "{lang}"
_HUB = "hf:"


class Source(Protocol):
    """The text of one language."""

    def documents(self) -> Iterator[str]:
        """Documents in order, without those that are empty; a CorpusError names what cannot be read."""

    def identity(self) -> dict[str, Any]:
        """What tells this text from another, in values that JSON can hold; no path of this machine."""


@dataclass(frozen=True)
class Corpus:
    """A place with text in several languages.

    Attributes:
        place: path, pattern, or `hf:` and the id of a dataset.
        column: name of the text's column in JSON lines, parquet and datasets; may hold `{lang}`.
        documents: in a plain text file, one document a `line` or a `file`.
        config: of a dataset; may hold `{lang}`.
        split: of a dataset.
        revision: of a dataset.
    """

    place: str
    column: str = "text"
    documents: str = "line"
    config: str = LANG
    split: str = "train"
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> Corpus:
        """From `PLACE?option=value&option=value`.

        Raises:
            CorpusError: for an option that is not known.
        """
        place, _, query = str(text).partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        known = [field.name for field in fields(cls) if field.name != "place"]
        for name in options:
            if name not in known:
                raise CorpusError(f"corpus {text!r}: unknown option {name!r}{did_you_mean(name, known)}")
        corpus = cls(place, **options)
        if corpus.documents not in {"line", "file"}:
            raise CorpusError(f"corpus {text!r}: documents={corpus.documents!r}, expected line or file")
        return corpus

    @property
    def name(self) -> str:
        """What to call it in an artefact: never a path of this machine."""
        return self.place if self.place.startswith(_HUB) else Path(self.place).name

    def source(self, language: str) -> Source:
        """The text of one language.

        Raises:
            CorpusError: if there is none.
        """
        columns = tuple(dict.fromkeys(self.column.replace(LANG, name) for name in spellings(language)))
        if self.place.startswith(_HUB):
            return HubDataset.find(self, language, columns)
        per_file = LANG not in self.column
        return LocalFiles(language, find_files(self.place, language, per_file), columns, self.documents == "file")


@dataclass(frozen=True)
class HubDataset:
    """One language of a dataset that the `datasets` library streams.

    Attributes:
        language: whose text it is.
        path: id of the dataset, or a folder that holds one.
        config: its configuration.
        split: its split.
        revision: branch, tag or commit.
        columns: names that the text's column may have.
    """

    language: str
    path: str
    config: str
    split: str
    revision: str
    columns: tuple[str, ...]

    @classmethod
    def find(cls, corpus: Corpus, language: str, columns: tuple[str, ...]) -> HubDataset:
        """The configuration of a dataset that holds a language.

        Raises:
            CorpusError: if the dataset cannot be had, or has no such configuration.
        """
        import datasets

        path = corpus.place.removeprefix(_HUB)
        try:
            there = datasets.get_dataset_config_names(path, revision=corpus.revision)
        except Exception as error:  # the library raises a dozen classes of its own and of its network layers
            raise CorpusError(f"corpus {corpus.place}: {_first_line(error)}") from error
        wanted = [corpus.config.replace(LANG, name) for name in spellings(language)]
        if LANG in corpus.column and len(there) == 1:  # parallel text: every language in one configuration
            wanted.append(there[0])
        for config in wanted:
            if config in there:
                return cls(language, path, config, corpus.split, corpus.revision, columns)
        hint = did_you_mean(wanted[0], there)
        raise CorpusError(f"corpus {corpus.place} for {language}: no configuration {' or '.join(wanted)}{hint}")

    def documents(self) -> Iterator[str]:
        """Documents in order, streamed."""
        import datasets

        where = f"corpus hf:{self.path}, configuration {self.config}"
        try:
            rows = datasets.load_dataset(
                self.path, self.config, split=self.split, revision=self.revision, streaming=True
            )
            for row in rows:
                name = next((column for column in self.columns if column in row), None)
                if name is None:
                    raise CorpusError(
                        f"{where}: no column {self.columns[0]!r}, found {', '.join(row)}; say which with ?column=NAME"
                    )
                if str(row[name] or "").strip():
                    yield str(row[name]).strip()
        except CorpusError:
            raise
        except Exception as error:
            raise CorpusError(f"{where}, split {self.split}: {_first_line(error)}") from error

    def identity(self) -> dict[str, Any]:
        """Id, configuration, split and revision."""
        own = {"dataset": self.path, "config": self.config, "split": self.split, "revision": self.revision}
        return {**own, "columns": list(self.columns)}


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:297]}..."
