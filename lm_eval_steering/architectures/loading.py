"""A model that is loaded when its weights are first needed; what can be refused earlier is refused earlier."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Mapping
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError

from lm_eval_steering.architectures import (
    ModelSites,
    Shape,
    model_type_of,
    parse_sites,
    refuse_unsupported,
    shape_of,
    sites_of,
    text_config_of,
)
from lm_eval_steering.architectures.weights import weights_sketch
from lm_eval_steering.errors import ArchitectureError, SteeringError, did_you_mean
from lm_eval_steering.files import expand_home

# Further arguments of loading, with their names in `steered-hf` and lm-eval's `hf`.
_ARGUMENTS = (
    "gguf_file", "subfolder", "peft", "tokenizer", "use_fast_tokenizer", "add_bos_token", "prefix_token_id",
    "quantization_config", "load_in_8bit", "load_in_4bit", "attn_implementation", "max_memory", "offload_folder",
    "token", "cache_dir",
)  # fmt: skip
_log = logging.getLogger("lm_eval.steering")
_TOKENIZER_ONLY = {"tokenizer", "use_fast_tokenizer", "add_bos_token", "prefix_token_id"}
_BITSANDBYTES = ("load_in_", "bnb_4bit_", "llm_int8_")  # how the names of its arguments begin


Bos = Literal["auto", "always", "never"]


class LazyModel:
    """A causal language model of transformers and its tokenizer; the config is read at once, the weights on demand.

    Attributes:
        name: hub id, or the name of the folder without its path.
        revision: commit of the hub, empty for a folder.
        config: of transformers.
        dtype: of the weights, the checkpoint's for `auto`.
        arguments: further arguments of loading.
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
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Read the config.

        Args:
            pretrained: hub id or folder.
            revision: branch, tag or commit on the hub.
            dtype: of the weights.
            device: a GPU by default if there is one.
            sites: modules of the units, for a family that is not in the table (`architectures.sites_of`).
            device_map: of accelerate, such as auto, for a model that does not fit on one device.
            trust_remote_code: whether to run code of the model's repository.
            arguments: as `steered-hf` takes them: `gguf_file`, `peft`, `quantization_config`, `load_in_8bit`, ...

        Raises:
            SteeringError: if a dtype, device or argument is unknown, or there is no such model (with
                transformers' message).
        """
        from transformers import AutoConfig

        self.arguments = _checked(arguments or {})
        self._pretrained, self._revision = str(Path(pretrained).expanduser()), revision
        self._device, self._device_map, self._trust_remote_code = _device(device), device_map, trust_remote_code
        if sites is not None:
            parse_sites(sites)
        self.override = sites
        refuse_missing_folder(pretrained)
        self.config = self._from_pretrained(AutoConfig, **self._given("gguf_file", "subfolder", "token", "cache_dir"))
        self.revision = commit_of(self._pretrained, revision, self.arguments.get("cache_dir"))
        # The dtype that `auto` means, so that a recording names it.
        self.dtype = dtype if dtype != "auto" else str(self.config.dtype or "float32").removeprefix("torch.")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise SteeringError(f"dtype {dtype!r}: expected auto, bfloat16, float16, float32 or float64")
        self._set_name(self._pretrained)

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> LazyModel:
        """From a loaded model."""
        lazy = cls.__new__(cls)
        lazy.revision = ""  # transformers 5 does not keep it in a loaded model
        lazy.config, lazy.dtype, lazy.override = model.config, str(model.dtype).removeprefix("torch."), None
        lazy.arguments = {}
        lazy._set_name(str(model.config.name_or_path or "unnamed"))
        lazy.__dict__ |= {"model": model, "tokenizer": tokenizer}
        return lazy

    def _set_name(self, pretrained: str) -> None:
        self.name = Path(pretrained).name if Path(pretrained).exists() else pretrained

    def _given(self, *names: str) -> dict[str, Any]:
        """The named arguments that were given."""
        return {name: self.arguments[name] for name in names if self.arguments.get(name) not in (None, False, "")}

    def _from_pretrained(self, kind: Any, source: str | None = None, **arguments: Any) -> Any:
        source = source or self._pretrained
        try:
            return kind.from_pretrained(
                source, revision=self._revision, trust_remote_code=self._trust_remote_code, **arguments
            )
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            message = str(error).strip().splitlines()[0]
            if message.startswith("Unrecognized configuration class"):
                refuse_unsupported(self.config)
                message = f"{self.config.model_type}: transformers has no causal language model of this architecture"
            raise SteeringError(f"model {source!r}: {message}{missing_folder(source)}") from error

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, loaded as lm-eval's `hf` loads it."""
        from transformers import AutoTokenizer

        given = self._given("subfolder", "token", "cache_dir")
        if self.arguments.get("add_bos_token") is not None:
            given["add_bos_token"] = self.arguments["add_bos_token"]
        source = self.arguments.get("tokenizer")
        if source is None and self._given("gguf_file"):
            given |= self._given("gguf_file")
        elif self.arguments.get("use_fast_tokenizer") is False:
            given["use_fast"] = False
        return self._from_pretrained(AutoTokenizer, source, **given)

    @cached_property
    def model(self) -> Any:
        """The loaded model, on its device, ready for inference."""
        from transformers import AutoModelForCausalLM

        given = {
            name: value
            for name, value in self._given(*_ARGUMENTS).items()
            if name not in _TOKENIZER_ONLY | {"peft"} and not is_quantization(name)
        }
        quantization = quantization_config(self.arguments, self.dtype)
        if quantization is not None:
            given["quantization_config"] = quantization
        if self._device_map is not None:
            given["device_map"] = self._device_map
        loaded = self._from_pretrained(AutoModelForCausalLM, dtype=self.dtype, **given)
        if self._given("peft"):
            loaded = self._with_adapter(loaded)
        # A quantised or dispatched model is on its devices already.
        if self._device_map is None and getattr(loaded, "hf_quantizer", None) is None:
            loaded = loaded.to(self._device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return loaded.eval()

    def _with_adapter(self, loaded: Any) -> Any:
        from peft import PeftModel

        adapter = str(self.arguments["peft"])
        if loaded.config.vocab_size != len(self.tokenizer) and len(self.tokenizer) > loaded.config.vocab_size:
            loaded.resize_token_embeddings(len(self.tokenizer))  # as lm-eval does for an adapter with more tokens
        try:
            return PeftModel.from_pretrained(loaded, adapter, revision=self._revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise SteeringError(f"peft={adapter!r}: {str(error).strip().splitlines()[0]}") from error

    @cached_property
    def sites(self) -> ModelSites:
        """The modules of its units."""
        sites = sites_of(self.model, self.override)
        if sites.shape != self.shape:
            raise ArchitectureError(f"{self.name}: the model has {sites.shape}, its config {self.shape}")
        return sites

    @property
    def shape(self) -> Shape:
        """Layers and units, from the config alone."""
        return shape_of(self.config)

    @cached_property
    def sketch(self) -> tuple[float, ...]:
        """A sketch of the loaded weights."""
        return weights_sketch(self.model)

    def prefix(self, bos: Bos = "auto") -> tuple[int, ...]:
        """Token ids before a text, the same as in evaluation.

        Args:
            bos: `auto`: the tokens that the tokenizer adds before a text, or else lm-eval's `prefix_token_id`: the
                argument of that name, the tokenizer's BOS, or its EOS. `always`: lm-eval's `prefix_token_id`,
                whatever the tokenizer adds. `never`: nothing.

        Raises:
            SteeringError: for `always`, if the tokenizer has neither BOS nor EOS.
        """
        if bos == "never":
            return ()
        added = _added_before(self.tokenizer) if bos == "auto" else ()
        if added:
            return added
        candidates = (self.arguments.get("prefix_token_id"), self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        token = next((int(candidate) for candidate in candidates if candidate is not None), None)
        if token is None and bos == "always":
            raise SteeringError(f"{self.name}: bos=always, and the tokenizer has neither BOS nor EOS; use bos=never")
        return () if token is None else (token,)

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Hash over its tokenizer."""
        return tokenizer_sha256(self.tokenizer)

    @cached_property
    def context(self) -> int | None:
        """Number of tokens that fit after BOS; None if the config names no limit."""
        names = ("max_position_embeddings", "max_seq_len")
        text = text_config_of(self.config)
        return next((int(getattr(text, name)) - 1 for name in names if getattr(text, name, None)), None)

    @property
    def architecture(self) -> str:
        """`model_type` of its language part."""
        return model_type_of(self.config)

    def maker(self) -> dict[str, Any]:
        """Fields of a provenance that the config gives."""
        return {
            "model": self.name,
            "revision": self.revision,
            "architecture": self.architecture,
            "layers": self.shape.layers,
            "units": self.shape.units,
            **({"widths": list(self.shape.widths)} if self.shape.widths else {}),
            "activation_function": activation_function(self.config),
            "sites": self.override or "",
        }

    def description(self) -> dict[str, Any]:
        """The model's fields of a provenance; only the tokenizer is loaded."""
        return self.maker() | {"dtype": self.dtype, "tokenizer": self.tokenizer_sha256}


def _added_before(tokenizer: Any) -> tuple[int, ...]:
    """Special tokens that a tokenizer adds before a text."""
    special = set(tokenizer.all_special_ids)
    ids = tokenizer("a")["input_ids"]
    return tuple(takewhile(special.__contains__, ids))


def is_quantization(name: str) -> bool:
    """Whether a model argument says how the weights are quantised."""
    return name == "quantization_config" or name.startswith(_BITSANDBYTES)


def quantization_config(arguments: Mapping[str, Any], dtype: str) -> Any:
    """The quantisation config of some arguments for transformers; None if there is none.

    Args:
        arguments: `quantization_config`, an object of transformers or a mapping as in a checkpoint's config.json; or
            `load_in_8bit`, `load_in_4bit`, `bnb_4bit_...` and `llm_int8_...` of bitsandbytes.
        dtype: of the computation in 4 bit, unless `bnb_4bit_compute_dtype` names another.

    Raises:
        SteeringError: if both are given, or the library is missing or refuses them.
    """
    given = arguments.get("quantization_config")
    bits = {
        name: value
        for name, value in arguments.items()
        if name.startswith(_BITSANDBYTES) and value is not None and value is not False
    }
    if given is None and not bits:
        return None
    if given is not None and bits:
        raise SteeringError(f"quantization_config conflicts with {next(iter(bits))}: give one of them")
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        if bits:
            if bits.get("load_in_4bit"):
                bits.setdefault("bnb_4bit_compute_dtype", dtype)
            return BitsAndBytesConfig(**bits)
        if isinstance(given, Mapping):
            return AutoQuantizationConfig.from_dict(dict(given))
    except (ImportError, ValueError, TypeError, KeyError) as error:
        raise SteeringError(f"quantization: {str(error).strip().splitlines()[0]}") from error
    if isinstance(given, str):
        raise SteeringError(f"quantization_config={given!r}: expected a mapping as in a checkpoint's config.json")
    return given


def _checked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    for name in arguments:
        if name not in _ARGUMENTS and not is_quantization(name):
            raise SteeringError(f"unknown model argument {name!r}{did_you_mean(name, _ARGUMENTS)}")
    return {name: expand_home(value) for name, value in arguments.items()}


def refuse_missing_folder(pretrained: str) -> None:
    """Refuse at once what can only be a folder and is none, and warn of what may be meant as one.

    Without a network the hub is tried again and again before anything is printed.

    Raises:
        SteeringError: naming it, and folders beside it that are spelled almost alike.
    """
    path = Path(pretrained).expanduser()
    no_hub_id = pretrained.startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2
    if path.exists():
        return
    similar = _similar_folders(path)
    if no_hub_id or pretrained.endswith("/"):
        raise SteeringError(f"model {pretrained!r}: no such folder{similar}")
    if similar or (len(path.parts) > 1 and path.parent.is_dir()):
        _log.warning("model %r: no such folder%s; looking for it on the hub", pretrained, similar)


def missing_folder(pretrained: str) -> str:
    """What to add to the hub's error about a name that may have been meant as a folder; empty where there is one."""
    path = Path(pretrained).expanduser()
    return "" if path.exists() else f"; there is no folder of that name either{_similar_folders(path)}"


def _similar_folders(path: Path) -> str:
    folders = [folder.name for folder in path.parent.iterdir() if folder.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, folders, n=3, cutoff=0.75)
    return f"; did you mean {' or '.join(repr(str(path.with_name(name))) for name in near)}?" if near else ""


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
    """Hash over a tokenizer's vocabulary and rules, without its current padding and truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = tokenizer.get_vocab()
    else:
        content = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    whole = {"tokenizer": content, "bos_token_id": tokenizer.bos_token_id}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _device(name: str | torch.device | None) -> torch.device | None:
    try:
        device = None if name is None else torch.device(name)
    except RuntimeError:
        raise SteeringError(f"device {name!r}: expected cuda, cuda:1, cpu, mps, ...") from None
    if device is not None and device.type == "cuda" and not torch.cuda.is_available():
        raise SteeringError(f"device {name!r}: torch finds no CUDA device on this machine")
    return device


def activation_function(config: Any) -> str:
    """Name of the activation function in the config, empty if it is not a setting of the family."""
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    text = text_config_of(config)
    return next((str(getattr(text, name)) for name in names if getattr(text, name, None)), "")
