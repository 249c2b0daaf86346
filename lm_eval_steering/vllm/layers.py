"""Where vLLM keeps an MLP's activation and what its layers return, and putting steered modules there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lm_eval_steering.architectures import FAMILIES as HF_FAMILIES
from lm_eval_steering.errors import ArchitectureError
from lm_eval_steering.vllm import compat
from lm_eval_steering.vllm.activation import SteeredActivation
from lm_eval_steering.vllm.hidden_states import Returns, SteeredHiddenStates


@dataclass(frozen=True)
class Family:
    """Names of the modules that matter in vLLM's model of one `model_type` of transformers.

    Attributes:
        activation: path of the activation's module inside a layer.
        down: path of the last linear layer of the MLP inside a layer, split over workers by its inputs.
        gated: whether the module multiplies with the up projection.
        returns: what a layer returns.
    """

    activation: str
    down: str
    gated: bool
    returns: Returns = Returns.HIDDEN_STATES


_FUSED = Family("mlp.act_fn", "mlp.down_proj", True, Returns.PARTS)
# Some of these vLLM runs with the modules of transformers (GPT-NeoX, OLMo 2, Phi), and names are theirs.
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"), _FUSED),
    "cohere": replace(_FUSED, returns=Returns.HIDDEN_STATES_AND_INPUT),
    "olmo2": replace(_FUSED, returns=Returns.HIDDEN_STATES),
    "gpt2": Family("mlp.act", "mlp.c_proj", False),
    "gpt_neox": Family("mlp.act", "mlp.dense_4h_to_h", False),
    "opt": Family("activation_fn", "fc2", False),
    "bloom": Family("mlp.gelu_impl", "mlp.dense_4h_to_h", False),
    "falcon": Family("mlp.act", "mlp.dense_4h_to_h", False),
    "phi": Family("mlp.activation_fn", "mlp.fc2", False),
}
_HIDDEN_STATES = "steered_hidden_states"  # attribute of a layer
_LISTS = ("model.layers", "transformer.h", "model.decoder.layers", "gpt_neox.layers")


def refuse_unknown(model_type: str) -> None:
    """Refuse a family that is not in the table, before an engine starts.

    Raises:
        ArchitectureError: naming it.
    """
    if model_type not in FAMILIES:
        way_out = "use --model steered-hf" if model_type in HF_FAMILIES else "--model steered-hf may find its units"
        raise ArchitectureError(
            f"architecture {model_type!r}: steered-vllm knows {', '.join(sorted(FAMILIES))}; {way_out}"
        )


@dataclass(frozen=True)
class SteeredLayer:
    """A steered activation and the units that it holds: [first, first + width) of `full`; and the hidden states.

    `hidden_states` is None in an engine that was started without room for `site=residual`.
    """

    activation: SteeredActivation
    first: int
    full: int
    hidden_states: SteeredHiddenStates | None = None


def install(
    model: nn.Module, model_type: str, layers: int, capacity: int, dimensions: int | None, real: torch.Tensor
) -> dict[int, SteeredLayer]:
    """Put a steered activation into each MLP that this worker holds, and a hook on each of its layers.

    Args:
        model: of vLLM, with its weights, not yet compiled; its language part.
        model_type: of transformers' config of the text decoder.
        layers: number of decoder layers of the whole model.
        capacity: see `SteeredActivation`.
        dimensions: of the hidden states; None leaves what layers return alone.
        real: see `SteeredModule`.

    Returns:
        Number of the layer -> what was put there.

    Raises:
        ArchitectureError: naming what was found instead of what the table says.
    """
    refuse_unknown(model_type)
    family = FAMILIES[model_type]
    installed: dict[int, SteeredLayer] = {}
    for number, layer in enumerate(_layers(model, layers)):
        if not compat.is_elsewhere(layer):
            steered = _replace(layer, number, family, capacity, real)
            if dimensions is not None:
                steered = replace(steered, hidden_states=steer_what_it_returns(layer, family.returns, dimensions, real))
            installed[number] = steered
    return installed


def steer_what_it_returns(
    layer: nn.Module, returns: Returns, dimensions: int, real: torch.Tensor
) -> SteeredHiddenStates:
    """Put a hook on a layer that edits what it returns.

    Its name, class and attributes stay, which vLLM may look at. Compiled code contains what hooks do that were there
    before.

    Args:
        layer: of vLLM, not yet compiled.
        returns: what it returns.
        dimensions: of the hidden states.
        real: see `SteeredModule`.
    """
    module = SteeredHiddenStates(returns, dimensions, real)
    layer.add_module(_HIDDEN_STATES, module)
    layer.register_forward_hook(_steered)
    return module


def _steered(layer: nn.Module, _inputs: Any, output: Any) -> Any:
    return getattr(layer, _HIDDEN_STATES)(output)


def _layers(model: nn.Module, layers: int) -> list[nn.Module]:
    for path in _LISTS:
        modules = _at(model, path)
        if isinstance(modules, nn.ModuleList):
            if len(modules) != layers:
                raise ArchitectureError(f"{type(model).__name__}.{path} has {len(modules)} layers, its config {layers}")
            return list(modules)
    raise ArchitectureError(f"{type(model).__name__}: no list of layers at {', '.join(_LISTS)}")


def _replace(layer: nn.Module, number: int, family: Family, capacity: int, real: torch.Tensor) -> SteeredLayer:
    original, down = _at(layer, family.activation), _at(layer, family.down)
    where = f"layer {number} ({type(layer).__name__})"
    if not isinstance(original, nn.Module) or not isinstance(down, nn.Module):
        missing = family.down if isinstance(original, nn.Module) else family.activation
        children = ", ".join(name for name, _ in layer.named_modules() if name.count(".") == 1)
        raise ArchitectureError(f"{where}: no module {missing}; it has {children}; use --model steered-hf")
    function = compat.gated_function(original)
    if (function is None) == family.gated or (not family.gated and compat.is_fused(original)):
        expected = "SiluAndMul or GeluAndMul" if family.gated else "a plain activation function"
        raise ArchitectureError(
            f"{where}: {family.activation} is a {type(original).__name__}, expected {expected}: a fused or quantised "
            "activation would pass the intervention by; use --model steered-hf, or weights that are not quantised so"
        )
    first, width, full = compat.slice_of(down)
    module = SteeredActivation(original, width, capacity, function, real)
    parent, _, name = family.activation.rpartition(".")
    setattr(_at(layer, parent) if parent else layer, name, module)
    return SteeredLayer(module, first, full)


def _at(module: nn.Module, path: str) -> Any:
    """What is at a path of attributes; None where there is nothing."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value
