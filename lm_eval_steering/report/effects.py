"""The effect of each intervention on each score: difference from the baseline, interval, test, correction.

Intervals and tests need items. The aggregation is not inferred from a metric's name: each known one is tried, and only
one that reproduces lm-eval's value is used, so that an interval always belongs to the score in its row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.metrics.statistics import (
    MEAN,
    OF_PAIRS,
    SEED,
    Aggregate,
    Arm,
    Array,
    compare,
    compare_corpora,
    holm,
    interval_of_items,
)
from lm_eval_steering.report.read import CLEAN, DEGENERATE, FORCED, LANG_UNKNOWN, REPEATED, Items, Sweep, align, forced
from lm_eval_steering.sweep.halves import REPORT, half_of

if TYPE_CHECKING:
    import pandas as pd

ALPHA = 0.05  # after Holm's correction
_PAIR = 2
FACTS = (
    "cell", "task", "family", "evaluated", "steered", "relation", "kind", "factor", "items", "stage", "deactivation",
    "damage_asked", "damage_reached",
)  # fmt: skip
COLUMNS = (
    *FACTS, "metric", "higher_is_better", "n", "baseline", "score", "difference", "low", "high", "p", "p_holm", "test",
    "comparisons",
)  # fmt: skip

# --- Corpus scores (BLEU, chrF++): paired tests, and the interval of the difference on the same resamples


def is_corpus_metric(metric: str) -> bool:
    """Whether sacreBLEU computes it over all items together."""
    return metric.partition("@")[0] in ("bleu", "chrf++")


def fresh_metric(metric: str, tokenizer: str, references: Sequence[str]) -> Any:
    """A sacreBLEU metric with its references; a new one each time, because it keeps state of what it scored."""
    from sacrebleu.metrics import BLEU, CHRF

    of_metric = [list(references)]
    if metric.startswith("bleu"):
        return BLEU(tokenize=tokenizer, references=of_metric)
    return CHRF(word_order=2, references=of_metric)


def _by_corpus(
    sweep: Sweep, cells: Sequence[dict[str, Any]], metric: str, replicates: dict[tuple[str, str], Array]
) -> Iterator[dict[str, Any]]:
    """Rows of a corpus metric, whose items are (tokenizer, reference, hypothesis); one baseline's cells in one test."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        items = sweep.items.get(cell["cell"])
        if items is not None and metric in items.values:
            groups.setdefault(cell["baseline_cell"], []).append(cell)
    for baseline, group in groups.items():
        before = sweep.items.get(baseline)
        if before is None or metric not in before.values:
            continue
        tokenizer, references, first = zip(*before.values[metric], strict=True)
        paired = [cell for cell in group if np.array_equal(before.docs, sweep.items[cell["cell"]].docs)]
        systems = {cell["cell"]: [item[2] for item in sweep.items[cell["cell"]].values[metric]] for cell in paired}
        tested = compare_corpora(fresh_metric(metric, tokenizer[0], references), first, systems, references)
        for cell in paired:
            name = cell["cell"]
            replicates[name, metric] = tested[name].replicates
            low, high = interval_of_items(replicates[name, metric][:, None], np.array([len(references)]))
            yield {
                **{column: cell[column] for column in FACTS},
                "metric": metric, "higher_is_better": True, "n": len(references),
                "baseline": tested[name].baseline, "score": tested[name].score,
                "difference": tested[name].score - tested[name].baseline, "low": float(low[0]), "high": float(high[0]),
                "p": tested[name].p_value, "test": tested[name].test,
            }  # fmt: skip


# --- All metrics


@dataclass
class Effects:
    """Every steered cell and metric.

    Attributes:
        frame: COLUMNS, one row per cell and metric. `difference` is nan without a baseline, `low`, `high` and `p`
            without items; `comparisons` is the number of comparisons that Holm's correction is over.
        replicates: (cell, metric) -> (resamples,) of the difference; absent without items.
    """

    frame: pd.DataFrame
    replicates: dict[tuple[str, str], Array]


