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
    """The modules of one layer at which units and hidden states are observed and edited.

    The output of `activation` is site `activation`; the first input of `down` is site `product`; the hidden states that
    `block`, the decoder layer itself, returns are site `residual` (`hidden_states`).
    """

    layer: int
    activation: nn.Module
    down: nn.Module
    block: nn.Module


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
            layer,
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


def hidden_states(output: Any) -> torch.Tensor:
    """(row, position, dimension) hidden states that a decoder layer returned: a tensor, or the first of a tuple.

    A layer of Gemma 3n returns several streams, (stream, row, position, dimension); here they stand side by side in
    the last axis, stream by stream.

    Raises:
        ArchitectureError: if it returned something else.
    """
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, torch.Tensor) or hidden.dim() not in {3, 4}:
        what = f"a tensor of shape {tuple(hidden.shape)}" if isinstance(hidden, torch.Tensor) else type(hidden).__name__
        raise ArchitectureError(
            f"site=residual: a decoder layer returned {what}, expected hidden states (row, position, dimension), alone "
            "or first in a tuple; steer at site=activation or site=product"
        )
    return hidden.movedim(0, -2).flatten(-2) if hidden.dim() == 4 else hidden


def with_hidden_states(output: Any, hidden: torch.Tensor) -> Any:
    """What a decoder layer returned, with its hidden states replaced by those of the form of `hidden_states`."""
    before = output[0] if isinstance(output, tuple) else output
    if before.dim() == 4:
        hidden = hidden.reshape(*hidden.shape[:-1], before.shape[0], before.shape[-1]).movedim(-2, 0).contiguous()
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


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
