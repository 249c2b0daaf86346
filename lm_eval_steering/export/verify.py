"""Hooks compared with the export: on the user's text, and a family with Llama's class on a small random model."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lm_eval_steering.architectures import model_type_of
from lm_eval_steering.architectures.loading import LazyModel, is_quantization
from lm_eval_steering.errors import ArchitectureError, SteeringError
from lm_eval_steering.export.layouts import as_llama
from lm_eval_steering.steering.attach import Steering
from lm_eval_steering.steering.compiled import CompiledIntervention

_NEW_TOKENS = 16
# Largest difference of a token's log-probability, in nats, and relative to it where it is below -1. In float32 only the
# order of sums differs; half precision rounds after every module, with hooks after others than with folded weights.
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.4}


class VerificationError(SteeringError):
    """A written export that differs from the model under hooks."""


@dataclass(frozen=True)
class VerifiedPrompt:
    """One prompt and its greedy continuation under hooks.

    Attributes:
        tokens: (1, token) of both.
        prompt: number of prompt tokens.
        steered: (token - 1,) log-probability of each token but the first.
        plain: (token - 1,) the same without the intervention.
        best: (token - 1,) the most probable token at each position.
        margin: (token - 1,) log-probability of the best token minus that of the second best.
    """

    tokens: torch.Tensor
    prompt: int
    steered: torch.Tensor
    plain: torch.Tensor
    best: torch.Tensor
    margin: torch.Tensor


@dataclass(frozen=True)
class Verdict:
    """Result of the comparison.

    Attributes:
        prompts: number of prompts.
        tokens: number of tokens whose log-probabilities were compared.
        largest: largest difference of a log-probability between hooks and export.
        tolerance: the largest difference that counts as rounding in the dtype.
        effect: the largest change of a log-probability by the intervention itself.
        greedy: number of tokens of the continuations.
        different: how many of these the export chooses differently, ties within the tolerance not counted.
    """

    prompts: int
    tokens: int
    largest: float
    tolerance: float
    effect: float
    greedy: int
    different: int

    @property
    def good(self) -> bool:
        """Whether hooks and export are the same up to rounding."""
        return self.largest <= self.tolerance and not self.different

    def sentence(self) -> str:
        """One line for the user."""
        line = (
            f"{self.prompts} prompts, {self.tokens} tokens: largest difference of a log-probability {self.largest:.1e} "
            f"(tolerance {self.tolerance:g}), {self.greedy - self.different} of {self.greedy} greedy tokens the same; "
            f"largest change by the intervention itself {self.effect:.1e}"
        )
        return line if self.effect > 10 * self.tolerance else f"{line}, too little for a meaningful comparison"


def read_prompts(path: Path | None, count: int) -> list[str]:
    """The first lines of a text file that are not blank.

    Raises:
        SteeringError: if there are fewer.
    """
    if path is None:
        raise SteeringError("--verify without --text: name a text file, one prompt per line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SteeringError(f"--text {path}: {error}") from None
    if len(lines) < count:
        raise SteeringError(f"--text {path}: {len(lines)} lines that are not blank, --verify asks for {count}")
    return lines[:count]


# Arguments that make other weights of a checkpoint -> what to do instead.
_OTHER_WEIGHTS = {
    "peft": "merge the adapter (peft's merge_and_unload, then save_pretrained) and export that folder",
    "gguf_file": "load the file with transformers, save the model (save_pretrained) and export that folder",
    "subfolder": "download the subfolder and name it as --model",
}


@dataclass(frozen=True)
class Loader:
    """How the model and the export are loaded.

    Attributes:
        pretrained: hub id or folder of the model.
        revision: on the hub.
        dtype: of the weights.
        device: a GPU by default if there is one.
        device_map: of accelerate, for a model that does not fit on one device.
        trust_remote_code: whether to run code of the model's repository.
        arguments: what else it is loaded with, as `steered-hf` takes it; none that makes other weights.
    """

    pretrained: str
    revision: str = "main"
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, way_out in _OTHER_WEIGHTS.items():
            if self.arguments.get(name):
                raise SteeringError(f"--model-args {name}: an export changes a checkpoint's own tensors; {way_out}")
        for name in self.arguments:
            if is_quantization(name):
                raise SteeringError(
                    f"--model-args {name}: an export changes a checkpoint's own tensors; export the checkpoint as it "
                    "is, and quantise the export"
                )

    def model(self) -> LazyModel:
        """The model."""
        return LazyModel(
            self.pretrained, self.revision, self.dtype, self.device, device_map=self.device_map,
            trust_remote_code=self.trust_remote_code, arguments=self.arguments,
        )  # fmt: skip

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
    """The model's log-probabilities and continuations under hooks, and without.

    Raises:
        SteeringError: if a prompt has fewer than two tokens.
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
            of_tokens = _of_tokens(steered, tokens), _of_tokens(plain, tokens)
            margin = values[:, 0] - values[:, 1]
            rows.append(VerifiedPrompt(tokens.cpu(), prompt.shape[1], *of_tokens, indices[:, 0], margin))
        steering.evidence()
    return rows


