"""The table of model families, read from a config before anything is loaded: modules, shape, and what is refused.

To add a family, add a row (`docs/architectures.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval_steering.errors import ArchitectureError


@dataclass(frozen=True)
class Family:
    """Names of the modules that matter in one `model_type` of transformers.

    Attributes:
        layers: path of the list of decoder layers, from the model that holds no language-model head.
        activation: path of the activation function's module inside a layer.
        down: path of the last linear layer of the MLP inside a layer.
        gated: whether the activation is multiplied with an up projection before the last linear layer.
        width: the number of units per layer, from the model's config; a list where layers may differ.
        before: paths of the linear layers before the activation: gate and up projection, or one layer; in a gated
            family one layer holds the rows of the gate projection and then those of the up projection.
        biases: config values under which the MLP's linear layers have biases; None where the class has none.
        transposed: whether weights are kept as (input, output), as Conv1D does.
    """

    layers: str
    activation: str
    down: str
    gated: bool
    width: Callable[[Any], int | Sequence[int]]
    before: tuple[str, ...]
    biases: Mapping[str, Any] | None = None
    transposed: bool = False


def _attribute(name: str, times_hidden: int | None = None) -> Callable[[Any], int]:
    """Width from one attribute of the config; where that is absent, a multiple of the hidden size."""

    def width(config: Any) -> int:
        return int(getattr(config, name, None) or (times_hidden or 0) * config.hidden_size)

    return width


def _gemma4_widths(config: Any) -> list[int]:
    """Layers that share keys and values may have MLPs of twice the width."""
    width, layers = int(config.intermediate_size), int(config.num_hidden_layers)
    wide = int(config.num_kv_shared_layers or 0) if getattr(config, "use_double_wide_mlp", False) else 0
    return [width] * (layers - wide) + [2 * width] * wide


def _given_intermediate(config: Any) -> int | Sequence[int]:
    width = config.intermediate_size
    return list(map(int, width)) if isinstance(width, list | tuple) else int(width)


_INTERMEDIATE = _attribute("intermediate_size")
_FOUR_TIMES = _attribute("", times_hidden=4)
_LLAMA = Family("layers", "mlp.act_fn", "mlp.down_proj", True, _INTERMEDIATE, ("mlp.gate_proj", "mlp.up_proj"))
_LIKE_LLAMA = (
    "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "cohere", "cwm", "deepseek_v2",
    "deepseek_v3", "exaone4", "hunyuan_v1_dense", "ministral", "ministral3", "olmo3", "qwen3_5_text", "qwen3_next",
    "smollm3", "vaultgemma",
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": replace(_LLAMA, biases={"mlp_bias": True}),
    **dict.fromkeys(_LIKE_LLAMA, _LLAMA),
    "gemma3n_text": replace(_LLAMA, width=_given_intermediate),
    "gemma4_text": replace(_LLAMA, width=_gemma4_widths),
    **dict.fromkeys(("apertus", "arcee", "jais2"), replace(_LLAMA, gated=False, before=("mlp.up_proj",))),
    "glm4": replace(_LLAMA, activation="mlp.activation_fn", before=("mlp.gate_up_proj",)),
    "phi3": replace(_LLAMA, activation="mlp.activation_fn", before=("mlp.gate_up_proj",)),
    "falcon_h1": Family(
        "layers", "feed_forward.act_fn", "feed_forward.down_proj", True, _INTERMEDIATE,
        ("feed_forward.gate_proj", "feed_forward.up_proj"),
    ),
    "llama4_text": Family(
        "layers", "feed_forward.activation_fn", "feed_forward.down_proj", True, _attribute("intermediate_size_mlp"),
        ("feed_forward.gate_proj", "feed_forward.up_proj"),
    ),
    "granitemoehybrid": Family(
        "layers", "shared_mlp.activation", "shared_mlp.output_linear", True, _attribute("shared_intermediate_size"),
        ("shared_mlp.input_linear",),
    ),
    "nanochat": Family("layers", "mlp.activation_fn", "mlp.fc2", False, _INTERMEDIATE, ("mlp.fc1",)),
    "phi": Family("layers", "mlp.activation_fn", "mlp.fc2", False, _INTERMEDIATE, ("mlp.fc1",), {}),
    "starcoder2": Family(
        "layers", "mlp.act", "mlp.c_proj", False, _INTERMEDIATE, ("mlp.c_fc",), {"use_bias": True}
    ),
    "gpt2": Family(
        "h", "mlp.act", "mlp.c_proj", False, _attribute("n_inner", times_hidden=4), ("mlp.c_fc",), {}, transposed=True
    ),
    "gpt_neo": Family(
        "h", "mlp.act", "mlp.c_proj", False, _attribute("intermediate_size", times_hidden=4), ("mlp.c_fc",), {}
    ),
    "gptj": Family("h", "mlp.act", "mlp.fc_out", False, _attribute("n_inner", times_hidden=4), ("mlp.fc_in",), {}),
    "gpt_neox": Family("layers", "mlp.act", "mlp.dense_4h_to_h", False, _INTERMEDIATE, ("mlp.dense_h_to_4h",), {}),
    "bloom": Family("h", "mlp.gelu_impl", "mlp.dense_4h_to_h", False, _FOUR_TIMES, ("mlp.dense_h_to_4h",), {}),
    "falcon": Family(
        "h", "mlp.act", "mlp.dense_4h_to_h", False, _attribute("ffn_hidden_size", times_hidden=4),
        ("mlp.dense_h_to_4h",), {"bias": True},
    ),
    "mpt": Family("blocks", "ffn.act", "ffn.down_proj", False, _FOUR_TIMES, ("ffn.up_proj",)),
    # The activation belongs to the layer, and its input is flattened to (row * position, unit).
    "opt": Family(
        "decoder.layers", "activation_fn", "fc2", False, _attribute("ffn_dim"), ("fc1",), {"enable_bias": True}
    ),
}  # fmt: skip

# Names under which configs outside the table give the width of the MLP; None there means four times the hidden size.
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff")
# Families outside the table whose config counts the outputs of gate and up together.
_HALVED = {"recurrent_gemma"}
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")

# Families whose layers have an expert module as soon as there is one expert.
_EXPERTS_FROM_ONE = {"granitemoehybrid"}


@dataclass(frozen=True)
class Shape:
    """Number of decoder layers, and of MLP units in each.

    Attributes:
        layers: number of decoder layers.
        units: MLP units per layer, of the widest where they differ.
        widths: units of each layer where they differ, else empty.
    """

    layers: int
    units: int
    widths: tuple[int, ...] = ()

    @classmethod
    def of(cls, widths: Sequence[int]) -> Shape:
        """From the number of units of each layer."""
        differ = len(set(widths)) > 1
        return cls(len(widths), max(widths), tuple(widths) if differ else ())

    def width(self, layer: int) -> int:
        """Units of one layer."""
        return self.widths[layer] if self.widths else self.units

    def __str__(self) -> str:
        return shape_text(self.layers, self.units, self.widths)


def shape_text(layers: int, units: int, widths: Sequence[int] = ()) -> str:
    """`26 layers of 1152 units`, or `3 layers of 24 to 48 units`."""
    return f"{layers} layers of {f'{min(widths)} to ' if widths else ''}{units} units"


def text_config_of(config: Any) -> Any:
    """The part of a transformers config that describes the text decoder: the config itself where that is all.

    Raises:
        ArchitectureError: if the config has several text parts.
    """
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config(decoder=True)
    except ValueError as error:
        raise ArchitectureError(f"{config.model_type}: {str(error).splitlines()[0]}; give its text model") from error


def model_type_of(config: Any) -> str:
    """`model_type` of the text decoder, as neuron sets keep it: `gemma3_text` for the composite `gemma3` too."""
    return str(getattr(text_config_of(config), "model_type", None))


def refuse_unsupported(config: Any) -> None:
    """Refuse models whose units cannot be steered.

    Raises:
        ArchitectureError: for a mixture of experts and for an encoder-decoder model.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{config.model_type}: an encoder-decoder model, whose units exist once for the text read and once for "
            "the text written; use a decoder-only model"
        )
    text = text_config_of(config)
    if not _has_expert_layers(text):
        return
    for part in (text, getattr(text, "ffn_config", None)):
        # The key of config.json first: transformers may have a second name for it.
        for name in sorted(_EXPERTS, key=lambda name: name not in vars(part or text)):
            count = getattr(part, name, None)
            if isinstance(count, int) and count > (0 if text.model_type in _EXPERTS_FROM_ONE else 1):
                raise experts_error(text, f"{name}={count}")


