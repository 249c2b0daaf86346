"""Log-likelihoods in one go: which method is exact for a model, its check against plain forward passes, and scoring.

`SteeredHFLM.loglikelihood` (model.py) hands tokenised requests to `Scorer.score`. It makes rows and batches of them
(packing.py), and runs each batch through `ScoringContext.forward`, which is `SteeredHFLM.forward_pass`: there the rows'
lengths are handed to the intervention, whose hooks (steering/attach.py) edit the activations.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.models.utils_hf import clear_torch_cache
from torch import nn
from tqdm import tqdm

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.compat import attention_implementation
from lm_eval_steering.lmeval.packing import (
    BatchBudget,
    Cost,
    DeviceLimits,
    Masks,
    Packed,
    PackedRow,
    ScoredRequest,
    batches,
    head_at,
    log_probabilities,
    pack,
    rows_of,
    scored_requests,
)
from lm_eval_steering.lmeval.requests import Request, ScoringRows
from lm_eval_steering.steering.attach import Steering

# --- Unsteered answers that are kept for the next intervention on the same requests

LogLikelihood = tuple[float, bool]  # (summed log-probability, greedy match)
Numbered = tuple[int, LogLikelihood]  # with the number of the request
# About 200 MB: an answer is two tuples, a float and an int. LSS in 20 languages of 1,000 items has 40,000.
ANSWERS = 1_000_000


class Baseline:
    """Answers by batch: of the same rows in the same batch they are bit-equal.

    Where there are more than `limit` answers, those of the batches go that were not asked for longest; they are
    computed again when they are needed, so that a score never depends on it.
    """

    def __init__(self, limit: int = ANSWERS) -> None:
        """Nothing is kept yet.

        Args:
            limit: number of answers that may be kept; those of the last batch are, however many they are.
        """
        self._limit = limit
        self._batches: OrderedDict[bytes, list[Numbered]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        """Number of answers."""
        return self._size

    def get(self, key: bytes) -> list[Numbered] | None:
        """Answers of the batch with this `digest_of`, if they are kept."""
        if key in self._batches:
            self._batches.move_to_end(key)
        return self._batches.get(key)

    def keep(self, key: bytes, answers: list[Numbered]) -> None:
        """Keep the answers of a batch that `get` did not find."""
        self._batches[key] = answers
        self._size += len(answers)
        while self._size > self._limit and len(self._batches) > 1:
            self._size -= len(self._batches.popitem(last=False)[1])

    def clear(self) -> None:
        """Keep nothing."""
        self._batches.clear()
        self._size = 0


def digest_of(batch: Sequence[PackedRow]) -> bytes:
    """Hash of a batch: tokens and depths determine the trees."""
    trees = [(row.tokens, row.depths, row.scored) for row in batch]
    return hashlib.sha256(repr(trees).encode()).digest()


# --- Which method is exact for a model and an intervention, known before anything is scored

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
class ScoringMethod:
    """How log-likelihoods are computed.

    Attributes:
        name: `packed`: one row a common prefix, with the continuations as its branches; `rows`: one row a request;
            both with the head at scored positions alone. `plain`: lm-eval's own batches and forward passes.
        why: what decides against the methods before it; empty for `packed`.
        masks: of the family, for `packed`.
    """

    name: str
    why: str = ""
    masks: Masks = Masks.FULL

    @property
    def shared(self) -> bool:
        """Whether it is one of ours."""
        return self.name != "plain"


def method_of(model: nn.Module, backend: str, lookahead: bool, needs_rows: bool) -> ScoringMethod:
    """The method that does least work among those that are exact.

    Args:
        model: the loaded model.
        backend: lm-eval's, `causal` or `seq2seq`.
        lookahead: whether the intervention depends on later tokens of the row.
        needs_rows: whether it depends on where a token stands in its row.
    """
    config: Any = model.config
    against = _against_sharing(model, backend, lookahead)
    if against:
        return ScoringMethod("plain", against)
    masks = PACKABLE.get(config.model_type)
    implementation = attention_implementation(config)
    if needs_rows:
        return ScoringMethod("rows", "the intervention depends on where a token stands in its row")
    if masks is None or getattr(config, "alibi", False):
        return ScoringMethod("rows", f"{config.model_type} takes no attention mask of ours")
    if implementation not in {"sdpa", "eager"}:
        return ScoringMethod("rows", f"attention implementation {implementation} takes no mask of ours")
    return ScoringMethod("packed", "", masks)


def _against_sharing(model: Any, backend: str, lookahead: bool) -> str:
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


# --- Each method is checked against the model's plain forward pass, on a few requests of the run itself

# Requests that are scored twice for it, and tokens after which no further one is.
SAMPLE, TOKENS = 4, 512
# By how much a token's log-probability may differ, in nats, where the softmax rounds more than the logits.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# In units of the last place of the largest logit, for the sum over tokens: what rounding the logits alone can do. In
# bfloat16 a right method stays, on the demo model, below 1 % of it, and wrong position ids exceed it.
_ROUNDINGS = 4


def sample_of(rows: Iterable[PackedRow]) -> list[int]:
    """Indices of a few requests: short ones, on different branches where there are such."""
    numbers: list[int] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: (not row.branches, len(row.tokens))):
        if numbers and (len(numbers) >= SAMPLE or tokens + len(row.tokens) > TOKENS):
            break
        numbers += _spread(row, SAMPLE - len(numbers))
        tokens += len(row.tokens)
    return numbers


def _spread(row: PackedRow, number: int) -> list[int]:
    """Requests of a row: those from which most of it is hidden, and those that are its first branch."""

    def hidden_and_depth(scored: tuple[int, list[int], tuple[int, ...]]) -> tuple[int, int]:
        last = scored[1][-1]
        return row.depths[last] - last, row.depths[last]

    ordered = [each[0] for each in sorted(row.scored, key=hidden_and_depth)]
    half = number // 2
    return ordered if len(ordered) <= number else ordered[: number - half] + ordered[len(ordered) - half :]


def difference(context: ScoringContext, requests: Sequence[ScoredRequest], answers: Mapping[int, LogLikelihood]) -> str:
    """What differs from plain forward passes over single rows, in a sentence; empty where nothing does.

    Args:
        context: of the model, whose intervention is suspended.
        requests: the sample.
        answers: request index -> (summed log-probability, greedy match) by the method that is checked.
    """
    for request in requests:
        tokens = torch.tensor([request.tokens], device=context.device)
        logits = context.forward(tokens, None, {})[0, -len(request.targets) :]
        rounding = _ROUNDINGS * torch.finfo(context.dtype).eps * float(logits.abs().max()) * len(request.targets) ** 0.5
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = torch.tensor(request.targets, device=logits.device).unsqueeze(1)
        # Not log-softmax, which in float32 is off by 2e-5 a token at a vocabulary of 262k.
        each = logits.gather(1, targets)[:, 0] - logits.logsumexp(-1)
        expected, ours = float(each.sum()), answers[request.number][0]
        allowed = max(rounding, _TOLERANCE.get(context.dtype, 0.0) * max(len(request.targets), abs(expected)))
        same = math.isnan(expected) and math.isnan(ours)
        if not same and not abs(expected - ours) <= allowed:
            return f"it gave {ours:.6g} where the plain forward pass gives {expected:.6g}"
    return ""


# --- Scoring

# (row, position) token ids, the rows' lengths (None where nothing is steered), further arguments of the model -> logits
# (row, position, vocabulary), under the intervention in force.
Forward = Callable[[torch.Tensor, ScoringRows | None, dict[str, Any]], torch.Tensor]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoringContext:
    """What scoring needs to know of a loaded model, at the moment of one call.

    Attributes:
        model: of transformers.
        forward: one forward pass of it.
        steering: the intervention in force; None where the model is unsteered.
        backend: lm-eval's, `causal` or `seq2seq`.
        device: of the model.
        dtype: in which logits are computed.
        max_length: of a row, in tokens.
        batch_size: number of rows of the longest request that one forward pass may hold.
    """

    model: nn.Module
    forward: Forward
    steering: Steering | None
    backend: str
    device: torch.device
    dtype: torch.dtype
    max_length: int
    batch_size: int

    def unsteered(self) -> AbstractContextManager[None]:
        """Inside, the intervention is suspended."""
        return self.steering.suspended() if self.steering else nullcontext()


@dataclass(frozen=True)
class Scores:
    """Answers to requests, in their order.

    Attributes:
        steered: under the intervention in force.
        unsteered: of the same rows in the same batches without it; None where they were not asked for.
    """

    steered: list[LogLikelihood]
    unsteered: list[LogLikelihood] | None = None


class Scorer:
    """Log-likelihoods by the method that does least work among those that are exact.

    A method's first requests on a model are scored by plain forward passes too; where the answers differ, the method is
    not used on this model any more.
    """

    def __init__(self, setting: str) -> None:
        """Nothing is computed yet.

        Args:
            setting: `auto`, `shared` (an error where it is not exact) or `plain`.
        """
        self.setting = setting
        self._checked: set[tuple[str, bool]] = set()  # methods that were checked, without and with branches
        self._failed: dict[str, str] = {}  # method -> why it failed
        self._baseline = Baseline()
        self._requests: Counter[str] = Counter()
        self._cost: Cost | None = None
        self._limits: DeviceLimits | None = None  # found once, so that batches do not follow the memory of the moment
        self._room: BatchBudget | None = None  # what is left since memory ran out

    # --- which method -------------------------------------------------------------------------------------------

    def method(self, context: ScoringContext) -> ScoringMethod:
        """How requests are scored under the intervention in force."""
        if self.setting == "plain":
            return ScoringMethod("plain", "scoring=plain")
        plan = context.steering.plan if context.steering else None
        method = method_of(
            context.model, context.backend, bool(plan and plan.lookahead), bool(plan and plan.needs_rows)
        )
        return ScoringMethod("plain", self._failed[method.name]) if method.name in self._failed else method

    def report(self, context: ScoringContext) -> dict[str, Any]:
        """What was used, as plain data: setting, method, why none that does less work, and how many requests.

        `precision` says what half precision does to the scores; it is empty in float32 and wider.
        """
        method = self.method(context)
        return {
            "setting": self.setting, "way": method.name, "why": method.why, "requests": dict(self._requests),
            "precision": _precision(context.dtype),
        }  # fmt: skip

    def count_plain(self, number: int) -> None:
        """Note requests that lm-eval's own code scored."""
        self._requests["plain"] += number

    def shares(self, context: ScoringContext, requests: Sequence[Request]) -> bool:
        """Whether these requests are scored here; checks the method on some of them where that was not done yet.

        Raises:
            SteeringError: if the user asked for `shared` and it is not exact.
        """
        method = self.method(context)
        if method.shared and requests and (method.name, True) not in self._checked:
            self._check(context, method, requests)
            method = self.method(context)
        if self.setting == "shared" and not method.shared:
            raise SteeringError(f"scoring=shared: {method.why}; scoring=auto chooses what is exact")
        return method.shared

    def _check(self, context: ScoringContext, method: ScoringMethod, requests: Sequence[Request]) -> None:
        """Compare a method with the plain forward pass, once without branches and once with them."""
        rows = self._rows(context, method, scored_requests(requests, context.max_length))
        kind = method.name, any(row.branches for row in rows)
        if kind in self._checked:
            return
        sample = scored_requests([requests[index] for index in sample_of(rows)], context.max_length)
        wrong = ""
        with context.unsteered():
            try:
                answers: dict[int, LogLikelihood] = {}
                for batch in batches(self._rows(context, method, sample), BatchBudget.unlimited()):
                    answers.update(_answers(context, _packed(context, method, batch), self._limits_of(context).block))
                wrong = difference(context, sample, answers)
            except Exception as error:
                if should_reduce_batch_size(error):
                    raise
                wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        self._checked.add(kind)
        if wrong:
            self._failed[method.name] = f"scoring {method.name} is not exact for this model: {wrong}"
            _log.warning("%s; lm-eval's own way is used", self._failed[method.name])

    # --- scoring ------------------------------------------------------------------------------------------------

    def score(
        self,
        context: ScoringContext,
        requests: Sequence[Request],
        *,
        twice: bool = False,
        progress: bool = False,
        answered: Callable[[Request, LogLikelihood], None] = lambda _request, _answer: None,
    ) -> Scores:
        """(summed log-probability, greedy match) of each request.

        Args:
            context: of the model.
            requests: tokenised.
            twice: run each batch a second time without the intervention.
            progress: show a bar.
            answered: called with each request and its steered answer as soon as that is known.
        """
        method = self.method(context)
        to_score = scored_requests(requests, context.max_length)
        rows = self._rows(context, method, to_score)
        longest = max((len(request.tokens) for request in to_score), default=1)
        vocabulary = context.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        limits = self._limits_of(context)
        budget = BatchBudget.like(context.batch_size, longest, vocabulary, limits).within(self._room)
        steered: dict[int, LogLikelihood] = {}
        unsteered: dict[int, LogLikelihood] = {}
        bar = tqdm(total=len(requests), disable=not progress, desc="Running loglikelihood requests")
        for answers, without in self._in_batches(context, method, rows, budget, twice):
            steered.update(answers)
            unsteered.update(without)
            for index, answer in answers:
                answered(requests[index], answer)
            bar.update(len(answers))
        bar.close()
        self._requests[method.name] += len(requests)
        indices = range(len(requests))
        return Scores([steered[index] for index in indices], [unsteered[index] for index in indices] if twice else None)

    def _limits_of(self, context: ScoringContext) -> DeviceLimits:
        if self._limits is None:
            self._limits = DeviceLimits.of(context.device, context.dtype, context.model.config)
        return self._limits

    def forget_baseline(self) -> None:
        """Let go of the unsteered answers that are kept for the next intervention on the same requests."""
        self._baseline.clear()

    def _rows(
        self, context: ScoringContext, method: ScoringMethod, requests: Sequence[ScoredRequest]
    ) -> list[PackedRow]:
        if method.name != "packed":
            return rows_of(requests, None)
        if self._cost is None:
            model: Any = context.model
            weights = model.num_parameters(exclude_embeddings=True) / model.config.num_hidden_layers
            # A pair takes 2 multiplications for each feature, which mask and softmax make 8 times as dear.
            self._cost = Cost(weights, 16 * model.config.hidden_size)
        return rows_of(requests, self._cost)

    def _in_batches(
        self, context: ScoringContext, method: ScoringMethod, rows: list[PackedRow], budget: BatchBudget, twice: bool
    ) -> Iterator[tuple[list[Numbered], list[Numbered]]]:
        """Answers of each batch, steered and, where wanted, unsteered. Batches shrink where memory runs out."""
        todo = batches(rows, budget)[::-1]
        while todo:
            batch = todo.pop()
            try:
                packed = _packed(context, method, batch)
                steered = _answers(context, packed, self._limits_of(context).block)
                yield steered, self._without_steering(context, batch, packed, steered) if twice else []
            except RuntimeError as error:
                if len(batch) == 1 or not should_reduce_batch_size(error):
                    raise
                clear_torch_cache()
                budget = self._room = BatchBudget.half_of(batch)
                rest = [row for each in (batch, *todo) for row in each]
                todo = batches(rest, budget)[::-1]

    def _without_steering(
        self, context: ScoringContext, batch: list[PackedRow], packed: Packed, steered: list[Numbered]
    ) -> list[Numbered]:
        """Answers of the same batch without the intervention, kept for the next intervention on the same requests."""
        if context.steering is None:
            return steered
        key = digest_of(batch)
        answers = self._baseline.get(key)
        if answers is None:
            with context.unsteered():
                answers = _answers(context, packed, self._limits_of(context).block)
            self._baseline.keep(key, answers)
        return answers


