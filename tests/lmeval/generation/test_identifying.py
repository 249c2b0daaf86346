"""Languages are identified while the model goes on, and nothing is lost by it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lm_eval_steering.lmeval.generation import Identifying
from lm_eval_steering.metrics.output_language import IdentifiedText
from tests.lmeval.generation.test_ways import loaded, requests, texts


def test_another_thread_identifies_each_text_once_as_soon_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, seen = loaded(batch_size=2), []
    identify = type(lm).identify

    def noted(self: Any, text: str) -> IdentifiedText:
        seen.append((text, threading.current_thread()))
        return identify(self, text)

    monkeypatch.setattr(type(lm), "identify", noted)
    hook = lm.cache_hook
    answers = lm.generate_until(requests([]), disable_tqdm=True)
    assert all(isinstance(answer, IdentifiedText) for answer in answers)
    assert sorted(text for text, _ in seen) == sorted(set(map(str, answers)))
    assert threading.main_thread() not in {thread for _, thread in seen}
    assert lm.cache_hook is hook


def test_the_request_cache_gets_every_text_with_its_language(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, kept = loaded(), []
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda kind, _request, answer: kept.append((kind, answer)))
    found = texts(lm, requests([]))
    assert sorted(kept) == sorted(("generate_until", text) for text in found)
    assert all(isinstance(answer, IdentifiedText) for _, answer in kept)


def test_an_error_loses_no_text_and_the_hook_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, kept = loaded(), []
    hook = lm.cache_hook
    monkeypatch.setattr(hook, "add_partial", lambda _kind, _request, answer: kept.append(answer))
    with pytest.raises(KeyError), Identifying(lm.identify, lm.cache_hook) as identifying:
        identifying.add_partial("generate_until", ("", {}), "text")
        raise KeyError
    assert lm.cache_hook is hook and kept == ["text"]
