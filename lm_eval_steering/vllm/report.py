"""What decides a score of a `SteeredVLLM` beside the intervention, and what is stored beside every score."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm_eval_steering.lmeval.identity import _tokenizer_digest, _without_names, refuse_nothing
from lm_eval_steering.metrics import pass_rates
from lm_eval_steering.provenance import versions
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
        "weights": lm.weights.digest or lm.model.collective_rpc("steering_weights"),
        "config": _without_names(config.hf_config.to_dict()),
        "generation_config": _without_names(compat.generation_config(lm.model)),
        "adapters": files_digest(lm.adapter),
        "tokenizer": _tokenizer_digest(lm.tokenizer),
        "dtype": lm.dtype,
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


def report_of(lm: Any) -> dict[str, Any]:
    """What was done to a `SteeredVLLM`, as plain data, with the keys of `lmeval.identity.Steered` and `engine`.

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
        "scoring": {"setting": "vllm", "requests": {"vllm": lm.scored}},
        "generation": {"setting": "vllm", "prompts": {"vllm": lm.generated}},
        "engine": lm.steering.report(),
        "versions": versions(),
    }
    if lm.steering.plan is not None and lm.neuron_set is not None:
        evidence: Any = lm.steering.evidence()
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
