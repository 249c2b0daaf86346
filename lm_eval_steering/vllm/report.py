"""What decides a score of a `SteeredVLLM` beside the intervention, and what is stored beside every score."""

from __future__ import annotations

from typing import Any

from lm_eval_steering.architectures.loading import tokenizer_sha256
from lm_eval_steering.lmeval.compat import without_names
from lm_eval_steering.lmeval.identity import Steered
from lm_eval_steering.vllm import compat
from lm_eval_steering.vllm.weights import files_digest


def identity_of(lm: Any) -> dict[str, Any]:
    """Parts of the fingerprint that belong to engine, model, tokenizer and scoring; read once after the start.

    Parallel sizes, release and compilation are no part of it.

    Args:
        lm: a `SteeredVLLM`.
    """
    config = compat.model_config(lm.model)
    return {
        "engine": "vllm",
        # Where the files cannot be read, what the workers hold: then it depends on how they share it.
        "weights": lm.weights.digest or compat.call_workers(lm.model, "steering_weights"),
        "config": without_names(config.hf_config.to_dict()),
        "generation_config": without_names(compat.generation_config(lm.model)),
        "adapters": files_digest(lm.adapter),
        "tokenizer": tokenizer_sha256(lm.tokenizer),
        "dtype": lm.activation_dtype,
        "quantization": config.quantization,
        "cache_dtype": compat.cache_dtype(lm.model),
        "max_length": lm.max_length,
        "add_bos_token": lm.add_bos_token,
        "prefix_token_id": lm.prefix_token_id,
        "truncation": lm.truncation_side,
        "think_end_token": lm.think_end_token,
        "enable_thinking": lm.enable_thinking,
        "seed": lm.model_args["seed"],
        "identifier": lm.identifier.signature(),
    }


def report_of(lm: Any, steered: Steered) -> dict[str, Any]:
    """What was done to a `SteeredVLLM`, as plain data, with the keys of `lmeval.identity.Steered` and `engine`.

    Args:
        lm: the model.
        steered: what its scores are of.

    Raises:
        DidNotHappenError: if forward passes ran and nothing was edited in them.
    """
    scoring = {"setting": "vllm", "requests": {"vllm": lm.scored}}
    generation = {"setting": "vllm", "prompts": {"vllm": lm.generated}}
    steering = lm.steering if lm.steering.plan is not None else None
    report = steered.report(scoring, generation, steering, f"{lm.rank} of {lm.world_size}")
    return report | {"engine": lm.steering.report()}