def effects_of(sweep: Sweep, half: bool | None = None, cells: pd.DataFrame | None = None) -> Effects:
    """Effects of steered cells.

    Args:
        sweep: cells, scores, items.
        half: None for all items; True for the reported half, False for the half that factors were chosen on.
        cells: which ones; all by default.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    replicates: dict[tuple[str, str], Array] = {}
    cells = sweep.steered_cells() if cells is None else cells
    scores = scores_by_cell(sweep)
    for _, group in cells.groupby(["task", "items"], sort=False):
        records = group.to_dict("records")
        metrics = dict.fromkeys(metric for cell in group["cell"] for metric in scores.get(cell, {}))
        derived = dict.fromkeys(
            metric
            for cell in group["cell"] if cell in sweep.items
            for metric, values in sweep.items[cell].values.items()
            if metric not in metrics and values.dtype != object and values.ndim == 1
        )  # fmt: skip
        for metric in [*metrics, *derived]:
            rows += _of_metric(sweep, records, metric, scores, half, replicates)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame["factor"] = frame["factor"].astype(float)
    return Effects(_corrected(frame), replicates)


def scores_by_cell(sweep: Sweep) -> dict[str, dict[str, tuple[float, Any, int]]]:
    """cell -> metric -> (value, whether higher is better, n), of the scores that are numbers."""
    scores: dict[str, dict[str, tuple[float, Any, int]]] = {}
    numbers = sweep.scores[sweep.scores["value"].notna()]
    columns = (numbers[name].tolist() for name in ("cell", "metric", "value", "higher_is_better", "n"))
    for cell, metric, value, better, n in zip(*columns, strict=True):
        scores.setdefault(cell, {})[metric] = (float(value), better, int(n))
    return scores


def _of_metric(
    sweep: Sweep,
    cells: Sequence[dict[str, Any]],
    metric: str,
    scores: dict[str, Any],
    half: bool | None,
    replicates: dict[tuple[str, str], Array],
) -> Iterator[dict[str, Any]]:
    """Rows of one metric of one task; cells that can be compared by items are compared in one step."""
    together: dict[tuple[Any, ...], list[tuple[dict[str, Any], Arm, Arm, Aggregate]]] = {}
    for cell in cells:
        pair = arms_of(sweep, cell, metric, scores, half)
        if pair is None:
            yield from _by_scores(sweep, cell, metric, scores, half)
        else:
            before, after, aggregate = pair
            key = (len(after.numerator), aggregate.name, after.denominator is None)
            together.setdefault(key, []).append((cell, before, after, aggregate))
    for group in together.values():
        yield from _by_items(group, metric, scores, replicates, sweep.is_shift(metric))
    if half is None and is_corpus_metric(metric):
        yield from _by_corpus(sweep, cells, metric, replicates)


def _by_items(
    group: Sequence[tuple[dict[str, Any], Arm, Arm, Aggregate]],
    metric: str,
    scores: dict[str, Any],
    replicates: dict[tuple[str, str], Array],
    shift: bool,
) -> Iterator[dict[str, Any]]:
    # Cells of one task share their baseline's array in memory, so that each baseline is resampled once.
    keys = [before.numerator.ctypes.data for _, before, _, _ in group]
    baselines = dict(zip(keys, [before for _, before, _, _ in group], strict=True))
    column_of = {key: column for column, key in enumerate(baselines)}
    compared = compare(
        _stacked(list(baselines.values())), _stacked([after for _, _, after, _ in group]), group[0][3],
        baseline_of=np.array([column_of[key] for key in keys]),
    )  # fmt: skip
    for number, (cell, _, _, _) in enumerate(group):
        replicates[cell["cell"], metric] = compared.replicates[:, number]
        yield {
            **{name: cell[name] for name in FACTS},
            "metric": metric,
            "higher_is_better": _better(scores, cell["cell"], metric),
            "n": int(compared.n[number]),
            "baseline": np.nan if shift else compared.baseline[number],
            "score": compared.score[number],
            "difference": compared.difference[number],
            "low": compared.low[number],
            "high": compared.high[number],
            "p": np.nan if shift else compared.p_value[number],
            "test": "" if shift else compared.tests[number],
        }


def _stacked(arms: Sequence[Arm]) -> Arm:
    tops = np.column_stack([arm.numerator for arm in arms])
    bottoms = [arm.denominator for arm in arms if arm.denominator is not None]
    return Arm(tops, np.column_stack(bottoms) if bottoms else None)


def _by_scores(
    sweep: Sweep, cell: dict[str, Any], metric: str, scores: dict[str, Any], half: bool | None
) -> Iterator[dict[str, Any]]:
    """A row without interval: there are no items, or no known aggregation gives the score."""
    score = scores.get(cell["cell"], {}).get(metric)
    if score is None or half is not None or is_corpus_metric(metric):
        return
    before = np.nan if sweep.is_shift(metric) else scores.get(cell["baseline_cell"], {}).get(metric, (np.nan,))[0]
    yield {
        **{name: cell[name] for name in FACTS},
        "metric": metric, "higher_is_better": _better(scores, cell["cell"], metric), "n": score[2],
        "baseline": before, "score": score[0],
        "difference": score[0] - before, "low": np.nan, "high": np.nan, "p": np.nan, "test": "",
    }  # fmt: skip


def _better(scores: dict[str, Any], cell: str, metric: str) -> bool | None:
    """Whether higher is better; None where neither lm-eval's results nor the metric's definition says so."""
    score = scores.get(cell, {}).get(metric)
    if score is None or score[1] is None or score[1] != score[1]:
        return {DEGENERATE: False, LANG_UNKNOWN: False, REPEATED: False, CLEAN: True}.get(metric.partition("@")[0])
    return bool(score[1])


# --- From items to the two arms of a comparison


def arms_of(
    sweep: Sweep, cell: dict[str, Any], metric: str, scores: dict[str, Any], half: bool | None
) -> tuple[Arm, Arm, Aggregate] | None:
    """Items of the baseline and of the cell over the same documents, and their aggregation; None without items."""
    after = sweep.items.get(cell["cell"])
    before = after if sweep.is_shift(metric) else sweep.items.get(cell["baseline_cell"])
    if after is None or before is None or metric not in after.values or after.values[metric].dtype == object:
        return None
    score = scores.get(cell["cell"], {}).get(metric)
    aggregate = aggregate_of(after.values[metric], None if score is None else score[0])
    base_values = baseline_values(before, metric, cell["steered"])
    if aggregate is None or base_values is None:
        return None
    _, (first, second) = align([Items(before.docs, {metric: base_values}), after], metric)
    assert first is not None and second is not None
    if half is not None:
        chosen = halves_of(after) == half
        if len(chosen) != len(second) or not chosen.any():
            return None
        first, second = first[chosen], second[chosen]
    arms = [_arm(np.zeros_like(first) if sweep.is_shift(metric) else first), _arm(second)]
    return arms[0], arms[1], aggregate


def halves_of(items: Items) -> NDArray[np.bool_]:
    """(items,) whether an item is in the reported half: by the sweep's split, else by a hash of the document number."""
    return _halves(items.docs.tobytes()) if items.reported is None else items.reported


