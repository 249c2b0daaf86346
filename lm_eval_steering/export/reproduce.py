"""The proof that a re-expressed model is the same model, on a small random one with the other settings."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lm_eval_steering.architectures import model_type_of
from lm_eval_steering.errors import ArchitectureError
from lm_eval_steering.export.families import Layout

_TOKENS = 24
_CLOSE = 1e-6  # of the largest |logit|, in float32


def refuse_unless_reproduced(config: Any, layout: Layout) -> None:
    """Compare a model and its re-expression, both without an intervention and with the same random weights.

    The small model keeps what its config says of heads' size, rotary embedding, norm and activation; only layers,
    heads, units and vocabulary are fewer. Rows are read from position 0 and up to the last one.

    Raises:
        ArchitectureError: if one is not the other.
    """
    assert layout.as_llama is not None
    small = _small(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    llama = _llama(layout.as_llama(small), model.state_dict())
    tokens = torch.randint(0, small.vocab_size, (2, _TOKENS))
    last = int(small.max_position_embeddings)
    for start in sorted({0, max(last - _TOKENS, 0)}):
        positions = torch.arange(start, start + _TOKENS).expand(2, _TOKENS)
        with torch.inference_mode():
            one = model(tokens, position_ids=positions).logits
            other = llama(tokens, position_ids=positions).logits
        difference = float((one - other).abs().max() / one.abs().max())
        if not difference <= _CLOSE:
            raise ArchitectureError(
                f"{model_type_of(config)}: written as Llama, a small model with this config gives other logits (by "
                f"{difference:.1e} of the largest); op=scale and deactivation can be exported as they are, and "
                "`--model steered-hf` evaluates the rest"
            )


def _small(config: Any) -> Any:
    small = copy.deepcopy(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    grouped = config.num_key_value_heads < config.num_attention_heads
    sizes = {
        "hidden_size": 2 * head, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1 if grouped else 2, "head_dim": head, "vocab_size": 64, "pad_token_id": None,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    for name, value in sizes.items():
        setattr(small, name, value)
    if getattr(config, "layer_types", None) is not None:
        small.layer_types = config.layer_types[:2]
    return small


def _llama(config: LlamaConfig, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = LlamaForCausalLM(config).eval()
    left = model.load_state_dict(weights, strict=False)
    wrong = [*left.unexpected_keys, *(name for name in left.missing_keys if not name.endswith(".bias"))]
    if wrong:
        raise ArchitectureError(f"{config.model_type}: cannot be written as Llama, which has no {wrong[0]}")
    for name in left.missing_keys:
        torch.nn.init.zeros_(model.get_parameter(name))
    return model
