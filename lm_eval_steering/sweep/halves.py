"""Two halves of the items, the same for all tasks and languages: what a factor is chosen on is never reported on.

The half is a seeded hash of the source item, which an item shares with its translations, so that no translation of an
item that was chosen on is reported on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_steering.errors import SteeringError

ALL, CHOOSE, REPORT = "all", "choose", "report"
FIELDS = ("id", "idx", "question_id", "item_id")
POSITION = "doc_id"


def half_of(item: str, seed: int) -> str:
    """`choose` or `report`: the first bit of SHA-256 over seed and item."""
    return REPORT if hashlib.sha256(f"{seed} {item}".encode()).digest()[0] & 1 else CHOOSE


def item_of(document: Mapping[str, Any], position: int, field: str | None) -> str | None:
    """What names a document's source item in every language; None where it has no such field.

    Args:
        document: of lm-eval.
        position: of the document in its task.
        field: of the document; None takes the first of FIELDS, `doc_id` the position.
    """
    if field == POSITION:
        return str(position)
    names = (field,) if field else FIELDS
    return next((str(document[name]) for name in names if document.get(name) is not None), None)


def source_item(document: Mapping[str, Any], position: int, field: str | None, task: str) -> str:
    """As `item_of`, of a task that is to be split.

    Raises:
        SteeringError: naming the task, if the document has no such field.
    """
    item = item_of(document, position, field)
    if item is None:
        raise SteeringError(
            f"{task}: its documents have no {field or ' or '.join(FIELDS)} to split them by; name the field that a "
            "document shares with its translations, choose: {item: FIELD}, or doc_id where the order is the same in "
            f"all languages, or choose: {{split: whole}}; fields: {', '.join(map(str, document))}"
        )
    return item


def can_be_split(task: Any, field: str | None) -> bool:
    """Whether every document of a task of lm-eval names its source item."""
    return all(item_of(document, position, field) is not None for position, document in enumerate(task.eval_docs))


def positions_of(task: Any, name: str, half: str, seed: int, field: str | None, limit: int | None = None) -> list[int]:
    """Positions of a task's documents that belong to one half; the first `limit` of them.

    Raises:
        SteeringError: if there is none.
    """
    positions = [
        position
        for position, document in enumerate(task.eval_docs)
        if half_of(source_item(document, position, field, name), seed) == half
    ]
    if not positions:
        raise SteeringError(f"{name}: no item falls into the half to {half} on; take another choose.seed or more items")
    return positions[:limit]


def metrics_by_half(
    task: Any, name: str, samples: Sequence[Mapping[str, Any]], seed: int, field: str | None
) -> dict[str, Any]:
    """Half -> metrics, by the task's own aggregation over its items, and the number of items that each is over.

    Args:
        task: of lm-eval.
        name: of the task.
        samples: lm-eval's, of one cell.
        seed: of the split.
        field: as in `source_item`.

    Raises:
        SteeringError: as `source_item`.
    """
    aggregation = task.aggregation()
    values: dict[str, dict[str, list[Any]]] = {CHOOSE: {}, REPORT: {}}
    for sample in samples:
        half = half_of(source_item(sample["doc"], sample["doc_id"], field, name), seed)
        for metric in sample["metrics"]:
            values[half].setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return {
        half: {
            "n": {key: len(of_items) for key, of_items in sorted(values[half].items())},
            "metrics": {key: _aggregate(aggregation, key, of_items) for key, of_items in sorted(values[half].items())},
        }
        for half in (CHOOSE, REPORT)
    }


def _aggregate(aggregation: Mapping[str, Any], key: str, values: list[Any]) -> Any:
    """As lm-eval does it: the mean where a metric has no aggregation of its own; of one that fails, how it did."""
    from lm_eval.api.metrics import mean

    try:
        return aggregation.get(key.partition(",")[0], mean)(values)
    except Exception as error:  # whatever a task's own function raises on fewer items must not end the sweep
        return repr(error)
