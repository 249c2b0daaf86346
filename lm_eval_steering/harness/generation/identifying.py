"""The language of each output is identified on the processor while the model makes the next batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from lm_eval_steering.metrics.output_language import IdentifiedText


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
