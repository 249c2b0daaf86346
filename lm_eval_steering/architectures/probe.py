"""One forward pass of a few tokens, watched from inside the decoder layers, that leaves the model as it was."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lm_eval_steering.architectures.families import model_type_of, text_config_of
from lm_eval_steering.errors import ArchitectureError

TOKENS = 5
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


@dataclass
class LayerTrace:
    """What one layer did in the probe; paths are inside the layer.

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
    """What was seen: a trace for each layer, and how often each watched ancestor of the layers ran."""

    layers: tuple[LayerTrace, ...]
    ancestors: tuple[int, ...]


def run_probe(base: Any, layers: Sequence[nn.Module], ancestors: Sequence[nn.Module]) -> Probe:
    """Run the model once on a few tokens and note inputs and outputs of every module inside its layers.

    Hooks of others sleep meanwhile; random state, training mode, gradients and hooks are afterwards what they were.

    Args:
        base: the whole model, as transformers loaded it.
        layers: its decoder layers.
        ancestors: modules around them whose calls are counted.

    Raises:
        ArchitectureError: if weights are not in memory, or the forward pass fails.
    """
    tensors = [*base.parameters(), *base.buffers()]
    if any(tensor.device.type == "meta" for tensor in tensors):
        raise ArchitectureError(
            f"architecture {model_type_of(base.config)!r}: its MLP units are checked by a forward pass, and some "
            "weights are on the meta device (offloaded, or never loaded); load the model whole"
        )
    traces = tuple(LayerTrace() for _ in layers)
    calls = [0] * len(ancestors)
    with untouched(base), _watching(layers, traces, ancestors, calls):
        try:
            ids = _token_ids(base)
            base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except Exception as error:  # a model that we know nothing of can fail in any way
            raise ArchitectureError(
                f"architecture {model_type_of(base.config)!r}: the forward pass of {TOKENS} tokens that looks for its "
                f"MLP units failed: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
            ) from error
    return Probe(traces, tuple(calls))


@contextmanager
def untouched(base: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without anyone's hooks, and everything as before at the end."""
    modules = list(base.modules())
    training = [module.training for module in modules]
    hooks = [{name: module.__dict__[name] for name in _HOOKS if name in module.__dict__} for module in modules]
    devices = {tensor.device for tensor in base.parameters() if tensor.device.type not in {"cpu", "meta"}}
    kind = next((device.type for device in devices), "cuda")
    forked = torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind)
    with forked, torch.no_grad():
        try:
            for module, own in zip(modules, hooks, strict=True):
                module.training = False
                # The handles of others point at their own dictionary, so it is set aside, not emptied.
                module.__dict__.update({name: OrderedDict() for name in own})
            yield
        finally:
            for module, mode, own in zip(modules, training, hooks, strict=True):
                module.training = mode
                module.__dict__.update(own)


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
    chosen = [usual[place * len(usual) // TOKENS] for place in range(TOKENS)]
    return torch.tensor([chosen], device=weight.device)


@contextmanager
def _watching(
    layers: Sequence[nn.Module], traces: Sequence[LayerTrace], ancestors: Sequence[nn.Module], calls: list[int]
) -> Iterator[None]:
    """Fill the traces and the counts of calls during a forward pass."""
    names = [{id(module): path for path, module in layer.named_modules() if path} for layer in layers]
    running: list[int] = []  # numbers of the layers in progress; a module that layers share is noted for the last

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
