"""Finding the MLP units of a family that the table does not know, and checking where a user says that they are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lm_eval_steering.architectures.families import (
    Shape,
    declared_layers,
    declared_units,
    experts_error,
    model_type_of,
)
from lm_eval_steering.architectures.probe import TOKENS, LayerTrace, run_probe, untouched
from lm_eval_steering.architectures.sites import ModelSites, layer_sites, submodule, text_part
from lm_eval_steering.errors import ArchitectureError

FORM = "sites=LAYERS:ACTIVATION:DOWN, for example sites=model.layers:mlp.act_fn:mlp.down_proj"
_PATH = re.compile(r"\w+(\.\w+)*")
# An activation followed by a linear layer also stands in attention and in state-space blocks.
_NOT_MLP = re.compile(r"attn|attention|mamba|mixer|ssm|conv|router|vision")
_ROUTED = re.compile(r"(^|\.)(routed_)?experts?(_?\d+)?(\.|$)")


@dataclass(frozen=True)
class SitePaths:
    """Where a user says that the units are.

    Attributes:
        layers: path of the list of decoder layers, from the whole model as `model.named_modules()` names it.
        activation: path of the activation's module inside a layer.
        down: path of the MLP's last linear layer inside a layer.
    """

    layers: str
    activation: str
    down: str

    def __str__(self) -> str:
        return f"{self.layers}:{self.activation}:{self.down}"


@dataclass(frozen=True)
class Site:
    """A place found in one layer: paths inside the layer, the number of units, and whether the MLP is gated."""

    activation: str
    down: str
    units: int
    gated: bool


def parse_sites(text: str) -> SitePaths:
    """Read the option `sites=`: three dotted paths joined by colons, which `--model_args` leaves alone.

    Raises:
        ArchitectureError: if the text has another form.
    """
    parts = str(text).strip().split(":")
    if len(parts) != 3 or not all(_PATH.fullmatch(part) for part in parts):
        raise ArchitectureError(f"sites={text}: expected three module paths joined by colons, {FORM}")
    return SitePaths(*parts)


def discover(base: Any) -> ModelSites:
    """The sites of a model outside the table, found and proven by one forward pass.

    In every layer there must be one activation module, working on each unit by itself and called once, of which the
    input of one linear layer is the output, or the output times the output (or half of it) of another linear layer.

    Args:
        base: the whole model, as transformers loaded it.

    Raises:
        ArchitectureError: naming what was found instead, and the option that points at the modules.
    """
    path = _layer_list(base)
    layers = list(base.get_submodule(path))
    traces, decoder = _probe(base, path, layers)
    name = model_type_of(base.config)
    with untouched(base):
        found = [_sites_in(layer, trace) for layer, trace in zip(layers, traces, strict=True)]
    for number, sites in enumerate(found):
        if len(sites) != 1 or sites != found[0]:
            there = _listed(sites) or _unused(layers[number], traces[number])
            first = f" where layer 0 has {_listed(found[0])}" if number else ""
            raise ArchitectureError(
                f"architecture {name!r} is not in the table, and the probe did not find the one MLP activation of "
                f"every layer of {path}: layer {number} has {there}{first}; say where it is: {FORM}"
            )
    return _model_sites(base, decoder, layers, found[0][0])


def verify(base: Any, paths: SitePaths) -> ModelSites:
    """The sites where the user says that they are, held to the same proof as discovered ones.

    Args:
        base: the whole model, as transformers loaded it.
        paths: parsed from the option.

    Raises:
        ArchitectureError: naming the option, the layer and what does not hold.
    """
    try:
        holder = submodule(base, paths.layers, "list of layers")
        if not isinstance(holder, nn.ModuleList):
            raise ArchitectureError(f"{paths.layers} is a {type(holder).__name__}, expected a list of layers")
        layers = list(holder)
        layer_sites(layers, paths.activation, paths.down)
        traces, decoder = _probe(base, paths.layers, layers)
        with untouched(base):
            sites = [
                _checked(number, layer, trace, paths)
                for number, (layer, trace) in enumerate(zip(layers, traces, strict=True))
            ]
        if len(set(sites)) != 1:
            raise ArchitectureError(f"the layers differ: {_listed(dict.fromkeys(sites))}")
        return _model_sites(base, decoder, layers, sites[0])
    except ArchitectureError as error:
        raise ArchitectureError(f"sites={paths}: {error}") from error


def _layer_list(base: Any) -> str:
    """Path of the decoder's list of layers: of the lists as long as the config says, the one with most parameters."""
    names = {id(module): path for path, module in base.named_modules()}
    lists = [module for module in text_part(base).modules() if isinstance(module, nn.ModuleList) and len(module)]
    wanted = declared_layers(base.config)
    fitting = [module for module in lists if wanted is None or len(module) == wanted]
    if not fitting:
        found = ", ".join(f"{names[id(module)]} ({len(module)})" for module in lists[:5]) or "no list of modules"
        raise ArchitectureError(
            f"architecture {model_type_of(base.config)!r} is not in the table, and it has no list of {wanted} layers: "
            f"{found}; say where they are: {FORM}"
        )
    return names[id(max(fitting, key=lambda module: sum(weight.numel() for weight in module.parameters())))]


def _probe(base: Any, path: str, layers: list[nn.Module]) -> tuple[tuple[LayerTrace, ...], nn.Module]:
    """The layers' traces, and the decoder: the innermost module around them that takes token ids and runs once."""
    for name, _module in base.named_modules():
        if name.startswith(f"{path}.") and _ROUTED.search(name):
            raise experts_error(base.config, f"modules {name}")
    parts = path.split(".")[:-1]
    ancestors = [base.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]
    probe = run_probe(base, layers, ancestors)
    for module, calls in zip(ancestors, probe.ancestors, strict=True):
        if calls == 1 and "input_ids" in inspect.signature(module.forward).parameters:
            return probe.layers, module
    raise ArchitectureError(f"no module around {path} takes input_ids and runs once in a forward pass")


