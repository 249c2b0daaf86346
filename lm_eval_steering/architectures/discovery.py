"""The MLP units of a family that is not in the table: found by a forward pass, or checked at the user's paths."""

from __future__ import annotations

import inspect
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lm_eval_steering.architectures.compat import HOOKS
from lm_eval_steering.architectures.families import (
    Shape,
    declared_layers,
    declared_units,
    experts_error,
    model_type_of,
    text_config_of,
)
from lm_eval_steering.architectures.sites import ModelSites, layer_sites, submodule, text_part
from lm_eval_steering.errors import ArchitectureError

# --- The probe: one forward pass of a few tokens with hooks inside the decoder layers

TOKENS = 5


@dataclass
class LayerTrace:
    """The modules of one layer in the probe; paths are inside the layer.

    Attributes:
        calls: path -> calls of that module.
        inputs: path -> (token, feature), the first positional input of its last call, where that is a tensor.
        outputs: path -> (token, feature), the output of its last call, where that is a tensor.
    """

    calls: Counter[str] = field(default_factory=Counter)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """A trace for each layer, and the number of calls of each watched ancestor of the layers."""

    layers: tuple[LayerTrace, ...]
    ancestors: tuple[int, ...]


def run_probe(base: Any, layers: Sequence[nn.Module], ancestors: Sequence[nn.Module]) -> Probe:
    """Run the model once on a few tokens and record inputs and outputs of every module inside its layers.

    Other hooks are disabled meanwhile; random state, training mode and hooks are restored.

    Args:
        base: the whole model, as transformers loaded it.
        layers: its decoder layers.
        ancestors: modules that contain the layers, whose calls are counted.

    Raises:
        ArchitectureError: if weights are not in memory, or the forward pass fails.
    """
    tensors = [*base.parameters(), *base.buffers()]
    if any(tensor.device.type == "meta" for tensor in tensors):
        raise ArchitectureError(
            f"architecture {model_type_of(base.config)!r}: its MLP units are checked by a forward pass, but some "
            "weights are on the meta device (offloaded, or never loaded); load the model whole"
        )
    traces = tuple(LayerTrace() for _ in layers)
    calls = [0] * len(ancestors)
    with untouched(base), _watching(layers, traces, ancestors, calls):
        try:
            ids = _token_ids(base)
            base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except Exception as error:  # an unknown model can fail in any way
            raise ArchitectureError(
                f"architecture {model_type_of(base.config)!r}: the forward pass of {TOKENS} tokens that looks for its "
                f"MLP units failed: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
            ) from error
    return Probe(traces, tuple(calls))


