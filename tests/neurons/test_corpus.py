"""Text from every source, and what is said of text that cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from lm_eval_steering.errors import CorpusError
from lm_eval_steering.neurons.corpus import Corpus

TEXTS = ["Bonjour à tous.", "Deux\u2028lignes.", "Trois."]  # the separator inside a line does not end it


def documents(corpus: str, language: str = "fra_Latn") -> list[str]:
    return list(Corpus.parse(corpus).source(language).documents())


def write_lines(path: Path, column: str = "text") -> None:
    lines = "".join(json.dumps({column: text, "other": 1}) + "\n" for text in TEXTS)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


@pytest.mark.parametrize("name", ["fra_Latn", "fra-Latn", "fra", "fr"])
def test_a_folder_with_a_file_for_each_language(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.txt").write_text("\n".join(TEXTS) + "\n\n")
    assert documents(str(tmp_path)) == TEXTS


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "fr.devtest").write_text("\n".join(TEXTS))
    write_lines(tmp_path / "fr.jsonl")
    write_lines(tmp_path / "fr.jsonl.gz", "sentence")
    parquet.write_table(pyarrow.table({"text": [*TEXTS, None, " "]}), tmp_path / "fr.parquet")
    assert documents(f"{tmp_path}/{{lang}}.devtest") == TEXTS
    assert documents(f"{tmp_path}/{{lang}}.jsonl") == TEXTS
    assert documents(f"{tmp_path}/{{lang}}.jsonl.gz?column=sentence") == TEXTS
    assert documents(f"{tmp_path}/{{lang}}.parquet") == TEXTS


def test_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "fra").mkdir()
    (tmp_path / "fra" / "b.txt").write_text("three")
    (tmp_path / "fra" / "a.txt").write_text("one\ntwo\n")
    assert documents(f"{tmp_path}/{{lang}}/*.txt") == ["one", "two", "three"]
    assert documents(f"{tmp_path}/{{lang}}/*.txt?documents=file") == ["one\n\ntwo", "three"]


def test_parallel_text_with_a_column_for_each_language(tmp_path: Path) -> None:
    table = pyarrow.table({"sentence_fra_Latn": TEXTS, "sentence_deu_Latn": ["Hallo."] * 3})
    parquet.write_table(table, tmp_path / "flores.parquet")
    assert documents(f"{tmp_path}/flores.parquet?column=sentence_{{lang}}") == TEXTS
    assert documents(f"{tmp_path}/flores.parquet?column=sentence_{{lang}}", "deu_Latn") == ["Hallo."] * 3
    with pytest.raises(CorpusError, match=r"no column 'sentence_ita_Latn', found sentence_fra_Latn, sentence_deu"):
        documents(f"{tmp_path}/flores.parquet?column=sentence_{{lang}}", "ita_Latn")


def test_a_dataset_is_streamed_from_its_configuration(tmp_path: Path) -> None:
    for code in ("fr", "de"):
        (tmp_path / "data" / code).mkdir(parents=True)
        write_lines(tmp_path / "data" / code / "train.jsonl")
    configs = "".join(f'- config_name: "2023.{c}"\n  data_files: "{c}/train.jsonl"\n' for c in ("fr", "de"))
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    corpus = f"hf:{tmp_path}/data?config=2023.{{lang}}"
    assert documents(corpus) == TEXTS
    assert Corpus.parse(corpus).source("fra_Latn").identity()["config"] == "2023.fr"
    assert documents(f"{corpus}&names=deu_Latn:de") == TEXTS
    with pytest.raises(CorpusError, match=r"no configuration 2023\.xx"):
        documents(f"{corpus}&names=fra_Latn:xx")
    with pytest.raises(CorpusError, match=r"for ita_Latn: no configuration 2023.ita_Latn .*; did you mean"):
        documents(corpus, "ita_Latn")
    with pytest.raises(CorpusError, match=r"no column 'body', found text, other; name it with \?column=NAME"):
        documents(f"{corpus}&column=body")
    with pytest.raises(CorpusError, match=r"no split 'test', found train"):
        documents(f"{corpus}&split=test")
    with pytest.raises(CorpusError, match="nowhere"):
        documents(f"hf:{tmp_path}/nowhere")


def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "fra_Latn.txt").write_bytes(b"bonjour\nmal\xff\n")
    with pytest.raises(CorpusError, match=r"fra_Latn\.txt, line 2: not UTF-8"):
        documents(str(tmp_path))
    (tmp_path / "deu_Latn.txt").write_text("\n \n")
    with pytest.raises(CorpusError, match=r"deu_Latn: .*deu_Latn\.txt is empty"):
        documents(str(tmp_path), "deu_Latn")
    (tmp_path / "ita_Latn.jsonl").write_text('{"text": "uno"}\n{"text": \n')
    with pytest.raises(CorpusError, match=r"ita_Latn\.jsonl, line 2: not JSON"):
        documents(str(tmp_path), "ita_Latn")
    (tmp_path / "spa_Latn.jsonl").write_text('{"body": "uno"}\n')
    with pytest.raises(CorpusError, match=r"spa_Latn\.jsonl, line 1: no column 'text', found body"):
        documents(str(tmp_path), "spa_Latn")
    (tmp_path / "por_Latn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(CorpusError, match=r"por_Latn\.parquet: not a whole parquet file"):
        documents(str(tmp_path), "por_Latn")
    (tmp_path / "nld_Latn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "een"}\n' * 999)[:-20])
    with pytest.raises(CorpusError, match=r"nld_Latn\.jsonl\.gz: cannot be read"):
        documents(str(tmp_path), "nld_Latn")


def test_what_is_not_there_or_not_clear_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"eng_Latn: no file .*eng_Latn\.txt \(nor eng-Latn, .*eng, en for eng_Latn\)"
    ):
        documents(str(tmp_path), "eng_Latn")
    (tmp_path / "fra.txt").write_text("a")
    (tmp_path / "fra.jsonl").write_text("{}")
    with pytest.raises(CorpusError, match=r"both .*fra\.txt and .*fra\.jsonl exist"):
        documents(str(tmp_path))
    with pytest.raises(CorpusError, match="nowhere does not exist; expected a folder with a file for each"):
        documents(str(tmp_path / "nowhere"))
    (tmp_path / "fra.csv").write_text("a,b")
    with pytest.raises(CorpusError, match=r"fra\.csv: cannot be read as text"):
        documents(f"{tmp_path}/{{lang}}.csv")
    with pytest.raises(CorpusError, match=r"unknown option 'colum'; did you mean 'column'"):
        Corpus.parse(f"{tmp_path}?colum=x")
    with pytest.raises(CorpusError, match=r"documents='page', expected line or file"):
        Corpus.parse(f"{tmp_path}?documents=page")


def test_als_is_not_read_as_albanian(tmp_path: Path) -> None:
    (tmp_path / "als.txt").write_text("Alemannisch")
    (tmp_path / "sq.txt").write_text("Shqip")
    assert documents(str(tmp_path), "als_Latn") == ["Shqip"]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("hf:org/data?config=default", r"one text for every language; put \{lang\} in config=, split= or column="),
        ("text/{lang}*.txt", r"\{lang\} needs a separator after it"),
        ("text?split=test", "split= belongs to hf:DATASET"),
        ("text?names=zho_Hans", "names='zho_Hans', expected CODE:NAME"),
    ],
)
def test_a_corpus_that_cannot_be_meant_is_refused(corpus: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        documents(corpus)


@pytest.mark.parametrize("value", ['{"fr": "bonjour"}', '["bonjour"]', "1.5", '"a\\ud83d"'])
def test_what_is_not_text_is_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "fra.jsonl").write_text(f'{{"text": {value}}}\n')
    with pytest.raises(CorpusError, match=r"fra\.jsonl, line 1: (expected text, got|not text that UTF-8 can hold)"):
        documents(str(tmp_path))


def test_an_edited_file_is_another_text(tmp_path: Path) -> None:
    file = tmp_path / "fra.txt"
    file.write_text("un deux trois")
    before = Corpus.parse(str(tmp_path)).source("fra_Latn").identity()
    file.write_text("un deux quatr")
    assert Corpus.parse(str(tmp_path)).source("fra_Latn").identity() != before
    assert str(tmp_path) not in json.dumps(before), "a path of this machine in an artefact"
