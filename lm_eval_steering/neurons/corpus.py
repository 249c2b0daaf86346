"""Plain text as a corpus: one document a line, one file a language, cut into rows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_steering.errors import CorpusError

Row = list[int]  # token ids, special tokens left out


def read_corpus(pattern: str | Path, languages: Sequence[str]) -> dict[str, list[str]]:
    """Documents of each language, from a folder with `fra_Latn.txt` files or a path with `{lang}` in it.

    Raises:
        CorpusError: naming the file that is missing, empty or not UTF-8 (with its line).
    """
    text = str(pattern)
    if "{lang}" not in text:
        if not Path(text).is_dir():
            raise CorpusError(
                f"corpus {text!r}: expected a folder of LANGUAGE.txt files, or a path with {{lang}} in it"
            )
        text = str(Path(text) / "{lang}.txt")
    return {language: _read_lines(Path(text.replace("{lang}", language)), language) for language in languages}


def _read_lines(path: Path, language: str) -> list[str]:
    if not path.is_file():
        raise CorpusError(f"corpus for {language}: no file {path}")
    lines = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            lines.append(raw.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
    documents = [line for line in lines if line]
    if not documents:
        raise CorpusError(f"corpus for {language}: {path} is empty")
    return documents


def packed_rows(documents: Iterable[str], tokenizer: Any, length: int, budget: int | None = None) -> list[Row]:
    """Documents tokenised without special tokens, concatenated, and cut into rows of `length` tokens.

    Args:
        documents: text of one language.
        tokenizer: of transformers.
        length: tokens a row; the last row may be shorter.
        budget: stop after this many tokens.
    """
    stream: Row = []
    for document in documents:
        stream += tokenizer.encode(document, add_special_tokens=False)
        if budget is not None and len(stream) >= budget:
            stream = stream[:budget]
            break
    return [stream[start : start + length] for start in range(0, len(stream), length)]


def sentence_rows(
    sentences: Iterable[str],
    tokenizer: Any,
    length: int,
    *,
    at_least: int = 1,
    at_most: int | None = None,
    budget: int | None = None,
) -> list[Row]:
    """One row a sentence, cut at `length` tokens; sentences under `at_least` tokens are left out.

    Args:
        at_most: number of rows at which to stop.
        budget: number of tokens at which to stop; the last row is cut to it.
    """
    rows: list[Row] = []
    left = budget
    for sentence in sentences:
        if at_most is not None and len(rows) >= at_most:
            break
        row = tokenizer.encode(sentence, add_special_tokens=False)[:length][:left]
        if len(row) >= at_least:
            rows.append(row)
            left = None if left is None else left - len(row)
        if left is not None and left <= 0:
            break
    return rows


def rows_hash(rows: Mapping[str, Sequence[Row]]) -> str:
    """SHA-256 over the token ids of every language: the text that was really seen."""
    digest = hashlib.sha256()
    for language, own in rows.items():
        digest.update(language.encode())
        for row in own:
            digest.update(np.asarray([len(row), *row], dtype="<i8").tobytes())
    return digest.hexdigest()