@contextmanager
def untouched(base: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and hooks; at the end everything is restored."""
    modules = list(base.modules())
    training = [module.training for module in modules]
    hooks = [{name: module.__dict__[name] for name in HOOKS if name in module.__dict__} for module in modules]
    devices = {tensor.device for tensor in base.parameters() if tensor.device.type not in {"cpu", "meta"}}
    kind = next((device.type for device in devices), "cuda")
    forked = torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind)
    with forked, torch.no_grad():
        try:
            for module, saved in zip(modules, hooks, strict=True):
                module.training = False
                # Handles refer to the dictionaries, which are therefore replaced and not emptied.
                module.__dict__.update({name: OrderedDict() for name in saved})
            yield
        finally:
            for module, mode, saved in zip(modules, training, hooks, strict=True):
                module.training = mode
                module.__dict__.update(saved)


def _token_ids(base: Any) -> torch.Tensor:
    """(1, token) different ids spread over the vocabulary, none of them special, where the embeddings are."""
    weight = base.get_input_embeddings().weight
    text = text_config_of(base.config)
    size = int(getattr(text, "vocab_size", None) or len(weight))
    special = {
        value
        for config in (base.config, text)
        for name, value in vars(config).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    usual = [number for number in range(min(size, 1000)) if number not in special] or [0]
    chosen = [usual[number * len(usual) // TOKENS] for number in range(TOKENS)]
    return torch.tensor([chosen], device=weight.device)


@contextmanager
def _watching(
    layers: Sequence[nn.Module], traces: Sequence[LayerTrace], ancestors: Sequence[nn.Module], calls: list[int]
) -> Iterator[None]:
    """Record the traces and the numbers of calls during a forward pass."""
    names = [{id(module): path for path, module in layer.named_modules() if path} for layer in layers]
    running: list[int] = []  # numbers of the layers in progress; a shared module counts for the last

    def enter(number: int) -> Callable[..., None]:
        return lambda *_: running.append(number)

    def leave(*_: Any) -> None:
        running.pop()

    def count(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[number] += 1

        return hook

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if running and id(module) in names[running[-1]]:
            path = names[running[-1]][id(module)]
            traces[running[-1]].calls[path] += 1
            _keep(traces[running[-1]].inputs, path, inputs[0] if inputs else None)

    def after(module: nn.Module, _inputs: Any, output: Any) -> None:
        if running and id(module) in names[running[-1]]:
            _keep(traces[running[-1]].outputs, names[running[-1]][id(module)], output)

    handles = []
    try:
        for number, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(enter(number)))
            handles.append(layer.register_forward_hook(leave, always_call=True))
        for number, ancestor in enumerate(ancestors):
            handles.append(ancestor.register_forward_pre_hook(count(number)))
        for module in {id(module): module for layer in layers for module in layer.modules()}.values():
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(into: dict[str, torch.Tensor], path: str, value: Any) -> None:
    # A copy, because an in-place activation overwrites what came before it.
    if isinstance(value, torch.Tensor) and value.dim() > 0 and value.is_floating_point():
        into[path] = value.detach().reshape(-1, value.shape[-1]).clone()


FORM = "sites=LAYERS:ACTIVATION:DOWN, for example sites=model.layers:mlp.act_fn:mlp.down_proj"
_PATH = re.compile(r"\w+(\.\w+)*")
# An activation followed by a linear layer also occurs in attention and state-space blocks.
_NOT_MLP = re.compile(r"attn|attention|mamba|mixer|ssm|conv|router|vision")
_ROUTED = re.compile(r"(^|\.)(routed_)?experts?(_?\d+)?(\.|$)")


@dataclass(frozen=True)
class SitePaths:
    """The user's paths of the modules of the units.

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
    """The MLP of one layer: paths inside the layer, the number of units, and whether the MLP is gated."""

    activation: str
    down: str
    units: int
    gated: bool

    @property
    def paths(self) -> tuple[str, str, bool]:
        """What must be equal in all layers; the number of units may differ."""
        return self.activation, self.down, self.gated


def parse_sites(text: str) -> SitePaths:
    """The argument `sites=`: three dotted paths joined by colons, which `--model_args` does not split.

    Raises:
        ArchitectureError: if the text has another form.
    """
    parts = str(text).strip().split(":")
    if len(parts) != 3 or not all(_PATH.fullmatch(part) for part in parts):
        raise ArchitectureError(f"sites={text}: expected three module paths joined by colons, {FORM}")
    return SitePaths(*parts)


def discover(base: Any) -> ModelSites:
    """The sites of a model outside the table, found by one forward pass.

    In every layer there must be one module that works on each unit by itself and is called once, such that the input
    of one linear layer is its output, or its output times the output (or half the output) of another linear layer.

    Args:
        base: the whole model, as transformers loaded it.

    Raises:
        ArchitectureError: naming the candidates, and the argument that names the modules.
    """
    path = _layer_list(base)
    layers = list(base.get_submodule(path))
    traces, decoder = _probe(base, path, layers)
    name = model_type_of(base.config)
    with untouched(base):
        by_layer = [_sites_in(layer, trace) for layer, trace in zip(layers, traces, strict=True)]
    for number, sites in enumerate(by_layer):
        if len(sites) != 1 or sites[0].paths != by_layer[0][0].paths:
            seen = _listed(sites) or _unused(layers[number], traces[number])
            first = f" where layer 0 has {_listed(by_layer[0])}" if number else ""
            raise ArchitectureError(
                f"architecture {name!r} is not in the table, and the probe did not find the one MLP activation of "
                f"every layer of {path}: layer {number} has {seen}{first}{_way_out(layers[number], traces[number])}"
            )
    return _model_sites(base, decoder, layers, [sites[0] for sites in by_layer])


def verify(base: Any, paths: SitePaths) -> ModelSites:
    """The sites at the user's paths, with the same checks as in `discover`.

    Args:
        base: the whole model, as transformers loaded it.
        paths: from `parse_sites`.

    Raises:
        ArchitectureError: naming the argument, the layer and the failed check.
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
        if len({site.gated for site in sites}) != 1:
            raise ArchitectureError(f"the layers differ: {_listed(dict.fromkeys(sites))}")
        return _model_sites(base, decoder, layers, sites)
    except ArchitectureError as error:
        raise ArchitectureError(f"sites={paths}: {error}") from error


def _layer_list(base: Any) -> str:
    """Path of the decoder's list of layers: of the lists as long as the config says, the one with most parameters."""
    names: dict[int, str] = {id(module): path for path, module in base.named_modules()}
    lists = [module for module in text_part(base).modules() if isinstance(module, nn.ModuleList) and len(module)]
    wanted = declared_layers(base.config)
    fitting = [module for module in lists if wanted is None or len(module) == wanted]
    if not fitting:
        lengths = ", ".join(f"{names[id(module)]} ({len(module)})" for module in lists[:5]) or "no list of modules"
        raise ArchitectureError(
            f"architecture {model_type_of(base.config)!r} is not in the table, and it has no list of {wanted} layers: "
            f"{lengths}; name it: {FORM}"
        )
    return names[id(max(fitting, key=lambda module: sum(weight.numel() for weight in module.parameters())))]


def _probe(base: Any, path: str, layers: list[nn.Module]) -> tuple[tuple[LayerTrace, ...], nn.Module]:
    """The layers' traces, and the decoder: the innermost module with the layers that takes token ids and runs once."""
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
    """Every pair of modules in one layer that passes the checks."""
    sites = []
    for down in _linear_layers(layer, trace):
        for activation in trace.outputs:
            if _NOT_MLP.search(activation) or trace.calls[activation] != 1 or trace.calls[down] != 1:
                continue
            gated = _relation(trace, activation, down, layer)
            if gated is not None and _works_on_each_unit(layer.get_submodule(activation), trace, activation):
                sites.append(Site(activation, down, trace.outputs[activation].shape[-1], gated))
    # An adapter around the last linear layer passes its input to its parts.
    return [
        site for site in sites if not any(site.down.startswith(f"{other.down}.") for other in sites if other != site)
    ]


def _checked(number: int, layer: nn.Module, trace: LayerTrace, paths: SitePaths) -> Site:
    """The site at the user's paths in one layer, or an error that names the failed check."""
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
        raise ArchitectureError(f"layer {number}: {paths.activation} is not an activation function of single units")
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
        if any(_equal(units * part.to(units.device), product) for part in torch.split(up, width, dim=-1)):
            return True
    return None


def _works_on_each_unit(module: nn.Module, trace: LayerTrace, path: str) -> bool:
    """Whether the module changes its input, and no output depends on other units (every other unit is varied)."""
    before, after = trace.inputs.get(path), trace.outputs[path]
    if before is None or before.shape != after.shape or _equal(before, after):
        return False
    other = before.clone()
    other[:, ::2] = 50 * (1 + other[:, ::2].abs())  # large, so that a norm would change
    try:
        return _equal(module(other)[:, 1::2], after[:, 1::2])
    except (TypeError, ValueError, RuntimeError, IndexError):  # it needs another shape, or several inputs
        return False


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equality up to a few rounding errors of their dtype."""
    step = torch.finfo(second.dtype).eps
    one, two = first.cpu().double(), second.cpu().double()  # not every accelerator has doubles
    return torch.allclose(one, two, rtol=4 * step, atol=step * float(two.abs().max()))


def _linear_layers(layer: nn.Module, trace: LayerTrace) -> list[str]:
    """Paths of the linear layers that ran: of torch, of transformers, quantised or with an adapter."""
    return [path for path in trace.inputs if _is_linear(layer.get_submodule(path))]


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "linear" in type(module).__name__.lower() or (isinstance(weight, torch.Tensor) and weight.dim() == 2)


def _model_sites(base: Any, decoder: nn.Module, layers: list[nn.Module], sites: Sequence[Site]) -> ModelSites:
    """The sites, whose shape must be that of the config."""
    name, site = model_type_of(base.config), sites[0]
    shape = Shape.of([each.units for each in sites])
    units = declared_units(base.config) or [each.units for each in sites]
    declared = Shape.of([units] * (declared_layers(base.config) or shape.layers) if isinstance(units, int) else units)
    if shape != declared:
        raise ArchitectureError(
            f"architecture {name!r}: {shape} at {site.activation}, by the config {declared}; a row "
            "in lm_eval_steering.architectures.FAMILIES gives its width"
        )
    return ModelSites(decoder, layer_sites(layers, site.activation, site.down), shape, site.gated)


def _way_out(layer: nn.Module, trace: LayerTrace) -> str:
    """What can be done about a layer without a site: nothing, if no module that ran is an activation function."""
    modules = {path: layer.get_submodule(path) for path in trace.outputs}
    if any(_works_on_each_unit(module, trace, path) for path, module in modules.items() if not _is_linear(module)):
        return f"; name it: {FORM}"
    if all(_NOT_MLP.search(path) for path in _linear_layers(layer, trace)):
        return (
            "; its layers hold no MLP, so there are no units to observe or edit: all of their linear layers are of "
            "attention, convolution or a state space (as in Mamba); use a model whose layers have an MLP"
        )
    return (
        "; its MLP calls its activation as a function (such as F.silu) and not as a module, so there is nothing to "
        "observe or edit: `sites=` cannot help; use an implementation of the model with a module for it"
    )


def _unused(layer: nn.Module, trace: LayerTrace) -> str:
    """Modules named like an activation function in a layer without a site, and their numbers of calls."""
    names = [path for path, _ in layer.named_modules() if re.search(r"act|gelu|silu|relu", path.rpartition(".")[2])]
    return "none that leads to a linear layer" + "".join(
        f", {path} ran {trace.calls[path]} times" for path in names[:3]
    )


def _listed(sites: Iterable[Site]) -> str:
    return " and ".join(f"{site.activation} before {site.down} ({site.units} units)" for site in sites)


def _shape(tensor: torch.Tensor | None) -> str:
    return "(none)" if tensor is None else str(tuple(tensor.shape))
