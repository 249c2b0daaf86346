"""Whether a loaded model can be steered, and with this neuron set."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lm_eval_steering.architectures import ModelSites, model_type_of, sites_of
from lm_eval_steering.errors import ArchitectureError
from lm_eval_steering.fingerprint import weights_sketch
from lm_eval_steering.neurons.neuron_set import NeuronSet


def refuse_sharded(model: nn.Module) -> None:
    """Refuse tensor parallelism, in which each device holds a part of every layer's units.

    Raises:
        ArchitectureError: naming a split parameter.
    """
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor":
            raise ArchitectureError(
                f"{name} is split over devices (tensor parallelism), so a unit's number means another neuron on each; "
                "load the model without tp_plan, whole or with parallelize=True"
            )


def refuse_prompt_learning(model: nn.Module) -> None:
    """Refuse adapters that put positions of their own before a request's, which have no token and no place in it.

    Raises:
        ArchitectureError: naming the adapter.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:
            raise ArchitectureError(
                f"the adapter {name} ({config.peft_type}) adds positions of its own to every request, "
                "neither prompt nor generated; steer without it, or with an adapter of weights (LoRA)"
            )


def fitting_sites(
    model: nn.Module,
    neurons: NeuronSet,
    *,
    sites: str | None = None,
    force: bool = False,
    sketch: Sequence[float] | None = None,
    name: str = "this model",
    found: ModelSites | None = None,
) -> ModelSites:
    """Where the model's units are, if the neuron set is of this model.

    Args:
        model: a causal language model of transformers, PEFT-wrapped or not.
        neurons: the set.
        sites: where the units are, if neither the family is known nor the set says it.
        force: accept a set of other weights, or of another model that has all of the neurons.
        sketch: of the model's weights, if it is known already.
        name: of the model, for the message.
        found: where the units are, if it was found out before.

    Raises:
        NeuronSetError: if the set belongs to another model.
        ArchitectureError: if the units are not found, or are split over devices, or an adapter adds positions.
    """
    refuse_sharded(model)
    refuse_prompt_learning(model)
    found = found or sites_of(model, sites or neurons.provenance.sites or None)
    neurons.check_model(found.shape.layers, found.shape.units, model_type_of(model.config), force)
    if not force:
        neurons.check_weights(weights_sketch(model) if sketch is None else sketch, name)
    return found
