"""Few-shot examples that belong to a document, whatever the number of processes, `limit` and chosen documents.

lm-eval draws the examples of one document after the other from one seeded stream, over the documents that the process
at hand evaluates. So the same document gets other examples under two processes, or where only some documents are
evaluated. `PerDocumentSampler` draws for the documents that are skipped too: every document gets the examples that one
process of lm-eval draws for it when it evaluates all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.samplers import ContextSampler

SEED = 1234  # lm-eval's default `fewshot_random_seed`


class PerDocumentSampler(ContextSampler):
    """A sampler of lm-eval that keeps its stream in step with the positions of the documents.

    Attributes:
        sampler: the task's own.
    """

    def __init__(self, sampler: ContextSampler) -> None:
        super().__init__(sampler.df, fewshot_indices=sampler.fewshot_indices)
        self.sampler = sampler
        self._positions: Sequence[int] = ()
        self._documents: Sequence[Any] = ()
        self._excluded = False
        self._evaluated = self._drawn = 0

    def begin(self, positions: Sequence[int], documents: Sequence[Any], excluded: bool) -> None:
        """Before an evaluation.

        Args:
            positions: of the documents that this process evaluates, ascending.
            documents: all of the task.
            excluded: whether a document is left out of its own examples, as where they come from the same split.
        """
        self._positions, self._documents, self._excluded = positions, documents, excluded
        self._evaluated = self._drawn = 0

    def set_rnd(self, rnd: int | None) -> ContextSampler:
        """Begin the stream anew, as lm-eval does before each evaluation."""
        self.sampler.set_rnd(rnd)
        self._evaluated = self._drawn = 0
        return self

    def replace_df(self, df: Sequence[dict[str, Any]]) -> ContextSampler:
        """Draw from other documents."""
        self.sampler.replace_df(df)
        return self

    def fewshot_docs(self) -> list[Any]:
        """The documents that examples are drawn from."""
        return list(self.sampler.fewshot_docs())

    def sample(
        self, n: int, eval_doc: Any = None, df: Sequence[dict[str, Any]] | None = None, **kwargs: Any
    ) -> Sequence[dict[str, Any]]:
        """Examples of the next document; those of the documents between it and the last one are drawn and dropped."""
        for position in range(self._drawn, self._positions[self._evaluated]):
            self.sampler.sample(n, eval_doc=self._documents[position] if self._excluded else None, df=df, **kwargs)
        self._drawn = self._positions[self._evaluated] + 1
        self._evaluated += 1
        return self.sampler.sample(n, eval_doc=eval_doc, df=df, **kwargs)


def draw_per_document(
    task: Any, positions: Sequence[int] | None, limit: int | None, rank: int = 0, world_size: int = 1
) -> None:
    """Make a task draw the examples of each document as one process does that evaluates all documents.

    Args:
        task: of lm-eval.
        positions: of the documents that are evaluated by all processes; None where `limit` says it.
        limit: first documents, None for all.
        rank: of this process.
        world_size: number of processes, which share the documents out in turn.
    """
    if not hasattr(task, "sampler"):
        return  # a task without documents to draw from
    if not isinstance(task.sampler, PerDocumentSampler):
        task.sampler = PerDocumentSampler(task.sampler)
    documents = task.eval_docs
    everyone = sorted(positions) if positions is not None else range(min(limit or len(documents), len(documents)))
    task.sampler.begin(everyone[rank::world_size], documents, task.fewshot_cfg.split == task.config.test_split)


def fewshot_source(task: Any, num_fewshot: int | None) -> dict[str, Any] | None:
    """What decides a task's few-shot examples beside its settings: number, sampler, seed and the documents drawn from.

    None where prompts have no examples.

    Args:
        task: of lm-eval.
        num_fewshot: that is asked for; None leaves the task's own. lm-eval leaves a task at 0 that says 0.
    """
    declared = task.config.num_fewshot
    number = declared if num_fewshot is None or declared == 0 else num_fewshot
    if not number or not hasattr(task, "sampler"):
        return None
    sampler = task.sampler.sampler if isinstance(task.sampler, PerDocumentSampler) else task.sampler
    return {
        "number": number,
        "sampler": type(sampler).__name__,
        "seed": SEED,
        "documents": sampler.fewshot_docs(),
    }
