"""Prompts for the analyses: lines of a text file, or the demo's sentences; and batches of their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.files import read_json_lines
from lm_eval_steering.resources import demo_model, demo_sentences

_UNSPACED = ("jpn_Jpan", "zho_Hans")  # no blank between clauses


@dataclass(frozen=True)
class Prompts:
    """Texts, and where they come from.

    Attributes:
        texts: one per prompt.
        source: name of the file, or of the demo's sentences.
    """

    texts: tuple[str, ...]
    source: str

    def identity(self) -> dict[str, Any]:
        """Source, number and hash, for a provenance."""
        digest = hashlib.sha256("\n".join(self.texts).encode()).hexdigest()
        return {"source": self.source, "number": len(self.texts), "sha256": digest}


def read_prompts(path: Path | None, pretrained: str, languages: Sequence[str], clauses: bool = False) -> Prompts:
    """The lines of a text file that are not blank; without a file, the demo's sentences for the demo model.

    Args:
        path: UTF-8 text, one prompt per line.
        pretrained: the model, as the user wrote it.
        languages: of the demo's sentences, in turn.
        clauses: the demo's first clauses alone, which leave a sentence open.

    Raises:
        SteeringError: if there is no such file, no prompt in it, or the model is not the demo's and no file is given.
    """
    if path is None:
        if Path(pretrained).resolve() != demo_model().resolve():
            raise SteeringError(f"--prompts is missing: name a text file, one prompt per line, to give to {pretrained}")
        return demo_prompts(languages, clauses)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SteeringError(f"--prompts {path}: cannot be read as UTF-8 text ({error})") from None
    # The blank at the end of `Answer: ` belongs to the prompt.
    texts = tuple(line for line in lines if line.strip())
    if not texts:
        raise SteeringError(f"--prompts {path}: no prompt in it, expected one per line")
    return Prompts(texts, path.name)


def demo_prompts(languages: Sequence[str], clauses: bool = False) -> Prompts:
    """The demo's 60 held-out sentences, or their first clauses, in turn in these languages.

    Raises:
        SteeringError: if they are in none of them.
    """
    sentences = [row["sentence"] for row in read_json_lines(demo_sentences())]
    codes = [code for code in languages if code in sentences[0]]
    if not codes:
        raise SteeringError(f"the demo's sentences are not in {'+'.join(languages)}; known: {', '.join(sentences[0])}")
    texts = []
    for number, sentence in enumerate(sentences):
        code = codes[number % len(codes)]
        parts = sentence[code][:1] if clauses else sentence[code]
        texts.append(("" if code in _UNSPACED else " ").join(parts))
    kind = "first clauses" if clauses else "sentences"
    return Prompts(tuple(texts), f"demo, {kind} in {'+'.join(codes)}")


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left, so that each row's last token stands in the last column.

    Attributes:
        ids: (row, position).
        mask: (row, position), 1 for real tokens.
    """

    ids: torch.Tensor
    mask: torch.Tensor

    def positions(self) -> torch.Tensor:
        """(row, position) index of each token among the real tokens of its row."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)


def batches(model: LazyModel, texts: Sequence[str], size: int, new_tokens: int = 0) -> Iterator[PromptBatch]:
    """Rows of tokens in the order of the texts.

    Args:
        model: whose tokenizer and device count.
        texts: prompts.
        size: rows per batch.
        new_tokens: to be generated, which must fit into the context after the prompt.

    Raises:
        SteeringError: if a prompt is too long for the model, or has no token.
    """
    rows = [model.tokenizer(text)["input_ids"] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise SteeringError(f"prompt {text[:40]!r}: no token in it")
        if model.context is not None and len(row) + new_tokens > model.context + 1:
            raise SteeringError(
                f"prompt {text[:40]!r}: {len(row)} tokens and {new_tokens} to generate, the context has "
                f"{model.context + 1}"
            )
    for start in range(0, len(rows), size):
        yield _padded(rows[start : start + size], pad_token(model), model.model.get_input_embeddings().weight.device)


def pad_token(model: LazyModel) -> int:
    """Id to pad with; masked positions are never read, so any id will do where the tokenizer has none."""
    pad = model.tokenizer.pad_token_id
    return int(pad if pad is not None else model.tokenizer.eos_token_id or 0)


def placed(model: Any, batch: PromptBatch) -> dict[str, torch.Tensor]:
    """The batch as the model's inputs; ALiBi families take no position ids."""
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if "position_ids" in signature(model.forward).parameters:
        inputs["position_ids"] = batch.positions()
    return inputs


def _padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> PromptBatch:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :], mask[number, longest - len(row) :] = torch.tensor(row), 1
    return PromptBatch(ids.to(device), mask.to(device))
