"""Values of items as lm-eval's results hold them, for scores that are computed after its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

BOOTSTRAPS = 100_000  # of lm-eval's command


def values_of(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Any]]:
    """lm-eval's raw values by (metric, filter)."""
    values: dict[tuple[str, str], list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), []).append(sample[metric])
    return values


def aggregated(metric: str, filter_: str, aggregation: Callable[[list[Any]], Any], values: list[Any]) -> dict[str, Any]:
    """lm-eval's two entries of a metric; standard errors as lm-eval's own default has them."""
    from lm_eval.api.metrics import stderr_for_metric

    of_values: Any = aggregation  # lm-eval's types want a float of any sequence
    error: Callable[[list[Any]], Any] | None = stderr_for_metric(of_values, BOOTSTRAPS)
    return {
        f"{metric},{filter_}": aggregation(values),
        f"{metric}_stderr,{filter_}": error(values) if error and len(values) > 1 else "N/A",
    }