@torch.inference_mode()
def compare(model: Any, rows: Sequence[VerifiedPrompt]) -> Verdict:
    """The exported model on the prompts and continuations of the model under hooks."""
    limit = _TOLERANCES[model.dtype]
    largest, effect, different, greedy, count = 0.0, 0.0, 0, 0, 0
    for row in rows:
        exported = _log_probabilities(model, row.tokens.to(model.device))
        size = row.steered.abs().clamp(min=1)
        largest = _largest(largest, (_of_tokens(exported, row.tokens) - row.steered).abs() / size)
        effect = _largest(effect, (row.plain - row.steered).abs())
        differs = exported.argmax(-1) != row.best
        continued = torch.arange(len(differs)) >= row.prompt - 1
        different += int((differs & continued & (row.margin > 2 * limit)).sum())
        greedy += int(continued.sum())
        count += len(differs)
    return Verdict(len(rows), count, largest, limit, effect, greedy, different)


def _largest(so_far: float, differences: torch.Tensor) -> float:
    """The largest difference; NaN counts as infinite."""
    largest = float(differences.max())
    return max(so_far, math.inf if math.isnan(largest) else largest)


def _tokens(lazy: LazyModel, text: str) -> torch.Tensor:
    """(1, token), cut so that the continuation fits into the context."""
    longest = None if lazy.context is None else lazy.context - _NEW_TOKENS
    tokens = lazy.tokenizer(text, return_tensors="pt")["input_ids"][:, :longest]
    if tokens.shape[1] < 2:
        raise SteeringError(f"--text: {text!r} has fewer than two tokens")
    return tokens.to(lazy.model.device)


def _log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """(token - 1, vocabulary) in float32, on the CPU."""
    logits = model(tokens).logits[0, :-1].float()
    # log_softmax in float32 is off by 2e-5 at a vocabulary of 262k, logsumexp by 3e-7.
    return (logits - logits.logsumexp(-1, keepdim=True)).cpu()


def _of_tokens(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(token - 1,) log-probability of each token but the first, from (token - 1, vocabulary)."""
    return values.gather(-1, tokens[0, 1:, None].cpu())[:, 0]


# --- A family exported as Llama gives the same logits: shown on a small random model with its settings

_TOKENS = 24
_CLOSE = 1e-6  # relative to the largest |logit|, in float32


def refuse_unless_llama(config: Any) -> None:
    """Compare a small model of a family with the same model as Llama, on random weights and without an intervention.

    The small model keeps head size, rotary embedding, norm and activation function of the config, and has fewer layers,
    heads, units and tokens. Rows begin at position 0, and end at the last position.

    Raises:
        ArchitectureError: if the logits differ.
    """
    small = _small(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    llama = _llama(as_llama(small), model.state_dict())
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
                f"{model_type_of(config)}: exported as Llama, a small model with this config gives other logits (by "
                f"{difference:.1e} of the largest); op=scale and deactivation can be exported in its class, and "
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
    keys = model.load_state_dict(weights, strict=False)
    wrong = [*keys.unexpected_keys, *(name for name in keys.missing_keys if not name.endswith(".bias"))]
    if wrong:
        raise ArchitectureError(f"{config.model_type}: cannot be exported as Llama, which has no {wrong[0]}")
    for name in keys.missing_keys:
        torch.nn.init.zeros_(model.get_parameter(name))
    return model
