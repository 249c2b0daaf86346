"""Greedy decoding in which a row leaves the batch when it is done, and prompts are read with few pads.

What is computed for a row is what transformers computes for it in lm-eval's batch, in passes of another shape, so
numbers round differently: by some 1e-6 in float32, and by enough to decide tokens in half precision.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from lm_eval_steering.harness.generation.stopping import StopStrings
from lm_eval_steering.harness.scoring.batches import Budget, alike
from lm_eval_steering.harness.scoring.choose import rope_by_batch

# (row, position) bool of the prompts' real tokens, and (row,) number of them: of the next forward passes.
Declare = Callable[[torch.Tensor, torch.Tensor], AbstractContextManager[None]]
_BY_ROW = {"attention_mask", "position_ids"}
_ALIBI = {"bloom", "mpt"}
# Of a generation config: other ways of decoding, other caches, and what knows the rows of the first pass.
_NOT_BY_ROW = (
    "cache_implementation", "constraints", "dola_layers", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "force_words_ids", "guidance_scale", "penalty_alpha", "prefill_chunk_size", "prompt_lookup_num_tokens",
    "token_healing", "watermarking_config",
)  # fmt: skip


def against_leaving(model: Any) -> str:
    """Why rows cannot leave a batch of this model, or must not; empty where they can.

    Args:
        model: the loaded model.
    """
    config, settings = model.config, model.generation_config
    implementation = getattr(config, "_attn_implementation", "eager")
    reasons = {
        f"{model.dtype} rounds too much: a batch of another shape may give other tokens": not _rounds_little(model),
        f"attention implementation {implementation} is not compared with lm-eval's texts": (
            implementation not in {"sdpa", "eager"}
        ),
        "rotary embeddings that are scaled by the longest row of the batch": bool(rope_by_batch(config)),
        "its processes take every step together": is_fsdp_managed_module(model) or is_deepspeed_zero3_enabled(),
        "the model's generation config asks for more than greedy decoding": any(
            getattr(settings, name, None) for name in _NOT_BY_ROW
        ),
        f"{type(model).__name__} prepares its inputs in a way of its own": (
            "next_sequence_length" not in inspect.signature(model.prepare_inputs_for_generation).parameters
        ),
        f"{type(model).__name__} takes no position ids": not _placed(model),
    }
    found = next((reason for reason, holds in reasons.items() if holds), "")
    if found:
        return found
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    usual = model._supports_default_dynamic_cache() and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    shared = getattr(config.get_text_config(), "num_kv_shared_layers", None)
    return "" if usual and not shared else f"{type(model).__name__} has a cache of its own"


def _rounds_little(model: Any) -> bool:
    """Whether a batch of another shape changes logits by some 1e-6 only."""
    kinds = {each.dtype for each in model.parameters() if each.is_floating_point()}
    exact = torch.get_float32_matmul_precision() == "highest"
    return kinds <= {torch.float32, torch.float64} and exact and getattr(model, "hf_quantizer", None) is None


def _placed(model: Any) -> bool:
    """Whether a row's numbers do not depend on its column, because it is told where its tokens stand, or ALiBi is."""
    return "position_ids" in inspect.signature(model.forward).parameters or model.config.model_type in _ALIBI


