"""Which way of generating makes the texts of lm-eval's `hf` by the least work, and that way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import CompileConfig, StoppingCriteriaList

from lm_eval_steering.errors import InterventionError
from lm_eval_steering.harness.generation.leaving import Leaving, against_leaving
from lm_eval_steering.harness.generation.stopping import StopStrings, against_early_ends


@contextmanager
def own_random_numbers(lm: Any) -> Iterator[None]:
    """Each rank's own: lm-eval seeds all alike, and sampled answers to equal prompts would be the same on each."""
    if lm.world_size == 1:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(torch.initial_seed() + lm.rank)
        yield


def refuse_growing(model: Any, setting: str) -> None:
    """Refuse a model that needs a cache which grows.

    Raises:
        InterventionError: naming it.
    """
    alibi = getattr(model.config, "alibi", False)
    if alibi or not getattr(model, "_can_compile_fullgraph", False):
        raise InterventionError(
            f"generation={setting}: {type(model).__name__} takes no cache of fixed size; use generation=auto"
        )


class Generator:
    """Texts of a `SteeredHFLM`, in the way that does least work among those that make the texts of `hf`.

    Ways: `leaving` (rows that are done leave the batch, prompts are read with few pads), `whole` (they stay, and the
    batch ends when all are done), `static` (the same with a cache of fixed size), `compiled` (and a compiled forward
    pass), `plain` (lm-eval's own code).
    """

    def __init__(self, lm: Any, setting: str) -> None:
        """Nothing is generated yet.

        Args:
            lm: the `SteeredHFLM`.
            setting: one of `arguments.GENERATION`.

        Raises:
            InterventionError: if the model takes no cache of fixed size and the setting wants one.
        """
        self._lm = lm
        self.setting = setting
        self._prompts: Counter[str] = Counter()
        self._why = ""
        if setting in ("static", "compiled"):
            refuse_growing(lm.model, setting)

    def report(self) -> dict[str, Any]:
        """The setting, how many prompts went which way, and why the last did not go one that does less work."""
        return {"setting": self.setting, "prompts": dict(self._prompts), "why": self._why}

    def __call__(self, context: torch.Tensor, max_length: int, stop: list[str], **arguments: Any) -> torch.Tensor:
        """What `HFLM._model_generate` does.

        Args:
            context: (row, position) token ids, padded on the left.
            max_length: of context and continuation, in tokens.
            stop: the strings.
            **arguments: of `model.generate`.

        Returns:
            (row, position) token ids.
        """
        lm = self._lm
        way, self._why = self._way(stop, arguments)
        self._prompts[way] += len(context)
        if way == "plain":
            return HFLM._model_generate(lm, context, max_length, stop, **arguments)
        criterion = StopStrings(lm.tokenizer, stop, *context.shape)
        if not arguments.get("temperature"):
            arguments.pop("temperature", None)  # transformers warns of it
        mixed = lm.mixed_precision_dtype
        with torch.autocast(device_type=lm.device.type, dtype=mixed, enabled=mixed is not None):
            return lm.model.generate(
                input_ids=context, max_length=max_length, stopping_criteria=StoppingCriteriaList([criterion]),
                pad_token_id=lm.tokenizer.pad_token_id, use_cache=True, **self._how(way, criterion, arguments),
                **arguments,
            )  # fmt: skip

    def _way(self, stop: list[str], arguments: dict[str, Any]) -> tuple[str, str]:
        """Name of the way for a batch, and why not one that does less work."""
        if self.setting == "plain":
            return "plain", "generation=plain"
        if against := against_early_ends(self._lm, stop, arguments):
            return "plain", against
        if self.setting != "auto":
            return self.setting, f"generation={self.setting}"
        if self._lm.mixed_precision_dtype is not None:
            return "whole", "mixed precision rounds too much: a batch of another shape may give other tokens"
        return ("whole", self._against_leaving) if self._against_leaving else ("leaving", "")

    @cached_property
    def _against_leaving(self) -> str:
        return against_leaving(self._lm.model)

    def _how(self, way: str, criterion: StopStrings, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` that make it the way."""
        if way == "whole":
            return {}
        if way == "leaving":
            steering = self._lm.steering
            declare = steering.rows if steering is not None and steering.active else lambda *_: nullcontext()
            return {"custom_generate": Leaving(arguments["attention_mask"], criterion, declare)}
        if way == "static":
            return {"cache_implementation": "static", "disable_compile": True}
        compiling = CompileConfig(mode="reduce-overhead" if self._lm.device.type == "cuda" else "default")
        compiling._compile_all_devices = True
        return {"cache_implementation": "static", "compile_config": compiling}
