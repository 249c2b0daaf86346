"""Log-likelihood requests before scoring: what is refused, what is scored twice, and which row is which request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lm_eval_steering.errors import DidNotHappenError, SteeringError
from lm_eval_steering.lmeval.compat import another_order, fed_to_model, in_scoring_order, strings_to_encode
from lm_eval_steering.metrics.likelihood import MADE_FOR, NEEDS_UNSTEERED_SCORE

Request = tuple[Any, list[int], list[int]]  # what keys the cache (None in rolling), context tokens, continuation tokens


def needs_unsteered_score(request: Instance) -> bool:
    """Whether a request is to be scored a second time, without the intervention."""
    return isinstance(request.doc, dict) and bool(request.doc.get(NEEDS_UNSTEERED_SCORE))


def refuse_stale(requests: Sequence[Instance], targets: Sequence[str]) -> None:
    """Refuse documents that were made for another target language: lm-eval's `--cache_requests` does not know it.

    Raises:
        SteeringError: naming both.
    """
    for request in requests:
        made_for = request.doc.get(MADE_FOR) if isinstance(request.doc, dict) else None
        if made_for is not None and set(made_for) != set(targets):
            raise SteeringError(
                f"{request.task_name}: its requests were made for {'+'.join(made_for) or 'no language'}, the model "
                f"is steered to {'+'.join(targets) or 'none'}; run without --cache_requests, and from Python "
                "give the TaskManager metadata={'target_language': ...}"
            )


def rounds_of(requests: Sequence[Request]) -> list[list[int]]:
    """Request indices, in rounds within which equal tokens have equal context lengths.

    lm-eval scores requests of equal tokens by one row. That is right only if their contexts are equally long: an
    intervention may know the context from the continuation, and lm-eval 0.4.13 itself gives the request with the
    shorter continuation the scores of the wrong positions. As a rule there is one round, and its batches are lm-eval's.
    """
    rounds: list[list[int]] = []
    seen: dict[tuple[int, ...], dict[int, int]] = {}
    for number, (key, context, continuation) in enumerate(requests):
        lengths = seen.setdefault(tuple(context + continuation[:-1]), {})
        turn = lengths.setdefault(0 if key is None else len(context), len(lengths))
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(number)
    return rounds


@dataclass(frozen=True)
class ScoringRows:
    """The rows of one scoring batch: (row, position) bool, False for pads, and (row,) number of prompt tokens."""

    real: torch.Tensor
    prompt: torch.Tensor


class ExpectedRows:
    """The rows of lm-eval's own batches, which tell the model neither rows nor lengths; each batch is compared."""

    def __init__(self, requests: Sequence[Request], max_length: int, shared: bool) -> None:
        """Note the order.

        Args:
            requests: of one call of lm-eval's scoring.
            max_length: of the model, in tokens.
            shared: whether lm-eval scores requests of equal tokens by one row (`logits_cache`).
        """
        self._rest: Iterator[Request] = in_scoring_order(requests, shared)
        self._max_length = max_length

    def take(self, tokens: torch.Tensor) -> ScoringRows:
        """The rows of the next batch, (row, position) token ids padded on the right.

        Raises:
            DidNotHappenError: if they are not the expected ones, so that no length could be trusted.
        """
        expected = torch.zeros(tokens.shape, dtype=tokens.dtype)
        real = torch.zeros(tokens.shape, dtype=torch.bool)
        prompt = torch.zeros(len(tokens), dtype=torch.long)
        for row in range(len(tokens)):
            request = next(self._rest, None)
            if request is None:
                raise DidNotHappenError("lm-eval scored more rows than it has requests")
            key, context, continuation = request
            fed = fed_to_model(context, continuation, self._max_length)
            if len(fed) > tokens.shape[1]:
                break  # the comparison below fails
            expected[row, : len(fed)] = torch.tensor(fed, dtype=tokens.dtype)
            real[row, : len(fed)] = True
            # In rolling likelihood every token is prompt.
            prompt[row] = len(fed) if key is None else len(fed) - len(continuation) + 1
        if not torch.equal(torch.where(real, tokens.cpu(), 0), expected) or not real.any(1).all():
            raise another_order()
        return ScoringRows(real, prompt)


def encode_ahead(
    tokenizer: Any, requests: Sequence[Instance], prefix_token_id: int, add_bos_token: bool | None
) -> dict[str, list[int]]:
    """Token ids of every string of log-likelihood requests, in one call of a fast tokenizer.

    lm-eval encodes each option's context again, one string a call. Strings that begin with the text of the beginning
    token are left to it, and all strings where the tokenizer is slow.

    Args:
        tokenizer: of the model.
        requests: of (context, continuation).
        prefix_token_id: of the model.
        add_bos_token: the model argument.
    """
    bos = tokenizer.decode(prefix_token_id)
    texts = strings_to_encode(request.args for request in requests)
    strings = [text for text in texts if not has_bos_prefix(text, bos)]
    if not strings or not tokenizer.is_fast:
        return {}
    special = {} if add_bos_token is None else {"add_special_tokens": add_bos_token}
    return dict(zip(strings, tokenizer(strings, **special)["input_ids"], strict=True))


def begun(tokens: torch.Tensor, mask: torch.Tensor, prefix_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch padded on the left, with the prefix token in rows that have no token: an empty prompt, to be continued.

    Args:
        tokens: (row, position) ids.
        mask: (row, position), 0 for pads.
        prefix_token_id: of the model.
    """
    if tokens.shape[1] == 0:
        tokens, mask = tokens.new_zeros(len(tokens), 1).long(), mask.new_zeros(len(mask), 1).long()
    empty = mask.sum(dim=1) == 0
    if empty.any():
        tokens[empty, -1], mask[empty, -1] = prefix_token_id, 1
    return tokens, mask


def windows_of(tokens: list[int], prefix_token_id: int, max_length: int) -> list[Request]:
    """lm-eval's windows of a text: each token is predicted once, from at most `max_length` tokens before it."""
    windows = get_rolling_token_windows(
        token_list=tokens, prefix_token=prefix_token_id, max_seq_len=max_length, context_len=1
    )
    return [(None, *make_disjoint_window(window)) for window in windows]


class BatchSizes:
    """Batch sizes that lm-eval's search found in the steered pass, for the unsteered pass over the same rows."""

    def __init__(self) -> None:
        self._detected: list[int] = []
        self._replayed: Iterator[int] | None = None

    @contextmanager
    def of_two_passes(self) -> Iterator[None]:
        """Both passes happen inside; sizes found in the first are kept."""
        self._detected = []
        try:
            yield
        finally:
            self._replayed = None

    def replay(self) -> None:
        """The second pass begins: from now on the sizes are those of the first."""
        self._replayed = iter(self._detected)

    def detect(self, search: Callable[[], int]) -> int:
        """The next size: found by the search, or by the one of the first pass."""
        if self._replayed is not None:
            return next(self._replayed)
        self._detected.append(search())
        return self._detected[-1]