def _precision(dtype: torch.dtype) -> str:
    """What a dtype does to log-likelihoods, where it is a half one."""
    if dtype not in (torch.bfloat16, torch.float16):
        return ""
    return (
        f"{str(dtype).removeprefix('torch.')}: a log-likelihood is rounded, and changes with the batch and the method, "
        "by tenths of a nat; compare runs of equal settings (docs/half-precision.md)"
    )


def _packed(context: ScoringContext, method: ScoringMethod, batch: list[PackedRow]) -> Packed:
    config = context.model.config
    dtype = torch.bool if attention_implementation(config) == "sdpa" else context.model.dtype
    return pack(batch, method.masks, config, dtype, context.device)  # type: ignore[arg-type]


def _answers(context: ScoringContext, packed: Packed, block: int) -> list[Numbered]:
    """One forward pass, and the answers of its requests."""
    head = context.model.get_output_embeddings()  # type: ignore[operator]
    with head_at(head, packed.nodes):
        logits = context.forward(packed.tokens, packed.rows, packed.inputs | {"use_cache": False})
    with torch.no_grad():
        node, targets = packed.node.to(logits.device), packed.targets.to(logits.device)
        each, greedy = log_probabilities(logits[0], node, targets, block)
    log_probability, is_greedy = each.tolist(), greedy.tolist()
    answers, start = [], 0
    for index, length in packed.requests:
        stop = start + length
        answers.append((index, (sum(log_probability[start:stop]), all(is_greedy[start:stop]))))
        start = stop
    return answers
