"""Which family can say what in its weights, and the config under which it says it.

A scaled unit is a scaled column of the last linear layer: every family has that. An added constant needs a bias there,
and in a gated MLP a lifted unit needs a gate with a bias, since without one no unit can emit a constant.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN

from lm_eval_steering.architectures import FAMILIES, Family, family_of, model_type_of, text_config_of
from lm_eval_steering.errors import ArchitectureError
from lm_eval_steering.export.layer_maps import LayerMap

# At 32 silu(c) and gelu(c) are c in every floating-point type, so that the constant is exact.
PULSE = 32.0


@dataclass(frozen=True)
class Layout:
    """Where a family keeps the weights of its MLP, beside `architectures.FAMILIES`.

    Attributes:
        before: paths inside a layer of the linear layers before the activation: gate and up, or one alone; a gated
            family with one keeps gate and up in it, one below the other.
        biases: config values under which the MLP's linear layers have biases; None where the class has none.
        transposed: whether weights are kept as (input, output), as Conv1D does.
        as_llama: the same model as a config of Llama with biases, where it can be one.
    """

    before: tuple[str, ...]
    biases: Mapping[str, Any] | None = None
    transposed: bool = False
    as_llama: Callable[[Any], LlamaConfig] | None = None


# Llama's own names for what the families that can be Llama have too; `layer_types` of full attention are its default.
_LLAMA_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
)  # fmt: skip


def _as_llama(attention_bias: bool) -> Callable[[Any], LlamaConfig]:
    def convert(config: Any) -> LlamaConfig:
        window = getattr(config, "sliding_window", None)
        if window is not None and window < config.max_position_embeddings:
            raise ArchitectureError(
                f"{config.model_type}: set and add need biases in its MLP, which only Llama's class has, and Llama has "
                f"no sliding window (here {window} tokens of {config.max_position_embeddings}); op=scale and "
                "deactivation can be exported, `--model steered-hf` evaluates the rest"
            )
        said = {key: copy.deepcopy(getattr(config, key)) for key in _LLAMA_KEYS if hasattr(config, key)}
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return LlamaConfig(**said, head_dim=head, attention_bias=attention_bias, mlp_bias=True, dtype=config.dtype)

    return convert


_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

LAYOUTS: dict[str, Layout] = {
    "llama": Layout(_GATE_UP, {"mlp_bias": True}),
    "mistral": Layout(_GATE_UP, as_llama=_as_llama(attention_bias=False)),
    "qwen2": Layout(_GATE_UP, as_llama=_as_llama(attention_bias=True)),
    **dict.fromkeys(
        (
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "gemma3n_text",
            "gemma4_text",
            "olmo2",
            "cohere",
            "cwm",
            "deepseek_v2",
            "deepseek_v3",
            "exaone4",
            "hunyuan_v1_dense",
            "ministral",
            "ministral3",
            "olmo3",
            "qwen3_5_text",
            "qwen3_next",
            "smollm3",
            "vaultgemma",
        ),
        Layout(_GATE_UP),
    ),
    **dict.fromkeys(("apertus", "arcee", "jais2"), Layout(("mlp.up_proj",))),
    "glm4": Layout(("mlp.gate_up_proj",)),
    "nanochat": Layout(("mlp.fc1",)),
    **dict.fromkeys(("falcon_h1", "llama4_text"), Layout(("feed_forward.gate_proj", "feed_forward.up_proj"))),
    "granitemoehybrid": Layout(("shared_mlp.input_linear",)),
    "phi3": Layout(("mlp.gate_up_proj",)),
    "phi": Layout(("mlp.fc1",), {}),
    "starcoder2": Layout(("mlp.c_fc",), {"use_bias": True}),
    "gpt2": Layout(("mlp.c_fc",), {}, transposed=True),
    "gpt_neo": Layout(("mlp.c_fc",), {}),
    "gptj": Layout(("mlp.fc_in",), {}),
    "gpt_neox": Layout(("mlp.dense_h_to_4h",), {}),
    "bloom": Layout(("mlp.dense_h_to_4h",), {}),
    "falcon": Layout(("mlp.dense_h_to_4h",), {"bias": True}),
    "mpt": Layout(("ffn.up_proj",)),
    "opt": Layout(("fc1",), {"enable_bias": True}),
}


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor of a decoder layer belongs: number of the layer, path of the module in it, `weight` or `bias`."""

    layer: int
    path: str
    kind: str


