"""How a model is run over rows: its batch size, the processes that share the work, and the log of it."""

from __future__ import annotations

from functools import cached_property

from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.neurons.recording import batch_size_that_fits
from lm_eval_steering.neurons.running import Batches, Ranks, TokenRows
from lm_eval_steering.progress import Log

CONTEXT = 2048  # tokens a row at most, by default


class ModelRunner:
    """A model and the way to run it.

    Attributes:
        model: loaded when its weights are first needed.
        batch_size: rows a forward pass; None finds one that fits.
        ranks: the processes that share the work.
        log: what is shown and kept.
        longest: tokens of the longest row, for a batch size that fits.
    """

    def __init__(
        self,
        model: LazyModel,
        batch_size: int | None = 16,
        ranks: Ranks | None = None,
        log: Log | None = None,
        longest: int = CONTEXT,
    ) -> None:
        self.model, self.batch_size, self.longest = model, batch_size, longest
        self.ranks = ranks or Ranks()
        self.log = log or Log(show=False)

    def load(self) -> None:
        """Load the model, and note how long that took."""
        if "model" not in self.model.__dict__:
            with self.log.timed("load model", model=self.model.name) as facts:
                facts["device"] = str(next(self.model.model.parameters()).device)

    def batches(self, rows: TokenRows) -> Batches:
        """This process's part of the plan for some rows."""
        return Batches(rows, self.model.tokenizer, self.model.sites, self.fitting, self.ranks)

    @cached_property
    def fitting(self) -> int:
        """The batch size that was asked for, or one that fits the device of every process."""
        if self.batch_size is not None:
            return self.batch_size
        longest = min(self.longest, self.model.context or self.longest)

        def build(size: int) -> Batches:
            return Batches(TokenRows.of([[0] * longest] * size), self.model.tokenizer, self.model.sites, size)

        return min(self.ranks.gather(batch_size_that_fits(self.model.sites, build)))
