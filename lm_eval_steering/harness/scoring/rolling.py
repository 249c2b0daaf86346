"""Rolling log-likelihood of whole texts: the windows of all texts are one list of requests, batched like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lm_eval_steering.harness.batches import Request


def windows_of(lm: Any, text: str) -> list[Request]:
    """lm-eval's windows of a text: each token is predicted once, from at most `max_length` tokens before it."""
    windows = get_rolling_token_windows(
        token_list=lm.tok_encode(text), prefix_token=lm.prefix_token_id, max_seq_len=lm.max_length, context_len=1
    )
    return [(None, *make_disjoint_window(window)) for window in windows]


def rolling(lm: Any, requests: Sequence[Instance], disable_tqdm: bool) -> list[float]:
    """Summed log-probability of each text, in nats."""
    texts = [request.args[0] for request in requests]
    windows = [windows_of(lm, text) for text in texts]
    answers = iter(lm._loglikelihood_tokens([window for own in windows for window in own], disable_tqdm))
    totals = []
    for text, own in zip(texts, windows, strict=True):
        totals.append(sum(next(answers)[0] for _ in own))
        lm.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
    return totals