def place_of(name: str, family: Family) -> TensorLocation | None:
    """The place of a tensor by the model's name for it; None outside the decoder layers."""
    found = re.fullmatch(rf"(?:\w+\.)*?{re.escape(family.layers)}\.(\d+)\.(.+)\.(weight|bias)", name)
    return None if found is None else TensorLocation(int(found[1]), found[2], found[3])


@dataclass(frozen=True)
class Target:
    """What is written.

    Attributes:
        config: of the exported model.
        layout: where its weights are.
        width: its units a layer.
        pulse: what the activation function makes of PULSE.
        re_expressed: whether it is of another class than the model.
        notes: what differs from the model beside the weights, for the model card.
    """

    config: Any
    layout: Layout
    width: int
    pulse: float = 1.0
    re_expressed: bool = False
    notes: tuple[str, ...] = field(default=())


def layout_of(config: Any) -> Layout:
    """Where a model's MLP weights are.

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
    if family_of(config) is None or name not in LAYOUTS:
        raise ArchitectureError(
            f"{name}: export knows where the weights are in {', '.join(sorted(LAYOUTS))}; `--model steered-hf` "
            "evaluates any family"
        )
    return LAYOUTS[name]


def target_of(config: Any, maps: Mapping[int, LayerMap], multiple: int) -> Target:
    """The config under which the maps can be written, as near to the model's own as possible.

    Args:
        config: of the model.
        maps: layer -> what is made of its units.
        multiple: what a grown width is a multiple of.

    Raises:
        ArchitectureError: if the family cannot say it, with the reason and what can be done.
    """
    layout, name = layout_of(config), model_type_of(config)
    family = FAMILIES[name]
    width = _one_width(config, family)
    own = copy.deepcopy(config)
    if all(each.scales_only for each in maps.values()):
        return Target(own, layout, width)
    if layout.as_llama is not None:
        llama = Target(layout.as_llama(config), LAYOUTS["llama"], width, re_expressed=True)
        return _grown(llama, maps, multiple, (f"re-expressed as Llama with biases ({name} has none in its MLP)",))
    if layout.biases is None:
        raise ArchitectureError(f"{name}: {_no_bias(family.gated)}; {_CAN}")
    changed = {key: value for key, value in layout.biases.items() if getattr(own, key) != value}
    for key, value in changed.items():
        setattr(own, key, value)
    notes = tuple(f"{key}={value} in its config; biases that the model has not are 0" for key, value in changed.items())
    target = Target(own, layout, width, notes=notes)
    return _grown(target, maps, multiple, notes) if family.gated else target


def _one_width(config: Any, family: Family) -> int:
    width = family.width(config)
    widths = {width} if isinstance(width, int) else set(width)
    if len(widths) > 1:
        raise ArchitectureError(
            f"{model_type_of(config)}: layers of {min(widths)} to {max(widths)} units, which export cannot write; "
            "`--model steered-hf` evaluates them"
        )
    return widths.pop()


_CAN = "op=scale and deactivation (set 0) can be exported, and `--model steered-hf` evaluates the rest"


def _no_bias(gated: bool) -> str:
    if gated:
        return (
            "its class has no biases in the MLP, and a gated unit without one cannot emit the constant of set and add"
        )
    return "its class has no bias at the MLP's last linear layer, which set and add need"


def _grown(target: Target, maps: Mapping[int, LayerMap], multiple: int, notes: tuple[str, ...]) -> Target:
    """The same with room for appended units in every layer."""
    name = str(target.config.hidden_act)
    pulse = float(ACT2FN[name](torch.tensor(PULSE, dtype=torch.float64)))
    if any(each.lift.any() for each in maps.values()) and not (pulse and abs(pulse) < 1e4):
        raise ArchitectureError(
            f"hidden_act={name}: no unit can emit a constant ({name}({PULSE:g}) is {pulse:g}); {_CAN}"
        )
    most = max(len(each.appended) for each in maps.values())
    width = target.width
    if most:
        width = -(-(width + most) // multiple) * multiple
        notes = (*notes, f"{target.width} units a layer became {width}, in multiples of {multiple}")
    target.config.intermediate_size = width
    return Target(target.config, target.layout, width, pulse, target.re_expressed, notes)
