"""What is printed and stored beside every score: what was done, to what, and the proof that it happened."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm_eval_steering.errors import DidNotHappenError
from lm_eval_steering.metrics import pass_rates
from lm_eval_steering.neurons.loading import versions
from lm_eval_steering.steering.evidence import Evidence


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
