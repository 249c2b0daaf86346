"""The contract with vLLM's private names: each is where `compat` looks for it and means what it is taken for."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lm_eval_steering.vllm import compat
from lm_eval_steering.vllm.activation import SteeredActivation

pytestmark = pytest.mark.usefixtures("vllm")


def test_the_release_is_in_the_tested_range() -> None:
    assert compat.tested(compat.release())


def test_engine_and_sampling_arguments() -> None:
    engine, sampling = compat.engine_arguments(), compat.sampling_arguments()
    assert {"worker_cls", "additional_config", "kv_transfer_config", "enable_dbo", "tensor_parallel_size"} <= engine
    assert {"min_tokens", "seed", "repetition_penalty", "top_k", "temperature"} <= sampling
    assert "min_new_tokens" not in sampling


def test_scoring_parameters_are_those_of_lm_eval() -> None:
    from lm_eval.models.vllm_causallms import VLLM

    asked: list[Any] = []
    model = SimpleNamespace(generate=lambda _, sampling_params, **__: asked.extend(sampling_params))
    lm = SimpleNamespace(model=model, data_parallel_size=1, batch_size=1, lora_request=None)
    VLLM._model_generate(lm, [[1, 2]])
    assert asked == [compat.scoring_parameters()]


def test_the_platforms_worker_loads_and_executes() -> None:
    worker = compat.platform_worker()
    assert "scheduler_output" in inspect.signature(worker.execute_model).parameters
    assert callable(worker.load_model) and callable(worker.get_model)


def test_tokens_scheduled() -> None:
    from vllm.v1.core.sched.output import SchedulerOutput

    assert "total_num_scheduled_tokens" in {field.name for field in dataclasses.fields(SchedulerOutput)}


def test_additional_config_is_in_the_key_of_compiled_graphs() -> None:
    from vllm.config import VllmConfig

    keys = {VllmConfig(additional_config=config).compute_hash() for config in ({}, {"lm_eval_steering_layout": 1})}
    assert len(keys) == 2


def test_gated_functions_are_those_of_vllms_modules() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul, get_act_fn

    inputs = torch.randn(3, 16)
    with set_current_vllm_config(VllmConfig()):
        for module in (SiluAndMul(), GeluAndMul(), GeluAndMul(approximate="tanh")):
            function = compat.gated_function(module)
            assert function is not None and compat.is_fused(module)
            torch.testing.assert_close(function(inputs[:, :8]) * inputs[:, 8:], module(inputs))
        for name in ("gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh"):
            assert compat.gated_function(get_act_fn(name)) is None
            assert not compat.is_fused(get_act_fn(name))


def test_vllms_own_fusion_with_quantisation_leaves_a_steered_module_alone() -> None:
    from vllm.model_executor.layers.fusion.fused_act_quant import _FUSED_ACT_QUANT

    assert all(kind is not SteeredActivation for kind, _ in _FUSED_ACT_QUANT)


def test_batches_matter_on_gpus_without_batch_invariant_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs
    from vllm.platforms import current_platform

    envs.disable_envs_cache()
    assert not compat.batches_matter()
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    assert compat.batches_matter()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert not compat.batches_matter()


def test_a_client_knows_that_its_engine_is_dead() -> None:
    from vllm.v1.engine.core_client import BackgroundResources, MPClient

    assert "engine_dead" in {field.name for field in dataclasses.fields(BackgroundResources)}
    assert "self.resources = BackgroundResources(" in inspect.getsource(MPClient.__init__)


def test_no_call_waits_for_a_dead_engine() -> None:
    resources = SimpleNamespace(engine_dead=False)
    never = threading.Event()

    def asked(*_: Any, **__: Any) -> list[Any]:
        resources.engine_dead = True
        never.wait(30)
        return []

    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(
            engine_core=SimpleNamespace(resources=resources), has_unfinished_requests=lambda: False
        ),
        collective_rpc=asked, reset_prefix_cache=asked,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="steering_layout: no answer; the engine's process has ended, or hangs"):
        compat.call_workers(llm, "steering_layout")
    with pytest.raises(RuntimeError, match="reset_prefix_cache: no answer"):
        compat.reset_prefix_cache(llm)
    assert not compat.is_idle(llm)
    never.set()


def test_a_worker_whose_driver_was_killed_before_it_loaded_ends() -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    code = "import sys; from lm_eval_steering.vllm.worker import end_with; end_with(int(sys.argv[1])); sys.exit(7)"
    for driver, status in ((int(gone.stdout), 1), (os.getpid(), 7)):
        assert subprocess.run([sys.executable, "-c", code, str(driver)], check=False).returncode == status


def test_layers_elsewhere_in_the_pipeline() -> None:
    from vllm.model_executor.models.utils import PPMissingLayer

    assert compat.is_elsewhere(PPMissingLayer()) and not compat.is_elsewhere(nn.Identity())


def test_counters_of_compiling_are_numbers() -> None:
    found = compat.compilations()
    assert {"num_models_seen", "num_backend_compilations", "num_cudagraph_captured"} <= found.keys()
