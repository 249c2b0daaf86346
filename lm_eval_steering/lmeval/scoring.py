"""Scores log-likelihood requests in one of our ways, and says in which."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.api.instance import Instance
from lm_eval.models.utils import has_bos_prefix
from lm_eval.models.utils_hf import clear_torch_cache
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from tqdm import tqdm

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.lmeval.packing import (
    BatchBudget,
    Cost,
    Masks,
    Packed,
    PackedRow,
    ScoredRequest,
    batches,
    entries_of,
    head_at,
    log_probabilities,
    pack,
    rows_of,
    with_inputs,
)
from lm_eval_steering.lmeval.requests import Request, ScoringRows

# --- Tokens of all strings of a task at once: lm-eval encodes each option's context again, one string a call


class Encoded:
    """Token ids of strings that `tok_encode` of a `SteeredHFLM` is about to be asked for, the same as it gives."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self._ids: dict[str, list[int]] = {}

    def get(self, string: str) -> list[int] | None:
        """A copy of a string's ids; None where `tok_encode` has to find them."""
        found = self._ids.get(string)
        return None if found is None else list(found)

    @contextmanager
    def ahead(self, requests: Iterable[Instance]) -> Iterator[None]:
        """Inside, the strings of these log-likelihood requests are known."""
        lm = self._lm
        bos = lm.tokenizer.decode(lm.prefix_token_id)
        strings = [each for each in _strings(requests) if not has_bos_prefix(each, bos)]
        if strings and lm.tokenizer.is_fast:
            special = {} if lm.add_bos_token is None else {"add_special_tokens": lm.add_bos_token}
            ids = lm.tokenizer(strings, **special)["input_ids"]
            self._ids = dict(zip(strings, ids, strict=True))
        try:
            yield
        finally:
            self._ids = {}


def _strings(requests: Iterable[Instance]) -> list[str]:
    """What `TemplateLM._encode_pair` encodes: each context without its last blanks, and with its continuation."""
    found: dict[str, None] = {}
    for request in requests:
        context, continuation = request.args
        if context:
            found[context.rstrip()] = found[context + continuation] = None
    return list(found)


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
    """What a batch is: tokens and depths tell the trees."""
    told = [(row.tokens, row.depths, row.scored) for row in batch]
    return hashlib.sha256(repr(told).encode()).digest()


# --- Which way of scoring is exact for a model and an intervention, told before anything is scored

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


# --- Our way of scoring against the model's plain forward pass, on a few requests of the run itself

# Requests that are scored twice for it, and tokens after which no further one is.
SAMPLE, TOKENS = 4, 512
# By how much a token's log-probability may differ, in nats, where the softmax rounds more than the logits.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# In units of the last place of the largest logit, for the sum over tokens: what rounding the logits alone can do. In
# bfloat16 a right way of scoring the demo model stays below 1 % of it, and wrong position ids exceed it.
_ROUNDINGS = 4


def sample_of(rows: Iterable[PackedRow]) -> list[int]:
    """Numbers of a few requests: short ones, on different branches where there are such."""
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


def difference(lm: Any, entries: Sequence[ScoredRequest], found: Mapping[int, tuple[float, bool]]) -> str:
    """What differs from plain forward passes over single rows, in a sentence; empty where nothing does.

    Args:
        lm: the `SteeredHFLM`.
        entries: the requests.
        found: request number -> our (summed log-probability, greedy match).
    """
    dtype = lm.mixed_precision_dtype or lm.model.dtype
    for entry in entries:
        logits = lm._model_call(torch.tensor([entry.tokens], device=lm.device))[0, -len(entry.targets) :]
        rounding = _ROUNDINGS * torch.finfo(dtype).eps * float(logits.abs().max()) * len(entry.targets) ** 0.5
        logits = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        own = logits.gather(1, torch.tensor(entry.targets, device=logits.device).unsqueeze(1))
        expected, ours = float(own.sum()), found[entry.number][0]
        allowed = max(rounding, _TOLERANCE.get(dtype, 0.0) * max(len(entry.targets), abs(expected)))
        same = math.isnan(expected) and math.isnan(ours)
        if not same and not abs(expected - ours) <= allowed:
            return f"it gave {ours:.6g} where the plain forward pass gives {expected:.6g}"
    return ""


# --- Rolling log-likelihood of whole texts: the windows of all texts are one list of requests, batched like any other


