"""Greedy generation that ends as soon as every row has its stop string, with the texts of lm-eval's `hf`.

lm-eval decodes all rows once for each stop string after each token, and goes on until one and the same string has come
up in every row. Here a row ends by itself, and is decoded only where its last token could complete a string. Batches
are lm-eval's and finished rows stay in them, so every forward pass has the shape it has there and rounds alike; what
differs are tokens that lm-eval cuts off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

# Arguments under which tokens do not depend on how many tokens other batches had.
_GREEDY = {
    "attention_mask", "do_sample", "temperature", "top_p", "top_k", "min_new_tokens", "min_length",
    "repetition_penalty",
}  # fmt: skip
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Decoders of which the text of some tokens begins the text of more tokens, but for an incomplete character at the end.
# (`ByteFallback` is none: of single bytes in a row all are unreadable if one is.)
_DECODERS = {"ByteLevel", "Metaspace", "Replace", "Fuse", "Strip", "Sequence"}


def ends_early(lm: Any, stop: Sequence[str], arguments: Mapping[str, Any]) -> bool:
    """Whether rows may end one by one without a change of any text; elsewhere lm-eval's own code has to generate.

    Args:
        lm: the `SteeredHFLM`.
        stop: the strings, with that of the end token.
        arguments: of `HFLM._model_generate`, without the stop strings and the length.
    """
    settings = lm.model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return (
        arguments.get("do_sample") is False
        and getattr(settings, "num_beams", 1) in (None, 1)
        and _GREEDY.issuperset(arguments)
        and lm.backend == "causal"
        and lm.think_end_token is None
        and lm.eot_token_id in ends
        and independent(stop)
        and not _special(lm, stop)
        and _grows(lm.tokenizer)
    )


def independent(stop: Sequence[str]) -> bool:
    """Whether no string can begin in or before another one and end after it, so that the first to come up decides."""
    terms = [each for each in stop if each]
    return not any(
        one[-number:] == other[:number]
        for one, other in permutations(dict.fromkeys(terms), 2)
        for number in range(1, min(len(one), len(other)))
    ) and not any(one in other[1:-1] for one, other in permutations(dict.fromkeys(terms), 2))


def _special(lm: Any, stop: Sequence[str]) -> bool:
    """Whether a string has to do with special tokens, which lm-eval sees when it stops and not when it cuts."""
    end = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
    return any(
        term in token or token in term for term in stop for token in lm.tokenizer.all_special_tokens if term != end
    )


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


def _parts(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    return [decoder, *(part for own in decoder.get("decoders", []) for part in _parts(own))]


def _known(decoder: dict[str, Any]) -> bool:
    return decoder["type"] in _DECODERS and not decoder.get("stop")  # `stop`: what `Strip` takes from the end


@contextmanager
def own_random_numbers(lm: Any) -> Iterator[None]:
    """Each rank's own: lm-eval seeds all alike, and sampled answers to equal prompts would be the same on each."""
    if lm.world_size == 1:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(torch.initial_seed() + lm.rank)
        yield


def generate(lm: Any, context: torch.Tensor, max_length: int, stop: list[str], **arguments: Any) -> torch.Tensor:
    """What `HFLM._model_generate` does, where possible in fewer steps.

    Args:
        lm: the `SteeredHFLM`.
        context: (row, position) token ids, padded on the left.
        max_length: of context and continuation, in tokens.
        stop: the strings.
        **arguments: of `model.generate`.

    Returns:
        (row, position) token ids.
    """
    if not ends_early(lm, stop, arguments):
        return HFLM._model_generate(lm, context, max_length, stop, **arguments)
    criteria = StoppingCriteriaList([StopStrings(lm.tokenizer, stop, *context.shape)])
    if not arguments.get("temperature"):
        arguments.pop("temperature", None)  # transformers warns of it
    mixed = lm.mixed_precision_dtype
    with torch.autocast(device_type=lm.device.type, dtype=mixed, enabled=mixed is not None):
        return lm.model.generate(
            input_ids=context, max_length=max_length, stopping_criteria=criteria,
            pad_token_id=lm.tokenizer.pad_token_id, use_cache=True, **arguments,
        )  # fmt: skip


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
        self._stop = [each for each in stop if each]
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

    def _may_complete(self, token: int) -> bool:
        """Whether a string may end with this token: it has its last character, or a part of a character."""
        if token not in self._completes:
            text = self._decode([token])
            self._completes[token] = self._blank or any(each in text for each in self._last)
        return self._completes[token]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
