"""Texts by transformers' own `generate`, which ends each row at its own stop string, and their languages meanwhile."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from types import TracebackType
from typing import Any, Self

import torch
from lm_eval.api.model import CacheHook
from transformers import StoppingCriteria, StoppingCriteriaList

from lm_eval_steering.architectures.families import refuse_unsupported
from lm_eval_steering.errors import ArchitectureError, InterventionError
from lm_eval_steering.lmeval.compat import compile_config, decodes_by_backend, takes_static_cache
from lm_eval_steering.lmeval.scoring import rope_by_batch
from lm_eval_steering.metrics.output_language import IdentifiedText


@dataclass(frozen=True)
class GenerationContext:
    """What generation needs to know of a loaded model.

    Attributes:
        model: of transformers.
        tokenizer: of the model.
        backend: lm-eval's, `causal` or `seq2seq`.
        device: of the model.
        mixed_precision_dtype: of autocast, if any.
        end_token_id: the token that ends a text.
        think_end_token: what ends a thought, if the user named it.
    """

    model: Any
    tokenizer: Any
    backend: str
    device: torch.device
    mixed_precision_dtype: torch.dtype | None
    end_token_id: int
    think_end_token: str | int | None


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


def against_early_ends(context: GenerationContext, stop: Sequence[str], arguments: Mapping[str, Any]) -> str:
    """Why rows cannot end one by one with the texts of `hf`, so that lm-eval's code has to generate.

    Args:
        context: of the model.
        stop: the strings, with that of the end token.
        arguments: of lm-eval's generation, without the stop strings and the length.

    Returns:
        The reason; empty where they can.
    """
    settings = context.model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    reasons = {
        "texts are sampled, or do_sample is not said": arguments.get("do_sample") is not False,
        "several beams": getattr(settings, "num_beams", 1) not in (None, 1),
        f"arguments {sorted(set(arguments) - _GREEDY)}": not _GREEDY.issuperset(arguments),
        f"a {context.backend} model": context.backend != "causal",
        "think_end_token": context.think_end_token is not None,
        "rotary embeddings that keep the longest batch so far": rope_by_batch(context.model.config) == "dynamic",
        "a model in which rows may meet (experts, quantisation)": _rows_meet(context.model),
        "the end token ends no text in the model's generation config": context.end_token_id not in ends,
        "an empty stop string": "" in stop,
        "stop strings that can overlap": not independent(stop),
        "stop strings that have to do with special tokens": _special(context, stop),
        "a tokenizer of which later tokens may change the text of earlier ones": not _grows(context.tokenizer),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def independent(stop: Sequence[str]) -> bool:
    """Whether no string can begin in or before another one and end after it, so that the first to come up decides."""
    return not any(_overlap(one, other) or one in other[1:-1] for one, other in permutations(dict.fromkeys(stop), 2))


def _overlap(one: str, other: str) -> bool:
    """Whether a string ends in what another one begins with."""
    return any(one[-number:] == other[:number] for number in range(1, min(len(one), len(other))))


def _special(context: GenerationContext, stop: Sequence[str]) -> bool:
    """Whether a string has to do with special tokens, which lm-eval sees when it stops and not when it cuts."""
    end = context.tokenizer.decode(context.end_token_id, skip_special_tokens=False)
    # Not all tokens that decoding leaves out have a name (`<|eot_id|>`).
    added = {str(token) for token in context.tokenizer.added_tokens_decoder.values() if token.special}
    return any(
        term in token or token in term or _overlap(term, token) or _overlap(token, term)
        for term in stop
        for token in added.union(context.tokenizer.all_special_tokens)
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
    if not decodes_by_backend(tokenizer):  # a family's method may do anything
        return False
    # Spaces before punctuation may go, or not, whatever the setting says.
    if tokenizer.clean_up_tokenization_spaces and " ," not in tokenizer.decode(tokenizer.encode("x , y")):
        return False
    decoder = tokenizer.backend_tokenizer.decoder
    return decoder is None or all(map(_known, _parts(json.loads(decoder.__getstate__()))))


def _known(decoder: dict[str, Any]) -> bool:
    return decoder["type"] in _DECODERS and not decoder.get("stop")  # `stop`: what `Strip` takes from the end


def _parts(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    return [decoder, *(part for each in decoder.get("decoders", []) for part in _parts(each))]


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
                text = self._text_of(input_ids[row, self._start :].tolist())
                self._done[row] = any(each in text for each in self._stop)
        return torch.tensor(self._done, device=input_ids.device)

    def _may_complete(self, token: int) -> bool:
        """Whether a string may end with this token: it has its last character, or a part of a character."""
        if token not in self._completes:
            text = self._text_of([token])
            self._completes[token] = self._blank or any(each in text for each in self._last)
        return self._completes[token]

    def _text_of(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


# --- The language of each output is identified on CPU while the model generates the next batch


Identify = Callable[..., IdentifiedText]  # of a text, and whether it is a thought that did not end, where that is known


class Identifying(CacheHook):
    """In place of a model's cache hook: lm-eval hands it each text, and another thread identifies its language."""

    def __init__(self, identify: Identify, hook: CacheHook) -> None:
        """Nothing is generated yet.

        Args:
            identify: gives a text its language.
            hook: of the request cache, which gets the texts with their languages.
        """
        self.dbdict = hook.dbdict
        self._identify, self._hook = identify, hook
        self._thread = ThreadPoolExecutor(1, "identify")
        self._identified: dict[tuple[str, bool | None], Future[IdentifiedText]] = {}
        self._waiting: deque[tuple[str, Iterable[Any], Future[IdentifiedText]]] = deque()
        self._unfinished: deque[bool] = deque()  # of the rows of the last batch whose texts have not come yet
        # By identity: lm-eval returns the very strings that it hands over, in the order of the requests. Empty strings
        # are one object, and have no language either way.
        self._of_text: dict[int, tuple[str, bool]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()
        self._pass_on()

    def unfinished(self, rows: Iterable[bool]) -> None:
        """Which rows of a batch are thoughts that did not end; their texts come next, in this order."""
        self._unfinished = deque(rows)

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """What lm-eval calls with each text."""
        if self._unfinished:
            self._of_text[id(res)] = res, self._unfinished.popleft()
        self._waiting.append((attr, req, self._submit(res)))
        self._pass_on()

    def _pass_on(self) -> None:
        """Give texts whose language is known to the hook of the request cache."""
        while self._waiting and self._waiting[0][2].done():
            kind, request, identified = self._waiting.popleft()
            self._hook.add_partial(kind, request, identified.result())

    def text(self, answer: str) -> IdentifiedText:
        """A text with its language, once that is known."""
        return self._submit(answer).result()

    def _submit(self, answer: str) -> Future[IdentifiedText]:
        unfinished = self._of_text[id(answer)][1] if id(answer) in self._of_text else None
        key = (answer, unfinished)
        if key not in self._identified:
            known = () if unfinished is None else (unfinished,)
            self._identified[key] = self._thread.submit(self._identify, answer, *known)
        return self._identified[key]


def unfinished_thoughts(
    texts: torch.Tensor, prompt: int, think_end_token: str | int, decode: Callable[[list[int]], str]
) -> list[bool]:
    """Which rows of a batch never end their thought, so that lm-eval takes the whole of it for the answer.

    Args:
        texts: (row, position) token ids.
        prompt: number of positions before what was generated.
        think_end_token: as lm-eval has it: a token id, or a string of the decoded text.
        decode: token ids to the text in which lm-eval looks for the string.
    """
    rows = texts[:, prompt:].tolist()
    if isinstance(think_end_token, int):
        return [think_end_token not in row for row in rows]
    return [think_end_token not in decode(row) for row in rows]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Inside, random numbers of a seed of their own, if there is one; outside they go on as if nothing had been."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def random_numbers_of_rank(rank: int, world_size: int) -> Iterator[None]:
    """Inside, each rank has random numbers of its own.

    lm-eval seeds all alike, and sampled answers to equal prompts would be the same on each.
    """
    if world_size == 1:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(torch.initial_seed() + rank)
        yield


# --- Generation

Generate = Callable[..., torch.Tensor]


class Generator:
    """Texts of a model, the same as those of lm-eval's `hf`.

    Methods: `dynamic` (transformers' default cache; each row ends at its own stop string, and the batch when all rows
    have ended), `static` (the same with a cache of fixed size), `compiled` (and a compiled forward pass), `plain`
    (lm-eval's own code).
    """

    def __init__(self, context: GenerationContext, setting: str) -> None:
        """Nothing is generated yet.

        Args:
            context: of the model.
            setting: one of `arguments.GENERATION`.

        Raises:
            InterventionError: if the model takes no cache of fixed size and the setting wants one.
        """
        if setting in ("static", "compiled") and not takes_static_cache(context.model):
            raise InterventionError(
                f"generation={setting}: {type(context.model).__name__} takes no cache of fixed size; use "
                "generation=auto"
            )
        self.setting = setting
        self._prompts: Counter[str] = Counter()
        self._why = ""

    def report(self) -> dict[str, Any]:
        """The setting, how many prompts each method had, and why the last did not have one that does less work."""
        return {"setting": self.setting, "prompts": dict(self._prompts), "why": self._why}

    def __call__(
        self,
        context: GenerationContext,
        plain: Generate,
        prompts: torch.Tensor,
        max_length: int,
        stop: list[str],
        **arguments: Any,
    ) -> torch.Tensor:
        """Generate for one batch.

        Args:
            context: of the model.
            plain: lm-eval's own code, with the same arguments.
            prompts: (row, position) token ids, padded on the left.
            max_length: of prompt and continuation, in tokens.
            stop: the strings.
            **arguments: of `model.generate`, and `seed`, of the batch's random numbers.

        Returns:
            (row, position) token ids.
        """
        seed = arguments.pop("seed", None)
        method, self._why = self._method(context, stop, arguments)
        self._prompts[method] += len(prompts)
        with seeded(seed):
            if method == "plain":
                return plain(prompts, max_length, stop, **arguments)
            if not arguments.get("temperature"):
                arguments.pop("temperature", None)  # transformers warns of it
            criterion = StopStrings(context.tokenizer, stop, *prompts.shape)
            mixed = context.mixed_precision_dtype
            with torch.autocast(device_type=context.device.type, dtype=mixed, enabled=mixed is not None):
                return context.model.generate(
                    input_ids=prompts, max_length=max_length, stopping_criteria=StoppingCriteriaList([criterion]),
                    pad_token_id=context.tokenizer.pad_token_id, use_cache=True, **_cache(method, context.device.type),
                    **arguments,
                )  # fmt: skip

    def _method(self, context: GenerationContext, stop: list[str], arguments: dict[str, Any]) -> tuple[str, str]:
        """Name of the method for a batch, and why not one that does less work."""
        if self.setting == "plain":
            return "plain", "generation=plain"
        if against := against_early_ends(context, stop, arguments):
            return "plain", against
        return ("dynamic", "") if self.setting == "auto" else (self.setting, f"generation={self.setting}")


def _cache(method: str, device: str) -> dict[str, Any]:
    """Arguments of `generate` for a method's cache."""
    if method == "static":
        return {"cache_implementation": "static", "disable_compile": True}
    if method == "compiled":
        return {"cache_implementation": "static", "compile_config": compile_config(device)}
    return {}