def _has_expert_layers(text: Any) -> bool:
    """Whether any layer has experts: a config may count experts and use them in no layer."""
    if not getattr(text, "is_moe", True):
        return False
    layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return True
    dense_layers = getattr(text, "first_k_dense_replace", None)
    if isinstance(dense_layers, int) and dense_layers >= layers:
        return False
    if getattr(text, "moe_layers", None) == []:
        return False
    return not set(range(layers)) <= set(getattr(text, "mlp_only_layers", None) or ())


def experts_error(config: Any, sign: str) -> ArchitectureError:
    """The refusal of a mixture of experts; `sign` is what shows it."""
    return ArchitectureError(
        f"{model_type_of(config)}: a mixture of experts ({sign}), not supported: its routed experts share one "
        "activation module and get the tokens regrouped, so a unit would not mean the same thing in each token; use "
        "a dense model"
    )


def family_of(config: Any) -> Family | None:
    """The table's row for a transformers config; None where the family is not in the table.

    Raises:
        ArchitectureError: for a mixture of experts and for an encoder-decoder model.
    """
    refuse_unsupported(config)
    return FAMILIES.get(model_type_of(config))


def declared_layers(config: Any) -> int | None:
    """Number of decoder layers by the config, None if it does not name it."""
    layers = getattr(text_config_of(config), "num_hidden_layers", None)
    return int(layers) if isinstance(layers, int) else None


