"""What a config says before anything is loaded: the family, its row in the table, the shape, and what is refused.

To add a family, add a row. `docs/architectures.md` says what each column means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
        width: the number of units a layer, from the model's config.
    """

    layers: str
    activation: str
    down: str
    gated: bool
    width: Callable[[Any], int]


def _attribute(name: str, times_hidden: int | None = None) -> Callable[[Any], int]:
    """Width from one attribute of the config; where that is absent, a multiple of the hidden size."""

    def width(config: Any) -> int:
        return int(getattr(config, name, None) or (times_hidden or 0) * config.hidden_size)

    return width


_INTERMEDIATE = _attribute("intermediate_size")
_LLAMA = Family("layers", "mlp.act_fn", "mlp.down_proj", True, _INTERMEDIATE)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "cohere"), _LLAMA
    ),
    "phi3": Family("layers", "mlp.activation_fn", "mlp.down_proj", True, _INTERMEDIATE),
    "phi": Family("layers", "mlp.activation_fn", "mlp.fc2", False, _INTERMEDIATE),
    "starcoder2": Family("layers", "mlp.act", "mlp.c_proj", False, _INTERMEDIATE),
    "gpt2": Family("h", "mlp.act", "mlp.c_proj", False, _attribute("n_inner", times_hidden=4)),
    "gpt_neo": Family("h", "mlp.act", "mlp.c_proj", False, _attribute("intermediate_size", times_hidden=4)),
    "gptj": Family("h", "mlp.act", "mlp.fc_out", False, _attribute("n_inner", times_hidden=4)),
    "gpt_neox": Family("layers", "mlp.act", "mlp.dense_4h_to_h", False, _INTERMEDIATE),
    "bloom": Family("h", "mlp.gelu_impl", "mlp.dense_4h_to_h", False, _attribute("", times_hidden=4)),
    "falcon": Family("h", "mlp.act", "mlp.dense_4h_to_h", False, _attribute("ffn_hidden_size", times_hidden=4)),
    "mpt": Family("blocks", "ffn.act", "ffn.down_proj", False, _attribute("", times_hidden=4)),
    # The activation belongs to the layer, and its input is flattened to (row * position, unit).
    "opt": Family("decoder.layers", "activation_fn", "fc2", False, _attribute("ffn_dim")),
}

# Names under which configs outside the table give the width of the MLP; None there means four times the hidden size.
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Shape:
    """Number of decoder layers, and of MLP units in each."""

    layers: int
    units: int


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
    """Refuse by name what no table and no probe can make right.

    Raises:
        ArchitectureError: for a mixture of experts and for an encoder-decoder model.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{config.model_type}: an encoder-decoder model, whose units exist once for the text read and once for "
            "the text written; use a decoder-only model"
        )
    text = text_config_of(config)
    for part in (text, getattr(text, "ffn_config", None)):
        for name in _EXPERTS:
            count = getattr(part, name, None)
            # A config may count experts that a switch leaves out of the model.
            if isinstance(count, int) and count > 1 and getattr(text, "is_moe", True):
                raise experts_error(text, f"{name}={count}")


def experts_error(config: Any, sign: str) -> ArchitectureError:
    """The refusal of a mixture of experts; `sign` is by what it was recognised."""
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
    """Number of decoder layers that the config says, None where it does not."""
    layers = getattr(text_config_of(config), "num_hidden_layers", None)
    return int(layers) if isinstance(layers, int) else None


def declared_units(config: Any) -> int | None:
    """Units a layer that the config says, by the table or by the usual names, None where it does not.

    Raises:
        ArchitectureError: if the layers have different numbers of units, or the family is refused.
    """
    family, text = family_of(config), text_config_of(config)
    if family is not None:
        return family.width(text)
    name = next((name for name in _WIDTHS if hasattr(text, name)), None)
    width = getattr(text, name) if name else None
    if isinstance(width, list | tuple):
        if len(set(width)) != 1:
            raise ArchitectureError(
                f"{model_type_of(config)}: {name} has {len(set(width))} different values; layers of different widths "
                "are not supported"
            )
        width = width[0]
    if name and width is None:
        width = 4 * int(getattr(text, "hidden_size", 0)) or None
    return int(width) if isinstance(width, int) else None


def shape_of(config: Any) -> Shape:
    """Layers and units a layer, from a transformers config alone: nothing is loaded.

    A family of the table has its own formula. Of any other, the config's `num_hidden_layers` and the first of
    `intermediate_size`, `ffn_dim`, `n_inner`, `ffn_hidden_size` and `d_ff` count (four times the hidden size where that
    one is None); `sites_of` refuses the loaded model if its probe finds another shape.

    Raises:
        ArchitectureError: if the config does not say, or the family is refused by name.
    """
    units, layers = declared_units(config), declared_layers(config)
    if layers is None or units is None:
        what, names = ("layers", ("num_hidden_layers",)) if layers is None else ("MLP units", _WIDTHS)
        raise ArchitectureError(
            f"architecture {model_type_of(config)!r} is not in the table, and its config does not say the number of "
            f"{what} (looked for {', '.join(names)}); a row in lm_eval_steering.architectures.FAMILIES makes it known"
        )
    return Shape(layers, units)
