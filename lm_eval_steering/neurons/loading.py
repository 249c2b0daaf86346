"""A model that is loaded when its weights are first needed: everything that can be refused before, is."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lm_eval_steering.architectures import ModelSites, Shape, model_type_of, shape_of, sites_of, text_config_of
from lm_eval_steering.errors import ArchitectureError, SteeringError
from lm_eval_steering.fingerprint import weights_sketch


class LazyModel:
    """A causal language model of transformers and its tokenizer; the config is read at once, the weights on demand.

    Attributes:
        name: hub id, or the name of the folder: never a path of this machine.
        revision: commit of the hub, empty for a folder.
        config: of transformers.
        dtype: of the weights, the checkpoint's where `auto` was asked for.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str = "main",
        dtype: str = "auto",
        device: str | torch.device | None = None,
        sites: str | None = None,
    ) -> None:
        """Read the config.

        Args:
            pretrained: hub id or folder.
            revision: branch, tag or commit on the hub.
            dtype: of the weights.
            device: a GPU by default where there is one.
            sites: where the units are in a family that is not known (`architectures.sites_of`).

        Raises:
            SteeringError: if there is no such model; the message is transformers' first line.
        """
        from transformers import AutoConfig

        self._pretrained, self._revision, self._device = pretrained, revision, device
        self.override = sites
        self.config = self._from_hub(AutoConfig)
        # What `auto` takes, so that a recording says what it was made in.
        self.dtype = dtype if dtype != "auto" else str(self.config.dtype or "float32").removeprefix("torch.")
        self._name_it(pretrained)

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> LazyModel:
        """A model that is loaded already."""
        own = cls.__new__(cls)
        own.config, own.dtype, own.override = model.config, str(model.dtype).removeprefix("torch."), None
        own._name_it(str(getattr(model.config, "_name_or_path", "") or "unnamed"))
        own.__dict__ |= {"model": model, "tokenizer": tokenizer}
        return own

    def _name_it(self, pretrained: str) -> None:
        self.name = Path(pretrained).name if Path(pretrained).exists() else pretrained
        self.revision = str(getattr(self.config, "_commit_hash", None) or "")

    def _from_hub(self, kind: Any, **arguments: Any) -> Any:
        try:
            return kind.from_pretrained(self._pretrained, revision=self._revision, **arguments)
        except (OSError, ValueError) as error:
            raise SteeringError(f"model {self._pretrained!r}: {str(error).splitlines()[0]}") from error

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from transformers import AutoTokenizer

        return self._from_hub(AutoTokenizer)

    @cached_property
    def model(self) -> Any:
        """The loaded model, on its device, ready for inference."""
        from transformers import AutoModelForCausalLM

        loaded = self._from_hub(AutoModelForCausalLM, dtype=self.dtype)
        return loaded.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()

    @cached_property
    def sites(self) -> ModelSites:
        """Where its units are."""
        found = sites_of(self.model, self.override)
        if found.shape != self.shape:
            raise ArchitectureError(f"{self.name}: units found at {found.shape}, the config says {self.shape}")
        return found

    @property
    def shape(self) -> Shape:
        """Layers and units, from the config where its family is known: nothing is loaded."""
        return shape_of(self.config)

    @cached_property
    def sketch(self) -> tuple[float, ...]:
        """A sketch of the loaded weights."""
        return weights_sketch(self.model)

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Hash over the tokenizer's vocabulary and rules."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            content: Any = self.tokenizer.get_vocab()
        else:  # how a batch was last padded or cut is no part of it
            content = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def context(self) -> int | None:
        """Tokens that fit beside BOS; None where the model names no limit."""
        names = ("max_position_embeddings", "max_seq_len")
        text = text_config_of(self.config)
        return next((int(getattr(text, name)) - 1 for name in names if getattr(text, name, None)), None)

    @property
    def architecture(self) -> str:
        """`model_type` of its language part."""
        return model_type_of(self.config)

    def maker(self) -> dict[str, Any]:
        """What the config alone says of the model, as fields of a provenance."""
        return {
            "model": self.name,
            "revision": self.revision,
            "architecture": self.architecture,
            "layers": self.shape.layers,
            "units": self.shape.units,
            "activation_function": activation_function(self.config),
            "sites": self.override or "",
        }

    def description(self) -> dict[str, Any]:
        """The model's part of a provenance: nothing is loaded but the tokenizer."""
        return self.maker() | {"dtype": self.dtype, "tokenizer": self.tokenizer_sha256}


def activation_function(config: Any) -> str:
    """Its name in the config, empty where the family has it in its code."""
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    text = text_config_of(config)
    return next((str(getattr(text, name)) for name in names if getattr(text, name, None)), "")


def versions() -> dict[str, str]:
    """Versions of the libraries that decide a number."""
    return {name: importlib.metadata.version(name) for name in ("lm-eval-steering", "torch", "transformers", "numpy")}
