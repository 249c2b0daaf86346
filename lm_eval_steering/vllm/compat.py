"""Every name of vLLM that is not part of its documented interface, each behind a small function with a contract test.

Nothing here is imported before it is needed: vLLM may be absent.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional

from lm_eval_steering.errors import SteeringError

# Releases against whose source and behaviour everything here was written and tested.
OLDEST, NEWEST = "0.32.0", "0.32"
_LONGEST = 400  # characters of an error of vLLM that are shown
_LOOK = 1.0  # seconds between two looks at an engine that has not answered
_log = logging.getLogger("lm_eval.steering")


def release() -> str:
    """Version of vLLM.

    Raises:
        SteeringError: if it is absent, or older than what was tested.
    """
    try:
        installed = version("vllm")
        import vllm  # noqa: F401
    except (PackageNotFoundError, ImportError) as error:
        raise SteeringError(
            f"steered-vllm needs vLLM ({error}): pip install 'lm-eval-steering[vllm]', or use --model steered-hf"
        ) from None
    if Version(installed) < Version(OLDEST):
        raise SteeringError(
            f"vLLM {installed} is older than {OLDEST}, the first that steered-vllm was tested with; update"
        )
    return installed


def tested(installed: str) -> bool:
    """Whether a release is in the tested range; patch releases of the newest are."""
    parts = Version(installed).release[:2]
    return Version(OLDEST).release[:2] <= parts <= Version(NEWEST).release[:2]


def warn_if_untested(installed: str) -> None:
    """One line where the release is newer than what was tested; the counters still prove each edit."""
    if not tested(installed):
        _log.warning(
            "vLLM %s is outside the range that steered-vllm was tested with (%s to %s.*): every edit is still counted, "
            "but compare a few scores with --model steered-hf first",
            installed,
            OLDEST,
            NEWEST,
        )


def engine_arguments() -> set[str]:
    """Names of the arguments of an engine, which `vllm.LLM` takes."""
    from vllm.engine.arg_utils import EngineArgs

    return {name for name in EngineArgs.__dataclass_fields__ if not name.startswith("_")}


@functools.cache
def sampling_arguments() -> set[str]:
    """Names of the arguments of `vllm.SamplingParams`."""
    from vllm import SamplingParams

    return {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}


def scoring_parameters() -> Any:
    """What lm-eval asks for where it scores a prompt: the log-probability of each of its tokens, and one token more."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)


# --- in the workers ---------------------------------------------------------------------------------------------


def platform_worker() -> type:
    """The worker class of the platform that vLLM runs on (CUDA, ROCm or CPU), as its platforms choose it.

    Raises:
        SteeringError: naming another platform.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    if current_platform.is_cuda_alike():
        from vllm.v1.worker.gpu_worker import Worker

        return Worker
    raise SteeringError(f"steered-vllm knows the workers of CUDA, ROCm and CPU, not of {current_platform.device_name}")


def model_of(worker: Any) -> nn.Module:
    """The model that a worker has loaded: its language part where it has several."""
    model = worker.get_model()
    return model.get_language_model() if hasattr(model, "get_language_model") else model


def additional_config(worker: Any) -> dict[str, Any]:
    """What the engine was given as `additional_config`."""
    return dict(worker.vllm_config.additional_config)


def hidden_size(config: Any) -> int:
    """Number of dimensions of the hidden states, of which each worker holds all, by vLLM's config of the model."""
    return int(config.get_hidden_size())


def ranks_of(worker: Any) -> dict[str, int]:
    """Number of a worker, and its rank among how many in tensor and in pipeline parallelism."""
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return {
        "rank": int(worker.rank),
        "tensor_rank": get_tensor_model_parallel_rank(),
        "tensor_size": get_tensor_model_parallel_world_size(),
        "pipeline_rank": int(get_pp_group().rank_in_group),
        "pipeline_size": int(get_pp_group().world_size),
    }


def scheduled_tokens(scheduler_output: Any) -> int:
    """Number of tokens, padding left out, of the forward pass that a worker is told to run."""
    return int(scheduler_output.total_num_scheduled_tokens)


def is_elsewhere(layer: nn.Module) -> bool:
    """Whether a module stands for a layer of another stage of the pipeline."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return isinstance(layer, PPMissingLayer)


def slice_of(linear: Any) -> tuple[int, int, int]:
    """First input, number of inputs and full number of inputs of the part of a linear layer that a worker holds."""
    linear = getattr(linear, "base_layer", linear)  # wrapped by an adapter
    held, full = int(getattr(linear, "input_size_per_partition", linear.input_size)), int(linear.input_size)
    rank = int(linear.tp_rank) if held != full else 0
    return rank * held, held, full


def gated_function(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The activation function of a module that computes function(gate) * up from both in one tensor; None of others."""
    from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul

    if type(module) is SiluAndMul:
        return functional.silu
    if type(module) is GeluAndMul:
        return functools.partial(functional.gelu, approximate=module.approximate)
    return None


def is_fused(module: nn.Module) -> bool:
    """Whether an activation module does more than apply a function to each unit: a product, or a quantisation."""
    name = type(module).__name__
    return "Mul" in name or "Quant" in name or "Moe" in name or "MoE" in name


