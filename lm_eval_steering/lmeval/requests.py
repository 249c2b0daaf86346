"""What lm-eval does not tell its model: which requests the rows of a forward pass are, and where contexts end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import Collator

from lm_eval_steering.errors import DidNotHappenError, SteeringError
from lm_eval_steering.metrics.likelihood import MADE_FOR, UNSTEERED_TWIN

Request = tuple[Any, list[int], list[int]]  # what keys the cache (None in rolling), context tokens, continuation tokens


def wants_twin(request: Instance) -> bool:
    """Whether a request is to be scored a second time, without the intervention."""
    return isinstance(request.doc, dict) and bool(request.doc.get(UNSTEERED_TWIN))


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


def parts(requests: Sequence[Request]) -> list[list[int]]:
    """Numbers of the requests, in rounds within which equal tokens have equal context lengths.

    lm-eval scores requests of equal tokens by one row. That is right only if their contexts are equally long: an
    intervention may know the context from the continuation, and lm-eval 0.4.13 itself gives the request with the
    shorter continuation the scores of the wrong positions. As a rule there is one round, and its batches are lm-eval's.
    """
    rounds: list[list[int]] = []
    seen: dict[tuple[int, ...], dict[int, int]] = {}
    for number, (key, context, continuation) in enumerate(requests):
        lengths = seen.setdefault(tuple(context + continuation[:-1]), {})
        place = lengths.setdefault(0 if key is None else len(context), len(lengths))
        if place == len(rounds):
            rounds.append([])
        rounds[place].append(number)
    return rounds


@dataclass(frozen=True)
class ScoringRows:
    """The rows of one scoring batch: (row, position) bool, False for pads, and (row,) number of prompt tokens."""

    real: torch.Tensor
    prompt: torch.Tensor


class RowBook:
    """The rows of the forward passes to come, in lm-eval's order; each batch is compared with what the model gets."""

    def __init__(self, requests: Sequence[Request], max_length: int, shared: bool) -> None:
        """Note the order.

        Args:
            requests: of one call of `_loglikelihood_tokens`.
            max_length: of the model, in tokens.
            shared: whether lm-eval scores requests of equal tokens by one row (`logits_cache`).
        """
        # The very class that lm-eval sorts and groups with, and the same keys as in HFLM._loglikelihood_tokens.
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
            group_by="contexts" if shared else None,
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        self._rest: Iterator[Request] = (request for chunk in order.get_batched(n=1) for request in chunk)
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
            # Too long ones lose tokens on the left; the last token is predicted and never read.
            own = (context + continuation)[-(self._max_length + 1) :][:-1]
            if len(own) > tokens.shape[1]:
                break  # the comparison says it
            expected[row, : len(own)] = torch.tensor(own, dtype=tokens.dtype)
            real[row, : len(own)] = True
            # In rolling likelihood every token is prompt.
            prompt[row] = len(own) if key is None else len(own) - len(continuation) + 1
        if not torch.equal(torch.where(real, tokens.cpu(), 0), expected) or not real.any(1).all():
            raise DidNotHappenError(
                "lm-eval batched its requests in an order that this release of lm-eval-steering does not know, so "
                "context lengths cannot be told; install the lm-eval that it was tested with"
            )
        return ScoringRows(real, prompt)


class BatchSizes:
    """Batch sizes that lm-eval's search found in the steered pass, for the unsteered pass over the same rows."""

    def __init__(self) -> None:
        self.twice = False  # while rows are scored with and without the intervention
        self._detected: list[int] = []
        self._replayed: Iterator[int] | None = None

    @contextmanager
    def scoring_twice(self) -> Iterator[None]:
        """Both passes happen inside; sizes found in the first are kept."""
        self.twice, self._detected = True, []
        try:
            yield
        finally:
            self.twice, self._replayed = False, None

    def replay(self) -> None:
        """The second pass begins: from now on the sizes are those of the first."""
        self._replayed = iter(self._detected)

    def detect(self, search: Callable[[], int]) -> int:
        """The next size: found by the search, or by the one of the first pass."""
        if self._replayed is not None:
            return next(self._replayed)
        self._detected.append(search())
        return self._detected[-1]
