"""What stands beside the weights: a model card for people, and the same as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lm_eval_steering.fingerprint import fingerprint
from lm_eval_steering.neurons.loading import versions
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.steering.schema import Intervention

RECORD = "steering.json"


@dataclass(frozen=True)
class Card:
    """What was exported.

    Attributes:
        model: hub id or folder's name of the model.
        revision: commit on the hub, empty for a folder.
        weights: digest of the model's weights.
        neurons: the set.
        intervention: with the set's codes.
        form: `checkpoint` or `lora`.
        dtype: of the export.
        notes: what else was changed.
        numbers: of the export, such as the rank.
    """

    model: str
    revision: str
    weights: str
    neurons: NeuronSet
    intervention: Intervention
    form: str
    dtype: str
    notes: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the export's weights."""
        return fingerprint(
            {
                "weights": self.weights,
                "neurons": self.neurons.content_hash(),
                "intervention": self.intervention.model_dump(mode="json"),
                "form": self.form,
                "dtype": self.dtype,
                "numbers": self.numbers,
            }
        )

    @cached_property
    def signature(self) -> str:
        """Readable form of the fingerprint; `steering.signature.parse` reads the intervention back."""
        parts = (
            self.intervention.signature(),
            f"neurons:{self.neurons.content_hash()[:8]}",
            f"fp:{self.fingerprint[:8]}",
            f"v:{versions()['lm-eval-steering']}",
        )
        return "|".join(parts)

    def record(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "signature": self.signature,
            "fingerprint": self.fingerprint,
            "intervention": self.intervention.model_dump(mode="json"),
            "steered_languages": list(self.intervention.steered),
            "form": self.form,
            "model": self.model,
            "revision": self.revision,
            "weights": self.weights,
            "dtype": self.dtype,
            "neuron_set": {"sha256": self.neurons.content_hash(), "model": self.neurons.provenance.model},
            "notes": list(self.notes),
            **self.numbers,
            "versions": versions(),
        }

    def write(self, folder: Path) -> None:
        """Write README.md and steering.json."""
        text = json.dumps(self.record(), indent=1, ensure_ascii=False)
        (folder / RECORD).write_text(f"{text}\n", encoding="utf-8")
        (folder / "README.md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The model card."""
        lora = self.form == "lora"
        front = {
            "base_model": self.model,
            "library_name": "peft" if lora else "transformers",
            "tags": ["lm-eval-steering", "language-neurons", *(["lora"] if lora else [])],
        }
        what = "A LoRA that scales" if lora else "The model with an intervention on"
        of = f"{self.model} at {self.revision}" if self.revision else self.model
        lines = [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
            f"# {self.model}, steered",
            f"{what} the language neurons of {of}, written into weights by lm-eval-steering. The intervention is the "
            "same for every token of every text; no code of ours is needed to run it.",
            _bullets(
                [
                    f"intervention: `{self.intervention.signature()}`",
                    f"signature: `{self.signature}`",
                    f"fingerprint: `{self.fingerprint}`",
                    f"neuron set: `{self.neurons.content_hash()}`",
                    f"dtype: {self.dtype}",
                    *(f"{name.replace('_', ' ')}: {value}" for name, value in self.numbers.items()),
                    *self.notes,
                ]
            ),
            f"```bash\n{self._command()}\n```",
            "The model's licence holds for this one too.",
        ]
        return "\n\n".join(lines) + "\n"

    def _command(self) -> str:
        where = f"pretrained={self.model},peft=THIS_FOLDER" if self.form == "lora" else "pretrained=THIS_FOLDER"
        return f"lm_eval --model hf --model_args {where} --tasks ..."


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