class Leaving:
    """`custom_generate` of transformers' `generate`, in place of its `_sample`; see `against_leaving`."""

    def __init__(self, mask: torch.Tensor, stop: StopStrings, declare: Declare) -> None:
        """Nothing is generated yet.

        Args:
            mask: (row, position) of the prompts, 0 for pads, which are on the left.
            stop: one of the stopping criteria, which is told when rows leave.
            declare: a context manager for each forward pass; says which of its rows' tokens are real.
        """
        self._real, self._stop, self._declare = mask.bool(), stop, declare
        self._lengths = self._real.sum(1)

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        past_key_values: DynamicCache,
        **inputs: Any,
    ) -> torch.Tensor:
        """(row, position) token ids; rows that were done are filled up with pads.

        Args:
            model: whose `generate` calls.
            input_ids: (row, position) token ids of the prompts.
            logits_processor: of `generate`.
            stopping_criteria: of `generate`.
            generation_config: of `generate`.
            past_key_values: the empty cache.
            **inputs: of the model's forward pass.
        """
        unknown = [name for name, each in inputs.items() if isinstance(each, torch.Tensor) and name not in _BY_ROW]
        if unknown:
            raise ValueError(f"{type(model).__name__}.generate made inputs that are not known here: {unknown}")
        texts = input_ids.new_full((len(input_ids), generation_config.max_length), generation_config.pad_token_id)
        width = input_ids.shape[1]
        texts[:, :width] = input_ids
        rows = torch.arange(len(input_ids), device=input_ids.device)
        logits, inputs = self._read(model, input_ids, past_key_values, inputs)
        while True:
            tokens = logits_processor(input_ids, logits).argmax(-1)
            input_ids = torch.cat([input_ids, tokens[:, None]], 1)
            texts[rows, width] = tokens
            width += 1
            done = stopping_criteria(input_ids, None)
            if done.all():
                return texts[:, :width]
            if done.any():
                staying = (~done).nonzero().squeeze(1)
                rows, input_ids = rows[staying], input_ids[staying]
                inputs = self._keep(staying, past_key_values, inputs)
                _keep_lengths(logits_processor, staying)
            logits, inputs = self._step(model, input_ids, past_key_values, inputs)

    # --- forward passes -----------------------------------------------------------------------------------------

    def _step(
        self, model: Any, input_ids: torch.Tensor, cache: DynamicCache, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Logits (row, vocabulary), float32, after one token more, and the next pass's inputs."""
        with self._declare(self._real, self._lengths):
            return _forward(model, input_ids, cache, inputs, next_sequence_length=1)

    def _read(
        self, model: Any, input_ids: torch.Tensor, cache: DynamicCache, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The same after the prompts, which are read in groups of similar length; the cache is as if read at once."""
        lengths = self._lengths.tolist()
        groups = alike(range(len(lengths)), lengths.__getitem__, lambda _: 1, Budget.of_prompts(input_ids.device.type))
        # What has left a sliding window is not in the cache, and in a row of other pads it would be other tokens.
        if len(groups) == 1 or any(layer.is_sliding for layer in cache.layers):
            with self._declare(self._real, self._lengths):
                return _forward(model, input_ids, cache, inputs, is_first_iteration=True)
        found: list[torch.Tensor] = []
        parts: list[DynamicCache] = []
        for rows in groups:
            longest = lengths[rows[0]]
            part = {
                name: _last(each[rows], longest) if isinstance(each, torch.Tensor) else each
                for name, each in inputs.items()
            }
            parts.append(DynamicCache(config=model.config))
            with self._declare(_last(self._real[rows], longest), self._lengths[rows]):
                logits, _ = _forward(model, _last(input_ids[rows], longest), parts[-1], part, is_first_iteration=True)
            found.append(logits)
        order = torch.tensor([row for rows in groups for row in rows], device=input_ids.device).argsort()
        _join(parts, order, input_ids.shape[1], cache)
        return torch.cat(found)[order], _longer(inputs)

    def _keep(self, staying: torch.Tensor, cache: DynamicCache, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of the rows that stay; the others are forgotten everywhere."""
        self._real, self._lengths = self._real[staying], self._lengths[staying]
        self._stop.leave(staying.tolist())
        for layer in cache.layers:
            layer.batch_select_indices(staying.to(layer.keys.device))
        return {name: each[staying] if isinstance(each, torch.Tensor) else each for name, each in inputs.items()}


def _keep_lengths(processors: Iterable[Any], staying: torch.Tensor) -> None:
    """The penalty on repetitions knows each row's number of pads; the other processors look at token ids alone."""
    for each in processors:
        if isinstance(lengths := getattr(each, "prompt_ignore_length", None), torch.Tensor):
            each.prompt_ignore_length = lengths[staying]


def _forward(
    model: Any, input_ids: torch.Tensor, cache: DynamicCache, inputs: dict[str, Any], **how: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    ready = model.prepare_inputs_for_generation(input_ids, past_key_values=cache, **inputs, **how)
    output = model(**ready, return_dict=True)
    return output.logits[:, -1].to(input_ids.device, torch.float32), _longer(inputs)


def _longer(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the pass over one token more."""
    mask, places = inputs.get("attention_mask"), inputs.get("position_ids")
    longer = dict(inputs)
    if mask is not None:
        longer["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    if places is not None:
        longer["position_ids"] = torch.cat([places, places[:, -1:] + 1], 1)
    return longer


def _last(each: torch.Tensor, number: int) -> torch.Tensor:
    return each[:, -number:]


def _join(parts: Sequence[DynamicCache], order: torch.Tensor, width: int, cache: DynamicCache) -> None:
    """Fill a cache with the parts' rows, padded on the left to one width, in another order."""
    for number in range(len(cache.layers)):
        layers = [part.layers[number] for part in parts]
        keys, values = (
            torch.cat([torch.nn.functional.pad(each, (0, 0, width - each.shape[2], 0)) for each in own])
            for own in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        place = order.to(keys.device)
        cache.update(keys[place], values[place], number)
        for part in parts:
            part.layers[number].reset()