def windows_of(lm: Any, text: str) -> list[Request]:
    """lm-eval's windows of a text: each token is predicted once, from at most `max_length` tokens before it."""
    windows = get_rolling_token_windows(
        token_list=lm.tok_encode(text), prefix_token=lm.prefix_token_id, max_seq_len=lm.max_length, context_len=1
    )
    return [(None, *make_disjoint_window(window)) for window in windows]


def rolling(lm: Any, requests: Sequence[Instance], disable_tqdm: bool) -> list[float]:
    """Summed log-probability of each text, in nats."""
    texts = [request.args[0] for request in requests]
    windows = [windows_of(lm, text) for text in texts]
    answers = iter(lm._loglikelihood_tokens([window for own in windows for window in own], disable_tqdm))
    totals = []
    for text, own in zip(texts, windows, strict=True):
        totals.append(sum(next(answers)[0] for _ in own))
        lm.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
    return totals


_log = logging.getLogger(__name__)


class GivenRows:
    """Stands where lm-eval's batches are guessed (`RowBook`): here the rows are known."""

    def __init__(self, rows: ScoringRows) -> None:
        self._rows = rows

    def take(self, _tokens: torch.Tensor) -> ScoringRows:
        """The rows of the batch in hand."""
        return self._rows


class Scorer:
    """Log-likelihoods of a `SteeredHFLM`, in the way that does least work among those that are exact.

    The first requests of a model are scored in lm-eval's way too, once for each way of ours; where the answers
    differ, that way is not used on this model any more.
    """

    def __init__(self, lm: Any, setting: str) -> None:
        """Nothing is computed yet.

        Args:
            lm: the `SteeredHFLM`.
            setting: `auto`, `shared` (an error where it is not exact) or `plain`.
        """
        self._lm = lm
        self.setting = setting
        self._proven: set[tuple[str, bool]] = set()  # ways that were tried, without and with branches
        self._failed: dict[str, str] = {}  # way -> why it failed
        self._baseline = Baseline()
        self._scored: Counter[str] = Counter()
        self._unsteered: list[LogLikelihood] | None = None  # of the requests that were scored twice last

    # --- which way ----------------------------------------------------------------------------------------------

    @property
    def way(self) -> Way:
        """How requests are scored under the intervention in force."""
        if self.setting == "plain":
            return Way("plain", "scoring=plain")
        plan = self._lm.steering.plan if self._lm.steering else None
        way = way_of(self._lm.model, self._lm.backend, bool(plan and plan.lookahead), bool(plan and plan.needs_rows))
        return Way("plain", self._failed[way.name]) if way.name in self._failed else way

    def report(self) -> dict[str, Any]:
        """What was used, as plain data: the setting, the way, why none that does less work, and how many requests."""
        way = self.way
        return {"setting": self.setting, "way": way.name, "why": way.why, "requests": dict(self._scored)}

    def count_plain(self, number: int) -> None:
        """Note requests that lm-eval's own code scored."""
        self._scored["plain"] += number

    def shares(self, requests: Sequence[Request]) -> bool:
        """Whether these requests are scored here; proves the way on some of them where that was not done yet.

        Raises:
            SteeringError: if the user asked for `shared` and it is not exact.
        """
        way = self.way
        if way.shared and requests and (way.name, True) not in self._proven:
            self._prove(way, requests)
            way = self.way
        if self.setting == "shared" and not way.shared:
            raise SteeringError(f"scoring=shared: {way.why}; scoring=auto chooses what is exact")
        return way.shared

    def _prove(self, way: Way, requests: Sequence[Request]) -> None:
        """Compare a way with the plain forward pass, once without branches and once with them."""
        lm = self._lm
        rows = self._rows(way, entries_of(requests, lm.max_length))
        proof = way.name, any(row.branches for row in rows)
        if proof in self._proven:
            return
        entries = entries_of([requests[number] for number in sample_of(rows)], lm.max_length)
        wrong = ""
        with lm.steering.suspended() if lm.steering else nullcontext():
            try:
                found: dict[int, LogLikelihood] = {}
                for batch in batches(self._rows(way, entries), BatchBudget.unlimited()):
                    found.update(self._answers(self._pack(way, batch)))
                wrong = difference(lm, entries, found)
            except Exception as error:
                if should_reduce_batch_size(error):
                    raise
                wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        self._proven.add(proof)
        if wrong:
            self._failed[way.name] = f"scoring {way.name} is not exact for this model: {wrong}"
            _log.warning("%s; lm-eval's own way is used", self._failed[way.name])

    # --- scoring ------------------------------------------------------------------------------------------------

    def score(self, requests: Sequence[Request], disable_tqdm: bool) -> list[LogLikelihood]:
        """(summed log-probability, greedy match) of each request.

        While the model scores rows twice (`BatchSizes.twice`), each batch runs a second time without the
        intervention; `take_unsteered` has those answers.
        """
        lm, way = self._lm, self.way
        entries = entries_of(requests, lm.max_length)
        rows = self._rows(way, entries)
        longest = max((len(entry.tokens) for entry in entries), default=1)
        size = lm.max_batch_size if lm.batch_size == "auto" else lm.batch_size
        budget = BatchBudget.like(int(size), longest, lm.model.config.get_text_config().vocab_size, lm.device.type)
        answers: dict[int, LogLikelihood] = {}
        unsteered: dict[int, LogLikelihood] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or lm.rank != 0, desc="Running loglikelihood requests")
        for found, twins in self._in_batches(way, rows, budget):
            answers.update(found)
            unsteered.update(twins)
            for number, answer in found:
                if requests[number][0] is not None:
                    lm.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
            bar.update(len(found))
        bar.close()
        self._scored[way.name] += len(requests)
        self._unsteered = [unsteered[number] for number in range(len(unsteered))] if lm.sizes.twice else None
        return [answers[number] for number in range(len(requests))]

    def take_unsteered(self) -> list[LogLikelihood] | None:
        """Answers of the second pass over the last requests, once; None where there was none."""
        found, self._unsteered = self._unsteered, None
        return found

    def forget_baseline(self) -> None:
        """Let go of the unsteered answers that are kept for the next intervention on the same requests."""
        self._baseline.clear()

    def _rows(self, way: Way, entries: Sequence[ScoredRequest]) -> list[PackedRow]:
        return rows_of(entries, self._cost if way.name == "packed" else None)

    @cached_property
    def _cost(self) -> Cost:
        config = self._lm.model.config
        weights = self._lm.model.num_parameters(exclude_embeddings=True) / config.num_hidden_layers
        # A pair takes 2 multiplications for each feature, which mask and softmax make 8 times as dear.
        return Cost(weights, 16 * config.hidden_size)

    def _in_batches(
        self, way: Way, rows: list[PackedRow], budget: BatchBudget
    ) -> Iterator[tuple[list[Numbered], list[Numbered]]]:
        """Answers of each batch, steered and, if they are wanted, unsteered. Batches shrink where memory runs out."""
        todo = batches(rows, budget)[::-1]
        while todo:
            batch = todo.pop()
            try:
                yield self._both(way, batch)
            except RuntimeError as error:
                if len(batch) == 1 or not should_reduce_batch_size(error):
                    raise
                clear_torch_cache()
                budget = BatchBudget.half_of(batch)
                rest = [row for each in (batch, *todo) for row in each]
                todo = batches(rest, budget)[::-1]

    def _both(self, way: Way, batch: list[PackedRow]) -> tuple[list[Numbered], list[Numbered]]:
        packed = self._pack(way, batch)
        steered = self._answers(packed)
        if not self._lm.sizes.twice:
            return steered, []
        if self._lm.steering is None:
            return steered, steered
        key = digest_of(batch)
        unsteered = self._baseline.get(key)
        if unsteered is None:
            with self._lm.steering.suspended():
                unsteered = self._answers(packed)
            self._baseline.keep(key, unsteered)
        return steered, unsteered

    def _pack(self, way: Way, batch: list[PackedRow]) -> Packed:
        model = self._lm.model
        chooses = model.config._attn_implementation == "sdpa"
        return pack(batch, way.masks, model.config, torch.bool if chooses else model.dtype, self._lm.device)

    def _answers(self, packed: Packed) -> list[Numbered]:
        lm = self._lm
        head = lm.model.get_output_embeddings()
        lm.book = GivenRows(packed.rows)
        try:
            with with_inputs(lm.model, packed.inputs | {"use_cache": False}), head_at(head, packed.nodes):
                logits = lm._model_call(packed.tokens)
        finally:
            lm.book = None
        with torch.no_grad():
            found, greedy = log_probabilities(
                logits[0], packed.place.to(logits.device), packed.targets.to(logits.device)
            )
        found_list, greedy_list = found.tolist(), greedy.tolist()
        answers, start = [], 0
        for number, length in packed.requests:
            stop = start + length
            answers.append((number, (sum(found_list[start:stop]), all(greedy_list[start:stop]))))
            start = stop
        return answers
