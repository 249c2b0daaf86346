"""Rows of the merged tables, from finished cells. Nothing here knows time or place, so equal work gives equal bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval_steering.sweep.cells import ALL, CHOOSE, REPORT

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

    from lm_eval_steering.sweep.stored import StoredCell

_STEP = ("op", "value", "site", "layers", "positions", "scope", "seed")


def metric_rows(stored: StoredCell, planned: bool = True) -> Iterator[dict[str, Any]]:
    """One row a metric of a finished cell.

    `value` is lm-eval's, over the items of the cell (`items`: all, or the half to report on); `value_choose` and
    `value_report` are over the halves where the cell was split; what is no number stands in `text`.
    """
    facts, halves = stored.facts, stored.facts.get("halves") or {}
    own = stored.results["results"][facts["cell"]["task"]]
    for key, value in sorted(facts["metrics"].items()):
        metric, _, filter_ = key.partition(",")
        parts = {
            f"value_{half}": _number(halves.get(half, {}).get("metrics", {}).get(key)) for half in (CHOOSE, REPORT)
        }
        yield {
            **identity(facts),
            "metric": metric,
            "filter": filter_,
            "value": _number(value),
            "stderr": _number(own.get(f"{metric}_stderr,{filter_}")),
            "text": value if isinstance(value, str) else None,
            "n": facts["n"],
            **parts,
            "n_choose": halves.get(CHOOSE, {}).get("n"),
            "n_report": halves.get(REPORT, {}).get("n"),
            "higher_is_better": facts["higher_is_better"].get(metric),
            "planned": planned,
        }


def item_rows(stored: StoredCell, samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row an item and filter of a finished cell; a metric that is no number is JSON."""
    from lm_eval_steering.sweep.split import half_of, source_item

    facts = stored.facts
    split = facts.get("split")
    for sample in samples:
        item = half = None
        if split:
            item = source_item(sample["doc"], sample["doc_id"], split["item"], facts["cell"]["task"])
            half = half_of(item, split["seed"])
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
        **{name: None if step.get(name) is None else str(step[name]) for name in _STEP},
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
