"""What decides a score beside the intervention, gathered from a loaded lm-eval model."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm_eval_steering.architectures.weights import weights_digest
from lm_eval_steering.errors import DidNotHappenError
from lm_eval_steering.metrics import pass_rates
from lm_eval_steering.provenance import fingerprint, versions
from lm_eval_steering.steering.attach import Evidence

# Keys of configs that differ between two places of one model, or two releases of a library.
_NAMES = {"_name_or_path", "name_or_path", "base_model_name_or_path", "transformers_version", "peft_version"}


def identity_of(lm: Any) -> dict[str, Any]:
    """Parts of the fingerprint that belong to model, tokenizer and scoring; read once after loading.

    Args:
        lm: a `SteeredHFLM`.
    """
    adapters = getattr(lm.model, "peft_config", None) or {}
    generation = getattr(lm.model, "generation_config", None)
    return {
        "weights": weights_digest(lm.model),
        "config": _without_names(lm.model.config.to_dict()),
        "generation_config": _without_names(generation.to_dict()) if generation else None,
        "adapters": {name: _without_names(adapter.to_dict()) for name, adapter in adapters.items()},
        "tokenizer": _tokenizer_digest(lm.tokenizer),
        "dtype": str(lm.model.dtype),
        "mixed_precision_dtype": str(lm.mixed_precision_dtype),
        "softmax_dtype": str(lm.softmax_dtype),
        "max_length": lm.max_length,
        "add_bos_token": lm.add_bos_token,
        "prefix_token_id": lm.prefix_token_id,
        "truncation": lm.truncation,
        "think_end_token": lm.think_end_token,
        "identifier": lm.identifier.signature(),
        "scoring": "plain" if lm.scorer.setting == "plain" else "shared",
        "generation": lm.generator.setting,
        "attention": getattr(lm.model.config, "_attn_implementation", None),
        "logits_cache": lm.logits_cache,
    }


def _without_names(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NAMES}


def _tokenizer_digest(tokenizer: Any) -> str:
    """Hash of a tokenizer's whole definition, or of its vocabulary where it has no fast one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return fingerprint({"tokenizer": backend.to_str() if backend else tokenizer.get_vocab()})


# --- What is printed and stored beside every score: what was done, to what, and the proof that it happened


def signature_of(lm: Any) -> str:
    """Readable form of a `SteeredHFLM`'s fingerprint, meant to be pasted in a paper; `signature.parse` reads it."""
    parts = [lm.intervention.signature(), f"lid:{lm.identifier.signature()}"]
    if lm.neuron_set:
        parts.insert(1, f"neurons:{lm.neuron_set.content_hash()[:8]}")
    return "|".join([*parts, f"fp:{lm.fingerprint[:8]}", f"v:{versions()['lm-eval-steering']}"])


def report_of(lm: Any) -> dict[str, Any]:
    """What was done to a `SteeredHFLM`, as plain data.

    Raises:
        DidNotHappenError: if forward passes ran and nothing was edited in them.
    """
    report: dict[str, Any] = {
        "signature": lm.signature,
        "fingerprint": lm.fingerprint,
        "intervention": lm.intervention.model_dump(mode="json"),
        "lookahead": lm.intervention.lookahead,
        "target_languages": list(lm.targets),
        "language_identifier": lm.identifier.signature(),
        "pass_rates": pass_rates.signature(),
        "scoring": lm.scorer.report(),
        "generation": lm.generator.report(),
        "versions": versions(),
    }
    if lm.steering is not None and lm.neuron_set is not None:
        evidence = lm.steering.evidence()
        refuse_nothing(evidence.forwards, evidence.positions, evidence, lm.intervention.signature())
        report["evidence"] = dataclasses.asdict(evidence) | {
            "shared_neurons": lm.steering.plan.shared,
            "rank": f"{lm.rank} of {lm.world_size}",
        }
        report["neuron_set"] = {
            "sha256": lm.neuron_set.content_hash(),
            "languages": list(lm.neuron_set.languages),
            **dataclasses.asdict(lm.neuron_set.provenance),
        }
    return report


def refuse_nothing(forwards: int, positions: int, evidence: Evidence, signature: str) -> None:
    """An intervention that chose no position in any forward pass gives the unsteered model's score: refuse it.

    Raises:
        DidNotHappenError: naming the intervention.
    """
    if forwards and evidence.modules and not positions:
        raise DidNotHappenError(
            f"{forwards} forward passes ran and no position was edited: {signature} chooses none of these requests' "
            "tokens (one-token continuations have no generated ones), so the scores are the unsteered model's"
        )
