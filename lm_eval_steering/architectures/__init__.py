"""The modules of a model's MLP units and of its decoder layers, for recording and steering.

`families` is the table of model families, read from a config alone; `discovery` finds the units of any other model by a
forward pass that also checks them; `sites` holds the modules of a loaded model. See `docs/architectures.md`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lm_eval_steering.architectures.discovery import SitePaths, discover, parse_sites, verify
from lm_eval_steering.architectures.families import (
    FAMILIES,
    Family,
    Shape,
    family_of,
    model_type_of,
    refuse_unsupported,
    shape_of,
    shape_text,
    text_config_of,
)
from lm_eval_steering.architectures.sites import (
    LayerSites,
    ModelSites,
    check_width,
    hidden_states,
    layer_sites,
    submodule,
    text_part,
    with_hidden_states,
)
from lm_eval_steering.errors import ArchitectureError

__all__ = [
    "FAMILIES",
    "Family",
    "LayerSites",
    "ModelSites",
    "Shape",
    "SitePaths",
    "check_width",
    "discover",
    "family_of",
    "hidden_states",
    "model_type_of",
    "parse_sites",
    "refuse_unsupported",
    "shape_of",
    "shape_text",
    "sites_of",
    "text_config_of",
    "with_hidden_states",
]


def sites_of(model: nn.Module, override: str | None = None) -> ModelSites:
    """The sites of a loaded model (a PEFT model too): from the table, or by a probe where the table has no row.

    Args:
        model: a causal language model of transformers, or a composite model with one inside.
        override: `LAYERS:ACTIVATION:DOWN`, the modules of the units; checked by the probe, whatever the family.

    Raises:
        ArchitectureError: if the family is refused, the model has no module at a path of the table or the override,
            layers share modules, or the probe finds no single site in each layer.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    family = family_of(base.config)
    if override is not None:
        return verify(base, parse_sites(override))
    return discover(base) if family is None else _from_table(base, family)


def _from_table(base: Any, family: Family) -> ModelSites:
    shape, inner = shape_of(base.config), text_part(base)
    layers: Any = submodule(inner, family.layers, "list of layers")
    # OPT's head calls the inner decoder directly: only the module that holds the layers always runs.
    decoder = submodule(inner, family.layers.rpartition(".")[0], "decoder")
    if len(layers) != shape.layers:
        raise ArchitectureError(f"{family.layers}: {len(layers)} layers, the config has {shape.layers}")
    return ModelSites(decoder, layer_sites(layers, family.activation, family.down), shape, family.gated)
