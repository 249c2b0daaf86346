"""Which intervention the weights of a model family can hold, and the config of the export.

A scaled unit is a scaled column of the last linear layer: every family has that. An added constant needs a bias there,
and in a gated MLP a unit whose lift is not 0 (`layer_maps`) needs a gate with a bias: no other unit emits a constant.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN

from lm_eval_steering.architectures import FAMILIES, Family, family_of, model_type_of, text_config_of
from lm_eval_steering.errors import ArchitectureError
from lm_eval_steering.export.layer_maps import LayerMap

# Bias of a constant unit's gate. silu(32) and gelu(32) are 32 in every floating-point type, so the constant is exact.
GATE_BIAS = 32.0

# Families that Llama's class computes too, with biases in the MLP which their own class has not -> Llama's
# `attention_bias`, whether query, key and value have biases.
AS_LLAMA = {"mistral": False, "qwen2": True}
# Keys of their configs that Llama has under the same name; `layer_types` of full attention are Llama's default.
_LLAMA_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
)  # fmt: skip
_WAY_OUT = "op=scale and deactivation (set 0) can be exported, and `--model steered-hf` evaluates the rest"


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor of a decoder layer belongs: number of the layer, path of the module in it, `weight` or `bias`."""

    layer: int
    path: str
    kind: str


def tensor_location(name: str, family: Family) -> TensorLocation | None:
    """The location of a tensor by the model's name for it; None outside the decoder layers."""
    match = re.fullmatch(rf"(?:\w+\.)*?{re.escape(family.layers)}\.(\d+)\.(.+)\.(weight|bias)", name)
    return None if match is None else TensorLocation(int(match[1]), match[2], match[3])


@dataclass(frozen=True)
class Target:
    """What is written.

    Attributes:
        config: of the exported model.
        width: its units per layer.
        gate_value: what the activation function makes of GATE_BIAS.
        as_llama: whether it is exported as Llama while the model is of another family.
        notes: how it differs from the model apart from the weights, for the model card.
    """

    config: Any
    width: int
    gate_value: float = 1.0
    as_llama: bool = False
    notes: tuple[str, ...] = ()


def exported_family(config: Any) -> Family:
    """The family of a model that can be exported.

    Raises:
        ArchitectureError: if its family is not in the table, it is part of a larger model, or its weights are
            quantised.
    """
    name = model_type_of(config)
    if text_config_of(config) is not config:
        raise ArchitectureError(f"{config.model_type}: a model of more than text; export its text model, {name}")
    if getattr(config, "quantization_config", None) is not None:
        raise ArchitectureError(
            f"{name}: the checkpoint is quantised, so its columns cannot be changed one by one; export the checkpoint "
            "that it was made from, and quantise the export"
        )
    family = family_of(config)
    if family is None:
        raise ArchitectureError(
            f"{name}: export supports {', '.join(sorted(FAMILIES))}; `--model steered-hf` evaluates any family"
        )
    return family


def target_of(config: Any, maps: Mapping[int, LayerMap], multiple: int) -> Target:
    """The config with which the maps can be written, as close to the model's config as possible.

    Args:
        config: of the model.
        maps: layer -> the maps of its units.
        multiple: a grown width is a multiple of this.

    Raises:
        ArchitectureError: if weights of the family cannot hold the maps, with the reason and what can be done.
    """
    family, name = exported_family(config), model_type_of(config)
    width = _one_width(config, family)
    target = Target(copy.deepcopy(config), width)
    if all(each.scales_only for each in maps.values()):
        return target
    if name in AS_LLAMA:
        note = f"exported as Llama with biases ({name} has none in its MLP)"
        return _grown(Target(as_llama(config), width, as_llama=True, notes=(note,)), maps, multiple)
    if family.biases is None:
        raise ArchitectureError(f"{name}: {_no_bias(family.gated)}; {_WAY_OUT}")
    changed = {key: value for key, value in family.biases.items() if getattr(config, key) != value}
    for key, value in changed.items():
        setattr(target.config, key, value)
    notes = tuple(f"{key}={value} in its config; biases that the model has not are 0" for key, value in changed.items())
    target = replace(target, notes=notes)
    return _grown(target, maps, multiple) if family.gated else target


def as_llama(config: Any) -> LlamaConfig:
    """The same model as a config of Llama with biases in the MLP, for a family of AS_LLAMA.

    Raises:
        ArchitectureError: if it has a sliding window, which Llama's class has not.
    """
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ArchitectureError(
            f"{config.model_type}: set and add need biases in its MLP, which only Llama's class has, and Llama has "
            f"no sliding window (here {window} tokens of {config.max_position_embeddings}); {_WAY_OUT}"
        )
    kept = {key: copy.deepcopy(getattr(config, key)) for key in _LLAMA_KEYS if hasattr(config, key)}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bias = AS_LLAMA[config.model_type]
    return LlamaConfig(**kept, head_dim=head, attention_bias=bias, mlp_bias=True, dtype=config.dtype)


def _one_width(config: Any, family: Family) -> int:
    width = family.width(config)
    widths = {width} if isinstance(width, int) else set(width)
    if len(widths) > 1:
        raise ArchitectureError(
            f"{model_type_of(config)}: layers of {min(widths)} to {max(widths)} units, which export cannot write; "
            "`--model steered-hf` evaluates them"
        )
    return widths.pop()


def _no_bias(gated: bool) -> str:
    if gated:
        return (
            "its class has no biases in the MLP, and a gated unit without one cannot emit the constant of set and add"
        )
    return "its class has no bias at the MLP's last linear layer, which set and add need"


def _grown(target: Target, maps: Mapping[int, LayerMap], multiple: int) -> Target:
    """A gated target with as many more units per layer as constant units have to be appended."""
    name = str(target.config.hidden_act)
    gate_value = float(ACT2FN[name](torch.tensor(GATE_BIAS, dtype=torch.float64)))
    if any(each.lift.any() for each in maps.values()) and not (gate_value and abs(gate_value) < 1e4):
        raise ArchitectureError(
            f"hidden_act={name}: no unit can emit a constant ({name}({GATE_BIAS:g}) is {gate_value:g}); {_WAY_OUT}"
        )
    width, notes = target.width, target.notes
    if appended := max(len(each.appended) for each in maps.values()):
        width = -(-(width + appended) // multiple) * multiple
        notes = (*notes, f"{target.width} units per layer became {width}, in multiples of {multiple}")
    target.config.intermediate_size = width
    return replace(target, width=width, gate_value=gate_value, notes=notes)
