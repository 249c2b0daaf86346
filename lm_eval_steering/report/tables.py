"""The tables of a report, as data frames: matrix, self and cross, controls, damage, best factors, cost.

A missing cell is blank (nan); it is counted, and never taken for 0.
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
from lm_eval_steering.report.effects import ALPHA, Effects, arms_of, effects_of, scores_by_cell
from lm_eval_steering.report.naming import CROSS, DAMAGES, NATS, SELF, SEVERAL, SUCCESSES, sign_of
from lm_eval_steering.report.read import CLEAN, FORCED, Sweep, check_pairs
from lm_eval_steering.sweep.damage_search import TOLERANCE

if TYPE_CHECKING:
    import pandas as pd

    from lm_eval_steering.report.method_comparison import MethodComparison

GROUP = ["family", "metric", "kind", "factor"]
RELATIONS = (SELF, CROSS, SEVERAL)
Places = dict[tuple[Any, ...], list[dict[str, Any]]]


def single(effects: Effects) -> pd.DataFrame:
    """One row per cell of the matrix: of two stages that evaluated a cell, the one with more items."""
    frame = effects.frame.sort_values(["n", "stage"], ascending=[False, True], kind="stable")
    return frame.drop_duplicates([*GROUP, "steered", "evaluated"]).sort_index()


def deciding(rows: pd.DataFrame, column: str = "relation") -> pd.DataFrame:
    """The rows that answer a question: items in the steered language, else in several, else in others."""
    relation = next((name for name in (SELF, SEVERAL, CROSS) if (rows[column] == name).any()), None)
    return rows if relation is None else rows[rows[column] == relation]


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
    pivoted = at.pivot(index="steered", columns="evaluated", values=value)
    return pivoted.reindex(index=rows, columns=columns)


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
    for _, setting in frame.groupby(["family", "metric", "kind"], sort=False):
        expected = _expected(setting)
        for _, group in setting.groupby("factor", sort=True, dropna=False):
            rows.append(_summary_row(group, effects, expected))
    return _readable_order(pd.DataFrame(rows)) if rows else pd.DataFrame(rows)


def _readable_order(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that have data; successes first, then damage, then the rest, and last what is zero everywhere."""
    ranks = {name: rank for rank, name in enumerate((*SUCCESSES, *DAMAGES))}
    values = table[[f"{relation}_{name}" for relation in RELATIONS for name in ("score", "baseline", "difference")]]
    order = table.assign(
        _zero=(values.fillna(0.0) == 0).all(axis=1),
        _rank=[ranks.get(str(metric).partition("@")[0], len(ranks)) for metric in table["metric"]],
    )
    order = order[values.notna().any(axis=1)].sort_values(["_zero", "_rank"], kind="stable", ignore_index=True)
    return order.drop(columns=["_zero", "_rank"])


