"""Scores log-likelihood requests in one of our ways, and says in which."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.models.utils_hf import clear_torch_cache
from tqdm import tqdm

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.harness.batches import Request, Rows
from lm_eval_steering.harness.scoring.baseline import Answer, Baseline, Numbered, digest_of
from lm_eval_steering.harness.scoring.batches import Budget, batches
from lm_eval_steering.harness.scoring.choose import Way, way_of
from lm_eval_steering.harness.scoring.head import head_at, log_probabilities, with_inputs
from lm_eval_steering.harness.scoring.packing import Packed, pack
from lm_eval_steering.harness.scoring.proof import difference, sample_of
from lm_eval_steering.harness.scoring.tree import Cost, Entry, Row, entries_of, rows_of

_log = logging.getLogger(__name__)


class GivenRows:
    """Stands where lm-eval's batches are guessed (`RowBook`): here the rows are known."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def take(self, _tokens: torch.Tensor) -> Rows:
        """The rows of the batch in hand."""
        return self._rows


class Scorer:
    """Log-likelihoods of a `SteeredHFLM`, in the way that does least work among those that are exact.

    The first requests of a model are scored in lm-eval's way too, once for each way of ours; where the answers
    differ, that way is not used on this model any more.
    """

    def __init__(self, lm: Any, setting: str) -> None:
        """Nothing is computed yet.

        Args:
            lm: the `SteeredHFLM`.
            setting: `auto`, `shared` (an error where it is not exact) or `plain`.
        """
        self._lm = lm
        self.setting = setting
        self._proven: set[tuple[str, bool]] = set()  # ways that were tried, without and with branches
        self._failed: dict[str, str] = {}  # way -> why it failed
        self._baseline = Baseline()
        self._scored: Counter[str] = Counter()
        self._unsteered: list[Answer] | None = None  # of the requests that were scored twice last

    # --- which way ----------------------------------------------------------------------------------------------

    @property
    def way(self) -> Way:
        """How requests are scored under the intervention in force."""
        if self.setting == "plain":
            return Way("plain", "scoring=plain")
        plan = self._lm.steering.plan if self._lm.steering else None
        way = way_of(self._lm.model, self._lm.backend, bool(plan and plan.lookahead), bool(plan and plan.needs_rows))
        return Way("plain", self._failed[way.name]) if way.name in self._failed else way

    def report(self) -> dict[str, Any]:
        """What was used, as plain data: the setting, the way, why none that does less work, and how many requests."""
        way = self.way
        return {"setting": self.setting, "way": way.name, "why": way.why, "requests": dict(self._scored)}

    def count_plain(self, number: int) -> None:
        """Note requests that lm-eval's own code scored."""
        self._scored["plain"] += number

    def shares(self, requests: Sequence[Request]) -> bool:
        """Whether these requests are scored here; proves the way on some of them where that was not done yet.

        Raises:
            SteeringError: if the user asked for `shared` and it is not exact.
        """
        way = self.way
        if way.shared and requests and (way.name, True) not in self._proven:
            self._prove(way, requests)
            way = self.way
        if self.setting == "shared" and not way.shared:
            raise SteeringError(f"scoring=shared: {way.why}; scoring=auto chooses what is exact")
        return way.shared

    def _prove(self, way: Way, requests: Sequence[Request]) -> None:
        """Compare a way with the plain forward pass, once without branches and once with them."""
        lm = self._lm
        rows = self._rows(way, entries_of(requests, lm.max_length))
        proof = way.name, any(row.branches for row in rows)
        if proof in self._proven:
            return
        entries = entries_of([requests[number] for number in sample_of(rows)], lm.max_length)
        wrong = ""
        with lm.steering.suspended() if lm.steering else nullcontext():
            try:
                found: dict[int, Answer] = {}
                for batch in batches(self._rows(way, entries), Budget.unlimited()):
                    found.update(self._answers(self._pack(way, batch)))
                wrong = difference(lm, entries, found)
            except Exception as error:
                if should_reduce_batch_size(error):
                    raise
                wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        self._proven.add(proof)
        if wrong:
            self._failed[way.name] = f"scoring {way.name} is not exact for this model: {wrong}"
            _log.warning("%s; lm-eval's own way is used", self._failed[way.name])

    # --- scoring ------------------------------------------------------------------------------------------------

    def score(self, requests: Sequence[Request], disable_tqdm: bool) -> list[Answer]:
        """(summed log-probability, greedy match) of each request.

        While the model scores rows twice (`BatchSizes.twice`), each batch runs a second time without the
        intervention; `take_unsteered` has those answers.
        """
        lm, way = self._lm, self.way
        entries = entries_of(requests, lm.max_length)
        rows = self._rows(way, entries)
        longest = max((len(entry.tokens) for entry in entries), default=1)
        size = lm.max_batch_size if lm.batch_size == "auto" else lm.batch_size
        budget = Budget.like(int(size), longest, lm.model.config.get_text_config().vocab_size, lm.device.type)
        answers: dict[int, Answer] = {}
        unsteered: dict[int, Answer] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or lm.rank != 0, desc="Running loglikelihood requests")
        for found, twins in self._in_batches(way, rows, budget):
            answers.update(found)
            unsteered.update(twins)
            for number, answer in found:
                if requests[number][0] is not None:
                    lm.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
            bar.update(len(found))
        bar.close()
        self._scored[way.name] += len(requests)
        self._unsteered = [unsteered[number] for number in range(len(unsteered))] if lm.sizes.twice else None
        return [answers[number] for number in range(len(requests))]

    def take_unsteered(self) -> list[Answer] | None:
        """Answers of the second pass over the last requests, once; None where there was none."""
        found, self._unsteered = self._unsteered, None
        return found

    def forget_baseline(self) -> None:
        """Let go of the unsteered answers that are kept for the next intervention on the same requests."""
        self._baseline.clear()

    def _rows(self, way: Way, entries: Sequence[Entry]) -> list[Row]:
        return rows_of(entries, self._cost if way.name == "packed" else None)

    @cached_property
    def _cost(self) -> Cost:
        config = self._lm.model.config
        weights = self._lm.model.num_parameters(exclude_embeddings=True) / config.num_hidden_layers
        # A pair takes 2 multiplications for each feature, which mask and softmax make 8 times as dear.
        return Cost(weights, 16 * config.hidden_size)

    def _in_batches(self, way: Way, rows: list[Row], budget: Budget) -> Iterator[tuple[list[Numbered], list[Numbered]]]:
        """Answers of each batch, steered and, if they are wanted, unsteered. Batches shrink where memory runs out."""
        todo = batches(rows, budget)[::-1]
        while todo:
            batch = todo.pop()
            try:
                yield self._both(way, batch)
            except RuntimeError as error:
                if len(batch) == 1 or not should_reduce_batch_size(error):
                    raise
                clear_torch_cache()
                budget = Budget.half_of(batch)
                rest = [row for each in (batch, *todo) for row in each]
                todo = batches(rest, budget)[::-1]

    def _both(self, way: Way, batch: list[Row]) -> tuple[list[Numbered], list[Numbered]]:
        packed = self._pack(way, batch)
        steered = self._answers(packed)
        if not self._lm.sizes.twice:
            return steered, []
        if self._lm.steering is None:
            return steered, steered
        key = digest_of(batch)
        unsteered = self._baseline.get(key)
        if unsteered is None:
            with self._lm.steering.suspended():
                unsteered = self._answers(packed)
            self._baseline.keep(key, unsteered)
        return steered, unsteered

    def _pack(self, way: Way, batch: list[Row]) -> Packed:
        model = self._lm.model
        chooses = model.config._attn_implementation == "sdpa"
        return pack(batch, way.masks, model.config, torch.bool if chooses else model.dtype, self._lm.device)

    def _answers(self, packed: Packed) -> list[Numbered]:
        lm = self._lm
        head = lm.model.get_output_embeddings()
        lm.book = GivenRows(packed.rows)
        try:
            with with_inputs(lm.model, packed.inputs | {"use_cache": False}), head_at(head, packed.nodes):
                logits = lm._model_call(packed.tokens)
        finally:
            lm.book = None
        with torch.no_grad():
            found, greedy = log_probabilities(
                logits[0], packed.place.to(logits.device), packed.targets.to(logits.device)
            )
        found_list, greedy_list = found.tolist(), greedy.tolist()
        answers, start = [], 0
        for number, length in packed.requests:
            stop = start + length
            answers.append((number, (sum(found_list[start:stop]), all(greedy_list[start:stop]))))
            start = stop
        return answers
