"""An intervention at work on a loaded model: hooks that edit the chosen units, and the proof that they did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lm_eval_steering.architectures import ModelSites, check_width, model_type_of, sites_of
from lm_eval_steering.errors import DidNotHappenError, InterventionError
from lm_eval_steering.fingerprint import weights_sketch
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.steering.intervention import from_arguments
from lm_eval_steering.steering.plan import Edit, Plan, compile_plan


@dataclass(frozen=True)
class Evidence:
    """What happened since the counters were last reset.

    Attributes:
        forwards: forward passes of the decoder while the intervention was on.
        modules: modules with a hook.
        fired: calls of those hooks.
        positions: positions of the tensors that were edited, summed over forwards; right padding of a scoring
            batch is among them, since it cannot reach a real token.
        neurons: neurons edited at each position.
        largest_change: largest |a' - a| over finite a, in units of the activation; infinite where a' overflowed.
        finite: whether the decoder's last hidden state stayed finite at the last position of every row.
    """

    forwards: int
    modules: int
    fired: int
    positions: int
    neurons: int
    largest_change: float
    finite: bool


class _LiveEdit:
    """One edit with its tensors on the device where the layer runs."""

    def __init__(self, edit: Edit, width: int) -> None:
        self.edit = edit
        self.width = width
        self.fired_in_forward = 0
        self.fired = 0
        self.positions = 0
        self._tensors: dict[torch.device, tuple[torch.Tensor, ...]] = {}
        self._largest: dict[torch.device, torch.Tensor] = {}
        self._scales = bool((edit.scale != 1).any())
        self._shifts = bool((edit.shift != 0).any())
        self._writes = bool(edit.written.any())

    def __call__(self, units: torch.Tensor) -> torch.Tensor:
        """A new tensor (..., unit) with the chosen units edited and every other one bit-identical."""
        check_width(units, self.width, self.edit.layer)
        index, scale, shift, written = self._on(units.device)
        before = units.index_select(-1, index)
        # One rounding, at the end: half precision is computed in float32, double precision in its own.
        wide = before.to(torch.promote_types(units.dtype, torch.float32))
        after = wide * scale if self._scales else wide
        after = after + shift if self._shifts else after
        after = torch.where(written, shift.to(wide.dtype), after) if self._writes else after
        after = after.to(units.dtype)
        self._count(units, before, after)
        return units.index_copy(-1, index, after)

    def _on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        if device not in self._tensors:
            parts = (self.edit.units, self.edit.scale, self.edit.shift, self.edit.written)
            self._tensors[device] = tuple(torch.from_numpy(part.copy()).to(device) for part in parts)
        return self._tensors[device]

    def _count(self, units: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        self.fired_in_forward += 1
        self.fired += 1
        self.positions += units.numel() // units.shape[-1]
        # In float32, where a difference of two halves cannot overflow; what was infinite before is no change of ours.
        change = (after.detach().float() - before.detach().float()).abs()
        change = torch.where(before.isfinite(), change, 0).amax()
        previous = self._largest.get(units.device)
        self._largest[units.device] = change if previous is None else torch.maximum(previous, change)

    def largest_change(self) -> float:
        return max((float(change) for change in self._largest.values()), default=0.0)

    def reset(self) -> None:
        self.fired = self.fired_in_forward = self.positions = 0
        self._largest.clear()


class Steering:
    """A plan attached to a model, as a context manager or by `attach` and `detach`.

    Hooks return new tensors, follow the device and dtype of what they get, and are removed without a trace. After
    each forward pass of the decoder every edited module must have fired exactly once.
    """

    def __init__(self, sites: ModelSites, plan: Plan) -> None:
        """Prepare; nothing is attached yet.

        Args:
            sites: where the model's units are (`architectures.sites_of`, `fitting_sites`).
            plan: compiled for this model's shape.
        """
        self.plan = plan
        self._sites = sites
        self._edits = [_LiveEdit(edit, self._sites.shape.units) for edit in plan.edits]
        self._handles: list[RemovableHandle] = []
        self._on = True
        self._forwards = 0
        self._broken: torch.Tensor | None = None  # on the device: whether a hidden state was not finite

    def attach(self) -> Self:
        """Put the hooks in place.

        Raises:
            InterventionError: if they are in place already.
        """
        if self._handles:
            raise InterventionError("this intervention is attached already")
        decoder = self._sites.decoder
        self._handles.append(decoder.register_forward_pre_hook(self._before_forward))
        for live in self._edits:
            site = self._sites.layers[live.edit.layer]
            if live.edit.site == "activation":
                self._handles.append(site.activation.register_forward_hook(self._output_hook(live)))
            else:
                self._handles.append(site.down.register_forward_pre_hook(self._input_hook(live)))
        self._handles.append(decoder.register_forward_hook(self._after_forward))
        return self

    def detach(self) -> None:
        """Remove every hook; the model computes what it did before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

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

    def evidence(self) -> Evidence:
        """What the hooks did; reads the counters from the device.

        Raises:
            DidNotHappenError: if hooks fired outside forward passes of the decoder, which nothing could check.
        """
        if not self._forwards and any(live.fired for live in self._edits):
            raise DidNotHappenError("layers ran outside a forward pass of their decoder, so nothing could be checked")
        return Evidence(
            forwards=self._forwards,
            modules=len(self._edits),
            fired=sum(live.fired for live in self._edits),
            positions=max((live.positions for live in self._edits), default=0),
            neurons=self.plan.neurons,
            largest_change=max((live.largest_change() for live in self._edits), default=0.0),
            finite=self._broken is None or not bool(self._broken),
        )

    def reset_evidence(self) -> None:
        """Set the counters to zero."""
        self._forwards, self._broken = 0, None
        for live in self._edits:
            live.reset()

    def _before_forward(self, _module: nn.Module, _inputs: Any) -> None:
        for live in self._edits:
            live.fired_in_forward = 0

    def _after_forward(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not self._on:
            return
        self._forwards += 1
        # The last position is real in generation, which pads left; scoring is checked by its scores too.
        broken = ~output[0][:, -1].detach().isfinite().all()
        self._broken = broken if self._broken is None else self._broken | broken.to(self._broken.device)
        for live in self._edits:
            if live.fired_in_forward != 1:
                raise DidNotHappenError(
                    f"the intervention at {live.edit.site} of layer {live.edit.layer} took place "
                    f"{live.fired_in_forward} times in one forward pass, expected once: something bypasses or "
                    "repeats that module (a fused kernel, gradient checkpointing), and no score can be trusted"
                )

    def _output_hook(self, live: _LiveEdit) -> Callable[..., torch.Tensor | None]:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            return live(output) if self._on else None

        return hook

    def _input_hook(self, live: _LiveEdit) -> Callable[..., tuple[torch.Tensor, ...] | None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            return (live(inputs[0]), *inputs[1:]) if self._on else None

        return hook


def fitting_sites(
    model: nn.Module,
    neurons: NeuronSet,
    *,
    sites: str | None = None,
    force: bool = False,
    sketch: Sequence[float] | None = None,
    name: str = "this model",
) -> ModelSites:
    """Where the model's units are, if the neuron set is of this model.

    Args:
        model: a causal language model of transformers, PEFT-wrapped or not.
        neurons: the set.
        sites: where the units are, if neither the family is known nor the set says it.
        force: accept a set of other weights, or of another model that has all of the neurons.
        sketch: of the model's weights, if it is known already.
        name: of the model, for the message.

    Raises:
        NeuronSetError: if the set belongs to another model.
        ArchitectureError: if the units are not found.
    """
    found = sites_of(model, sites or neurons.provenance.sites or None)
    neurons.check_model(found.shape.layers, found.shape.units, model_type_of(model.config), force)
    if not force:
        neurons.check_weights(weights_sketch(model) if sketch is None else sketch, name)
    return found


def steer(
    model: nn.Module,
    neurons: NeuronSet,
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
        neurons: the model's neuron set.
        language: whose neurons; several are joined by `+`.
        allow_empty: accept a language without neurons.
        force: use a neuron set that was found in other weights.
        sites: where the units are, if neither the family is known nor the set says it.
        **arguments: `op`, `value`, `factor`, `site`, `deactivate`, `layers`, `keep_shared` as on the command line.

    Raises:
        SteeringError: if the intervention is not defined or the set belongs to another model.
    """
    found = fitting_sites(model, neurons, sites=sites, force=force)
    intervention = from_arguments({"language": language, **arguments})
    return Steering(found, compile_plan(intervention, neurons, allow_empty))
