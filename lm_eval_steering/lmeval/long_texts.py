"""Whole texts that are longer than the model's context: windows, in which each token is predicted once.

lm-eval's `hf` ends with an error at a log-likelihood whose text is longer than the context. A document of our
perplexity tasks therefore asks for the beginning of such a text alone, marked `too_long`; here the whole is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from lm_eval_steering.errors import InterventionError
from lm_eval_steering.metrics.likelihood import Score

if TYPE_CHECKING:  # the task families import this module, and `lm-eval-steering tasks` starts without lm-eval
    from lm_eval.api.instance import Instance

    from lm_eval_steering.lmeval.requests import Request

TOO_LONG = "too_long"  # key of a document whose request holds the beginning of its `text` alone


class WholeTextScore(Score):
    """Score of a document's whole text, where its request has the beginning alone."""


def is_too_long(request: Instance) -> bool:
    """Whether a request stands for a longer text."""
    return isinstance(request.doc, dict) and bool(request.doc.get(TOO_LONG))


def whole_text(request: Instance) -> Instance:
    """The request for the whole text of its document."""
    return replace(request, arguments=("", request.doc["text"])) if is_too_long(request) else request


def of_whole_text(request: Instance, score: Score) -> Score:
    """The score of a request that `whole_text` has made, marked as one."""
    if not is_too_long(request):
        return score
    return WholeTextScore((score[0], score[1]), score.tokens, score.unsteered, score.targets)


def in_windows(request: Request, max_length: int) -> list[Request]:
    """One request as it is, or, where its context is empty and its text too long, lm-eval's rolling windows of it.

    Args:
        request: ((context, continuation), context tokens, continuation tokens); the context tokens of an empty context
            are one prefix token, and an instruction where there is one.
        max_length: Longest input of the model, in tokens.
    """
    key, context, continuation = request
    if key is None or key[0] != "":
        return [request]
    parts = parts_of(context, continuation, max_length)
    if len(parts) <= 1:
        return [request]
    # A key for each: a window is no request of lm-eval's, and its score is not the text's.
    return [(("", f"{key[1]}, window {number}"), *part) for number, part in enumerate(parts)]


def parts_of(prefix: list[int], text: list[int], max_length: int) -> list[tuple[list[int], list[int]]]:
    """lm-eval's rolling windows of a text, as (context, continuation): each token is predicted once.

    Args:
        prefix: one token, which the first window begins with; or that and an instruction, which all windows begin with.
        text: tokens.
        max_length: longest input of the model, in tokens.

    Raises:
        InterventionError: if the instruction leaves no place for text.
    """
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    if len(prefix) + len(text) - 1 <= max_length:
        return [(prefix, text)] if text else []
    instructed = len(prefix) > 1
    room = max_length - len(prefix) if instructed else max_length
    if room < 1:
        raise InterventionError(
            f"the instruction has {len(prefix) - 1} tokens, which leaves no place for text in the model's {max_length}"
        )
    windows = map(make_disjoint_window, get_rolling_token_windows(text, prefix[0], max_seq_len=room, context_len=1))
    if not instructed:
        return list(windows)
    return [(prefix if number == 0 else prefix + context, part) for number, (context, part) in enumerate(windows)]


def joined(scores: Sequence[Score], windows: Sequence[Sequence[Request]]) -> list[Score]:
    """One score for each request: the sum over its windows."""
    rest = iter(scores)
    return [_sum(list(islice(rest, len(parts)))) for parts in windows]


def _sum(scores: Sequence[Score]) -> Score:
    total = sum(score[0] for score in scores), all(score[1] for score in scores)
    return Score(total, sum(score.tokens for score in scores), targets=scores[0].targets)
