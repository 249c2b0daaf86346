"""Making `--use_cache` safe: lm-eval's keys know the request alone, ours know the intervention too."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from lm_eval.api.model import CacheHook

from lm_eval_steering.metrics.likelihood import Score

Decorate = Callable[[str, Iterable[Any], Any], Any]


def salt(database: Any, fingerprint: Callable[[], str]) -> None:
    """Make a cache's database mix the fingerprint, as it is at the moment of each call, into every key.

    One file then serves a whole sweep, and plain `hf` runs in the same file are never mixed up with ours. The object
    is changed in place, because lm-eval's cache wrapper looks keys up in the very same one.
    """
    kind = type(database)

    def mixed(key: str) -> str:
        return hashlib.sha256(f"{fingerprint()} {key}".encode()).hexdigest()

    class Salted(kind):  # type: ignore[valid-type, misc]
        def __contains__(self, key: str) -> bool:
            return super().__contains__(mixed(key))

        def __getitem__(self, key: str) -> Any:
            return super().__getitem__(mixed(key))

        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(mixed(key), value)

    database.__class__ = Salted


class DecoratingCacheHook(CacheHook):
    """Stores partial results as the model would return them at the end, so that a resumed run misses nothing."""

    def __init__(self, database: Any, decorate: Decorate) -> None:
        self.dbdict = database
        self._decorate = decorate

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """Store one result in the moment it is known; results that cannot stand alone are left to the end."""
        decorated = self._decorate(attr, req, res)
        if decorated is not None:
            super().add_partial(attr, req, decorated)


class PartialAnswers:
    """Makes partial answers of a `SteeredHFLM` what they would be at the end."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self._tokens: dict[tuple[str, ...], int] = {}  # (context, continuation) in hand -> tokens of the latter

    def expect(self, requests: Iterable[Any]) -> None:
        """Log-likelihood requests, tokenised, whose answers come next."""
        self._tokens = {request[0]: len(request[2]) for request in requests if request[0]}

    def __call__(self, kind: str, request: Iterable[Any], answer: Any) -> Any:
        """The whole answer, or None where it cannot stand alone yet, or must not."""
        if kind == "loglikelihood" and self._lm.sizes.twice:
            return None
        if self._lm.steering is not None and self._lm.steering.overflowed():
            return None
        if kind == "loglikelihood":
            return Score(answer, tokens=self._tokens[tuple(request)], targets=self._lm.targets)
        if kind == "loglikelihood_rolling":
            return self._lm.rolling_score(*request, answer)
        return answer
