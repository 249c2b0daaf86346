"""When a row of a batch is done: as soon as it has any stop string, with the text that lm-eval's `hf` cuts out.

lm-eval decodes all rows once for each stop string after each token, and goes on until one and the same string has come
up in every row. Here a row ends by itself, and is decoded only where its last token could complete a string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, StoppingCriteria

from lm_eval_steering.architectures.families import refuse_unsupported
from lm_eval_steering.errors import ArchitectureError
from lm_eval_steering.harness.scoring.choose import rope_by_batch

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