def declared_units(config: Any) -> int | tuple[int, ...] | None:
    """Units per layer by the config: by the table or the usual names; None if it does not name them.

    Raises:
        ArchitectureError: if the family is refused.
    """
    family, text = family_of(config), text_config_of(config)
    if family is not None:
        width: Any = family.width(text)
    else:
        name = next((name for name in _WIDTHS if hasattr(text, name)), None)
        width = getattr(text, name) if name else None
        if model_type_of(config) in _HALVED and width is not None:
            width //= 2
        if name and width is None:
            width = 4 * int(getattr(text, "hidden_size", 0)) or None
    if isinstance(width, list | tuple):
        return tuple(map(int, width))
    return int(width) if isinstance(width, int) else None


def shape_of(config: Any) -> Shape:
    """Layers and units per layer, from a transformers config alone.

    A family of the table has its own formula. Of any other, the config's `num_hidden_layers` and the first of
    `intermediate_size`, `ffn_dim`, `n_inner`, `ffn_hidden_size` and `d_ff` count (four times the hidden size where that
    one is None); `sites_of` refuses the loaded model if its probe finds another shape.

    Raises:
        ArchitectureError: if the config does not name them, or the family is refused by name.
    """
    units, layers = declared_units(config), declared_layers(config)
    if layers is None or units is None:
        what, names = ("layers", ("num_hidden_layers",)) if layers is None else ("MLP units", _WIDTHS)
        raise ArchitectureError(
            f"architecture {model_type_of(config)!r} is not in the table, and its config does not name the number of "
            f"{what} (looked for {', '.join(names)}); add a row to lm_eval_steering.architectures.FAMILIES"
        )
    if isinstance(units, tuple) and len(units) != layers:
        raise ArchitectureError(f"{model_type_of(config)}: {len(units)} widths of the MLP for {layers} layers")
    return Shape.of(units if isinstance(units, tuple) else [units] * layers)
