"""vLLM's worker with steered modules in each layer; `worker_cls` names it, and vLLM imports it in its processes.

The process of lm-eval calls the `steering_*` methods through `LLM.collective_rpc`; what they take and give is plain
data (numbers, strings, bytes, lists, dicts), which vLLM's messages carry without pickling.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from lm_eval_steering.architectures import Shape, model_type_of, shape_of
from lm_eval_steering.architectures.weights import weights_digest
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.steering.intervention import RESIDUAL
from lm_eval_steering.vllm import compat
from lm_eval_steering.vllm.activation import LAYOUT, SITES, SiteEdit, SteeredModule
from lm_eval_steering.vllm.arguments import CAPACITY_KEY, DRIVER, RESIDUAL_KEY
from lm_eval_steering.vllm.layers import SteeredLayer, install

MLP = "mlp"  # what a steered module edits; the other one edits `residual`
# (..., unit) what is expected and what came out; (unit,) bool, which of them are edited; and pairs of what is expected
# to be equal in all others.
_Comparable = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]
_PlatformWorker: Any = compat.platform_worker()


class SteeredWorker(_PlatformWorker):
    """The platform's own worker, whose model can be steered."""

    _steered: dict[int, SteeredLayer]
    _capacity: int
    _watched: list[tuple[Any, Any]]
    _hook: RemovableHandle | None
    _problem: str
    _forwards: int
    _real: torch.Tensor

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load as the platform does, then put steered modules in: before anything is compiled or captured."""
        host, _, driver = os.environ.get(DRIVER, "").partition(" ")
        if host == socket.gethostname():
            end_with(int(driver))
        super().load_model(*args, **kwargs)
        additional = compat.additional_config(self)
        self._capacity = int(additional[CAPACITY_KEY])
        dimensions = compat.hidden_size(self.model_config) if additional[RESIDUAL_KEY] else None
        self._steered, self._problem, self._forwards = {}, "", 0
        self._real = torch.zeros(1, dtype=torch.int64, device=self.device)
        config = self.model_config.hf_config
        try:
            shape: Shape = shape_of(config)
            self._steered = install(
                compat.model_of(self), model_type_of(config), shape.layers, self._capacity, dimensions, self._real
            )
        except SteeringError as error:
            # An exception here would reach the user as "engine core initialization failed".
            self._problem = str(error)

    def execute_model(self, scheduler_output: Any) -> Any:
        """One forward pass, whose number of real tokens the modules read; warm-up does not call this method."""
        tokens = compat.scheduled_tokens(scheduler_output)
        self._forwards += tokens > 0
        self._real.fill_(tokens)
        try:
            return super().execute_model(scheduler_output)
        finally:
            self._real.zero_()

    def steering_layout(self) -> dict[str, Any]:
        """Where this worker stands and which units and hidden states it holds, or why it cannot be steered."""
        layers = {str(number): [each.first, each.activation.width, each.full] for number, each in self._steered.items()}
        dimensions = {
            str(number): each.hidden_states.width
            for number, each in self._steered.items()
            if each.hidden_states is not None
        }
        layout = {"layout": LAYOUT, "capacity": self._capacity, "problem": self._problem}
        layout |= {"layers": layers, "dimensions": dimensions}
        return {**compat.ranks_of(self), **layout}

    def steering_write(self, edits: Sequence[Mapping[str, Any]]) -> int:
        """Replace the numbers in the buffers.

        Args:
            edits: of the whole model; each a dict of `layer`, `site`, and the bytes of `units` (int64), `scale`,
                `shift` (float32) and `written` (bool).

        Returns:
            Number of (site, layer, unit) that are edited here.
        """
        of_modules: dict[SteeredModule, list[SiteEdit]] = {module: [] for _, _, module in self._modules()}
        for edit in edits:
            steered = self._steered.get(int(edit["layer"]))
            if steered is None:  # of another stage of the pipeline
                continue
            module, site = (
                (steered.hidden_states, 0)
                if edit["site"] == RESIDUAL
                else (steered.activation, SITES.index(edit["site"]))
            )
            units, *numbers = self._held(edit, steered)
            if module is not None and len(units):
                of_modules[module].append(SiteEdit(site, units, *numbers))
        for each, of_module in of_modules.items():
            each.write(of_module)
        return sum(each.touched() for each in of_modules)

    def _modules(self) -> list[tuple[int, str, SteeredModule]]:
        """(layer, what it edits, steered module) of all that stand here."""
        modules: list[tuple[int, str, SteeredModule]] = []
        for layer, each in self._steered.items():
            modules.append((layer, MLP, each.activation))
            if each.hidden_states is not None:
                modules.append((layer, RESIDUAL, each.hidden_states))
        return modules

    def steering_evidence(self) -> dict[str, Any]:
        """What happened here: reads the device."""
        modules = self._modules()
        return {
            "rank": int(self.rank),
            "forwards": int(self._forwards),
            "modules": [
                {"layer": layer, "edits": edits, "touched": module.touched(), "tokens": int(module.tokens)}
                for layer, edits, module in modules
            ],
            "largest": max((float(module.largest) for _, _, module in modules), default=0.0),
        }

    def steering_watch(self, layer: int, edits: str) -> None:
        """Keep what goes into one of a layer's steered modules and what comes out of it, until `steering_compare`.

        The engine is an eager one: compiled code calls no hook.

        Args:
            layer: number.
            edits: `mlp` or `residual`.
        """
        self._watched, self._hook = [], None
        for _, _, module in [each for each in self._modules() if each[:2] == (layer, edits)]:
            self._hook = module.register_forward_hook(
                lambda _, inputs, output: self._watched.append((_copied(inputs[0]), _copied(output)))
            )

    def steering_compare(self, layer: int, edits: str, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """How what was watched compares with the definition of an intervention.

        Args:
            layer: that is watched.
            edits: as it was given to `steering_watch`.
            messages: as `steering_write` takes them, of this layer and module.

        Returns:
            `calls` of the module, number of `edited` units, the `furthest` difference of those (relative, of
            max(|expected|, 1)), and whether all `others` are as they came, bit by bit.
        """
        if self._hook is not None:
            self._hook.remove()
        comparison: dict[str, Any] = {"calls": len(self._watched), "edited": 0, "furthest": 0.0, "others": True}
        define = self._mlp_by_definition if edits == MLP else self._hidden_states_by_definition
        for inputs, output in self._watched:
            expected, actual, touched, pairs = define(self._steered[layer], messages, inputs, output)
            difference = (actual - expected).float().abs() / expected.float().abs().clamp(min=1.0)
            comparison["edited"] = int(touched.sum())
            if touched.any():
                comparison["furthest"] = max(comparison["furthest"], float(difference[..., touched].max()))
            others = [torch.equal(after[..., ~touched], before[..., ~touched]) for before, after in pairs]
            comparison["others"] &= all(others)
        return comparison

    def _mlp_by_definition(
        self, steered: SteeredLayer, messages: Sequence[Mapping[str, Any]], inputs: torch.Tensor, output: torch.Tensor
    ) -> _Comparable:
        module, width = steered.activation, steered.activation.width
        original = module.original(inputs)
        expected, touched = original.clone(), torch.zeros(width, dtype=torch.bool, device=output.device)
        for message in sorted(messages, key=lambda message: SITES.index(message["site"])):
            units, scale, shift, written = (each.to(output.device) for each in self._held(message, steered))
            if not len(units):
                continue
            gated = message["site"] == SITES[0] and module.function is not None
            before = expected[..., units]
            if gated and module.function is not None:
                before = module.function(inputs[..., :width])[..., units]
            after = (torch.where(written, 0.0, before.float() * scale) + shift).to(output.dtype)
            expected[..., units] = after * inputs[..., width:][..., units] if gated else after
            touched[units] = True
        return expected, output, touched, [(original, output)]

    def _hidden_states_by_definition(
        self, steered: SteeredLayer, messages: Sequence[Mapping[str, Any]], inputs: Any, output: Any
    ) -> _Comparable:
        module = steered.hidden_states
        assert module is not None
        before = module.hidden_states(inputs)
        expected, touched = before.clone(), torch.zeros(module.width, dtype=torch.bool, device=before.device)
        for message in messages:
            units, scale, shift, written = (each.to(before.device) for each in self._held(message, steered))
            after = torch.where(written, 0.0, before[..., units].float() * scale) + shift
            expected[..., units] = after.to(before.dtype)
            touched[units] = True
        came, went = (each if isinstance(each, tuple) else (each,) for each in (inputs, output))
        return expected, module.hidden_states(output), touched, list(zip(came, went, strict=True))

    def _held(self, edit: Mapping[str, Any], steered: SteeredLayer) -> list[torch.Tensor]:
        """Units of an edit that this worker holds, counted from its first, and their scale, shift and written.

        Dimensions of hidden states are held by each worker.
        """
        first, width = steered.first, steered.activation.width
        if edit["site"] == RESIDUAL:
            first, width = 0, steered.hidden_states.width if steered.hidden_states is not None else 0
        units = np.frombuffer(edit["units"], dtype=np.int64) - first
        held = (units >= 0) & (units < width)
        numbers = [
            np.frombuffer(edit[name], dtype=kind)[held]
            for name, kind in (("scale", np.float32), ("shift", np.float32), ("written", np.bool_))
        ]
        return [torch.from_numpy(each.copy()) for each in (units[held], *numbers)]

    def steering_compilations(self) -> dict[str, int]:
        """vLLM's counters of compiling and capturing in this process."""
        return compat.compilations()

    def steering_weights(self) -> str:
        """Digest of the weights that this worker holds."""
        return weights_digest(self.get_model())


def _copied(value: Any) -> Any:
    """Copies of a tensor, or of a tuple of tensors."""
    return tuple(each.clone() for each in value) if isinstance(value, tuple) else value.clone()


def end_with(driver: int) -> None:
    """End this process when lm-eval's is gone, and the engine's process between them: vLLM's would hold its memory.

    Args:
        driver: number of lm-eval's process, on this machine; where it is this process, nothing is watched.
    """
    if driver == os.getpid():
        return
    try:
        handle = os.pidfd_open(driver)
    except ProcessLookupError:  # it was killed while the engine started; vLLM ends an engine whose worker ends
        os._exit(1)
    except OSError:
        return
    parent = os.getppid()
    stat = Path(f"/proc/{parent}/stat").read_text()
    between = int(stat.rpartition(")")[2].split()[1]) == driver  # state, then the parent's parent

    def wait() -> None:
        select.select([handle], [], [])  # readable when the process has ended
        if between and os.getppid() == parent:
            with suppress(ProcessLookupError):
                os.kill(parent, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, name="end with lm-eval", daemon=True).start()
