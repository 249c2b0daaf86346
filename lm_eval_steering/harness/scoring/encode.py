"""Tokens of all strings of a task at once: lm-eval encodes each option's context again, one string a call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import has_bos_prefix


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
