"""vLLM's worker with a steered activation in each MLP; `worker_cls` names it, and vLLM imports it in its processes.

The process of lm-eval calls the `steering_*` methods through `LLM.collective_rpc`; what they take and give is plain
data (numbers, strings, bytes, lists, dicts), which vLLM's messages carry without pickling.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lm_eval_steering.architectures import Shape, model_type_of, shape_of
from lm_eval_steering.architectures.weights import weights_digest
from lm_eval_steering.errors import SteeringError
from lm_eval_steering.vllm import compat
from lm_eval_steering.vllm.activation import LAYOUT, SITES, SiteEdit
from lm_eval_steering.vllm.arguments import CAPACITY_KEY, DRIVER
from lm_eval_steering.vllm.layers import Place, install

_PlatformWorker: Any = compat.platform_worker()


class SteeredWorker(_PlatformWorker):
    """The platform's own worker, whose model can be steered."""

    _places: dict[int, Place]
    _capacity: int
    _problem: str
    _forwards: int
    _real: torch.Tensor

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load as the platform does, then replace activations: before anything is compiled or captured."""
        end_with(int(os.environ.get(DRIVER, "0")))
        super().load_model(*args, **kwargs)
        self._capacity = int(compat.additional_config(self)[CAPACITY_KEY])
        self._places, self._problem, self._forwards = {}, "", 0
        self._real = torch.zeros(1, dtype=torch.int64, device=self.device)
        config = self.model_config.hf_config
        try:
            shape: Shape = shape_of(config)
            self._places = install(
                compat.model_of(self), model_type_of(config), shape.layers, self._capacity, self._real
            )
        except SteeringError as error:
            # An exception here would reach the user as "engine core initialization failed".
            self._problem = str(error)

    def execute_model(self, scheduler_output: Any) -> Any:
        """One forward pass, whose number of real tokens the modules are told; warm-up passes do not come this way."""
        tokens = compat.scheduled_tokens(scheduler_output)
        self._forwards += tokens > 0
        self._real.fill_(tokens)
        try:
            return super().execute_model(scheduler_output)
        finally:
            self._real.zero_()

    def steering_layout(self) -> dict[str, Any]:
        """Where this worker stands and which units it holds, or why it cannot be steered."""
        places = {str(layer): [place.first, place.module.width, place.full] for layer, place in self._places.items()}
        own = {"layout": LAYOUT, "capacity": self._capacity, "layers": places, "problem": self._problem}
        return {**compat.ranks_of(self), **own}

    def steering_write(self, edits: Sequence[Mapping[str, Any]]) -> int:
        """Replace the numbers in the buffers.

        Args:
            edits: of the whole model; each a dict of `layer`, `site`, and the bytes of `units` (int64), `scale`,
                `shift` (float32) and `written` (bool).

        Returns:
            Number of (site, layer, unit) that are edited here.
        """
        of_layers: dict[int, list[SiteEdit]] = {layer: [] for layer in self._places}
        for edit in edits:
            layer = int(edit["layer"])
            if layer not in self._places:  # of another stage of the pipeline
                continue
            place = self._places[layer]
            units = np.frombuffer(edit["units"], dtype=np.int64) - place.first
            own = (units >= 0) & (units < place.module.width)
            if own.any():
                numbers = [
                    torch.from_numpy(np.frombuffer(edit[name], dtype=kind)[own].copy())
                    for name, kind in (("scale", np.float32), ("shift", np.float32), ("written", np.bool_))
                ]
                site = SITES.index(edit["site"])
                of_layers[layer].append(SiteEdit(site, torch.from_numpy(units[own].copy()), *numbers))
        for layer, of_layer in of_layers.items():
            self._places[layer].module.write(of_layer)
        return sum(place.module.touched() for place in self._places.values())

    def steering_evidence(self) -> dict[str, Any]:
        """What happened here: reads the device."""
        modules = {layer: place.module for layer, place in self._places.items()}
        return {
            "rank": int(self.rank),
            "forwards": int(self._forwards),
            "touched": {str(layer): module.touched() for layer, module in modules.items()},
            "tokens": {str(layer): int(module.tokens) for layer, module in modules.items()},
            "largest": max((float(module.largest) for module in modules.values()), default=0.0),
        }

    def steering_compilations(self) -> dict[str, int]:
        """vLLM's counters of compiling and capturing in this process."""
        return compat.compilations()

    def steering_weights(self) -> str:
        """Digest of the weights that this worker holds."""
        return weights_digest(self.get_model())


def end_with(driver: int) -> None:
    """End this process when lm-eval's is gone, and the engine's process between them: vLLM's would hold its memory.

    Args:
        driver: number of lm-eval's process; 0, or one of another machine, ends nothing.
    """
    if driver in (0, os.getpid()):
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