@lru_cache(maxsize=64)
def _halves(docs: bytes) -> NDArray[np.bool_]:
    return np.array([half_of(str(doc), SEED) == REPORT for doc in np.frombuffer(docs, dtype=np.int64)])


def baseline_values(before: Items, metric: str, steered: str) -> NDArray[Any] | None:
    """The baseline's items; its `lfs` and `lfs_clean` for the steered language come from its stored labels."""
    if metric.partition("@")[0] in (FORCED, CLEAN):
        counted = forced(before, metric, steered)
        if counted is not None:
            return counted
    return before.values.get(metric)


def aggregate_of(values: NDArray[Any], score: float | None) -> Aggregate | None:
    """The aggregation of the items that gives lm-eval's score, None if none does; without a score the mean."""
    if score is None:
        return MEAN if values.ndim == 1 else None
    if values.dtype == object:
        return None
    ratio = _arm(values).column().ratio(np.ones((1, len(values))))[0]
    for aggregate in OF_PAIRS if values.ndim == _PAIR else (MEAN,):
        with np.errstate(over="ignore"):
            if math.isclose(float(aggregate.of_ratio(ratio)[0]), score, rel_tol=1e-6, abs_tol=1e-9):
                return aggregate
    return None


def _arm(values: NDArray[Any]) -> Arm:
    return Arm(values[:, 0], values[:, 1]) if values.ndim == _PAIR else Arm(values)


# --- Correction for multiple comparisons


def _corrected(frame: pd.DataFrame) -> pd.DataFrame:
    """Holm over each family of comparisons: one metric of one task family and one intervention, all else varied."""
    frame["p_holm"], frame["comparisons"] = np.nan, 0
    for rows in frame.groupby(["family", "metric", "kind", "stage"], sort=False).indices.values():
        p_value = frame["p"].to_numpy(dtype=float)[rows]
        frame.iloc[rows, frame.columns.get_loc("p_holm")] = holm(p_value)
        frame.iloc[rows, frame.columns.get_loc("comparisons")] = int((~np.isnan(p_value)).sum())
    return frame
