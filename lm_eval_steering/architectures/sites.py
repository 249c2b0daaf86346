"""The modules of a loaded model at which units are observed and edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lm_eval_steering.architectures.families import Shape, text_config_of
from lm_eval_steering.errors import ArchitectureError


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
    """All sites of a loaded model. `decoder` holds the layers without a head, and runs each site once per forward."""

    decoder: nn.Module
    layers: tuple[LayerSites, ...]
    shape: Shape
    gated: bool


def layer_sites(layers: Sequence[nn.Module], activation: str, down: str) -> tuple[LayerSites, ...]:
    """The modules at two paths inside each layer.

    Raises:
        ArchitectureError: if a module is missing, or layers share one.
    """
    sites = tuple(
        LayerSites(
            number,
            submodule(layer, activation, f"activation of layer {number}"),
            submodule(layer, down, f"down projection of layer {number}"),
        )
        for number, layer in enumerate(layers)
    )
    if len({id(site.activation) for site in sites}) != len(sites):
        raise ArchitectureError("the layers share one activation module, so a hook cannot tell them apart")
    return sites


def submodule(parent: nn.Module, path: str, what: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        ArchitectureError: naming `what`, the path and the parent's class.
    """
    try:
        return parent.get_submodule(path)
    except AttributeError:
        raise ArchitectureError(f"{what}: no module {path!r} in {type(parent).__name__}") from None


def text_part(base: Any) -> nn.Module:
    """The decoder of a loaded model's text part, without a head: below `language_model` in a composite model.

    Raises:
        ArchitectureError: if a composite model holds no model of its text config.
    """
    text = text_config_of(base.config)
    if text is base.config:
        return _headless(base)
    for module in base.base_model.modules():
        config = getattr(module, "config", None)
        # Attention modules carry the text config too; only whole models know their base model.
        if hasattr(module, "base_model") and (config is text or getattr(config, "model_type", None) == text.model_type):
            return _headless(module)
    raise ArchitectureError(
        f"{base.config.model_type}: no {text.model_type} model inside {type(base).__name__}; load its text model"
    )


def _headless(model: Any) -> nn.Module:
    """The model inside one with a head; Llama 4's class names another part as its base."""
    decoder: nn.Module = model.base_model if model.base_model is not model else getattr(model, "model", model)
    return decoder


def check_width(units: torch.Tensor, expected: int, layer: int) -> None:
    """Refuse activations (..., unit) with another number of units than expected, as in a tensor-parallel shard.

    Raises:
        ArchitectureError: naming the layer and both widths.
    """
    if units.shape[-1] != expected:
        raise ArchitectureError(
            f"layer {layer}: {units.shape[-1]} units where {expected} were expected; a model whose units are split "
            "over devices (tensor parallelism) cannot be steered or recorded"
        )
