"""What decides a score beside the intervention, gathered from a loaded lm-eval model."""

from __future__ import annotations

from typing import Any

from lm_eval_steering.fingerprint import fingerprint, weights_digest

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
