"""From text to rows of tokens: documents packed into windows, or one row for each sentence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.errors import CorpusError

TokenRow = NDArray[np.int32]  # (token,) ids, special tokens left out

SENTENCES = 100  # per language, to calibrate with by default
SHORTEST = 5  # tokens; shorter sentences are left out of a calibration
_DOCUMENTS = 256  # tokenised at a time: a fast tokenizer spreads them over the cores


@dataclass(frozen=True)
class TokenRows:
    """Rows of one language.

    Attributes:
        ids: (token,) int32, all rows one after another, special tokens left out.
        lengths: (row,) int32, tokens of each row.
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]

    @classmethod
    def of(cls, rows: Iterable[Sequence[int] | TokenRow]) -> TokenRows:
        """From lists of token ids."""
        parts = [np.asarray(row, dtype=np.int32) for row in rows]
        lengths = np.array([len(part) for part in parts], dtype=np.int32)
        return cls(np.concatenate([np.zeros(0, dtype=np.int32), *parts]), lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[TokenRow]:
        return iter(np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self) else ())

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows."""
        return len(self.ids)

    def sha256(self) -> str:
        """Hash over the ids and where rows end: the text that the model really sees."""
        digest = hashlib.sha256(self.lengths.astype("<i4").tobytes())
        digest.update(self.ids.astype("<i4").tobytes())
        return digest.hexdigest()


def packed_rows(documents: Iterable[str], tokenizer: Any, length: int, budget: int | None = None) -> TokenRows:
    """Documents tokenised without special tokens, concatenated, and cut into rows of `length` tokens.

    Args:
        documents: text of one language.
        tokenizer: of transformers.
        length: tokens per row; the last row may be shorter.
        budget: number of tokens at which to stop.
    """
    parts: list[TokenRow] = [np.zeros(0, dtype=np.int32)]
    total = 0
    for tokens in tokenised(documents, tokenizer):
        parts.append(tokens)
        total += len(tokens)
        if budget is not None and total >= budget:
            break
    ids = np.concatenate(parts)[:budget]
    starts = np.arange(0, len(ids), length)
    return TokenRows(ids, np.minimum(length, len(ids) - starts).astype(np.int32))


def sentence_rows(
    sentences: Iterable[str],
    tokenizer: Any,
    length: int,
    *,
    at_least: int = 1,
    at_most: int | None = None,
    budget: int | None = None,
) -> TokenRows:
    """One row per sentence, cut at `length` tokens; sentences under `at_least` tokens are left out.

    Args:
        sentences: text of one language.
        tokenizer: of transformers.
        length: tokens per row at most.
        at_least: tokens that a sentence must have.
        at_most: number of rows at which to stop.
        budget: number of tokens at which to stop; the last row is cut to it.
    """
    rows: list[TokenRow] = []
    remaining = budget
    for tokens in tokenised(sentences, tokenizer):
        if (at_most is not None and len(rows) >= at_most) or (remaining is not None and remaining <= 0):
            break
        row = tokens[:length][:remaining]
        if len(row) >= at_least:
            rows.append(row)
            remaining = None if remaining is None else remaining - len(row)
    return TokenRows.of(rows)


def calibration_rows(documents: Iterable[str], language: str, tokenizer: Any, length: int, number: int) -> TokenRows:
    """The first lines of a text that have at least 5 tokens, one row per line.

    Args:
        documents: text of one language.
        language: of the text, for the message.
        tokenizer: of transformers.
        length: tokens per row at most.
        number: of rows at most.

    Raises:
        CorpusError: if there is no such line.
    """
    rows = sentence_rows(lines_of(documents), tokenizer, length, at_least=SHORTEST, at_most=number)
    if not len(rows):
        raise CorpusError(f"corpus for {language}: no line of at least {SHORTEST} tokens to calibrate with")
    return rows


def tokenised(texts: Iterable[str], tokenizer: Any) -> Iterator[TokenRow]:
    """Token ids of each text, without special tokens: those that a text spells out are text, and are not counted."""
    stream = iter(texts)
    special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int32)
    while chunk := list(islice(stream, _DOCUMENTS)):
        # `verbose` would warn of documents longer than the model's context, which are cut into rows here.
        for ids in tokenizer(chunk, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]:
            row = np.asarray(ids, dtype=np.int32)
            yield row[~np.isin(row, special)]


def lines_of(documents: Iterable[str]) -> Iterator[str]:
    """Documents split into their lines, without empty ones."""
    for document in documents:
        yield from (line.strip() for line in document.split("\n") if line.strip())
