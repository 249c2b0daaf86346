"""From text to a neuron set in one go: record, select, calibrate."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lm_eval_steering.architectures import shape_of, sites_of
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.fingerprint import weights_sketch
from lm_eval_steering.neurons import calibrate as calibration
from lm_eval_steering.neurons.corpus import Row, packed_rows, read_corpus, rows_hash, sentence_rows
from lm_eval_steering.neurons.neuron_set import NeuronSet, Provenance, union_of
from lm_eval_steering.neurons.recording import Recording, record
from lm_eval_steering.neurons.select import check_rate, lape, random_control


@dataclass(frozen=True)
class Search:
    """What to look for and in what text.

    Attributes:
        corpus: a folder of LANGUAGE.txt files, or a path with `{lang}` in it.
        languages: codes of the form fra_Latn.
        rate: share of all neurons that LAPE selects.
        tokens: budget for each language; all of the text by default.
        rows: `packed` windows of the context length, or one row a line (`sentences`).
        context: tokens a row; the smaller of 2,048 and the model's own length by default.
        sentences: number of calibration sentences a language.
        batch_size: rows a forward pass.
    """

    corpus: str
    languages: tuple[str, ...]
    rate: float = 0.01
    tokens: int | None = None
    rows: Literal["packed", "sentences"] = "packed"
    context: int | None = None
    sentences: int = calibration.SENTENCES
    batch_size: int = 16

    def check(self) -> dict[str, list[str]]:
        """Read the text and check the rate, so that a mistake is found before a model is loaded.

        Raises:
            CorpusError: if the text of a language is missing or empty.
            SteeringError: if the rate is outside (0, 1], or there is one language alone.
        """
        check_rate("rate", self.rate)
        if len(self.languages) < 2:
            raise SteeringError("language neurons are told apart between languages: name at least two")
        return read_corpus(self.corpus, self.languages)


def find_neurons(model: Any, tokenizer: Any, search: Search, progress: bool = True) -> tuple[NeuronSet, Recording]:
    """Record activations over the corpus, select by LAPE, and calibrate the chosen neurons at both sites.

    Raises:
        CorpusError: if the text of a language is missing or empty.
        SteeringError: if the rate is outside (0, 1].
    """
    documents = search.check()
    length = _context(model, search)
    rows = {language: _rows(text, tokenizer, length, search) for language, text in documents.items()}
    recording = record(model, tokenizer, rows, search.batch_size, progress)
    selected = lape(recording.counts, recording.n_tokens, search.rate)
    calibration_rows = _calibration_rows(documents, tokenizer, length, search)
    statistics = calibration.calibrate(
        model, tokenizer, calibration_rows, union_of(selected), search.batch_size, progress
    )
    shape = sites_of(model).shape
    provenance = Provenance(
        model=model_name(model),
        revision=str(getattr(model.config, "_commit_hash", None) or ""),
        architecture=str(model.config.model_type),
        layers=shape.layers,
        units=shape.units,
        weights=weights_sketch(model),
        selection={"method": "lape", "rate": search.rate, "filter_rate": 0.95, "bar_rate": 0.95},
        corpus={
            "source": Path(search.corpus).name,
            "rows": search.rows,
            "sha256": rows_hash(rows),
            "calibration_sha256": rows_hash(calibration_rows),
            "calibration_sentences": {language: len(own) for language, own in calibration_rows.items()},
            "tokens": dict(zip(recording.languages, recording.n_tokens.tolist(), strict=True)),
        },
        versions=versions(),
    )
    assignments = dict(zip(search.languages, selected, strict=True))
    return NeuronSet(search.languages, assignments, provenance, statistics), recording


def control_sets(
    model: Any, tokenizer: Any, search: Search, neuron_set: NeuronSet, seeds: Sequence[int], progress: bool = True
) -> list[NeuronSet]:
    """Matched random sets: as many neurons in each layer for each language, calibrated on the same sentences.

    Args:
        model: the neuron set's model.
        tokenizer: its tokenizer.
        search: what the set was found with.
        neuron_set: the set to match.
        seeds: one a control.
        progress: whether to show a bar.
    """
    draws = [
        random_control(neuron_set.assignments, neuron_set.languages, neuron_set.provenance.units, seed)
        for seed in seeds
    ]
    rows = _calibration_rows(search.check(), tokenizer, _context(model, search), search)
    union = union_of([neurons for draw in draws for neurons in draw.values()])
    statistics = calibration.calibrate(model, tokenizer, rows, union, search.batch_size, progress)
    return [
        replace(
            neuron_set,
            assignments=draw,
            statistics=statistics.restrict(union_of(list(draw.values()))),
            provenance=replace(
                neuron_set.provenance,
                selection={"method": "random", "seed": seed, "matched_to": neuron_set.content_hash()},
            ),
        )
        for seed, draw in zip(seeds, draws, strict=True)
    ]


def _context(model: Any, search: Search) -> int:
    """Tokens a row beside BOS."""
    names = ("max_position_embeddings", "max_seq_len")
    longest = next((int(getattr(model.config, name)) - 1 for name in names if hasattr(model.config, name)), None)
    if search.context is not None and longest is not None and search.context > longest:
        raise SteeringError(f"context={search.context}: the model reads at most {longest} tokens and BOS")
    return search.context or min(2048, longest or 2048)


def _calibration_rows(
    documents: Mapping[str, Sequence[str]], tokenizer: Any, length: int, search: Search
) -> dict[str, list[Row]]:
    return {
        language: sentence_rows(text, tokenizer, length, at_least=calibration.SHORTEST, at_most=search.sentences)
        for language, text in documents.items()
    }


def _rows(text: Sequence[str], tokenizer: Any, length: int, search: Search) -> list[Row]:
    if search.rows == "packed":
        return packed_rows(text, tokenizer, length, search.tokens)
    return sentence_rows(text, tokenizer, length, budget=search.tokens)


def model_name(model: Any) -> str:
    """Hub id of a model, or the name of the folder that it came from: never a path of this machine."""
    name = str(getattr(model.config, "_name_or_path", "") or "unnamed")
    return Path(name).name if Path(name).exists() else name


def versions() -> dict[str, str]:
    """Versions of the libraries that decide a number."""
    return {name: importlib.metadata.version(name) for name in ("lm-eval-steering", "torch", "transformers", "numpy")}


def model_provenance(name: str, revision: str, source: str) -> Provenance:
    """Provenance of lists that came from elsewhere, from a model's config alone.

    Raises:
        SteeringError: if there is no such model; ArchitectureError if its family is not known.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise SteeringError(f"model {name!r}: {str(error).splitlines()[0]}") from error
    shape = shape_of(config)
    return Provenance(
        model=Path(name).name if Path(name).exists() else name,
        revision=str(getattr(config, "_commit_hash", None) or ""),
        architecture=str(config.model_type),
        layers=shape.layers,
        units=shape.units,
        selection={"method": "imported", "file": source},
        versions=versions(),
    )


def load_model(name: str, revision: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    """Model and tokenizer from the hub or a folder, ready for inference.

    Raises:
        SteeringError: if there is no such model; the message is transformers' first line.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype)
    except (OSError, ValueError) as error:
        raise SteeringError(f"model {name!r}: {str(error).splitlines()[0]}") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer
