"""The tables of a report, as data frames: matrix, summary of self and cross, and the cost of each cell.

A blank (nan) is a cell that is not there; it is counted, and never taken for 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.language_families import family_order
from lm_eval_steering.metrics.paired import Array, interval_of, over_languages
from lm_eval_steering.report.data import CROSS, SELF, SEVERAL, Sweep
from lm_eval_steering.report.effects import ALPHA, Effects

if TYPE_CHECKING:
    import pandas as pd

GROUP = ["family", "metric", "kind", "factor"]
RELATIONS = (SELF, CROSS, SEVERAL)
_SEVERAL_COLUMN = ""


def single(effects: Effects) -> pd.DataFrame:
    """One row a cell in the sense of the matrix: where two stages evaluated one, the one with more items."""
    frame = effects.frame.sort_values(["n", "stage"], ascending=[False, True], kind="stable")
    return frame.drop_duplicates([*GROUP, "steered", "evaluated"]).sort_index()


def ordered(codes: Sequence[str]) -> list[str]:
    """Relatives side by side; `several languages` last."""
    return [*family_order(sorted({code for code in codes if code})), *([""] if "" in codes else [])]


def matrix(effects: Effects, family: str, metric: str, kind: str, factor: float, value: str) -> pd.DataFrame:
    """Steered language (rows) x evaluated language (columns), nan where a cell is missing.

    Args:
        effects: of all cells.
        family: of tasks.
        metric: of theirs.
        kind: of intervention.
        factor: of it; nan where it has none.
        value: which column of the effects: `score`, `difference`, `p_holm`, `n`, ...
    """
    frame = single(effects)
    own = frame[(frame["family"] == family) & (frame["metric"] == metric) & (frame["kind"] == kind)]
    at = own[own["factor"].isna()] if np.isnan(factor) else own[own["factor"] == factor]
    rows, columns = ordered(own["steered"].unique()), ordered(own["evaluated"].unique())
    found = at.pivot(index="steered", columns="evaluated", values=value)
    return found.reindex(index=rows, columns=columns)


def summary(effects: Effects) -> pd.DataFrame:
    """Self and cross for each task family, metric, intervention and factor.

    For each relation (self, cross; several where the items are in several languages): `cells` and `missing` of them,
    `n` items, mean `score` and `baseline`, mean and median `difference` with the 95 % interval over languages and
    items (`low`, `high`), and of how many cells the score was `improved`, and `significant`ly (Holm). `gap` is the mean
    difference of self minus that of cross.
    """
    import pandas as pd

    frame = single(effects)
    rows = []
    for _, own in frame.groupby(["family", "metric", "kind"], sort=False):
        expected = _expected(own)
        for _, group in own.groupby("factor", sort=True, dropna=False):
            rows.append(_summary_row(group, effects, expected))
    return pd.DataFrame(rows)


def _expected(own: pd.DataFrame) -> dict[str, int]:
    """Cells of each relation that the grid of steered and evaluated languages would have.

    A pair that no factor has evaluated is not defined (LSS towards its own base), so the grid is the union over
    factors; where a whole row or column is missing, `Store.missing` says so.
    """
    pairs = own.drop_duplicates(["steered", "evaluated"])
    return {relation: int((pairs["relation"] == relation).sum()) for relation in RELATIONS}


def _summary_row(group: pd.DataFrame, effects: Effects, expected: dict[str, int]) -> dict[str, Any]:
    first = group.iloc[0]
    row: dict[str, Any] = {name: first[name] for name in GROUP}
    row["higher_is_better"] = bool(first["higher_is_better"])
    row["languages"] = group["steered"].nunique()
    intervals = _intervals(group, effects)
    sign = 1 if row["higher_is_better"] else -1
    for relation in RELATIONS:
        own = group[group["relation"] == relation]
        differences = own["difference"]
        low, high = intervals.get(relation, (np.nan, np.nan))
        better = sign * differences > 0
        row |= {
            f"{relation}_cells": int(differences.notna().sum()),
            f"{relation}_missing": expected[relation] - int(differences.notna().sum()),
            f"{relation}_n": int(own["n"].sum()),
            f"{relation}_baseline": own["baseline"].mean(),
            f"{relation}_score": own["score"].mean(),
            f"{relation}_difference": differences.mean(),
            f"{relation}_median": differences.median(),
            f"{relation}_low": low,
            f"{relation}_high": high,
            f"{relation}_improved": int(better.sum()),
            f"{relation}_significant": int((better & (own["p_holm"] < ALPHA)).sum()),
        }
    row["gap"] = row["self_difference"] - row["cross_difference"]
    row["gap_low"], row["gap_high"] = intervals.get("gap", (np.nan, np.nan))
    return row


def _intervals(group: pd.DataFrame, effects: Effects) -> dict[str, tuple[float, float]]:
    """Relation -> interval of its mean difference; only where every cell of the relation has replicates."""
    keys = list(zip(group["cell"], group["metric"], strict=True))
    there = np.array([key in effects.replicates for key in keys])
    if not there.any():
        return {}
    replicates = np.column_stack([effects.replicates[key] for key in keys if key in effects.replicates])
    known = group[there]
    relations = known["relation"].to_numpy()
    whole = {r: bool((group["relation"] == r).sum() == (relations == r).sum() > 0) for r in RELATIONS}
    groups: dict[str, NDArray[np.bool_]] = {r: relations == r for r in RELATIONS if whole[r]}
    evaluated = [
        steered if relation != CROSS else code
        for steered, relation, code in zip(known["steered"], relations, known["evaluated"], strict=True)
    ]
    found: dict[str, Array] = over_languages(replicates, list(known["steered"]), evaluated, groups)
    if SELF in found and CROSS in found:
        found["gap"] = found[SELF] - found[CROSS]
    ends = {name: interval_of(own) for name, own in found.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def cost(sweep: Sweep) -> pd.DataFrame:
    """Seconds and tokens of each cell, where the sweep noted them."""
    import pandas as pd

    facts = sweep.cells[["cell", "task", "steered", "kind", "factor", "control"]]
    if sweep.timings.empty:
        return pd.DataFrame(columns=[*facts.columns, "seconds", "tokens"])
    own = sweep.timings.reindex(columns=["cell", "seconds", "tokens", "device", "batch_size"])
    return facts.merge(own, on="cell", how="inner").sort_values("seconds", ascending=False, ignore_index=True)


def settings(frame: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """(family, metric, kind) of everything that was evaluated, in the order of the effects."""
    for row in frame.drop_duplicates(["family", "metric", "kind"])[["family", "metric", "kind"]].itertuples():
        yield row.family, row.metric, row.kind
