"""What one analysis ran on (model, neurons, prompts, identifier, settings), for its JSON file and its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval_steering.analysis.prompts import Prompts
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.architectures.weights import weights_digest
from lm_eval_steering.files import write_text
from lm_eval_steering.metrics.language_id import LanguageIdentifier
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.provenance import fingerprint, versions
from lm_eval_steering.steering.compiled import compile_intervention
from lm_eval_steering.steering.intervention import from_arguments


def signature_of(arguments: Mapping[str, Any], neurons: NeuronSet | None) -> str:
    """The intervention in its readable form, with the neuron set's codes; `none` for the unsteered model.

    Raises:
        SteeringError: if the intervention is not defined, or not for this set; no model is needed to find out.
    """
    intervention = from_arguments(arguments)
    if neurons is None:
        return intervention.signature()
    return compile_intervention(intervention, neurons).intervention.signature()


def made_with(
    model: LazyModel, neurons: NeuronSet | None, prompts: Prompts, identifier: LanguageIdentifier, **settings: Any
) -> dict[str, Any]:
    """Model, neurons, prompts, identifier, settings and versions, in values that JSON can hold.

    Args:
        model: loaded.
        neurons: of the model, if any were used.
        prompts: that it was given.
        identifier: of languages.
        settings: of the analysis.
    """
    return {
        "model": model.description() | {"dtype": str(model.model.dtype).removeprefix("torch.")},
        "device": str(model.model.device),
        "weights": weights_digest(model.model),
        "neurons": None if neurons is None else {"content": neurons.content_hash(), **asdict(neurons.provenance)},
        "prompts": prompts.identity(),
        "identifier": identifier.signature(),
        "settings": settings,
        "seed": None,  # nothing is drawn: decoding is greedy
        "versions": versions(),
    }


def fingerprint_of(provenance: Mapping[str, Any], signature: str) -> str:
    """Hash over everything that decides the numbers of one run; device and provenance of the set are no part of it."""
    parts = {key: provenance[key] for key in ("weights", "prompts", "identifier", "settings", "versions")}
    neurons, model = provenance["neurons"], provenance["model"]
    return fingerprint(
        {
            **parts,
            "tokenizer": model["tokenizer"],
            "dtype": model["dtype"],
            "neurons": neurons["content"] if neurons and signature != "none" else None,
            "intervention": signature,
        }
    )


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """One file in one step; an absent value is blank."""
    import pandas as pd

    write_text(path, pd.DataFrame(list(rows), columns=list(columns)).to_csv(index=False, lineterminator="\n"))
