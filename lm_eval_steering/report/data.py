"""What a report is made of, wherever it was read from: cells, their scores, their items.

`read.py` makes it from a sweep's folder, `read_merged.py` from merged tables, `read_plain.py` from a plain lm-eval run.
Everything behind it (effects, tables, figures, page) knows these classes and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.errors import SteeringError

if TYPE_CHECKING:
    import pandas as pd

BASELINE = "baseline"
SELF, CROSS, SEVERAL = "self", "cross", "several"
CELL_COLUMNS = (
    "cell", "model", "task", "family", "evaluated", "steered", "relation", "kind", "factor", "control", "is_baseline",
    "target", "items", "stage", "signature", "fingerprint", "baseline_cell",
)  # fmt: skip
SCORE_COLUMNS = ("cell", "metric", "value", "text", "n", "higher_is_better")


class ReportError(SteeringError):
    """A report that cannot be made from what was given."""


@dataclass(frozen=True)
class Items:
    """The items of one cell.

    Attributes:
        docs: (items,) lm-eval's document numbers, ascending.
        values: metric -> (items,) numbers, (items, 2) pairs of a sum and its size, or objects (labels, texts); nan or
            None where an item has none.
        reported: (items,) whether the item is in the half that nothing was chosen on; None where nothing was split.
        digests: (items,) of the documents, to see that two runs had the same ones; None where they are not known.
    """

    docs: NDArray[np.int64]
    values: dict[str, NDArray[Any]]
    reported: NDArray[np.bool_] | None = None
    digests: NDArray[np.uint64] | None = None


@dataclass(frozen=True)
class Output:
    """What a model wrote for one item of one cell."""

    doc: int
    text: str
    language: str


@dataclass
class Samples:
    """Generated text for the explorer.

    Attributes:
        prompts: (task, target or "") -> document number -> prompt.
        outputs: cell -> its outputs, by document.
        left_out: number of outputs that were not kept, because there are too many for one page.
    """

    prompts: dict[tuple[str, str], dict[int, str]] = field(default_factory=dict)
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    left_out: int = 0

    @property
    def count(self) -> int:
        """Outputs that are there."""
        return sum(map(len, self.outputs.values()))


@dataclass
class Facts:
    """What a reader needs to do it again.

    Attributes:
        title: of the report.
        sources: what it was made from.
        command: that made it.
        plan: text of the plan, empty where it is not known.
        versions: package -> version.
        neurons: name or path of the neuron set, as the plan has it.
        choices: what the sweep itself chose, one mapping a group.
        notes: what a reader should know: cells left out, halves, baselines that are missing.
    """

    title: str
    sources: list[str] = field(default_factory=list)
    command: str = ""
    plan: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    neurons: str = ""
    choices: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Sweep:
    """A sweep, or a comparison of two.

    Attributes:
        cells: CELL_COLUMNS. `steered` is empty for a baseline; `evaluated` is empty where the items are in several
            languages; `control` is the seed of a random control; `baseline_cell` is what the cell is compared with.
        scores: SCORE_COLUMNS, one row a cell and metric.
        items: cell -> items; a cell without items has scores and no intervals.
        timings: cell, seconds, tokens.
        missing: planned cells that are not done: cell, task, status, why.
        samples: generated text.
        facts: the rest.
        against: what a difference is to: `baseline`, or the name of the other run.
    """

    cells: pd.DataFrame
    scores: pd.DataFrame
    items: dict[str, Items]
    timings: pd.DataFrame
    missing: pd.DataFrame
    samples: Samples
    facts: Facts
    against: str = BASELINE

    def is_shift(self, metric: str) -> bool:
        """Whether a score is itself a comparison with the unsteered model (LSS), whose null is random sets."""
        return self.against == BASELINE and metric.startswith("lss")

    def steered_cells(self) -> pd.DataFrame:
        """Interventions on a language's own neurons: neither baselines nor controls."""
        return self.cells[~self.cells["is_baseline"] & self.cells["control"].isna()]


def align(found: Sequence[Items], metric: str) -> tuple[NDArray[np.int64], list[NDArray[Any] | None]]:
    """Documents that any of these items has, and for each its values over them, nan where it has none.

    Returns:
        (documents,), and arrays (documents,) or (documents, 2); None for items without the metric.
    """
    docs = found[0].docs
    if any(own.docs is not docs and not np.array_equal(own.docs, docs) for own in found):
        docs = np.unique(np.concatenate([own.docs for own in found]))
    aligned: list[NDArray[Any] | None] = []
    for own in found:
        values = own.values.get(metric)
        if values is None or len(own.docs) == len(docs):
            aligned.append(values)
            continue
        empty = None if values.dtype == object else np.nan
        spread = np.full((len(docs), *values.shape[1:]), empty, dtype=values.dtype)
        spread[np.searchsorted(docs, own.docs)] = values
        aligned.append(spread)
    return docs, aligned


def check_same_documents(first: Items, second: Items, task: str) -> None:
    """Refuse to pair items that are not the same documents.

    Raises:
        ReportError: naming the task.
    """
    if first.digests is None or second.digests is None:
        return
    _, ours, theirs = np.intersect1d(first.docs, second.docs, return_indices=True)
    if not len(ours):
        raise ReportError(f"{task}: the two runs have no document in common; they cannot be paired")
    if differ := int((first.digests[ours] != second.digests[theirs]).sum()):
        raise ReportError(
            f"{task}: {differ} of {len(ours)} documents differ between a cell and its baseline; they cannot be paired: "
            "evaluate both on the same data"
        )