def by_relation(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary with one row for self, cross or several, so that every row has data; `gap` is in the row of self."""
    import pandas as pd

    parts = []
    for relation in RELATIONS:
        names = {name: name.removeprefix(f"{relation}_") for name in summary if name.startswith(f"{relation}_")}
        part = summary[[*GROUP, "languages", *names]].rename(columns=names)
        part.insert(len(GROUP), "items_in", relation)
        if relation == SELF:
            part = part.assign(**{name: summary[name] for name in ("gap", "gap_low", "gap_high")})
        parts.append(part[summary[f"{relation}_score"].notna()])
    return pd.concat(parts).sort_index(kind="stable").reset_index(drop=True)


def _expected(rows: pd.DataFrame) -> dict[str, int]:
    """Cells of each relation that the grid of steered and evaluated languages would have.

    A pair that no factor has evaluated is not defined (LSS towards its own base), so the grid is the union over
    factors; where a whole row or column is missing, `Store.missing` says so.
    """
    pairs = rows.drop_duplicates(["steered", "evaluated"])
    return {relation: int((pairs["relation"] == relation).sum()) for relation in RELATIONS}


def _summary_row(group: pd.DataFrame, effects: Effects, expected: dict[str, int]) -> dict[str, Any]:
    first = group.iloc[0]
    row: dict[str, Any] = {name: first[name] for name in GROUP}
    row["higher_is_better"] = first["higher_is_better"]
    row["languages"] = group["steered"].nunique()
    ends = intervals(group, effects)
    sign = sign_of(row["higher_is_better"])
    for relation in RELATIONS:
        cells = group[group["relation"] == relation]
        differences = cells["difference"]
        low, high = ends.get(relation, (np.nan, np.nan))
        better = sign * differences > 0
        row |= {
            f"{relation}_cells": int(differences.notna().sum()),
            f"{relation}_missing": expected[relation] - int(differences.notna().sum()),
            f"{relation}_n": int(cells["n"].sum()),
            f"{relation}_baseline": cells["baseline"].mean(),
            f"{relation}_score": cells["score"].mean(),
            f"{relation}_difference": differences.mean(),
            f"{relation}_median": differences.median(),
            f"{relation}_low": low,
            f"{relation}_high": high,
            f"{relation}_improved": int(better.sum()),
            f"{relation}_significant": int((better & (cells["p_holm"] < ALPHA)).sum()),
        }
    row["gap"] = row["self_difference"] - row["cross_difference"]
    row["gap_low"], row["gap_high"] = ends.get("gap", (np.nan, np.nan))
    return row


def intervals(group: pd.DataFrame, effects: Effects) -> dict[str, tuple[float, float]]:
    """Relation -> interval of its mean difference; only where every cell of the relation has replicates."""
    keys = list(zip(group["cell"], group["metric"], strict=True))
    present = np.array([key in effects.replicates for key in keys])
    if not present.any():
        return {}
    replicates = np.column_stack([effects.replicates[key] for key in keys if key in effects.replicates])
    known = group[present]
    relations = known["relation"].to_numpy()
    whole = {r: bool((group["relation"] == r).sum() == (relations == r).sum() > 0) for r in RELATIONS}
    groups: dict[str, NDArray[np.bool_]] = {r: relations == r for r in RELATIONS if whole[r]}
    evaluated = [
        steered if relation != CROSS else code
        for steered, relation, code in zip(known["steered"], relations, known["evaluated"], strict=True)
    ]
    drawn: dict[str, Array] = over_languages(replicates, list(known["steered"]), evaluated, groups)
    if SELF in drawn and CROSS in drawn:
        drawn["gap"] = drawn[SELF] - drawn[CROSS]
    ends = {name: interval_of(draws) for name, draws in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def cost(sweep: Sweep) -> pd.DataFrame:
    """Seconds and tokens of each cell, where the sweep noted them."""
    import pandas as pd

    facts = sweep.cells[["cell", "task", "steered", "kind", "factor", "control"]]
    if sweep.timings.empty:
        return pd.DataFrame(columns=[*facts.columns, "seconds", "tokens"])
    times = sweep.timings.reindex(columns=["cell", "seconds", "tokens", "device", "batch_size"])
    return facts.merge(times, on="cell", how="inner").sort_values("seconds", ascending=False, ignore_index=True)


# --- Random controls, and the damage of each intervention

CONTROLS_FOR_SD = 5  # with fewer random sets their range is given and not their standard deviation
CONTROLLED = ("lfs_clean", "lfs", "lss", "lss_distinct")
_BROKEN = {"degenerate": "degenerate", "repeated": "repeated", "unknown": "lang_unknown"}


def controls(sweep: Sweep, effects: Effects) -> pd.DataFrame:
    """LSS and LFS of each cell with the scores of its matched random sets.

    Columns: `score`, `sets` (number of random sets), their `mean`, `lowest`, `highest`, `difference` from their mean,
    `deviations` (that difference in their standard deviations, from 5 sets up, else blank), and `at_or_above`, the
    share of random sets that score as high, with its Wilson interval. The controls of an instruction are the same one
    naming other languages, of which `sets` is the number.
    """
    import pandas as pd

    scores = scores_by_cell(sweep)
    cells, by_place = {row["cell"]: row for row in sweep.steered_cells().to_dict("records")}, controls_by_place(sweep)
    rows = []
    for row in single(effects).to_dict("records"):
        if row["metric"] not in CONTROLLED:
            continue
        values = list(control_scores(sweep, cells[row["cell"]], row["metric"], scores, by_place).values())
        rows.append(_against(row, values) if values else _uncontrolled(row))
    return pd.DataFrame(rows)


def control_scores(
    sweep: Sweep, cell: dict[str, Any], metric: str, scores: dict[str, Any], places: Places, half: bool = False,
    damage: float | None = None,
) -> dict[int, float]:  # fmt: skip
    """Seed -> score of each matched random set of a cell: at its factor, or at one of its own that does a damage.

    Args:
        sweep: cells, scores, items.
        cell: a row of its cells.
        metric: of the task.
        scores: of `scores_by_cell`.
        places: of `controls_by_place`; of `controls_by_damage` where a damage is given.
        half: whether over the half of the items that nothing was chosen on.
        damage: that the factors were searched for, in nats per token.
    """
    place = _place_of(cell) if damage is None else (*_without_factor(cell), damage)
    found = {
        control["control"]: score_of(sweep, control, metric, scores, True if half else None)
        for control in places.get(place, [])
    }
    return {int(seed): score for seed, score in found.items() if score is not None}


def controls_by_place(sweep: Sweep) -> Places:
    """Cells of random sets by everything that they share with the cell that they are controls of."""
    places: Places = {}
    for control in sweep.cells[sweep.cells["control"].notna()].to_dict("records"):
        places.setdefault(_place_of(control), []).append(control)
    return places


def _place_of(cell: dict[str, Any]) -> tuple[Any, ...]:
    factor = None if np.isnan(cell["factor"]) else cell["factor"]
    return (*(cell[name] for name in ("task", "steered", "kind", "items", "target")), factor)


def score_of(
    sweep: Sweep, cell: dict[str, Any], metric: str, scores: dict[str, Any], half: bool | None
) -> float | None:
    """A cell's score over all its items (half None) or over one half; None where it is not known."""
    pair = arms_of(sweep, cell, metric, scores, half)
    if pair is None:
        stored = scores.get(cell["cell"], {}).get(metric)
        return stored[0] if stored is not None and half is None else None
    _, after, aggregate = pair
    ratio = after.column().ratio(np.ones((1, len(after.numerator))))
    return float(aggregate.of_ratio(ratio)[0, 0])


def _against(row: dict[str, Any], values: list[float]) -> dict[str, Any]:
    null = against_random(row["score"], values)
    deviation = float(np.std(values, ddof=1)) if len(values) >= CONTROLS_FOR_SD else np.nan
    difference = null.score - null.mean
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
    """For each language, intervention and factor: success and damage.

    `success` is the mean of `success_metric` (clean LFS where it is known, else LFS). `perplexity_self`,
    `perplexity_cross` and `perplexity_all` are rises of the perplexity of the steered language, of the others and of
    all texts; `perplexity` names the unit. `degenerate`, `repeated` and `unknown` are rises of the share of outputs
    that say nothing, that are another item's output too, or that are in no known language; a `_score` column is the
    share itself. `n_outputs` and `n_texts` count what the means are over. Where no task is text of the steered
    language, `perplexity_self` is the damage that was measured when the factor was searched for.
    """
    import pandas as pd

    frame = on_the_same_tasks(single(effects))
    unit = next((name for name in DAMAGES if (frame["metric"] == name).any()), "")
    success = next((name for name in (CLEAN, FORCED) if (frame["metric"] == name).any()), FORCED)
    rows = []
    for key, group in frame.groupby(["steered", "kind", "factor"], sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(("steered", "kind", "factor"), key, strict=True))
        forced = group[group["metric"] == success]
        row |= {"success_metric": success, "success": forced["score"].mean()}
        row["success_gain"] = forced["difference"].mean()
        row["n_outputs"] = int(forced["n"].sum())
        texts = group[group["metric"] == unit] if unit else group.iloc[:0]
        row |= {"perplexity": unit, "n_texts": int(texts["n"].sum())}
        row["perplexity_all"] = texts["difference"].mean()
        for relation in (SELF, CROSS):
            row[f"perplexity_{relation}"] = texts[texts["relation"] == relation]["difference"].mean()
        reached = group["damage_reached"].dropna()
        if len(reached) and unit in ("", NATS) and np.isnan(row["perplexity_self"]):
            row |= {"perplexity": NATS, "perplexity_self": reached.iloc[0]}
        for name, metric in _BROKEN.items():
            own_rows = group[group["metric"] == metric]
            row |= {name: own_rows["difference"].mean(), f"{name}_score": own_rows["score"].mean()}
        rows.append(row)
    result = pd.DataFrame(rows)
    measured = [name for name in result if name.startswith(("success", "perplexity_", *_BROKEN))]
    measured = [name for name in measured if name != "success_metric"]
    return result[result[measured].notna().any(axis=1)].reset_index(drop=True) if len(result) else result


def on_the_same_tasks(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each metric the tasks that every factor was run on: only the chosen factors have those of `then`."""
    first = frame[frame["stage"] == 1].groupby("metric")["task"].agg(set)
    kept = [name not in first or task in first[name] for name, task in zip(frame["metric"], frame["task"], strict=True)]
    return frame[kept]


# --- Interventions at equal damage, where the plan had factors searched for

_EQUAL_COLUMNS = (
    "family", "metric", "kind", "items_in", "damage", "languages", "steered", "missing", "off_target", "reached_low",
    "reached_high", "factor_low", "factor_high", "n", "baseline", "score", "difference", "low", "high", "sets",
    "random_mean", "random_lowest", "random_highest", "sets_at_factor", "random_at_factor", "higher_is_better",
)  # fmt: skip


def damages_of(asked: str) -> list[float]:
    """The damages of a cell's `damage_asked`."""
    return [float(damage) for damage in asked.split("+")] if asked else []


def equal_damage(sweep: Sweep, effects: Effects) -> pd.DataFrame:
    """One row for each score, intervention and damage: the mean over the languages whose factors do that damage.

    An instruction, which has no factor, has one row at the damage that it does.

    Columns: `damage` (asked, in nats per token; blank for an instruction), `languages` (their number) and `steered`
    (which), `missing` (languages that another intervention has and this one does not reach), `off_target` (cells whose
    damage is not within 10 %), the lowest and highest damage reached and factor, the score beside the baseline's with
    the interval of the difference over languages and items, and the same score of random neurons (mean over the
    languages; `sets` of them): at factors that do the same damage, and at the same factors (`sets_at_factor`,
    `random_at_factor`). Of an instruction the latter are of the same one naming other languages.
    """
    import pandas as pd

    frame = single(effects)
    frame = frame[(frame["damage_asked"] != "") | frame["damage_reached"].notna()]
    frame = frame.assign(damage=frame["damage_asked"].map(damages_of)).explode("damage").astype({"damage": float})
    if frame.empty:
        return pd.DataFrame(columns=list(_EQUAL_COLUMNS))
    scores, by_place, at_damage = scores_by_cell(sweep), controls_by_place(sweep), controls_by_damage(sweep)
    cells = {row["cell"]: row for row in sweep.steered_cells().to_dict("records")}
    rows = []
    for (family, metric, relation), of_score in frame.groupby(["family", "metric", "relation"], sort=False):
        everyone = set(of_score["steered"])
        for (kind, damage), group in of_score.groupby(["kind", "damage"], sort=False, dropna=False):
            own = [cells[cell] for cell in group["cell"]]
            random = list(
                means_of_sets(
                    [control_scores(sweep, cell, metric, scores, at_damage, damage=damage) for cell in own]
                ).values()
            )
            at_factor = means_of_sets([control_scores(sweep, cell, metric, scores, by_place) for cell in own])
            low, high = intervals(group, effects).get(relation, (np.nan, np.nan))
            there = sorted(set(group["steered"]))
            reached = group["damage_reached"]
            rows.append({
                "family": family, "metric": metric, "kind": kind, "items_in": relation, "damage": damage,
                "languages": len(there), "steered": " ".join(there), "missing": " ".join(sorted(everyone - set(there))),
                "off_target": int((abs(reached - damage) > TOLERANCE * damage).sum()),
                "reached_low": reached.min(), "reached_high": reached.max(),
                "factor_low": group["factor"].min(), "factor_high": group["factor"].max(), "n": int(group["n"].sum()),
                "baseline": group["baseline"].mean(), "score": group["score"].mean(),
                "difference": group["difference"].mean(), "low": low, "high": high, "sets": len(random),
                "random_mean": float(np.mean(random)) if random else np.nan,
                "random_lowest": min(random, default=np.nan), "random_highest": max(random, default=np.nan),
                "sets_at_factor": len(at_factor),
                "random_at_factor": float(np.mean(list(at_factor.values()))) if at_factor else np.nan,
                "higher_is_better": group["higher_is_better"].iloc[0],
            })  # fmt: skip
    order = {name: place for place, name in enumerate(dict.fromkeys(row["kind"] for row in rows))}
    rows.sort(
        key=lambda row: (
            row["family"], row["metric"], row["items_in"], np.nan_to_num(row["damage"], nan=np.inf), order[row["kind"]],
        )
    )  # fmt: skip
    return pd.DataFrame(rows, columns=list(_EQUAL_COLUMNS))


def _without_factor(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[name] for name in ("task", "steered", "kind", "items", "target"))


def controls_by_damage(sweep: Sweep) -> Places:
    """Cells of random sets whose factors were searched for, by what they share with a cell, and the damage."""
    places: Places = {}
    for control in sweep.cells[sweep.cells["control"].notna()].to_dict("records"):
        for damage in damages_of(control["damage_asked"]):
            places.setdefault((*_without_factor(control), damage), []).append(control)
    return places


def means_of_sets(by_cell: Sequence[dict[int, float]]) -> dict[int, float]:
    """Seed -> mean score over the cells, of the random sets that all of them have."""
    seeds = set.intersection(*(set(of_cell) for of_cell in by_cell)) if by_cell else set()
    return {seed: float(np.mean([of_cell[seed] for of_cell in by_cell])) for seed in sorted(seeds)}


# --- The best factor of each language: chosen on one half of the items, reported on the other one
#
# A factor that is chosen and reported on the same items looks better than it is. The halves are those of the sweep
# where it has split its items, else those of a seeded hash of the document number.

_BEST_COLUMNS = (
    "family", "metric", "kind", "steered", "on", "factors", "factor", "n_choose", "score_choose", "n", "baseline",
    "score", "difference", "low", "high", "p", "higher_is_better",
)  # fmt: skip


def best_factors(sweep: Sweep, effects: Effects) -> pd.DataFrame:
    """One row a language, intervention, task family and metric.

    Columns: `on` (self, several or cross: which cells decide; the self cell where there is one), `factors` tried,
    `factor` chosen, `n_choose` and `n` (items that it was chosen on, and other ones that it is reported on), its score
    on the former (`score_choose`), and what it does on the latter. The first of equals is taken, in the order of the
    factors. Only where two factors or more were evaluated, the items can be halved, and it is known whether more is
    better.
    """
    import pandas as pd

    frame = single(effects)
    frame = frame[frame["factor"].notna() & frame["higher_is_better"].notna()]
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
    required = sweep.cells[sweep.cells["cell"].isin(set(chosen))]
    reported = effects_of(sweep, True, required).frame.set_index(["cell", "metric"]).sort_index()
    return pd.DataFrame([_reported(row, reported) for row in rows]).reindex(columns=list(_BEST_COLUMNS))


def _choose(
    sweep: Sweep, group: pd.DataFrame, by_cell: dict[str, dict[str, Any]], scores: dict[str, Any]
) -> dict[str, Any] | None:
    rows = deciding(group)
    if rows["factor"].nunique() < 2:
        return None
    first = rows.iloc[0]
    metric, sign = str(first["metric"]), 1 if bool(first["higher_is_better"]) else -1
    objective, sizes = {}, {}
    for factor, at in rows.groupby("factor", sort=True):
        halves = [_score_of_half(sweep, by_cell[cell], metric, scores) for cell in at["cell"]]
        known = [half for half in halves if half is not None]
        if len(known) < len(halves):
            return None
        objective[factor] = float(np.mean([value for value, _ in known]))
        sizes[factor] = sum(n for _, n in known)
    factor = max(objective, key=lambda name: sign * objective[name])
    return {
        **{name: first[name] for name in ("family", "metric", "kind", "steered", "higher_is_better")},
        "on": first["relation"],
        "factors": rows["factor"].nunique(),
        "factor": factor,
        "n_choose": sizes[factor],
        "score_choose": objective[factor],
        "cells": list(rows.loc[rows["factor"] == factor, "cell"]),
    }


def _score_of_half(sweep: Sweep, cell: dict[str, Any], metric: str, scores: dict[str, Any]) -> tuple[float, int] | None:
    """(score on the half to choose on, items); None where items are not known, or a half is empty."""
    sides = [arms_of(sweep, cell, metric, scores, half) for half in (False, True)]
    if sides[0] is None or sides[1] is None:
        return None
    _, after, aggregate = sides[0]
    ratio = after.column().ratio(np.ones((1, len(after.numerator))))
    return float(aggregate.of_ratio(ratio)[0, 0]), int((~np.isnan(after.numerator)).sum())


def _reported(row: dict[str, Any], reported: pd.DataFrame) -> dict[str, Any]:
    """Means over the deciding cells; an interval where there is one cell."""
    rows = reported.loc[[(cell, row["metric"]) for cell in row["cells"]]]
    alone = len(rows) == 1
    values = {name: rows[name].mean() for name in ("baseline", "score", "difference")}
    ends = {name: rows[name].iloc[0] if alone else np.nan for name in ("low", "high", "p")}
    return row | values | ends | {"n": int(rows["n"].sum())}


# --- All of them ----------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Tables of one sweep, or of one comparison.

    Attributes:
        sweep: what was read.
        effects: one row per cell and metric.
        summary: self and cross for each factor (`summary`).
        best: the best factor of each language (`best_factors`).
        controls: LSS and LFS against random neurons (`controls`).
        damage: success and damage (`damage`).
        equal: interventions at equal damage (`equal_damage`).
        methods: which intervention does most on each language (`method_comparison`); None where there is one alone.
        cost: seconds and tokens of each cell.
        neurons: the neuron set of the sweep; None if it cannot be read.
    """

    sweep: Sweep
    effects: Effects
    summary: pd.DataFrame
    best: pd.DataFrame
    controls: pd.DataFrame
    damage: pd.DataFrame
    cost: pd.DataFrame
    equal: pd.DataFrame
    methods: MethodComparison | None
    neurons: NeuronSet | None = None

    def frames(self) -> dict[str, pd.DataFrame]:
        """Name -> table, in the order in which a person reads them; tables without rows are left out."""
        tables = {
            "summary": self.summary,
            "effects": self.effects.frame,
            "best-factors": self.best,
            "controls": self.controls,
            "damage": self.damage,
            "equal-damage": self.equal,
            **({} if self.methods is None else {"methods": self.methods.rows, "methods-paired": self.methods.pairs}),
            "cost": self.cost,
            "missing": self.sweep.missing,
        }
        return {name: frame for name, frame in tables.items() if len(frame)}


def compute(sweep: Sweep) -> Results:
    """All tables of a sweep.

    Raises:
        ReportError: if a cell and its baseline are not a pair (`read.check_pairs`).
    """
    from lm_eval_steering.report.method_comparison import compare_methods  # which is made of these tables

    check_pairs(sweep)
    effects = effects_of(sweep)
    best, damages = best_factors(sweep, effects), damage(effects)
    return Results(
        sweep, effects, summary(effects), best, controls(sweep, effects), damages, cost(sweep),
        equal_damage(sweep, effects), compare_methods(sweep, effects, best, damages),
    )  # fmt: skip
