"""Hooks against export on text of the user's own: the same numbers, or the export is not called good."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lm_eval_steering.architectures import model_type_of
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.errors import ArchitectureError, SteeringError
from lm_eval_steering.export.layouts import Layout
from lm_eval_steering.steering.attach import Steering
from lm_eval_steering.steering.compiled import CompiledIntervention

_NEW_TOKENS = 16
# Largest difference of a token's log-probability, in nats and as a share of it where it is below -1. float32 differs
# by the order of its sums alone; half precision rounds after every module, hooks and folded weights at other places.
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.4}


class VerificationError(SteeringError):
    """An export that was written and does not do what the hooks do."""


@dataclass(frozen=True)
class VerifiedPrompt:
    """One prompt and its greedy continuation under hooks.

    Attributes:
        tokens: (1, token) of both.
        prompt: number of prompt tokens.
        steered: (token - 1,) log-probability of each token but the first.
        plain: (token - 1,) the same without the intervention.
        best: (token - 1,) the most probable token at each place.
        margin: (token - 1,) by how much the best token leads the second best.
    """

    tokens: torch.Tensor
    prompt: int
    steered: torch.Tensor
    plain: torch.Tensor
    best: torch.Tensor
    margin: torch.Tensor


@dataclass(frozen=True)
class Verdict:
    """What the comparison found.

    Attributes:
        prompts: that were compared.
        tokens: whose log-probabilities were.
        largest: difference of a log-probability between hooks and export.
        tolerance: what counts as rounding in the dtype.
        effect: the largest change of a log-probability by the intervention itself.
        greedy: tokens of the continuations.
        parted: those that the export chooses otherwise, where the choice is not a tie within the tolerance.
    """

    prompts: int
    tokens: int
    largest: float
    tolerance: float
    effect: float
    greedy: int
    parted: int

    @property
    def good(self) -> bool:
        """Whether hooks and export are the same up to rounding."""
        return self.largest <= self.tolerance and not self.parted

    def sentence(self) -> str:
        """One line for the user."""
        line = (
            f"{self.prompts} prompts, {self.tokens} tokens: largest difference of a log-probability {self.largest:.1e} "
            f"(tolerance {self.tolerance:g}), {self.greedy - self.parted} of {self.greedy} greedy tokens the same; the "
            f"intervention itself changes one by {self.effect:.1e}"
        )
        return line if self.effect > 10 * self.tolerance else f"{line}, too little for this to prove much"


def read_prompts(path: Path | None, count: int) -> list[str]:
    """The first lines of a text file that are not blank.

    Raises:
        SteeringError: if there are fewer.
    """
    if path is None:
        raise SteeringError("--verify without --text: name a text file of your own, one prompt a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SteeringError(f"--text {path}: {error}") from None
    if len(lines) < count:
        raise SteeringError(f"--text {path}: {len(lines)} lines that are not blank, --verify asks for {count}")
    return lines[:count]


@dataclass(frozen=True)
class Loader:
    """How the model and the export are loaded.

    Attributes:
        pretrained: hub id or folder of the model.
        revision: on the hub.
        dtype: of the weights.
        device: a GPU by default where there is one.
        device_map: of accelerate, for a model that one device cannot hold.
    """

    pretrained: str
    revision: str = "main"
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None

    def model(self) -> LazyModel:
        """The model."""
        return LazyModel(self.pretrained, self.revision, self.dtype, self.device, device_map=self.device_map)

    def export(self, folder: Path, form: str) -> Any:
        """The export as an engine would load it."""
        if form == "checkpoint":
            return LazyModel(str(folder), dtype=self.dtype, device=self.device, device_map=self.device_map).model
        from peft import PeftModel

        return PeftModel.from_pretrained(self.model().model, str(folder)).eval()


def verify(loader: Loader, plan: CompiledIntervention, folder: Path, form: str, prompts: Sequence[str]) -> Verdict:
    """Compare hooks and export, one loaded after the other."""
    rows = under_hooks(loader.model(), plan, prompts)
    gc.collect()  # two models of this size may not fit
    return compare(loader.export(folder, form), rows)


@torch.inference_mode()
def under_hooks(lazy: LazyModel, plan: CompiledIntervention, prompts: Sequence[str]) -> list[VerifiedPrompt]:
    """What the model does under hooks, and without them.

    Raises:
        SteeringError: if a prompt has no two tokens.
    """
    model, rows = lazy.model, []
    with Steering(lazy.sites, plan) as steering:
        for text in prompts:
            prompt = _tokens(lazy, text)
            tokens = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=_NEW_TOKENS,
                pad_token_id=0, num_beams=1,
            )  # fmt: skip
            steered = _log_probabilities(model, tokens)
            with steering.suspended():
                plain = _log_probabilities(model, tokens)
            values, indices = steered.topk(2)
            taken = _taken(steered, tokens), _taken(plain, tokens)
            rows.append(
                VerifiedPrompt(tokens.cpu(), prompt.shape[1], *taken, indices[:, 0], values[:, 0] - values[:, 1])
            )
        steering.evidence()
    return rows


@torch.inference_mode()
def compare(model: Any, rows: Sequence[VerifiedPrompt]) -> Verdict:
    """The exported model on the tokens that the hooks' model was given and gave."""
    limit = _TOLERANCES[model.dtype]
    largest, effect, parted, greedy, count = 0.0, 0.0, 0, 0, 0
    for row in rows:
        found = _log_probabilities(model, row.tokens.to(model.device))
        share = row.steered.abs().clamp(min=1)
        largest = _worst(largest, (_taken(found, row.tokens) - row.steered).abs() / share)
        effect = _worst(effect, (row.plain - row.steered).abs())
        differs = found.argmax(-1) != row.best
        continued = torch.arange(len(differs)) >= row.prompt - 1
        parted += int((differs & continued & (row.margin > 2 * limit)).sum())
        greedy += int(continued.sum())
        count += len(differs)
    return Verdict(len(rows), count, largest, limit, effect, greedy, parted)


def _worst(so_far: float, values: torch.Tensor) -> float:
    """The larger one; what is no number is infinitely wrong."""
    found = float(values.max())
    return max(so_far, float("inf") if math.isnan(found) else found)


def _tokens(lazy: LazyModel, text: str) -> torch.Tensor:
    """(1, token), cut so that the continuation fits."""
    room = None if lazy.context is None else lazy.context - _NEW_TOKENS
    found = lazy.tokenizer(text, return_tensors="pt")["input_ids"][:, :room]
    if found.shape[1] < 2:
        raise SteeringError(f"--text: {text!r} has fewer than two tokens")
    return found.to(lazy.model.device)


def _log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """(token - 1, vocabulary) in float32, on the CPU."""
    logits = model(tokens).logits[0, :-1].float()
    # log_softmax in float32 is off by 2e-5 at a vocabulary of 262k, logsumexp by 3e-7.
    return (logits - logits.logsumexp(-1, keepdim=True)).cpu()


def _taken(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, tokens[0, 1:, None].cpu())[:, 0]


# --- The proof that a re-expressed model is the same model, on a small random one with the other settings

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
