"""Where a model family keeps its MLP units: the one table that recording and steering share, and the check of it.

To add a family, add a row. `docs/architectures.md` says what each column means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lm_eval_steering.errors import ArchitectureError, did_you_mean


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


@dataclass(frozen=True)
class Shape:
    """Number of decoder layers, and of MLP units in each."""

    layers: int
    units: int


@dataclass(frozen=True)
class LayerSites:
    """The two modules of one layer at which units are observed and edited.

    The output of `activation` is site `activation`; the first input of `down` is site `product`.
    """

    layer: int
    activation: nn.Module
    down: nn.Module


@dataclass(frozen=True)
class ModelSites:
    """All sites of a loaded model. `decoder` holds the layers, has no head, and runs each site once a forward pass."""

    decoder: nn.Module
    layers: tuple[LayerSites, ...]
    shape: Shape
    gated: bool


def family_of(config: Any) -> Family:
    """The table's row for a transformers config.

    Raises:
        ArchitectureError: if the family is not in the table.
    """
    model_type = str(getattr(config, "model_type", None))
    if model_type not in FAMILIES:
        raise ArchitectureError(
            f"architecture {model_type!r} is not known{did_you_mean(model_type, FAMILIES)} "
            "A row in lm_eval_steering.architectures.FAMILIES makes it known"
        )
    return FAMILIES[model_type]


def shape_of(config: Any) -> Shape:
    """Layers and units a layer, from a transformers config alone: nothing is loaded."""
    return Shape(int(config.num_hidden_layers), family_of(config).width(config))


def sites_of(model: nn.Module) -> ModelSites:
    """The sites of a loaded model (a PEFT model too).

    Raises:
        ArchitectureError: if the family is not known, a module is not where the table says, or modules are shared.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    family, shape = family_of(base.config), shape_of(base.config)
    layers: Any = _submodule(base.base_model, family.layers, "list of layers")
    # OPT's head calls the inner decoder past the model around it: the module that holds the layers always runs.
    decoder = _submodule(base.base_model, family.layers.rpartition(".")[0], "decoder")
    if len(layers) != shape.layers:
        raise ArchitectureError(f"{family.layers}: {len(layers)} layers, the config says {shape.layers}")
    sites = tuple(
        LayerSites(
            number,
            _submodule(layer, family.activation, f"activation of layer {number}"),
            _submodule(layer, family.down, f"down projection of layer {number}"),
        )
        for number, layer in enumerate(layers)
    )
    if len({id(site.activation) for site in sites}) != shape.layers:
        raise ArchitectureError("the layers share one activation module, so a hook cannot tell them apart")
    return ModelSites(decoder, sites, shape, family.gated)


def _submodule(parent: nn.Module, path: str, what: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError:
        raise ArchitectureError(f"{what}: no module {path!r} in {type(parent).__name__}") from None


def check_width(units: torch.Tensor, expected: int, layer: int) -> None:
    """Refuse activations (..., unit) whose last axis is not the number of units, as in a tensor-parallel shard.

    Raises:
        ArchitectureError: naming the layer and both widths.
    """
    if units.shape[-1] != expected:
        raise ArchitectureError(
            f"layer {layer}: {units.shape[-1]} units where {expected} were expected; a model whose units are split "
            "over devices (tensor parallelism) cannot be steered or recorded"
        )
