"""An intervention at work on a loaded model: hooks that edit the chosen units, and the proof that they did."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lm_eval_steering.architectures import LayerSites, ModelSites
from lm_eval_steering.errors import DidNotHappenError, InterventionError
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.steering.apply import EditAtWork
from lm_eval_steering.steering.evidence import Counters, Evidence
from lm_eval_steering.steering.fitting import fitting_sites
from lm_eval_steering.steering.intervention import from_arguments
from lm_eval_steering.steering.plan import Plan, compile_plan
from lm_eval_steering.steering.rows import Declared, ForwardRows, RowReader

__all__ = ["Evidence", "Steering", "steer"]

_Place = tuple[int, str]  # layer and site


class Steering:
    """A plan attached to a model, as a context manager or by `attach` and `detach`.

    Hooks return new tensors, follow the device and dtype of what they get, and are removed without a trace. After
    each forward pass of the decoder every edited module must have fired exactly once.
    """

    def __init__(self, sites: ModelSites, plan: Plan) -> None:
        """Prepare; nothing is attached yet.

        Args:
            sites: where the model's units are (`architectures.sites_of`, `fitting.fitting_sites`).
            plan: compiled for this model's shape.
        """
        self._sites = sites
        self._handles: dict[_Place, RemovableHandle] = {}
        self._around: list[RemovableHandle] = []
        self._on = True
        self._reader = RowReader(sites.decoder)
        self._rows: ForwardRows | None = None  # of the forward pass in progress
        self._take(plan)

    def _take(self, plan: Plan) -> None:
        self.plan = plan
        self._edits = {(edit.layer, edit.site): EditAtWork(edit, self._sites.shape.units) for edit in plan.edits}
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
        return self

    def _hook_layers(self) -> None:
        """Hooks where the plan edits, and nowhere else; those that stay are not touched."""
        if self._handles.keys() != self._edits.keys():
            forget_compiled()
        for place in self._handles.keys() - self._edits.keys():
            self._handles.pop(place).remove()
        for layer, site in sorted(self._edits.keys() - self._handles.keys()):
            self._handles[layer, site] = self._hook(self._sites.layers[layer], (layer, site))

    def detach(self) -> None:
        """Remove every hook; the model computes what it did before."""
        for handle in [*self._around, *self._handles.values()]:
            handle.remove()
        self._around.clear()
        self._handles.clear()
        forget_compiled()

    def change(self, plan: Plan) -> None:
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
        """Say what the batch of the forward passes inside is, where the model is not given an attention mask.

        Args:
            real: (row, position) bool of the first forward pass, False for pads; every later position is real.
            prompt: (row,) number of prompt tokens of each row; by default all real tokens of the first pass.
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
        """Whether an activation was not finite after an edit, or a hidden state; asks the device once a forward."""
        if self._checked != self.forwards:
            evidence = self.evidence()
            self._checked, self._overflowed = self.forwards, not evidence.finite or math.isinf(evidence.largest_change)
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

    def _hook(self, site: LayerSites, place: _Place) -> RemovableHandle:
        # The edit is looked up in each call, so that a changed plan needs no other hook.
        def output_hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            if not self._on:
                return None
            ours = _is_ours_alone(module, inputs, output)
            return self._edits[place](output, self._rows, self._counters.largest, in_place=ours)

        def input_hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            if not self._on:
                return None
            return (self._edits[place](inputs[0], self._rows, self._counters.largest), *inputs[1:])

        if place[1] == "activation":
            return site.activation.register_forward_hook(_eager(output_hook))
        return site.down.register_forward_pre_hook(_eager(input_hook))


def _is_ours_alone(module: nn.Module, inputs: Any, output: torch.Tensor) -> bool:
    """Whether nobody misses what a module's output held: made anew, for no other hook, and not by autograd."""
    if output.requires_grad or output.is_inference() != torch.is_inference_mode_enabled():
        return False
    if len(module._forward_hooks) > 1 or torch.nn.modules.module._global_forward_hooks:
        return False
    own = output.untyped_storage().data_ptr()
    return all(one.untyped_storage().data_ptr() != own for one in inputs if isinstance(one, torch.Tensor))


def forget_compiled() -> None:
    """Make torch.compile look at the modules again: what it compiled before knows no hook."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The same, which torch.compile leaves as it is: its counters and checks are Python's."""
    return torch.compiler.disable(hook)


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
        **arguments: those of `intervention.ARGUMENTS` (`op`, `value`, `deactivate`, ...), as on the command line.

    Raises:
        SteeringError: if the intervention is not defined or the set belongs to another model.
    """
    found = fitting_sites(model, neurons, sites=sites, force=force)
    intervention = from_arguments({"language": language, **arguments})
    return Steering(found, compile_plan(intervention, neurons, allow_empty))
