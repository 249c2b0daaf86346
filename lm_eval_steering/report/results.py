"""Everything that a report computes, once: the data frames of the Python API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_steering.report import tables
from lm_eval_steering.report.effects import Effects, arms_of, effects_of, halves_of, scores_by_cell
from lm_eval_steering.report.naming import CROSS, SELF, SEVERAL
from lm_eval_steering.report.read import Sweep
from lm_eval_steering.report.tables import single

if TYPE_CHECKING:
    import pandas as pd

# --- The best factor of each language: chosen on one half of the items, reported on the other one
#
# A factor that is chosen and reported on the same items looks better than it is. The halves are those of the sweep
# where it has split its items, else those of a seeded hash of the document number.

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = (
    "family", "metric", "kind", "steered", "on", "factors", "factor", "chosen_on", "n_choose", "reported_on", "n",
    "baseline", "score", "difference", "low", "high", "p", "higher_is_better",
)  # fmt: skip


def best_factors(sweep: Sweep, effects: Effects) -> pd.DataFrame:
    """One row a language, intervention, task family and metric.

    Columns: `on` (self, several or cross: which cells decide; the self cell where there is one), `factors` tried,
    `factor` chosen, `chosen_on` and `reported_on` (which items), `n_choose` and `n` of them, and what it does on the
    reported items. The first of equals is taken, in the order of the factors. Only where two factors or more were
    evaluated.
    """
    import pandas as pd

    frame = single(effects)
    frame = frame[frame["factor"].notna()]
    by_cell = {row["cell"]: row for row in sweep.steered_cells().to_dict("records")}
    scores = scores_by_cell(sweep)
    rows, chosen = [], []
    for _, group in frame.groupby(["family", "metric", "kind", "steered"], sort=False):
        row = _choose(sweep, group, by_cell, scores)
        if row is not None:
            rows.append(row)
            chosen += row["cells"]
    if not rows:
        return pd.DataFrame(columns=list(_COLUMNS))
    wanted = sweep.cells[sweep.cells["cell"].isin(set(chosen))]
    reported = effects_of(sweep, True, wanted).frame.set_index(["cell", "metric"]).sort_index()
    return pd.DataFrame([_reported(row, reported, frame) for row in rows]).reindex(columns=list(_COLUMNS))


def _choose(
    sweep: Sweep, group: pd.DataFrame, by_cell: dict[str, dict[str, Any]], scores: dict[str, Any]
) -> dict[str, Any] | None:
    relation = next(name for name in (SELF, SEVERAL, CROSS) if (group["relation"] == name).any())
    own = group[group["relation"] == relation]
    if own["factor"].nunique() < 2:
        return None
    metric, better = str(own["metric"].iloc[0]), bool(own["higher_is_better"].iloc[0])
    objective, sizes, whole = {}, {}, False
    for factor, at in own.groupby("factor", sort=True):
        values = []
        for cell, score, n in zip(at["cell"], at["score"], at["n"], strict=True):
            half = _score_of_half(sweep, by_cell[cell], metric, scores)
            whole |= half is None
            values.append((score, n) if half is None else half)
        objective[factor] = float(np.mean([value for value, _ in values]))
        sizes[factor] = sum(n for _, n in values)
    sign = 1 if better else -1
    factor = max(objective, key=lambda name: sign * objective[name])
    first = own.iloc[0]
    return {
        **{name: first[name] for name in ("family", "metric", "kind", "steered", "higher_is_better")},
        "on": relation,
        "factors": own["factor"].nunique(),
        "factor": factor,
        "chosen_on": "all items (optimistic)" if whole else "one half",
        "n_choose": sizes[factor],
        "reported_on": "the same items" if whole else "the other half",
        "cells": list(own.loc[own["factor"] == factor, "cell"]),
    }


def _score_of_half(sweep: Sweep, cell: dict[str, Any], metric: str, scores: dict[str, Any]) -> tuple[float, int] | None:
    """(score on the half to choose on, items); None where items are not known, or a half is empty."""
    pair = arms_of(sweep, cell, metric, scores, None)
    if pair is None:
        return None
    _, after, aggregate = pair
    reported = halves_of(sweep.items[cell["cell"]])
    if len(reported) != len(after.numerator) or reported.all() or not reported.any():
        return None
    chosen_on = after.column().of_items(~reported)
    ratio = chosen_on.ratio(np.ones((1, len(chosen_on.numerator))))
    return float(aggregate.of_ratio(ratio)[0, 0]), int((~np.isnan(chosen_on.numerator)).sum())


def _reported(row: dict[str, Any], reported: pd.DataFrame, frame: pd.DataFrame) -> dict[str, Any]:
    """Means over the deciding cells; an interval where there is one cell."""
    if row["reported_on"] == "the same items":
        found = frame[frame["cell"].isin(row["cells"]) & (frame["metric"] == row["metric"])]
    else:
        found = reported.loc[[(cell, row["metric"]) for cell in row["cells"]]]
    alone = len(found) == 1
    values = {name: found[name].mean() for name in ("baseline", "score", "difference")}
    ends = {name: found[name].iloc[0] if alone else np.nan for name in ("low", "high", "p")}
    return row | values | ends | {"n": int(found["n"].sum())}


if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Results:
    """Tables of one sweep, or of one comparison.

    Attributes:
        sweep: what was read.
        effects: one row a cell and metric.
        summary: self and cross for each factor (`tables.summary`).
        best: the best factor of each language (`best_factors`).
        controls: LSS and LFS beside random neurons (`tables.controls`).
        damage: success beside its price (`tables.damage`).
        cost: seconds and tokens of each cell.
        neurons: steered language -> neurons in each layer; empty where the neuron set is not at hand.
    """

    sweep: Sweep
    effects: Effects
    summary: pd.DataFrame
    best: pd.DataFrame
    controls: pd.DataFrame
    damage: pd.DataFrame
    cost: pd.DataFrame
    neurons: dict[str, list[int]] = field(default_factory=dict)

    def frames(self) -> dict[str, pd.DataFrame]:
        """Name -> table, in the order in which a person reads them; tables without rows are left out."""
        found = {
            "summary": self.summary,
            "effects": self.effects.frame,
            "best-factors": self.best,
            "controls": self.controls,
            "damage": self.damage,
            "cost": self.cost,
            "missing": self.sweep.missing,
        }
        return {name: frame for name, frame in found.items() if len(frame)}


def compute(sweep: Sweep) -> Results:
    """All tables of a sweep."""
    effects = effects_of(sweep)
    return Results(
        sweep,
        effects,
        tables.summary(effects),
        best_factors(sweep, effects),
        tables.controls(sweep, effects),
        tables.damage(effects),
        tables.cost(sweep),
    )
