"""The model of a sweep in one live engine: `steered-vllm`, which notices when a process of the engine has died."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from lm_eval_steering.sweep.sweep_model import SweepLM
from lm_eval_steering.vllm import compat
from lm_eval_steering.vllm.model import SteeredVLLM


class SweepEngine(SweepLM, SteeredVLLM):
    """`SteeredVLLM` for many evaluations: interventions change, the engine stays."""

    def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
        outputs = super()._model_generate(requests, generate, sampling_params)
        self.calls += 1
        self.tokens += sum(map(len, requests))
        self.tokens += sum(len(text.token_ids) for output in outputs for text in output.outputs) if generate else 0
        return outputs

    @property
    def weights_hash(self) -> str:
        """Of the checkpoint's files; where they cannot be read so, of what each worker holds."""
        return self.weights.digest or "+".join(compat.call_workers(self.model, "steering_weights"))

    @property
    def device_name(self) -> str:
        """Kind of device and number of workers."""
        report = self.steering.report()
        workers = report["tensor_parallel_size"] * report["pipeline_parallel_size"]
        return f"{report['device']} x {workers}"

    @property
    def is_lost(self) -> bool:
        """Whether a worker does not answer, or requests of an evaluation that failed are still on their way."""
        return not compat.is_idle(self.model)

    def close(self) -> None:
        """End the engine's processes."""
        with suppress(Exception):  # of an engine that is dead already
            compat.shut_down(self.model)
            compat.release_memory()
