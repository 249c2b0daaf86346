"""Rows of the merged tables, from finished cells. Nothing here knows time or place, so equal work gives equal bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval_steering.sweep.cells import ALL, CHOOSE, REPORT

if TYPE_CHECKING:
    import pandas as pd

    from lm_eval_steering.sweep.stored import StoredCell

# Columns of a step; `value` is that of the metric.
_STEP = {
    "op": "op", "value": "step_value", "site": "site", "layers": "layers", "positions": "positions", "scope": "scope",
    "seed": "seed",
}  # fmt: skip


def metric_rows(
    stored: StoredCell, planned: bool = True, halves: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """One row a metric of a finished cell.

    `value` is lm-eval's, over the items of the cell (`items`: all, or the half to report on); `value_choose` and
    `value_report` are over the `halves` where there are any; what is no number stands in `text`. `n`, `n_choose` and
    `n_report` count the items that have the metric.
    """
    facts, halves = stored.facts, halves or {}
    own = stored.results["results"][facts["cell"]["task"]]
    for key, value in sorted(facts["metrics"].items()):
        metric, _, filter_ = key.partition(",")
        own_halves = {half: halves.get(half, {}) for half in (CHOOSE, REPORT)}
        yield {
            **identity(facts),
            "metric": metric,
            "filter": filter_,
            "value": _number(value),
            "stderr": _number(own.get(f"{metric}_stderr,{filter_}")),
            "text": value if isinstance(value, str) else None,
            "n": facts["n"].get(key, 0),
            **{f"value_{half}": _number(part.get("metrics", {}).get(key)) for half, part in own_halves.items()},
            **{f"n_{half}": part["n"].get(key, 0) if part else None for half, part in own_halves.items()},
            "higher_is_better": facts["higher_is_better"].get(metric),
            "planned": planned,
        }


def item_rows(
    stored: StoredCell, samples: Sequence[Mapping[str, Any]], rule: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """One row an item and filter of a finished cell; a metric that is no number is JSON.

    Args:
        stored: the cell.
        samples: its samples.
        rule: how the plan halves the items; a cell of one half alone has its own.
    """
    from lm_eval_steering.sweep.split import half_of, item_of

    facts = stored.facts
    split = facts.get("split") or rule
    for sample in samples:
        item = half = None
        if split:
            item = item_of(sample["doc"], sample["doc_id"], split["item"])
            half = None if item is None else half_of(item, split["seed"])
        yield {
            **{key: identity(facts)[key] for key in ("cell", "task", "languages", "factor", "control", "target")},
            "doc_id": sample["doc_id"],
            "item": item,
            "half": half,
            "filter": sample["filter"],
            "response": json.dumps(sample["filtered_resps"], ensure_ascii=False),
            "metrics": json.dumps({m: sample[m] for m in sorted(sample["metrics"])}, ensure_ascii=False),
        }


def identity(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a cell from others, as columns; of an intervention of several steps the last one that steers."""
    cell = facts["cell"]
    variant = cell["variant"]
    steps = variant["intervention"]["steps"]
    step = next((step for step in reversed(steps) if not step["deactivation"]), steps[-1] if steps else {})
    silenced = [code for step in steps if step["deactivation"] for code in step["languages"]]
    return {
        "cell": cell["name"],
        "model": facts["model"],
        "task": cell["task"],
        "intervention": variant["name"],
        "languages": "+".join(variant["languages"]),
        "preset": variant["arguments"].get("preset"),
        **{column: None if step.get(name) is None else str(step[name]) for name, column in _STEP.items()},
        "factor": step.get("factor"),
        "deactivated": "+".join(silenced),
        "control": variant["control"],
        "target": cell["target"],
        "items": cell.get("items", ALL),
        "stage": cell["stage"],
        "fingerprint": facts["fingerprint"],
        "signature": facts["signature"],
    }


def table(rows: Sequence[Mapping[str, Any]], order: Sequence[str]) -> pd.DataFrame:
    """A table of rows, sorted; whole numbers stay whole where some are absent."""
    import pandas as pd

    found = pd.DataFrame(list(rows))
    for name in ("control", "n", "n_choose", "n_report", "stage", "doc_id"):
        if name in found:
            found[name] = found[name].astype("Int64")
    if found.empty:
        return found
    return found.sort_values(list(order), kind="stable", ignore_index=True)


def _number(found: Any) -> float | None:
    return float(found) if isinstance(found, int | float) else None
