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
from lm_eval_steering.languages import normalise, spellings
from lm_eval_steering.neurons.text_files import LocalFiles, as_text, find_files

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
        names: how the place spells a language where no rule leads to it, `zho_Hans:zh-cn+por_Latn:pt-br`.
    """

    place: str
    column: str = "text"
    documents: str = "line"
    config: str = LANG
    split: str = "train"
    revision: str = "main"
    names: str = ""

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
        return self.place.startswith(_HUB)

    def spellings(self, language: str) -> tuple[str, ...]:
        """How the place may spell a language: as `names` says, else by the rules.

        Raises:
            CorpusError: if `names` is not CODE:NAME joined by `+`.
        """
        own = {}
        for pair in filter(None, self.names.split("+")):
            code, colon, name = pair.partition(":")
            if not colon or not name:
                raise CorpusError(f"corpus {self.place}: names={self.names!r}, expected CODE:NAME joined by +")
            own[normalise(code)] = name
        return (own[language],) if language in own else spellings(language)

    @property
    def name(self) -> str:
        """What to call it in an artefact: never a path of this machine."""
        return self.place if self.is_dataset else Path(self.place).name

    def identity(self, language: str) -> dict[str, Any]:
        """What tells this text from another, in values that JSON can hold, without a network or a path of the machine.

        Files are hashed; a dataset is known by what was asked for.
        """
        if not self.is_dataset:
            return self.source(language).identity()
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def source(self, language: str) -> Source:
        """The text of one language.

        Raises:
            CorpusError: if there is none.
        """
        names = self.spellings(language)
        columns = tuple(dict.fromkeys(self.column.replace(LANG, name) for name in names))
        if self.is_dataset:
            return HubDataset.find(self, language, columns)
        files = find_files(self.place, language, names, LANG not in self.column)
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
            CorpusError: if the dataset cannot be had, or has no such configuration.
        """
        import datasets

        path = corpus.place.removeprefix(_HUB)
        try:
            there = datasets.get_dataset_config_names(path, revision=corpus.revision)
        except Exception as error:  # the library raises a dozen classes of its own and of its network layers
            raise CorpusError(f"corpus {corpus.place}: {_first_line(error)}") from error
        names = corpus.spellings(language)
        wanted = [corpus.config.replace(LANG, name) for name in names]
        if LANG in corpus.column + corpus.split and len(there) == 1:  # every language in one configuration
            wanted.append(there[0])
        for config in wanted:
            if config in there:
                splits = tuple(corpus.split.replace(LANG, name) for name in names)
                commit = _commit(path, corpus.revision)
                return cls(language, path, config, tuple(dict.fromkeys(splits)), commit, columns)
        hint = did_you_mean(wanted[0], there)
        raise CorpusError(f"corpus {corpus.place} for {language}: no configuration {' or '.join(wanted)}{hint}")

    def documents(self) -> Iterator[str]:
        """Documents in order, streamed."""
        import datasets

        where = f"corpus hf:{self.path}, configuration {self.config}"
        try:
            there = datasets.load_dataset(self.path, self.config, revision=self.revision, streaming=True)
            split = next((name for name in self.splits if name in there), None)
            if split is None:
                raise CorpusError(f"{where}: no split {self.splits[0]!r}, found {', '.join(there)}")
            for row in there[split]:
                name = next((column for column in self.columns if column in row), None)
                if name is None:
                    raise CorpusError(
                        f"{where}: no column {self.columns[0]!r}, found {', '.join(row)}; say which with ?column=NAME"
                    )
                if text := as_text(row[name], where).strip():
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
