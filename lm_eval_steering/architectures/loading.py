"""A model that is loaded when its weights are first needed: everything that can be refused before, is."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError

from lm_eval_steering.architectures import (
    ModelSites,
    Shape,
    model_type_of,
    parse_sites,
    shape_of,
    sites_of,
    text_config_of,
)
from lm_eval_steering.architectures.weights import weights_sketch
from lm_eval_steering.errors import ArchitectureError, SteeringError


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
        device_map: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Read the config.

        Args:
            pretrained: hub id or folder.
            revision: branch, tag or commit on the hub.
            dtype: of the weights.
            device: a GPU by default where there is one.
            sites: where the units are in a family that is not known (`architectures.sites_of`).
            device_map: of accelerate, such as auto, for a model that one device cannot hold.
            trust_remote_code: whether to run code of the model's repository.

        Raises:
            SteeringError: if a dtype or device is not known, or there is no such model; then in transformers' words.
        """
        from transformers import AutoConfig

        self._pretrained, self._revision = pretrained, revision
        self._device, self._device_map, self._trusted = _device(device), device_map, trust_remote_code
        if sites is not None:
            parse_sites(sites)
        self.override = sites
        self.config = self._from_hub(AutoConfig)
        self.revision = commit_of(pretrained, revision)
        # What `auto` takes, so that a recording says what it was made in.
        self.dtype = dtype if dtype != "auto" else str(self.config.dtype or "float32").removeprefix("torch.")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise SteeringError(f"dtype {dtype!r}: expected auto, bfloat16, float16, float32 or float64")
        self._name_it(pretrained)

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> LazyModel:
        """A model that is loaded already."""
        own = cls.__new__(cls)
        own.revision = ""  # transformers 5 does not keep it with a model
        own.config, own.dtype, own.override = model.config, str(model.dtype).removeprefix("torch."), None
        own._name_it(str(model.config.name_or_path or "unnamed"))
        own.__dict__ |= {"model": model, "tokenizer": tokenizer}
        return own

    def _name_it(self, pretrained: str) -> None:
        self.name = Path(pretrained).name if Path(pretrained).exists() else pretrained

    def _from_hub(self, kind: Any, **arguments: Any) -> Any:
        try:
            return kind.from_pretrained(
                self._pretrained, revision=self._revision, trust_remote_code=self._trusted, **arguments
            )
        except (OSError, ValueError, SafetensorError) as error:
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

        if self._device_map is not None:
            return self._from_hub(AutoModelForCausalLM, dtype=self.dtype, device_map=self._device_map).eval()
        loaded = self._from_hub(AutoModelForCausalLM, dtype=self.dtype)
        if getattr(loaded, "hf_quantizer", None) is None:  # a quantised model is where it must be
            loaded = loaded.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return loaded.eval()

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
        """Hash over its tokenizer."""
        return tokenizer_sha256(self.tokenizer)

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


def commit_of(pretrained: str, revision: str = "main", cache_dir: str | None = None) -> str:
    """Commit of the hub that a model's config was read from; empty for a folder.

    Args:
        pretrained: hub id or folder.
        revision: branch, tag or commit.
        cache_dir: of the hub, the default one by default.
    """
    if Path(pretrained).exists():
        return ""
    path = try_to_load_from_cache(pretrained, "config.json", cache_dir=cache_dir, revision=revision)
    return Path(path).parent.name if isinstance(path, str) else ""  # .../snapshots/COMMIT/config.json


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash over a tokenizer's vocabulary and rules; how a batch was last padded or cut is no part of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = tokenizer.get_vocab()
    else:
        content = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    whole = {"tokenizer": content, "bos_token_id": tokenizer.bos_token_id}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _device(name: str | torch.device | None) -> torch.device | None:
    try:
        found = None if name is None else torch.device(name)
    except RuntimeError:
        raise SteeringError(f"device {name!r}: expected cuda, cuda:1, cpu, mps, ...") from None
    if found is not None and found.type == "cuda" and not torch.cuda.is_available():
        raise SteeringError(f"device {name!r}: torch finds no CUDA device here")
    return found


def activation_function(config: Any) -> str:
    """Its name in the config, empty where the family has it in its code."""
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    text = text_config_of(config)
    return next((str(getattr(text, name)) for name in names if getattr(text, name, None)), "")