def compilations() -> dict[str, int]:
    """vLLM's counters of compiling and capturing in this process."""
    from vllm.compilation.counter import compilation_counter

    return {name: int(value) for name, value in vars(compilation_counter).items()}


# --- in the process of lm-eval ----------------------------------------------------------------------------------


def did_not_start(error: Exception) -> SteeringError:
    """What a user is told where vLLM raised an error while its engine started, perhaps in another process."""
    from vllm.platforms import current_platform

    message = " ".join(str(error).split())
    hint = ""
    if current_platform.is_cpu():
        hint = (
            "; where it says 'Available memory', vLLM asks for more than is free: set VLLM_CPU_KVCACHE_SPACE=1 (GiB) "
            "in the environment, or give a smaller gpu_memory_utilization= (0.92 of the memory by default, on CPU too)"
        )
    return SteeringError(
        f"vLLM did not start ({type(error).__name__}: {message[:_LONGEST]}); its own message is in the log above{hint}"
    )


def model_config(llm: Any) -> Any:
    """vLLM's own config of the model: `dtype`, `hf_config`, `max_model_len`, `quantization`."""
    return llm.llm_engine.model_config


def engine_report(llm: Any) -> dict[str, Any]:
    """How an engine runs, which is no part of a score's identity."""
    config = llm.llm_engine.vllm_config
    parallel, compiled = config.parallel_config, config.compilation_config
    return {
        "name": "vllm",
        "release": release(),
        "tensor_parallel_size": int(parallel.tensor_parallel_size),
        "pipeline_parallel_size": int(parallel.pipeline_parallel_size),
        "executor": str(parallel.distributed_executor_backend),
        "compilation": getattr(compiled.mode, "name", str(compiled.mode)),
        "cuda_graphs": getattr(compiled.cudagraph_mode, "name", str(compiled.cudagraph_mode)),
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "device": str(config.device_config.device_type),
    }


def cache_dtype(llm: Any) -> str:
    """Type of the numbers in the key-value cache: `auto` is the model's."""
    return str(llm.llm_engine.vllm_config.cache_config.cache_dtype)


def generation_config(llm: Any) -> dict[str, Any]:
    """What the model's own generation config says: vLLM takes further ends of text from there."""
    return dict(model_config(llm).try_get_generation_config() or {})


def batches_matter() -> bool:
    """Whether a row's numbers depend on the rows that it is batched with: on GPUs, without batch-invariant kernels."""
    from vllm import envs
    from vllm.platforms import current_platform

    return not (current_platform.is_cpu() or envs.VLLM_BATCH_INVARIANT)


def cache_keys(llm: Any) -> tuple[str, str]:
    """Keys of an engine's compiled graphs: its own, and that of the same engine without `additional_config`."""
    config = llm.llm_engine.vllm_config
    plain = copy.copy(config)
    plain.additional_config = {}
    return config.compute_hash(), plain.compute_hash()


def call_workers(llm: Any, method: str, args: tuple[Any, ...] = (), seconds: float = math.inf) -> list[Any]:
    """What a method of each worker gives.

    Args:
        llm: of vLLM.
        method: of the worker.
        args: plain data.
        seconds: that the workers have.

    Raises:
        RuntimeError: if the engine's process has ended, or the time is over.
    """
    return list(_answer(llm, lambda: llm.collective_rpc(method, args=args), method, seconds))


def reset_prefix_cache(llm: Any) -> bool:
    """Empty an engine's prefix cache; False where vLLM did not.

    Raises:
        RuntimeError: if the engine's process has ended.
    """
    return _answer(llm, llm.reset_prefix_cache, "reset_prefix_cache", math.inf) is not False


def _answer(llm: Any, call: Callable[[], Any], name: str, seconds: float) -> Any:
    """What a call to an engine gives: vLLM waits for ever where the engine dies meanwhile."""
    resources = getattr(llm.llm_engine.engine_core, "resources", None)
    if resources is None:  # the engine runs in this process
        return call()
    outcome: list[Any] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    end = time.monotonic() + seconds
    while thread.is_alive():
        thread.join(_LOOK)
        if thread.is_alive() and (resources.engine_dead or time.monotonic() > end):
            raise RuntimeError(f"{name}: no answer; the engine's process has ended, or hangs")
    if errors:
        raise errors[0]
    return outcome[0]


def is_idle(llm: Any, seconds: float = 60.0) -> bool:
    """Whether an engine's workers answer, and no request is on its way.

    Args:
        llm: of vLLM.
        seconds: that the workers have.
    """
    try:
        if llm.llm_engine.has_unfinished_requests():
            return False
        call_workers(llm, "steering_layout", seconds=seconds)
    except Exception:  # vLLM's own errors differ by what died and when it was noticed
        return False
    return True


def shut_down(llm: Any) -> None:
    """End an engine's processes; without this they end with the object."""
    llm.llm_engine.engine_core.shutdown()


def release_memory() -> None:
    """Let go of what an engine that has ended took in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
