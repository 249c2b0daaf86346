"""Which way of generating makes the texts of lm-eval's `hf` by the least work, and that way."""

from __future__ import annotations

import inspect
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import permutations
from types import TracebackType
from typing import Any, Self

import torch
from lm_eval.models.huggingface import HFLM
from transformers import CompileConfig, DynamicCache, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from lm_eval_steering.architectures.families import refuse_unsupported
from lm_eval_steering.errors import ArchitectureError, InterventionError
from lm_eval_steering.lmeval.packing import BatchBudget, alike
from lm_eval_steering.lmeval.scoring import rope_by_batch
from lm_eval_steering.metrics.output_language import IdentifiedText

# --- When a row of a batch is done: as soon as it has any stop string, with the text that lm-eval's `hf` cuts out
#
# lm-eval decodes all rows once for each stop string after each token, and goes on until one and the same string has
# come up in every row. Here a row ends by itself, and is decoded only where its last token could complete a string.

# Arguments under which a row's tokens do not depend on how long other rows go on.
_GREEDY = {
    "attention_mask", "do_sample", "temperature", "top_p", "top_k", "min_new_tokens", "min_length",
    "repetition_penalty",
}  # fmt: skip
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Decoders of which the text of some tokens begins the text of more tokens, but for an incomplete character at the end.
# With `ByteFallback` bytes that make no character take those before them along: lm-eval then finds a stop string or
# not as the other rows of the batch have it; here a row that had one has ended.
_DECODERS = {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip", "Sequence"}


def against_early_ends(lm: Any, stop: Sequence[str], arguments: Mapping[str, Any]) -> str:
    """Why rows cannot end one by one with the texts of `hf`, so that lm-eval's code has to generate.

    Args:
        lm: the `SteeredHFLM`.
        stop: the strings, with that of the end token.
        arguments: of `HFLM._model_generate`, without the stop strings and the length.

    Returns:
        The reason; empty where they can.
    """
    settings = lm.model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    reasons = {
        "texts are sampled, or do_sample is not said": arguments.get("do_sample") is not False,
        "several beams": getattr(settings, "num_beams", 1) not in (None, 1),
        f"arguments {sorted(set(arguments) - _GREEDY)}": not _GREEDY.issuperset(arguments),
        f"a {lm.backend} model": lm.backend != "causal",
        "think_end_token": lm.think_end_token is not None,
        "rotary embeddings that keep the longest batch so far": rope_by_batch(lm.model.config) == "dynamic",
        "a model in which rows may meet (experts, quantisation)": _rows_meet(lm.model),
        "the end token ends no text in the model's generation config": lm.eot_token_id not in ends,
        "an empty stop string": "" in stop,
        "stop strings that can overlap": not independent(stop),
        "stop strings that have to do with special tokens": _special(lm, stop),
        "a tokenizer of which later tokens may change the text of earlier ones": not _grows(lm.tokenizer),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def independent(stop: Sequence[str]) -> bool:
    """Whether no string can begin in or before another one and end after it, so that the first to come up decides."""
    return not any(_overlap(one, other) or one in other[1:-1] for one, other in permutations(dict.fromkeys(stop), 2))


def _overlap(one: str, other: str) -> bool:
    """Whether a string ends in what another one begins with."""
    return any(one[-number:] == other[:number] for number in range(1, min(len(one), len(other))))


def _special(lm: Any, stop: Sequence[str]) -> bool:
    """Whether a string has to do with special tokens, which lm-eval sees when it stops and not when it cuts."""
    end = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
    # Not all tokens that decoding leaves out have a name (`<|eot_id|>`).
    added = {str(token) for token in lm.tokenizer.added_tokens_decoder.values() if token.special}
    return any(
        term in token or token in term or _overlap(term, token) or _overlap(token, term)
        for term in stop
        for token in added.union(lm.tokenizer.all_special_tokens)
        if term != end
    )


def _rows_meet(model: Any) -> bool:
    """Whether a row's numbers may depend on the tokens of others, in half precision by enough to decide its own."""
    try:
        refuse_unsupported(model.config)
    except ArchitectureError:
        return True
    return getattr(model, "hf_quantizer", None) is not None


def _grows(tokenizer: Any) -> bool:
    """Whether more tokens leave the text of those before them as it is."""
    # A family's own way of decoding may do anything.
    own = getattr(type(tokenizer), "_decode", None) is not getattr(PreTrainedTokenizerFast, "_decode", None)
    if own or not tokenizer.is_fast:
        return False
    # Spaces before punctuation may go, or not, whatever the setting says.
    if tokenizer.clean_up_tokenization_spaces and " ," not in tokenizer.decode(tokenizer.encode("x , y")):
        return False
    decoder = tokenizer.backend_tokenizer.decoder
    return decoder is None or all(map(_known, _parts(json.loads(decoder.__getstate__()))))


def _known(decoder: dict[str, Any]) -> bool:
    return decoder["type"] in _DECODERS and not decoder.get("stop")  # `stop`: what `Strip` takes from the end


def _parts(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    return [decoder, *(part for own in decoder.get("decoders", []) for part in _parts(own))]


class StopStrings(StoppingCriteria):
    """Which rows have a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], rows: int, start: int) -> None:
        """Nothing is generated yet.

        Args:
            tokenizer: of the model.
            stop: the strings.
            rows: number of them.
            start: position of the first token that is generated.
        """
        self._tokenizer = tokenizer
        self._stop = stop
        # Decoders take a space away from the beginning.
        self._blank = any(each.endswith(" ") for each in self._stop)
        self._last = {_INCOMPLETE, *(each[-1] for each in self._stop)}
        self._start = start
        self._done = [False] * rows
        self._completes: dict[int, bool] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """(row,) bool: rows that are done.

        Args:
            input_ids: (row, position) token ids so far.
            scores: not looked at.
            **_: nor these.
        """
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self._done[row] and self._may_complete(token):
                text = self._decode(input_ids[row, self._start :].tolist())
                self._done[row] = any(each in text for each in self._stop)
        return torch.tensor(self._done, device=input_ids.device)

    def leave(self, staying: Sequence[int]) -> None:
        """Forget the other rows; those that stay are numbered anew."""
        self._done = [self._done[row] for row in staying]

    def _may_complete(self, token: int) -> bool:
        """Whether a string may end with this token: it has its last character, or a part of a character."""
        if token not in self._completes:
            text = self._decode([token])
            self._completes[token] = self._blank or any(each in text for each in self._last)
        return self._completes[token]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


# --- The language of each output is identified on the processor while the model makes the next batch


class Identifying:
    """Inside, texts are identified by one other thread as soon as lm-eval hands them to the model's cache hook."""

    def __init__(self, lm: Any) -> None:
        """Nothing is generated yet.

        Args:
            lm: the `SteeredHFLM`.
        """
        self._lm = lm
        self._hook = lm.cache_hook
        self._thread = ThreadPoolExecutor(1, "identify")
        self._found: dict[str, Future[IdentifiedText]] = {}
        self._waiting: deque[tuple[str, Iterable[Any], Future[IdentifiedText]]] = deque()

    def __enter__(self) -> Self:
        self._lm.cache_hook = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lm.cache_hook = self._hook
        self._thread.shutdown()
        self._pass_on()

    def add_partial(self, kind: str, request: Iterable[Any], answer: str) -> None:
        """What lm-eval calls with each text."""
        self._waiting.append((kind, request, self._submit(answer)))
        self._pass_on()

    def _pass_on(self) -> None:
        """Give texts whose language is known to the hook of the request cache."""
        while self._waiting and self._waiting[0][2].done():
            kind, request, found = self._waiting.popleft()
            self._hook.add_partial(kind, request, found.result())

    def text(self, answer: str) -> IdentifiedText:
        """A text with its language, once that is known."""
        return self._submit(answer).result()

    def _submit(self, answer: str) -> Future[IdentifiedText]:
        if answer not in self._found:
            self._found[answer] = self._thread.submit(self._lm.identify, answer)
        return self._found[answer]


# --- Greedy decoding in which a row leaves the batch when it is done, and prompts are read with few pads
#
# What is computed for a row is what transformers computes for it in lm-eval's batch, in passes of another shape, so
# numbers round differently: by some 1e-6 in float32, and by enough to decide tokens in half precision.

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
        groups = alike(
            range(len(lengths)), lengths.__getitem__, lambda _: 1, BatchBudget.of_prompts(input_ids.device.type)
        )
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
