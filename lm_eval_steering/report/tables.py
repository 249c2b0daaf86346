"""The tables of a report, as data frames: matrix, self and cross, controls, damage, best factors, cost.

A blank (nan) is a cell that is not there; it is counted, and never taken for 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.languages import family_order
from lm_eval_steering.metrics.statistics import Array, against_random, interval_of, over_languages
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.report.effects import ALPHA, Effects, arms_of, effects_of, halves_of, scores_by_cell
from lm_eval_steering.report.naming import CROSS, SELF, SEVERAL
from lm_eval_steering.report.read import Sweep, check_pairs

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


# --- What stands beside a gain: random controls, and the damage that came with it

CONTROLS_FOR_SD = 5  # below that many random sets a standard deviation says nothing, and their range is given
CONTROLLED = ("lfs", "lss", "lss_distinct")
# The same damage under several names; the first that a task has is taken.
PERPLEXITIES = ("nats_per_token", "token_perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
DAMAGES = {"degenerate": "degenerate", "unknown": "lang_unknown"}
_NO_FACTOR = "none"
_PLACE = ["task", "steered", "kind", "factor", "items", "target"]


def controls(sweep: Sweep, effects: Effects) -> pd.DataFrame:
    """LSS and LFS of each cell beside the same score of its matched random sets.

    Columns: `score`, `sets` (number of random sets), their `mean`, `lowest`, `highest`, `difference` from their mean,
    `deviations` (that difference in their standard deviations, from 5 sets up, else blank), and `at_or_above`, the
    share of random sets that score as high, with its Wilson interval.
    """
    import pandas as pd

    random = sweep.cells[sweep.cells["control"].notna()].merge(sweep.scores, on="cell")
    random = random[random["metric"].isin(CONTROLLED) & random["value"].notna()]
    random = random.assign(factor=[_NO_FACTOR if np.isnan(factor) else factor for factor in random["factor"]])
    found = {key: own["value"].tolist() for key, own in random.groupby([*_PLACE, "metric"])}
    targets = sweep.cells.set_index("cell")["target"]
    rows = []
    for row in single(effects).to_dict("records"):
        if row["metric"] not in CONTROLLED:
            continue
        factor = _NO_FACTOR if np.isnan(row["factor"]) else row["factor"]
        place = (row["task"], row["steered"], row["kind"], factor, row["items"], targets[row["cell"]], row["metric"])
        values = found.get(place, [])
        rows.append(_against(row, values) if values else _uncontrolled(row))
    return pd.DataFrame(rows)


def _against(row: dict[str, Any], values: list[float]) -> dict[str, Any]:
    null = against_random(row["score"], values)
    deviation = float(np.std(values, ddof=1)) if len(values) >= CONTROLS_FOR_SD else np.nan
    difference = null.own - null.mean
    return _uncontrolled(row) | {
        "sets": null.sets, "mean": null.mean, "lowest": null.lowest, "highest": null.highest, "difference": difference,
        "deviations": difference / deviation if deviation and deviation > 0 else np.nan,
        "at_or_above": null.share, "at_or_above_low": null.interval[0], "at_or_above_high": null.interval[1],
    }  # fmt: skip


def _uncontrolled(row: dict[str, Any]) -> dict[str, Any]:
    facts = ("family", "metric", "kind", "factor", "steered", "evaluated", "n", "score")
    blank = ("mean", "lowest", "highest", "difference", "deviations", "at_or_above", "at_or_above_low",
             "at_or_above_high")  # fmt: skip
    return {name: row[name] for name in facts} | {"sets": 0} | dict.fromkeys(blank, np.nan)


def damage(effects: Effects) -> pd.DataFrame:
    """For each language, intervention and factor: success beside its price.

    `success` is the mean LFS. `perplexity_self`, `perplexity_cross` and `perplexity_all` are rises of the perplexity
    of the steered language, of the others and of all texts; `perplexity` names the unit. `degenerate` and `unknown` are
    rises of the share of outputs that repeat themselves or are in no known language; a `_score` column is the share
    itself. `n_outputs` and `n_texts` count what the means are over.
    """
    import pandas as pd

    frame = single(effects)
    unit = next((name for name in PERPLEXITIES if (frame["metric"] == name).any()), "")
    rows = []
    for key, group in frame.groupby(["steered", "kind", "factor"], sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(("steered", "kind", "factor"), key, strict=True))
        forced = group[group["metric"] == "lfs"]
        row |= {"success": forced["score"].mean(), "success_gain": forced["difference"].mean()}
        row["n_outputs"] = int(forced["n"].sum())
        texts = group[group["metric"] == unit] if unit else group.iloc[:0]
        row |= {"perplexity": unit, "n_texts": int(texts["n"].sum())}
        row["perplexity_all"] = texts["difference"].mean()
        for relation in (SELF, CROSS):
            row[f"perplexity_{relation}"] = texts[texts["relation"] == relation]["difference"].mean()
        for name, metric in DAMAGES.items():
            own_rows = group[group["metric"] == metric]
            row |= {name: own_rows["difference"].mean(), f"{name}_score": own_rows["score"].mean()}
        rows.append(row)
    found = pd.DataFrame(rows)
    measured = [name for name in found.columns if name.startswith(("success", "perplexity_", "degenerate", "unknown"))]
    return found[found[measured].notna().any(axis=1)].reset_index(drop=True) if len(found) else found


# --- The best factor of each language: chosen on one half of the items, reported on the other one
#
# A factor that is chosen and reported on the same items looks better than it is. The halves are those of the sweep
# where it has split its items, else those of a seeded hash of the document number.

_BEST_COLUMNS = (
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
        return pd.DataFrame(columns=list(_BEST_COLUMNS))
    wanted = sweep.cells[sweep.cells["cell"].isin(set(chosen))]
    reported = effects_of(sweep, True, wanted).frame.set_index(["cell", "metric"]).sort_index()
    return pd.DataFrame([_reported(row, reported, frame) for row in rows]).reindex(columns=list(_BEST_COLUMNS))


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


# --- All of them ----------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Tables of one sweep, or of one comparison.

    Attributes:
        sweep: what was read.
        effects: one row a cell and metric.
        summary: self and cross for each factor (`summary`).
        best: the best factor of each language (`best_factors`).
        controls: LSS and LFS beside random neurons (`controls`).
        damage: success beside its price (`damage`).
        cost: seconds and tokens of each cell.
        neurons: the neuron set of the sweep; None where it is not at hand.
    """

    sweep: Sweep
    effects: Effects
    summary: pd.DataFrame
    best: pd.DataFrame
    controls: pd.DataFrame
    damage: pd.DataFrame
    cost: pd.DataFrame
    neurons: NeuronSet | None = None

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
    """All tables of a sweep.

    Raises:
        ReportError: if a cell and its baseline are not a pair (`read.check_pairs`).
    """
    check_pairs(sweep)
    effects = effects_of(sweep)
    return Results(
        sweep,
        effects,
        summary(effects),
        best_factors(sweep, effects),
        controls(sweep, effects),
        damage(effects),
        cost(sweep),
    )
