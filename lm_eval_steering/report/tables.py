"""The tables of a report, as data frames: matrix, summary of self and cross, and the cost of each cell.

A blank (nan) is a cell that is not there; it is counted, and never taken for 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_steering.languages import family_order
from lm_eval_steering.metrics.statistics import Array, against_random, interval_of, over_languages
from lm_eval_steering.report.effects import ALPHA, Effects
from lm_eval_steering.report.naming import CROSS, SELF, SEVERAL
from lm_eval_steering.report.read import Sweep

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


# --- What stands beside a gain: random controls, and the damage that came with it

if TYPE_CHECKING:
    import pandas as pd

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
