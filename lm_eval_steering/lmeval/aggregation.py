"""Values of items as lm-eval's results hold them, for scores that are computed after its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

BOOTSTRAPS = 100_000  # of lm-eval's command


def values_of(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Any]]:
    """lm-eval's raw values by (metric, filter)."""
    found: dict[tuple[str, str], list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            found.setdefault((metric, sample["filter"]), []).append(sample[metric])
    return found


def aggregated(metric: str, filter_: str, aggregation: Callable[[list[Any]], Any], values: list[Any]) -> dict[str, Any]:
    """lm-eval's two entries of a metric; standard errors as lm-eval's own default has them."""
    from lm_eval.api.metrics import stderr_for_metric

    error = stderr_for_metric(aggregation, BOOTSTRAPS)
    return {
        f"{metric},{filter_}": aggregation(values),
        f"{metric}_stderr,{filter_}": error(values) if error and len(values) > 1 else "N/A",
    }
