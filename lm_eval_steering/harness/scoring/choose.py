"""Which way of scoring is exact for a model and an intervention, told before anything is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lm_eval_steering.harness.scoring.packing import Masks

# Families whose layers take a mask and position ids as given, which the tests compare with lm-eval's own scores.
PACKABLE = {
    **dict.fromkeys(("llama", "olmo2", "cohere", "gemma", "phi", "gpt2", "gptj", "gpt_neox", "opt"), Masks.FULL),
    "falcon": Masks.FULL,
    **dict.fromkeys(("mistral", "phi3", "starcoder2"), Masks.WINDOW),
    **dict.fromkeys(("qwen2", "qwen3", "gemma2", "gemma3_text"), Masks.LAYERS),
}
# Rotary embeddings that are scaled by the longest row of the batch, so that a score depends on its neighbours.
_BY_BATCH = {"dynamic", "longrope"}


@dataclass(frozen=True)
class Way:
    """How log-likelihoods are computed.

    Attributes:
        name: `packed`: one row a common prefix, with the continuations as its branches; `rows`: one row a request;
            both with the head at scored positions alone. `plain`: lm-eval's own batches and forward passes.
        why: what decides against the ways before it; empty for `packed`.
        masks: of the family, for `packed`.
    """

    name: str
    why: str = ""
    masks: Masks = Masks.FULL

    @property
    def shared(self) -> bool:
        """Whether it is one of ours."""
        return self.name != "plain"


def way_of(model: nn.Module, backend: str, lookahead: bool, needs_rows: bool) -> Way:
    """The way that does least work among those that are exact.

    Args:
        model: the loaded model.
        backend: lm-eval's, `causal` or `seq2seq`.
        lookahead: whether the intervention depends on later tokens of the row.
        needs_rows: whether it depends on where a token stands in its row.
    """
    config: Any = model.config
    against = _against_ours(model, backend, lookahead)
    if against:
        return Way("plain", against)
    masks = PACKABLE.get(config.model_type)
    implementation = getattr(config, "_attn_implementation", "eager")
    if needs_rows:
        return Way("rows", "the intervention depends on where a token stands in its row")
    if masks is None or getattr(config, "alibi", False):
        return Way("rows", f"{config.model_type} takes no attention mask of ours")
    if implementation not in {"sdpa", "eager"}:
        return Way("rows", f"attention implementation {implementation} takes no mask of ours")
    return Way("packed", "", masks)


def _against_ours(model: Any, backend: str, lookahead: bool) -> str:
    """Why only lm-eval's own forward passes are exact; empty where ours are too."""
    if backend != "causal":
        return f"a {backend} model"
    if lookahead:
        return "scope=sequence looks ahead: each request needs a row of its own"
    if hasattr(model, "_orig_mod"):
        return "a compiled model, whose head cannot be given a part of the positions"
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return "a prompt-tuning adapter adds positions of its own"
    if model.get_output_embeddings() is None:
        return "the model names no head"
    if rope := rope_by_batch(model.config):
        return f"rope_type={rope}: positions are scaled by the longest row of the batch"
    return ""


def rope_by_batch(config: Any) -> str:
    """The kind of rotary embeddings, if they are scaled by the longest row of a batch; else empty."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(each.get("rope_type")) for each in (rope, *rope.values()) if isinstance(each, dict)}
    return min(kinds & _BY_BATCH, default="")