def _sites_in(layer: nn.Module, trace: LayerTrace) -> list[Site]:
    """Every place in one layer that behaves as an MLP's activation."""
    sites = []
    for down in _linear_layers(layer, trace):
        for activation in trace.outputs:
            if _NOT_MLP.search(activation) or trace.calls[activation] != 1 or trace.calls[down] != 1:
                continue
            gated = _relation(trace, activation, down, layer)
            if gated is not None and _works_on_each_unit(layer.get_submodule(activation), trace, activation):
                sites.append(Site(activation, down, trace.outputs[activation].shape[-1], gated))
    # An adapter around the last linear layer passes its input on to parts of its own.
    return [
        site for site in sites if not any(site.down.startswith(f"{other.down}.") for other in sites if other != site)
    ]


def _checked(number: int, layer: nn.Module, trace: LayerTrace, paths: SitePaths) -> Site:
    """The site at the user's paths in one layer, or an error that says what does not hold there."""
    for path in (paths.activation, paths.down):
        if trace.calls[path] != 1:
            raise ArchitectureError(f"layer {number}: {path} was called {trace.calls[path]} times, expected once")
    gated = _relation(trace, paths.activation, paths.down, layer)
    if gated is None:
        raise ArchitectureError(
            f"layer {number}: the input of {paths.down} {_shape(trace.inputs.get(paths.down))} is neither the output "
            f"of {paths.activation} {_shape(trace.outputs.get(paths.activation))} nor its product with the output of "
            "another linear layer"
        )
    if not _works_on_each_unit(layer.get_submodule(paths.activation), trace, paths.activation):
        raise ArchitectureError(f"layer {number}: {paths.activation} is no activation function of single units")
    return Site(paths.activation, paths.down, trace.outputs[paths.activation].shape[-1], gated)


def _relation(trace: LayerTrace, activation: str, down: str, layer: nn.Module) -> bool | None:
    """Whether the MLP is gated (True) or plain (False) between the two modules; None where neither holds."""
    units, product = trace.outputs.get(activation), trace.inputs.get(down)
    if units is None or product is None or units.shape != product.shape or len(units) != TOKENS or not product.any():
        return None
    if _equal(units, product):
        return False
    width = units.shape[-1]
    for linear in _linear_layers(layer, trace):
        up = trace.outputs.get(linear)
        if up is None or len(up) != len(units) or up.shape[-1] not in {width, 2 * width}:
            continue
        if any(_equal(units * part.to(units.device), product) for part in up.split(width, dim=-1)):
            return True
    return None


def _works_on_each_unit(module: nn.Module, trace: LayerTrace, path: str) -> bool:
    """Whether the module changes its input, and a change of every other unit leaves the units between alone."""
    before, after = trace.inputs.get(path), trace.outputs[path]
    if before is None or before.shape != after.shape or _equal(before, after):
        return False
    other = before.clone()
    other[:, ::2] = 50 * (1 + other[:, ::2].abs())  # far away, so that a norm cannot come out the same
    try:
        return _equal(module(other)[:, 1::2], after[:, 1::2])
    except (TypeError, ValueError, RuntimeError, IndexError):  # it wants another shape, or more than one input
        return False


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equality up to a few roundings of their dtype."""
    step = torch.finfo(second.dtype).eps
    one, two = first.cpu().double(), second.cpu().double()  # not every accelerator has doubles
    return torch.allclose(one, two, rtol=4 * step, atol=step * float(two.abs().max()))


def _linear_layers(layer: nn.Module, trace: LayerTrace) -> list[str]:
    """Paths of the modules that ran and multiply by a matrix: of torch, of transformers, quantised or adapted."""
    return [path for path in trace.inputs if _is_linear(layer.get_submodule(path))]


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "linear" in type(module).__name__.lower() or (isinstance(weight, torch.Tensor) and weight.dim() == 2)


def _model_sites(base: Any, decoder: nn.Module, layers: list[nn.Module], site: Site) -> ModelSites:
    """The sites, once their shape is seen to be the one that the config says."""
    name, shape = model_type_of(base.config), Shape(len(layers), site.units)
    said = Shape(declared_layers(base.config) or shape.layers, declared_units(base.config) or shape.units)
    if shape != said:
        raise ArchitectureError(
            f"architecture {name!r}: {shape.layers} layers of {shape.units} units at {site.activation}, the config "
            f"says {said.layers} of {said.units}; a row in lm_eval_steering.architectures.FAMILIES can say the width"
        )
    return ModelSites(decoder, layer_sites(layers, site.activation, site.down), shape, site.gated)


def _unused(layer: nn.Module, trace: LayerTrace) -> str:
    """What is named like an activation in a layer without a site, and how often each was called."""
    names = [path for path, _ in layer.named_modules() if re.search(r"act|gelu|silu|relu", path.rpartition(".")[2])]
    return "none that leads to a linear layer" + "".join(
        f", {path} ran {trace.calls[path]} times" for path in names[:3]
    )


def _listed(sites: Iterable[Site]) -> str:
    return " and ".join(f"{site.activation} before {site.down} ({site.units} units)" for site in sites)


def _shape(tensor: torch.Tensor | None) -> str:
    return "(none)" if tensor is None else str(tuple(tensor.shape))
