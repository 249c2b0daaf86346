"""vLLM's worker with a steered activation in each MLP; `worker_cls` names it, and vLLM imports it in its processes.

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
from lm_eval_steering.vllm import compat
from lm_eval_steering.vllm.activation import LAYOUT, SITES, SiteEdit
from lm_eval_steering.vllm.arguments import CAPACITY_KEY, DRIVER
from lm_eval_steering.vllm.layers import SteeredLayer, install

_PlatformWorker: Any = compat.platform_worker()


class SteeredWorker(_PlatformWorker):
    """The platform's own worker, whose model can be steered."""

    _steered: dict[int, SteeredLayer]
    _capacity: int
    _watched: list[tuple[torch.Tensor, torch.Tensor]]
    _hook: RemovableHandle | None
    _problem: str
    _forwards: int
    _real: torch.Tensor

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load as the platform does, then replace activations: before anything is compiled or captured."""
        host, _, driver = os.environ.get(DRIVER, "").partition(" ")
        if host == socket.gethostname():
            end_with(int(driver))
        super().load_model(*args, **kwargs)
        self._capacity = int(compat.additional_config(self)[CAPACITY_KEY])
        self._steered, self._problem, self._forwards = {}, "", 0
        self._real = torch.zeros(1, dtype=torch.int64, device=self.device)
        config = self.model_config.hf_config
        try:
            shape: Shape = shape_of(config)
            self._steered = install(
                compat.model_of(self), model_type_of(config), shape.layers, self._capacity, self._real
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
        """Where this worker stands and which units it holds, or why it cannot be steered."""
        layers = {str(number): [each.first, each.module.width, each.full] for number, each in self._steered.items()}
        layout = {"layout": LAYOUT, "capacity": self._capacity, "layers": layers, "problem": self._problem}
        return {**compat.ranks_of(self), **layout}

    def steering_write(self, edits: Sequence[Mapping[str, Any]]) -> int:
        """Replace the numbers in the buffers.

        Args:
            edits: of the whole model; each a dict of `layer`, `site`, and the bytes of `units` (int64), `scale`,
                `shift` (float32) and `written` (bool).

        Returns:
            Number of (site, layer, unit) that are edited here.
        """
        of_layers: dict[int, list[SiteEdit]] = {layer: [] for layer in self._steered}
        for edit in edits:
            layer = int(edit["layer"])
            if layer not in self._steered:  # of another stage of the pipeline
                continue
            units, *numbers = self._held(edit, self._steered[layer])
            if len(units):
                of_layers[layer].append(SiteEdit(SITES.index(edit["site"]), units, *numbers))
        for layer, of_layer in of_layers.items():
            self._steered[layer].module.write(of_layer)
        return sum(each.module.touched() for each in self._steered.values())

    def steering_evidence(self) -> dict[str, Any]:
        """What happened here: reads the device."""
        modules = {number: each.module for number, each in self._steered.items()}
        return {
            "rank": int(self.rank),
            "forwards": int(self._forwards),
            "touched": {str(layer): module.touched() for layer, module in modules.items()},
            "tokens": {str(layer): int(module.tokens) for layer, module in modules.items()},
            "largest": max((float(module.largest) for module in modules.values()), default=0.0),
        }

    def steering_watch(self, layer: int) -> None:
        """Keep what goes into a layer's steered module and what comes out of it, until `steering_compare`.

        The engine is an eager one: compiled code calls no hook.
        """
        watched: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._watched, self._hook = watched, None
        if layer in self._steered:
            self._hook = self._steered[layer].module.register_forward_hook(
                lambda _, inputs, output: watched.append((inputs[0].clone(), output.clone()))
            )

    def steering_compare(self, layer: int, edits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """How what was watched compares with the definition of an intervention.

        Args:
            layer: that is watched.
            edits: as `steering_write` takes them.

        Returns:
            `calls` of the module, number of `edited` units, the `furthest` difference of those (relative, of
            max(|expected|, 1)), and whether all `others` are those of the original module, bit by bit.
        """
        if self._hook is not None:
            self._hook.remove()
        comparison: dict[str, Any] = {"calls": len(self._watched), "edited": 0, "furthest": 0.0, "others": True}
        for inputs, output in self._watched:
            steered = self._steered[layer]
            module, width = steered.module, steered.module.width
            original = module.original(inputs)
            expected, touched = original.clone(), torch.zeros(width, dtype=torch.bool)
            for edit in sorted(edits, key=lambda edit: SITES.index(edit["site"])):
                units, scale, shift, written = self._held(edit, steered)
                if not len(units):
                    continue
                before = expected[..., units]
                if edit["site"] == SITES[0] and module.function is not None:
                    before = module.function(inputs[..., :width])[..., units]
                after = torch.where(written, 0.0, before.float() * scale) + shift
                after = after.to(output.dtype)
                if edit["site"] == SITES[0] and module.function is not None:
                    after = after * inputs[..., width:][..., units]
                expected[..., units] = after
                touched[units] = True
            difference = (output - expected).float().abs() / expected.float().abs().clamp(min=1.0)
            comparison["edited"] = int(touched.sum())
            if touched.any():
                comparison["furthest"] = max(comparison["furthest"], float(difference[..., touched].max()))
            comparison["others"] &= bool(torch.equal(output[..., ~touched], original[..., ~touched]))
        return comparison

    def _held(self, edit: Mapping[str, Any], steered: SteeredLayer) -> list[torch.Tensor]:
        """Units of an edit that this worker holds, counted from its first, and their scale, shift and written."""
        units = np.frombuffer(edit["units"], dtype=np.int64) - steered.first
        held = (units >= 0) & (units < steered.module.width)
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


def end_with(driver: int) -> None:
    """End this process when lm-eval's is gone, and the engine's process between them: vLLM's would hold its memory.

    Args:
        driver: number of lm-eval's process, on this machine; where it is this process, nothing is watched.
    """
    if driver == os.getpid():
        return
    try:
        handle = os.pidfd_open(driver)
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
