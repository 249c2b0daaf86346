"""What decides a score beside the intervention, gathered from a loaded lm-eval model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lm_eval.models.huggingface import HFLM

from lm_eval_steering.architectures.loading import tokenizer_sha256
from lm_eval_steering.architectures.weights import weights_digest
from lm_eval_steering.errors import DidNotHappenError
from lm_eval_steering.lmeval.compat import attention_implementation, without_names
from lm_eval_steering.metrics import pass_rates
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.provenance import versions
from lm_eval_steering.steering.attach import Evidence, Steering
from lm_eval_steering.steering.intervention import Intervention


def identity_of(lm: HFLM, identifier: str, scoring: str, generation: str) -> dict[str, Any]:
    """Parts of the fingerprint that belong to model, tokenizer and scoring; read once after loading.

    Args:
        lm: lm-eval's model.
        identifier: signature of what identifies languages.
        scoring: the model argument.
        generation: the model argument.
    """
    adapters = getattr(lm.model, "peft_config", None) or {}
    generation_config = getattr(lm.model, "generation_config", None)
    return {
        "weights": weights_digest(lm.model),
        "config": without_names(lm.model.config.to_dict()),
        "generation_config": without_names(generation_config.to_dict()) if generation_config else None,
        "adapters": {name: without_names(adapter.to_dict()) for name, adapter in adapters.items()},
        "tokenizer": tokenizer_sha256(lm.tokenizer),
        "dtype": str(lm.model.dtype),
        "mixed_precision_dtype": str(lm.mixed_precision_dtype),
        "softmax_dtype": str(lm.softmax_dtype),
        "max_length": lm.max_length,
        "add_bos_token": lm.add_bos_token,
        "prefix_token_id": lm.prefix_token_id,
        "truncation": lm.truncation,
        "think_end_token": lm.think_end_token,
        "identifier": identifier,
        "scoring": "plain" if scoring == "plain" else "shared",
        "generation": generation,
        "attention": attention_implementation(lm.model.config),
        "logits_cache": lm.logits_cache,
    }


# --- What is printed and stored beside every score: what was done, to what, and the proof that it happened


@dataclass(frozen=True)
class Steered:
    """What a score is of, beside the model.

    Attributes:
        intervention: in force; no steps where the model is unsteered.
        neuron_set: whose neurons, if any.
        fingerprint: hash over everything that decides a score.
        identifier: signature of what identifies languages.
        targets: codes of the languages whose share `lfs` counts.
    """

    intervention: Intervention
    neuron_set: NeuronSet | None
    fingerprint: str
    identifier: str
    targets: tuple[str, ...]

    @property
    def signature(self) -> str:
        """Readable form of the fingerprint, meant to be pasted in a paper; `report.naming` reads it."""
        parts = [self.intervention.signature(), f"lid:{self.identifier}"]
        if self.neuron_set:
            parts.insert(1, f"neurons:{self.neuron_set.content_hash()[:8]}")
        return "|".join([*parts, f"fp:{self.fingerprint[:8]}", f"v:{versions()['lm-eval-steering']}"])

    def report(
        self, scoring: dict[str, Any], generation: dict[str, Any], steering: Steering | None, rank: str
    ) -> dict[str, Any]:
        """What was done, to what, and the proof that it happened, as plain data.

        Args:
            scoring: how log-likelihoods were computed.
            generation: how texts were generated.
            steering: that was attached, if any.
            rank: which process of how many.

        Raises:
            DidNotHappenError: if forward passes ran and nothing was edited in them.
        """
        report: dict[str, Any] = {
            "signature": self.signature,
            "fingerprint": self.fingerprint,
            "intervention": self.intervention.model_dump(mode="json"),
            "lookahead": self.intervention.lookahead,
            "target_languages": list(self.targets),
            "language_identifier": self.identifier,
            "pass_rates": pass_rates.signature(),
            "scoring": scoring,
            "generation": generation,
            "versions": versions(),
        }
        if steering is not None and self.neuron_set is not None:
            evidence = steering.evidence()
            refuse_nothing(evidence.forwards, evidence.positions, evidence, self.intervention.signature())
            report["evidence"] = dataclasses.asdict(evidence) | {"shared_neurons": steering.plan.shared, "rank": rank}
            report["neuron_set"] = {
                "sha256": self.neuron_set.content_hash(),
                "languages": list(self.neuron_set.languages),
                **dataclasses.asdict(self.neuron_set.provenance),
                # One line: lm-eval's files have a line for each number of a list.
                "weights": " ".join(f"{value:.4g}" for value in self.neuron_set.provenance.weights),
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
