"""The model arguments of `steered-vllm`: ours separated from those of `vllm`, and refused where vLLM cannot follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Set
from dataclasses import fields
from typing import Any

import numpy as np

from lm_eval_steering.errors import InterventionError, SteeringError, did_you_mean
from lm_eval_steering.lmeval.arguments import SteeringArguments
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.steering.compiled import CompiledIntervention
from lm_eval_steering.steering.intervention import NORMAL, is_live
from lm_eval_steering.steering.positions import ALL
from lm_eval_steering.vllm.activation import LAYOUT

HF = "use --model steered-hf"
CAPACITY, HIDDEN_STATES = "steered_units", "steered_residual"  # model arguments of ours
# Keys of vLLM's `additional_config`.
LAYOUT_KEY, CAPACITY_KEY, RESIDUAL_KEY = (f"lm_eval_steering_{name}" for name in ("layout", "units", "residual"))
DRIVER = "LM_EVAL_STEERING_DRIVER"  # environment variable: host and number of the process with which the engine ends
_FEWEST = 64  # units, so that most neuron sets of a model share compiled graphs
_ONE_ENGINE = (
    "lm-eval makes new engines for every batch of requests then, which nothing could steer or count; run one engine a "
    "shard instead (tensor_parallel_size=, pipeline_parallel_size=, or a process for each group of tasks)"
)
# Argument -> (what is fine, why the rest is not).
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data_parallel_size": (lambda value: int(value) == 1, _ONE_ENGINE),
    "worker_cls": (lambda value: value == "auto", "steered-vllm brings the worker; leave it out"),
    "kv_transfer_config": (lambda value: not value, "a cache outside the engine would mix interventions; leave it out"),
    "kv_offloading_size": (lambda value: not value, "an offloaded cache would outlive interventions; leave it out"),
    "enable_dbo": (lambda value: not value, "batches in two halves cannot be counted; leave it out"),
    "ubatch_size": (lambda value: not value, "batches in parts cannot be counted; leave it out"),
    "prefill_context_parallel_size": (lambda value: int(value) == 1, "tokens split over workers cannot be counted"),
    "scoring": (lambda value: value == "auto", f"vLLM has one method of scoring; leave it out, or {HF}"),
    "generation": (lambda value: value == "auto", f"vLLM has one method of generating; leave it out, or {HF}"),
    "sites": (lambda value: value is None, f"steered-vllm steers the families of its table only; {HF}"),
}


def split(given: Mapping[str, Any], parent: type, engine: Set[str]) -> tuple[SteeringArguments, dict[str, Any]]:
    """Ours, and what belongs to lm-eval's `vllm` or to the engine.

    Args:
        given: as the user wrote them, without `pretrained`.
        parent: lm-eval's class.
        engine: names of the engine's arguments.

    Raises:
        SteeringError: for an argument that none of them knows, with the nearest one; or that cannot be steered.
    """
    ours = {field.name for field in fields(SteeringArguments)}
    known = set(inspect.signature(parent).parameters) - {"kwargs"} | engine
    known |= {"device", "swap_space", CAPACITY, HIDDEN_STATES}
    for key, value in given.items():
        if key not in ours | known:
            raise InterventionError(f"unknown model argument {key!r}{did_you_mean(key, sorted(ours | known))}")
        fine, why = _REFUSED.get(key, (lambda _: True, ""))
        if value is not None and not fine(value):
            raise SteeringError(f"{key}={value!r}: {why}")
    rest = {key: value for key, value in given.items() if key not in ours and key not in _REFUSED}
    return SteeringArguments(**{key: value for key, value in given.items() if key in ours}), rest


def capacity_of(given: Any, neuron_set: NeuronSet | None, units: int) -> int:
    """Number of units of each layer that interventions can edit: a size of buffers, and part of what is compiled.

    Args:
        given: as the user wrote it; None takes what all languages of the neuron set need, rounded up, or an eighth of
            a layer where there is no set.
        neuron_set: that the engine starts with.
        units: of a layer.

    Raises:
        SteeringError: if what was given is no number of units.
    """
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= units:
            raise SteeringError(f"{CAPACITY}={given!r}: expected a number of units per layer, 1 to {units}")
        return given
    needed = units // 8
    if neuron_set is not None:
        # As if no two languages shared one: those of a matched random set may not.
        layers = np.concatenate([neuron_set.neurons(code)[:, 0] for code in neuron_set.languages])
        needed = int(np.bincount(layers, minlength=1).max())
    return min(units, max(_FEWEST, 1 << max(needed - 1, 0).bit_length()))


def edits_hidden_states(given: Any, neuron_set: NeuronSet | None) -> bool:
    """Whether interventions can edit what layers return: part of what is compiled, with a small cost for each layer.

    Args:
        given: as the user wrote it; None takes whether the neuron set has statistics of hidden states, without which
            there is no site=residual, and True where there is no set.
        neuron_set: that the engine starts with.

    Raises:
        SteeringError: if what was given is neither True nor False.
    """
    if given is None:
        return neuron_set is None or bool(neuron_set.residual)
    if not isinstance(given, bool):
        raise SteeringError(f"{HIDDEN_STATES}={given!r}: expected True or False")
    return given


def with_worker(rest: Mapping[str, Any], worker: str, capacity: int, residual: bool) -> dict[str, Any]:
    """Arguments of the engine that make it a steered one, known to its cache of compiled graphs.

    Args:
        rest: arguments of lm-eval's `vllm` and of the engine, and ours of the engine.
        worker: path of the class.
        capacity: see `capacity_of`.
        residual: see `edits_hidden_states`.

    Raises:
        SteeringError: if the user's `additional_config` is no mapping.
    """
    more = rest.get("additional_config") or {}
    if not isinstance(more, Mapping):
        raise SteeringError(f"additional_config={more!r}: expected a mapping, which steered-vllm adds its layout to")
    given = {key: value for key, value in rest.items() if key not in (CAPACITY, HIDDEN_STATES)}
    ours = {LAYOUT_KEY: LAYOUT, CAPACITY_KEY: capacity, RESIDUAL_KEY: residual}
    return {**given, "worker_cls": worker, "additional_config": {**more, **ours}}


def refuse_what_hooks_do(plan: CompiledIntervention | None) -> None:
    """Refuse what is no map of one token's unit by itself, which is all that a compiled graph with buffers can do.

    Raises:
        InterventionError: naming the argument.
    """
    for step in plan.intervention.steps if plan else ():
        if step.positions != ALL:
            raise InterventionError(
                f"positions={step.positions}: vLLM's batches mix prompts and generated tokens, whose positions the "
                f"steered module does not know; {HF}"
            )
        if is_live(step.value):
            raise InterventionError(f"value={step.value}: a live statistic is taken by Python code at each pass; {HF}")
        if step.value == NORMAL:
            raise InterventionError(f"value={step.value}: random values depend on tokens and their positions; {HF}")


# Generation arguments of transformers that vLLM calls otherwise.
_TRANSLATED = {"min_new_tokens": "min_tokens"}
# Those that change nothing at these values, or that only say how transformers is to work.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "no_repeat_ngram_size": (0,), "length_penalty": (1.0,), "early_stopping": (False,),
    "num_beam_groups": (1,), "typical_p": (1.0,), "renormalize_logits": (False,), "num_return_sequences": (1,),
    "diversity_penalty": (0.0,), "encoder_repetition_penalty": (1.0,), "min_length": (0,),
}  # fmt: skip
_IDLE = {"use_cache", "pad_token_id", "cache_implementation", "attention_mask"}
_LM_EVAL = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "do_sample"}


def for_vllm(arguments: Mapping[str, Any], known: Set[str]) -> dict[str, Any]:
    """Generation arguments as vLLM knows them, from those that tasks write for transformers.

    Args:
        arguments: `generation_kwargs` of a task.
        known: names of the arguments of `vllm.SamplingParams`.

    Raises:
        SteeringError: naming one that vLLM has no counterpart of.
    """
    translated: dict[str, Any] = {}
    for key, value in arguments.items():
        name = _TRANSLATED.get(key, key)
        if name in known or name in _LM_EVAL:
            translated[name] = value
        elif key not in _IDLE and value is not None and value not in _NEUTRAL.get(key, ()):
            raise SteeringError(f"generation argument {key}={value!r}: vLLM has no such thing; {HF}")
    return translated
