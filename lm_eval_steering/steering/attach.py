"""An intervention attached to a loaded model: hooks that edit the chosen units, and evidence that they did."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lm_eval_steering.architectures import (
    LayerSites,
    ModelSites,
    check_width,
    hidden_states,
    model_type_of,
    sites_of,
    with_hidden_states,
)
from lm_eval_steering.architectures.compat import output_is_hooked
from lm_eval_steering.architectures.weights import weights_sketch
from lm_eval_steering.errors import ArchitectureError, DidNotHappenError, InterventionError
from lm_eval_steering.neurons.neuron_set import NeuronSet, neuron_set_of
from lm_eval_steering.steering.compiled import Affine, CompiledIntervention, Edit, LiveValue, Term, compile_intervention
from lm_eval_steering.steering.intervention import NORMAL, RESIDUAL, SITES, from_arguments
from lm_eval_steering.steering.live import normal, statistic
from lm_eval_steering.steering.positions import Declared, ForwardRows, GenerationPrompt, RowReader

# --- Evidence that an intervention took place: counted on the device, read when it is asked for

_SMALL, _MANY = 2**15, 32  # values of a tensor that waits, and how many such may wait
_LARGE = 2**24  # values that are compared at once: whole hidden states would take their memory several times more
# A norm squares, in float32, what the down projection makes of the activations: much larger changes overflow inside it
# and leave zeros, which are finite. A change of this size has already lost everything else to rounding.
_LARGEST_CHANGE = 1e15


@dataclass(frozen=True)
class Evidence:
    """What happened since the counters were last reset.

    Attributes:
        forwards: forward passes of the decoder while the intervention was on.
        modules: modules with a hook.
        fired: calls of those hooks.
        positions: positions that were edited, summed over forwards; pads that the caller marked are not among them.
        neurons: neurons edited at each position, dimensions of hidden states among them.
        largest_change: largest |a' - a| over finite a, in units of the activation; infinite where a' overflowed.
        nonfinite: share of real positions whose last hidden state, which the logits are made of, was not finite, or
            zero, which an overflow inside the last norm leaves.
        finite: whether there was none.
    """

    forwards: int
    modules: int
    fired: int
    positions: int
    neurons: int
    largest_change: float
    nonfinite: float
    finite: bool


class _Sum:
    """A running sum of numbers of the host and of the device."""

    def __init__(self) -> None:
        self._host = 0
        self._device: dict[torch.device, torch.Tensor] = {}

    def add(self, count: int | torch.Tensor) -> None:
        if isinstance(count, int):
            self._host += count
        else:
            before = self._device.get(count.device)
            self._device[count.device] = count if before is None else before + count

    def total(self) -> int:
        """Reads the device."""
        return self._host + sum(int(part) for part in self._device.values())


class LargestChange:
    """The largest |a' - a| so far, on the device. Small tensors wait for each other, so that decoding costs little."""

    def __init__(self) -> None:
        self._largest: dict[torch.device, torch.Tensor] = {}
        self._waiting: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._size = 0

    def add(self, before: torch.Tensor, after: torch.Tensor, in_use: bool = False) -> None:
        """Count one edit: the chosen units before it, in the precision that it is computed in, and after.

        Args:
            before: (..., unit).
            after: (..., unit).
            in_use: whether the model goes on with one of them, and may write to it while it waits.
        """
        size = before.numel()
        if size > _SMALL:
            rows = max(1, len(before) * _LARGE // size)
            for pair in zip(torch.split(before, rows), torch.split(after, rows), strict=True):
                self._count(before.device, *pair)
            return
        pair = (before.clone(), after.clone()) if in_use else (before, after)
        self._waiting.setdefault(before.device, []).append(pair)
        self._size += size
        if self._size > _SMALL * _MANY:
            self.settle()

    def settle(self) -> None:
        """Count what waits, and let go of it."""
        for device, pairs in self._waiting.items():
            self._count(
                device, *(torch.cat([part.reshape(-1) for part in parts]) for parts in zip(*pairs, strict=True))
            )
        self._waiting.clear()
        self._size = 0

    def _count(self, device: torch.device, before: torch.Tensor, after: torch.Tensor) -> None:
        # In the wide type, where a difference of two halves cannot overflow. What was infinite before is no change of
        # ours: there before - before is not a number, which the maximum leaves out.
        change = after.to(before.dtype).sub(before).add_(before - before).abs_()
        largest = change.nan_to_num_(0.0, math.inf).amax()
        previous = self._largest.get(device)
        self._largest[device] = largest if previous is None else torch.maximum(previous, largest)

    def value(self) -> float:
        """Reads the device."""
        self.settle()
        return max((float(change) for change in self._largest.values()), default=0.0)


class Counters:
    """Running sums over forward passes; sums that the device knows stay there until they are asked for."""

    def __init__(self) -> None:
        self.forwards = 0
        self.largest = LargestChange()
        self._edited: dict[tuple[str, ...], _Sum] = {}
        self._broken, self._seen = _Sum(), _Sum()

    def add(self, rows: ForwardRows, kinds: set[tuple[str, ...]], hidden: torch.Tensor) -> None:
        """Count one forward pass.

        Args:
            rows: its positions.
            kinds: forms of `positions`, of each edit.
            hidden: (row, position, feature) last hidden state.
        """
        self.forwards += 1
        self.largest.settle()
        for kind in kinds:
            self._edited.setdefault(kind, _Sum()).add(rows.count(kind))
        # A sum is finite only where every feature is; in float32, where it cannot overflow in halves.
        hidden = hidden.detach()
        broken = ~hidden.sum(-1, dtype=torch.promote_types(hidden.dtype, torch.float32)).isfinite()
        broken |= hidden.count_nonzero(-1) == 0
        if rows.real is not None and broken.shape == rows.real.shape:
            real = rows.real.to(broken.device)
            self._broken.add((broken & real).sum())
            self._seen.add(real.sum())
        else:
            self._broken.add(broken.sum())
            self._seen.add(broken.numel())

    @property
    def positions(self) -> int:
        """Positions edited; reads the device."""
        return max((edited.total() for edited in self._edited.values()), default=0)

    @property
    def nonfinite(self) -> float:
        """Share of real positions with a hidden state that is not finite; reads the device."""
        seen = self._seen.total()
        return self._broken.total() / seen if seen else 0.0


# --- Edits: tensors on the device of their layer, and the pure functions that compute the edited units


def affine(
    units: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    written: torch.Tensor | None,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """gain * scale * a + shift, and shift alone where written; what is None is left out, so an identity is exact.

    Args:
        units: (..., unit) in the precision to compute in.
        scale: (unit,).
        shift: (unit,) or (..., unit).
        written: (unit,) bool; by selection, since 0 times an infinite activation is not 0.
        gain: (..., 1).
    """
    result = units if scale is None else units * scale
    result = result if gain is None else result * gain
    result = result if written is None else torch.where(written, 0, result)
    return result if shift is None else result + shift


@dataclass(frozen=True)
class _Tensors:
    """An affine map on one device; None where a part does nothing."""

    scale: torch.Tensor | None
    shift: torch.Tensor | None
    written: torch.Tensor | None
    untouched: torch.Tensor | None
    coefficients: tuple[torch.Tensor, ...]
    chosen: tuple[torch.Tensor | None, ...]  # of the terms, then of the gain: indices of units, for `mad`


class AttachedEdit:
    """One edit of a plan, called with a layer's units in each forward pass; it keeps no activation."""

    def __init__(self, edit: Edit, width: int) -> None:
        """Prepare; tensors go to a device when a layer there runs for the first time."""
        self.edit = edit
        self.fired_in_forward = 0
        self.fired = 0
        self._width = width
        self._index: dict[torch.device, torch.Tensor] = {}
        self._tensors: dict[torch.device, tuple[_Tensors, ...]] = {}
        self._sourced = any(each.all_terms for each in edit.maps)
        self._all = len(edit.units) == width  # nothing to gather

    def __call__(
        self, units: torch.Tensor, rows: ForwardRows | None, changes: LargestChange, in_place: bool = False
    ) -> torch.Tensor:
        """A tensor (..., unit) with the chosen units edited at the chosen positions, every other one bit-identical.

        Args:
            units: (row, position, unit), or (row * position, unit) where the family flattens them.
            rows: of the forward pass; None where a layer runs by itself.
            changes: counts the largest.
            in_place: write into `units`, which nobody else reads; a copy of them all costs more than the edit.
        """
        self._check_width(units)
        rows = ForwardRows.all_prompt(units) if rows is None else rows
        if units.shape[:-1].numel() != rows.shape[0] * rows.shape[1]:
            raise InterventionError(
                f"layer {self.edit.layer}: {tuple(units.shape)} units where the decoder was given {rows.shape[0]} rows "
                f"of {rows.shape[1]} positions"
            )
        maps = self._on(units.device)
        index = self._index[units.device]
        # One rounding, at the end: half precision is computed in float32, double precision in its own.
        chosen = units if self._all else units.index_select(-1, index)
        wide = chosen.to(torch.promote_types(units.dtype, torch.float32))
        sources = self._sources(units, wide.dtype, rows) if self._sourced else {}
        after = wide
        for each, tensors in zip(self.edit.maps, maps, strict=True):
            after = self._map(each, tensors, after, sources, rows)
        after = after.to(units.dtype)
        self.fired_in_forward += 1
        self.fired += 1
        changes.add(wide.detach(), after.detach(), in_use=self._all)
        if self._all:
            return after
        return units.index_copy_(-1, index, after) if in_place else units.index_copy(-1, index, after)

    def _check_width(self, units: torch.Tensor) -> None:
        if self.edit.site != RESIDUAL:
            check_width(units, self._width, self.edit.layer)
        elif units.shape[-1] != self._width:
            raise InterventionError(
                f"site=residual: layer {self.edit.layer} returns {units.shape[-1]} dimensions, the neuron set has "
                f"statistics of {self._width}: it was calibrated on another model; calibrate it on this one"
            )

    def _map(
        self,
        each: Affine,
        tensors: _Tensors,
        units: torch.Tensor,
        sources: dict[LiveValue, torch.Tensor],
        rows: ForwardRows,
    ) -> torch.Tensor:
        """One affine map on (..., unit), at its positions and on the units that it touches."""
        shift = tensors.shift
        for term, coefficients in zip(each.terms, tensors.coefficients, strict=True):
            part = sources[term.source] * coefficients
            shift = part if shift is None else shift + part
        gain = sources[each.gain.source] if each.gain else None
        result = affine(units, tensors.scale, shift, tensors.written, gain)
        if tensors.untouched is not None:
            result = torch.where(tensors.untouched, units, result)
        mask = rows.mask(each.positions, units.device)
        return result if mask is None else torch.where(mask.reshape(*units.shape[:-1], 1), result, units)

    def _sources(self, units: torch.Tensor, dtype: torch.dtype, rows: ForwardRows) -> dict[LiveValue, torch.Tensor]:
        """Every value that only the forward pass knows, (..., 1) or (..., unit), from the units before any step."""
        sources: dict[LiveValue, torch.Tensor] = {}
        wide: torch.Tensor | None = None
        for each, tensors in zip(self.edit.maps, self._tensors[units.device], strict=True):
            for term, chosen in zip(each.all_terms, tensors.chosen, strict=True):
                if term.source in sources:
                    continue
                if term.source.name == NORMAL:
                    value = self._normal(term.source, units.device, rows)
                else:
                    wide = units.detach().to(dtype).reshape(*rows.shape, -1) if wide is None else wide
                    real = rows.real if rows.real is None else rows.real.to(units.device)
                    value = statistic(term.source.name, wide, real, term.source.sequence, chosen)
                value = value.expand(*rows.shape, -1).reshape(*units.shape[:-1], -1)
                sources[term.source] = value.to(dtype)
        return sources

    def _normal(self, source: LiveValue, device: torch.device, rows: ForwardRows) -> torch.Tensor:
        if rows.tokens is None or rows.index is None:
            raise InterventionError(
                "value=normal: the random numbers depend on token ids and their positions, and the model was given "
                f"{'embeddings' if rows.tokens is None else 'no two-dimensional attention mask'}"
            )
        stream = (source.step, SITES.index(self.edit.site), self.edit.layer)
        return normal(source.seed, stream, self._index[device], rows.index.to(device), rows.tokens.to(device))

    def _on(self, device: torch.device) -> tuple[_Tensors, ...]:
        if device not in self._tensors:
            self._index[device] = torch.from_numpy(self.edit.units.copy()).to(device)
            self._tensors[device] = tuple(self._moved(each, device) for each in self.edit.maps)
        return self._tensors[device]

    def _moved(self, each: Affine, device: torch.device) -> _Tensors:
        def chosen(term: Term) -> torch.Tensor | None:
            return None if term.chosen is None else torch.from_numpy(self.edit.units[term.chosen]).to(device)

        def moved(part: object, needed: bool) -> torch.Tensor | None:
            return torch.tensor(part, device=device) if needed else None

        return _Tensors(
            moved(each.scale, bool((each.scale[~each.written] != 1).any())),
            moved(each.shift, bool((each.shift != 0).any())),
            moved(each.written, bool(each.written.any())),
            moved(~each.touched, not each.touched.all()),
            tuple(torch.tensor(term.coefficients, device=device) for term in each.terms),
            tuple(chosen(term) for term in each.all_terms),
        )


# --- Whether a loaded model can be steered, and with this neuron set


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
    """Refuse adapters that put positions of their own before a request's, which belong to no token of it.

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
    """Where the model's units are, if the neuron set belongs to this model.

    Args:
        model: a causal language model of transformers, PEFT-wrapped or not.
        neurons: the set.
        sites: where the units are, if neither the family is known nor the set says it.
        force: accept a set of other weights, or of another model that has all of the neurons.
        sketch: of the model's weights, if it is known already.
        name: of the model, for the message.
        found: result of an earlier call for this model.

    Raises:
        NeuronSetError: if the set belongs to another model.
        ArchitectureError: if the units are not found, or are split over devices, or an adapter adds positions.
    """
    refuse_sharded(model)
    refuse_prompt_learning(model)
    found = found or sites_of(model, sites or neurons.provenance.sites or None)
    shape = found.shape
    neurons.check_model(shape.layers, shape.units, model_type_of(model.config), force, shape.widths)
    if not force:
        neurons.check_weights(weights_sketch(model) if sketch is None else sketch, name)
    return found


__all__ = ["Evidence", "Steering", "steer"]

_SiteKey = tuple[int, str]  # layer and site


class Steering:
    """A compiled intervention attached to a model, as a context manager or by `attach` and `detach`.

    Hooks return new tensors, follow the device and dtype of what they get, and are removed without a trace. After
    each forward pass of the decoder every edited module must have fired exactly once.
    """

    def __init__(self, sites: ModelSites, plan: CompiledIntervention, model: nn.Module | None = None) -> None:
        """Prepare; nothing is attached yet.

        Args:
            sites: where the model's units are (`architectures.sites_of`, `fitting_sites`).
            plan: compiled for this model's shape.
            model: whose `generate` tells how long a prompt is. Without it, `positions` other than `all` need `rows` for
                every forward pass with a cache.
        """
        self._sites = sites
        self._model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator,union-attr]
        self._handles: dict[_SiteKey, RemovableHandle] = {}
        self._around: list[RemovableHandle] = []
        self._on = True
        self._reader = RowReader(sites.decoder)
        self._rows: ForwardRows | None = None  # of the forward pass in progress
        self._take(plan)

    def _take(self, plan: CompiledIntervention) -> None:
        self.plan = plan
        shape = self._sites.shape
        self._edits = {
            (edit.layer, edit.site): AttachedEdit(edit, edit.dimensions or shape.width(edit.layer))
            for edit in plan.edits
        }
        self._kinds = {edit.positions for edit in plan.edits}
        self._needs = plan.needs_rows, plan.lookahead
        self._counters = Counters()
        self._checked, self._overflowed = 0, False  # at which number of forward passes the device was asked last

    def attach(self) -> Self:
        """Put the hooks in place.

        Raises:
            InterventionError: if they are in place already.
        """
        if self._around:
            raise InterventionError("this intervention is attached already")
        forget_compiled()
        decoder = self._sites.decoder
        self._around = [
            decoder.register_forward_pre_hook(_eager(self._before_forward), with_kwargs=True),
            decoder.register_forward_hook(_eager(self._after_forward)),
        ]
        self._hook_layers()
        if self._model is not None:
            watch_generate(self._model, self._reader)
        return self

    def _hook_layers(self) -> None:
        """Hooks where the plan edits, and nowhere else; those that stay are not touched."""
        if self._handles.keys() != self._edits.keys():
            forget_compiled()
        for key in self._handles.keys() - self._edits.keys():
            self._handles.pop(key).remove()
        for layer, site in sorted(self._edits.keys() - self._handles.keys()):
            self._handles[layer, site] = self._hook(self._sites.layers[layer], (layer, site))

    def detach(self) -> None:
        """Remove every hook; the model computes what it did before."""
        for handle in [*self._around, *self._handles.values()]:
            handle.remove()
        if self._around and self._model is not None:
            unwatch_generate(self._model, self._reader)
        self._around.clear()
        self._handles.clear()
        forget_compiled()

    def change(self, plan: CompiledIntervention) -> None:
        """Replace the plan on the attached model: tensors are swapped, hooks stay where both plans edit.

        The counters start anew.
        """
        self._take(plan)
        if self._around:
            self._hook_layers()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The unsteered model for a while, hooks in place; nothing is counted."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    @property
    def active(self) -> bool:
        """Whether forward passes are steered at the moment."""
        return bool(self._around) and self._on

    def rows(self, real: torch.Tensor, prompt: torch.Tensor | None = None) -> AbstractContextManager[None]:
        """Say what the batch of the forward passes inside is: its pads and its prompts.

        Args:
            real: (row, position) bool of the first forward pass, False for pads; every later position is real.
            prompt: (row,) number of prompt tokens of each row; by default all real tokens of `real`.
        """
        return self._reader.declaring(Declared(real.bool(), None if prompt is None else prompt.long().reshape(-1, 1)))

    # --- evidence -----------------------------------------------------------------------------------------------

    @property
    def forwards(self) -> int:
        """Forward passes of the decoder since the counters were last reset; asks nothing of the device."""
        return self._counters.forwards

    def evidence(self) -> Evidence:
        """What the hooks did; reads the counters from the device.

        Raises:
            DidNotHappenError: if hooks fired outside forward passes of the decoder, which nothing could check.
        """
        edits = list(self._edits.values())
        if not self.forwards and any(edit.fired for edit in edits):
            raise DidNotHappenError("layers ran outside a forward pass of their decoder, so nothing could be checked")
        nonfinite = self._counters.nonfinite
        return Evidence(
            forwards=self.forwards,
            modules=len(edits),
            fired=sum(edit.fired for edit in edits),
            positions=self._counters.positions,
            neurons=self.plan.neurons,
            largest_change=self._counters.largest.value(),
            nonfinite=nonfinite,
            finite=not nonfinite,
        )

    def overflowed(self) -> bool:
        """Whether an edited activation was not finite or changed by more than 1e15, or a hidden state overflowed.

        Asks the device once per forward pass.
        """
        if self._checked != self.forwards:
            evidence = self.evidence()
            self._checked = self.forwards
            self._overflowed = not evidence.finite or evidence.largest_change > _LARGEST_CHANGE
        return self._overflowed

    def reset_evidence(self) -> None:
        """Set the counters to zero."""
        self._counters = Counters()
        self._checked, self._overflowed = 0, False
        for edit in self._edits.values():
            edit.fired = edit.fired_in_forward = 0

    # --- hooks --------------------------------------------------------------------------------------------------

    def _before_forward(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._on:
            return
        for edit in self._edits.values():
            edit.fired_in_forward = 0
        self._rows = self._reader.read(args, kwargs, *self._needs)

    def _after_forward(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        rows, self._rows = self._rows, None
        if not self._on or rows is None:
            return
        self._counters.add(rows, self._kinds, output[0])
        for (layer, site), edit in self._edits.items():
            if edit.fired_in_forward != 1:
                raise DidNotHappenError(
                    f"the intervention at {site} of layer {layer} took place {edit.fired_in_forward} times in one "
                    "forward pass, expected once: something bypasses or repeats that module (a fused kernel, gradient "
                    "checkpointing), and no score can be trusted"
                )

    def _hook(self, site: LayerSites, key: _SiteKey) -> RemovableHandle:
        # The edit is looked up in each call, so that a changed plan needs no other hook.
        def output_hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            if not self._on:
                return None
            ours = _is_ours_alone(module, inputs, output)
            return self._edits[key](output, self._rows, self._counters.largest, in_place=ours)

        def input_hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            if not self._on:
                return None
            return (self._edits[key](inputs[0], self._rows, self._counters.largest), *inputs[1:])

        def layer_hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if not self._on:
                return None
            # Never in place: what a layer returns is collected by `output_hidden_states` and may be part of the next
            # layer's sum.
            edited = self._edits[key](hidden_states(output), self._rows, self._counters.largest)
            return with_hidden_states(output, edited)

        if key[1] == RESIDUAL:
            # Before other hooks, so that `output_hidden_states` collects what the next layer reads.
            return site.block.register_forward_hook(_eager(layer_hook), prepend=True)
        if key[1] == "activation":
            return site.activation.register_forward_hook(_eager(output_hook))
        return site.down.register_forward_pre_hook(_eager(input_hook))


# Model -> readers of the interventions attached to it. `generate` is replaced on the model while there are any.
_watching: WeakKeyDictionary[nn.Module, list[RowReader]] = WeakKeyDictionary()


def watch_generate(model: Any, reader: RowReader) -> None:
    """Tell `reader` the prompt of every call of the model's `generate`, until `unwatch_generate`."""
    if not hasattr(model, "generate"):
        return
    readers = _watching.setdefault(model, [])
    readers.append(reader)
    if len(readers) > 1:
        return
    original = model.generate

    @wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        prompt = GenerationPrompt.of(args, kwargs)
        with ExitStack() as stack:
            for each in readers:
                stack.enter_context(each.generating(prompt))
            return original(*args, **kwargs)

    model.generate = generate


def unwatch_generate(model: Any, reader: RowReader) -> None:
    """Undo `watch_generate`; the model's own `generate` is back when no reader is left."""
    readers = _watching.get(model, [])
    if reader in readers:
        readers.remove(reader)
        if not readers:
            del model.generate
            del _watching[model]


def _is_ours_alone(module: nn.Module, inputs: Any, output: torch.Tensor) -> bool:
    """Whether a module's output may be written to: made anew, read by no other hook, and not by autograd."""
    if output.requires_grad or output.is_inference() != torch.is_inference_mode_enabled():
        return False
    if output_is_hooked(module):
        return False
    memory = output.untyped_storage().data_ptr()
    return all(one.untyped_storage().data_ptr() != memory for one in inputs if isinstance(one, torch.Tensor))


def forget_compiled() -> None:
    """Make torch.compile look at the modules again: what it compiled before knows no hook."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The same, which torch.compile leaves as it is: its counters and checks are Python's."""
    disabled: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return disabled


def steer(
    model: nn.Module,
    neurons: NeuronSet | str | Path,
    language: str | None = None,
    *,
    allow_empty: bool = False,
    force: bool = False,
    sites: str | None = None,
    **arguments: Any,
) -> Steering:
    """A context manager under which `model` is steered: `with steer(model, neurons, "fra_Latn", op="add", ...):`.

    Args:
        model: a causal language model of transformers.
        neurons: the model's neuron set, the path of its file, or the name of one that ships.
        language: whose neurons; several are joined by `+`.
        allow_empty: accept a language without neurons.
        force: use a neuron set that was found in other weights.
        sites: where the units are, if neither the family is known nor the set says it.
        **arguments: those of `intervention.ARGUMENTS` (`op`, `value`, `deactivate`, ...), as on the command line.

    Raises:
        SteeringError: if the intervention is not defined or the set belongs to another model.
    """
    neurons = neuron_set_of(neurons)
    model_sites = fitting_sites(model, neurons, sites=sites, force=force)
    intervention = from_arguments({"language": language, **arguments})
    return Steering(model_sites, compile_intervention(intervention, neurons, allow_empty), model)
