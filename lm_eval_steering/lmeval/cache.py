"""Making `--use_cache` safe: lm-eval's keys know the request alone, ours know the intervention too."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from lm_eval.api.model import CacheHook

from lm_eval_steering.provenance import differing, versions

Complete = Callable[[str, Iterable[Any], Any], Any]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedAnswer:
    """What the database holds: an answer, and the versions of the libraries that made it."""

    answer: Any
    versions: dict[str, str]


def salt(database: Any, fingerprint: Callable[[], str]) -> None:
    """Make a cache's database mix the fingerprint, as it is at the moment of each call, into every key.

    One file then serves a whole sweep, and plain `hf` runs in the same file are never mixed up with ours. lm-eval's
    wrapper looks keys up in this very object, so the functions are replaced that a `SqliteDict` takes for writing keys
    and values.
    """
    encode_key, encode, decode = database.encode_key, database.encode, database.decode

    def answer_of(stored: Any) -> Any:
        entry = decode(stored)
        if not isinstance(entry, CachedAnswer):
            return entry
        if other := differing(entry.versions, versions()):
            _warn_once(
                f"--use_cache: answers were made with other versions ({other}); to make them anew, delete the file"
            )
        return entry.answer

    database.encode_key = lambda key: encode_key(hashlib.sha256(f"{fingerprint()} {key}".encode()).hexdigest())
    database.encode = lambda answer: encode(CachedAnswer(answer, versions()))
    database.decode = answer_of


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)


class CompletingCacheHook(CacheHook):
    """Stores partial results as the model would return them at the end, so that a resumed run misses nothing."""

    def __init__(self, database: Any, complete: Complete) -> None:
        """Nothing is stored yet.

        Args:
            database: lm-eval's.
            complete: (kind of request, its arguments, partial answer) -> the whole one, or None where it cannot be
                known yet.
        """
        self.dbdict = database
        self._complete = complete

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """Store one result in the moment it is known; results that cannot stand alone are left to the end."""
        completed = self._complete(attr, req, res)
        if completed is not None:
            super().add_partial(attr, req, completed)
