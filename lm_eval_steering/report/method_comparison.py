"""Which method does most: success of every intervention on every language, at equal damage and each at its best.

A method is a kind of intervention (`naming.kind_of`): an operation, value, site and layers, or an instruction in the
prompt. Two methods are compared over the same items by the paired bootstrap of `metrics.statistics`; means are over the
same languages for every method. What cannot be compared is a row that says why.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_steering.metrics.statistics import (
    MEAN,
    Arm,
    Array,
    against_random,
    compare,
    interval_of,
    over_languages,
)
from lm_eval_steering.report.effects import Effects, aggregate_of, baseline_values, halves_of, scores_by_cell
from lm_eval_steering.report.naming import NATS, SUCCESSES, listed, number
from lm_eval_steering.report.read import DEGENERATE, Items, Sweep, align
from lm_eval_steering.report.tables import (
    control_scores,
    controls_by_damage,
    controls_by_place,
    damages_of,
    deciding,
    means_of_sets,
    on_the_same_tasks,
    single,
)  # fmt: skip
from lm_eval_steering.sweep.damage_search import TOLERANCE

if TYPE_CHECKING:
    import pandas as pd

BEST = "best"
MEAN_OVER = ""  # `steered` of a row that is a mean over languages
_ROW = (
    "at", "steered", "languages", "kind", "factor", "damage", "n", "baseline", "success", "difference", "low", "high",
    "wins", "ahead_of", "sets", "random_lowest", "random_mean", "random_highest", "random_reached", "lss", "n_lss",
    "degenerate", "missing",
)  # fmt: skip
_PAIR = ("at", "steered", "languages", "kind", "other", "n", "difference", "low", "high", "p")
_POINT = ("kind", "steered", "factor", "damage", "success", "baseline", "n")


@dataclass(frozen=True)
class MethodComparison:
    """Methods beside each other.

    Attributes:
        family: of the tasks whose success is compared.
        metric: that success.
        rows: one row for each setting `at` (a damage in nats per token, or `best`), language and method; `steered` is
            empty and `languages` their number in a row that is a mean over languages. `difference` is from the
            baseline, with its interval (`low`, `high`); `ahead_of` names the methods that it exceeds by the whole
            paired interval (joined by ` + `), and `wins` says that these are all others. `damage` is the rise in nats
            per token of text in the steered language; `random_reached` of `sets` random sets, or other instructions,
            have as high a success. `missing` says why a row has no success.
        pairs: two methods each: success of `kind` minus that of `other` over the same items, its interval, and p.
        points: every method, language and factor with its damage and its success over all items.
    """

    family: str
    metric: str
    rows: pd.DataFrame
    pairs: pd.DataFrame
    points: pd.DataFrame


@dataclass(frozen=True)
class _Point:
    """One method on one language at one factor (nan where it has none): its cells by task."""

    factor: float
    damage: float
    asked: tuple[float, ...]
    cells: Mapping[str, dict[str, Any]]


_Curves = Mapping[str, Mapping[str, Sequence[_Point]]]  # kind -> steered language -> by factor


@dataclass(frozen=True)
class _Pair:
    """One success minus another over the same items; replicates are (resamples, tasks)."""

    n: int
    difference: float
    low: float
    high: float
    p: float
    replicates: Array


def compare_methods(
    sweep: Sweep, effects: Effects, best: pd.DataFrame, damage: pd.DataFrame
) -> MethodComparison | None:
    """The comparison; None where fewer than two methods steer with one success in common.

    Args:
        sweep: cells, scores, items.
        effects: of all cells.
        best: of `tables.best_factors`.
        damage: of `tables.damage`.
    """
    import pandas as pd

    rows = _of_success(effects)
    if rows is None or rows["kind"].nunique() < 2:
        return None
    family, metric = str(rows["family"].iloc[0]), str(rows["metric"].iloc[0])
    facts = _Facts(sweep, effects, metric, rows, damage)
    best = best[(best["family"] == family) & (best["metric"] == metric)] if len(best) else best
    chosen = {(row["kind"], row["steered"]): row["factor"] for row in best.to_dict("records")}
    targets = sorted({target for points in facts.points() for target in points.asked})
    languages = list(dict.fromkeys(rows["steered"]))
    table: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    settings: list[float | str] = [*targets, BEST]
    for at in settings:
        compared = []
        for language in languages:
            points = {
                kind: _at_best(curve, language, chosen.get((kind, language)))
                if isinstance(at, str) else _at_damage(curve, language, at)
                for kind, curve in facts.curves.items()
            }  # fmt: skip
            compared.append(_Language(facts, language, at, points))
        for block in compared:
            table += block.rows()
            pairs += block.pair_rows()
        means = _over_languages(compared, at)
        table += means[0]
        pairs += means[1]
    return MethodComparison(
        family, metric, pd.DataFrame(table, columns=list(_ROW)), pd.DataFrame(pairs, columns=list(_PAIR)),
        pd.DataFrame(facts.point_rows(), columns=list(_POINT)),
    )  # fmt: skip


def _of_success(effects: Effects) -> pd.DataFrame | None:
    """Effects of the first success that was measured, on the family of tasks that has most items of it."""
    frame = on_the_same_tasks(single(effects))
    frame = frame[~frame["deactivation"] & frame["score"].notna()]
    names = frame["metric"].map(lambda metric: str(metric).partition("@")[0])
    for success in SUCCESSES:
        rows = frame[names == success]
        if len(rows):
            rows = rows[rows["family"] == rows.groupby("family")["n"].sum().idxmax()]
            return deciding(rows[rows["metric"] == rows["metric"].iloc[0]])
    return None


class _Facts:
    """What all settings of one comparison share."""

    def __init__(self, sweep: Sweep, effects: Effects, metric: str, rows: pd.DataFrame, damage: pd.DataFrame) -> None:
        self.sweep, self.metric, self.frame = sweep, metric, effects.frame
        self.scores = scores_by_cell(sweep)
        self.by_place, self.by_damage = controls_by_place(sweep), controls_by_damage(sweep)
        by_cell = {row["cell"]: row for row in sweep.steered_cells().to_dict("records")}
        own_text = {
            (row["steered"], row["kind"], _key(row["factor"])): row["perplexity_self"]
            for row in damage.to_dict("records") if row["perplexity"] == NATS
        }  # fmt: skip
        curves: dict[str, dict[str, list[_Point]]] = {}
        for (kind, steered, factor), group in rows.groupby(["kind", "steered", "factor"], sort=True, dropna=False):
            cells = {row.task: by_cell[row.cell] for row in group.itertuples()}
            reached = group["damage_reached"].dropna()
            measured = float(reached.iloc[0]) if len(reached) else own_text.get((steered, kind, _key(factor)), np.nan)
            asked = sorted({target for text in group["damage_asked"] for target in damages_of(text)})
            point = _Point(float(factor), measured, tuple(asked), cells)
            curves.setdefault(kind, {}).setdefault(steered, []).append(point)
        order = {kind: index for index, kind in enumerate(dict.fromkeys(rows["kind"]))}
        self.curves: _Curves = {kind: curves[kind] for kind in sorted(curves, key=order.__getitem__)}

    def points(self) -> Iterable[_Point]:
        """Of every method and language."""
        return itertools.chain.from_iterable(points for of in self.curves.values() for points in of.values())

    def point_rows(self) -> Iterable[dict[str, Any]]:
        """Rows of `MethodComparison.points`."""
        for kind, of_language in self.curves.items():
            for steered, points in of_language.items():
                for point in points:
                    values = self.values([point], None)
                    if values is not None:
                        baseline, success = (
                            np.mean([np.nanmean(part[:, column]) for part in values]) for column in (0, 1)
                        )
                        n = sum(len(part) for part in values)
                        yield dict(
                            zip(_POINT, (kind, steered, point.factor, point.damage, success, baseline, n), strict=True)
                        )

    def values(self, points: Sequence[_Point], half: bool | None) -> list[Array] | None:
        """For each task (items, 1 + points): success of the baseline and of each point; None without items.

        Only tasks that all points have; of LSS, which is a shift from the unsteered model, the baseline is 0.
        """
        tasks = sorted(set.intersection(*(set(point.cells) for point in points)))
        parts = [self._of_task([point.cells[task] for point in points], half) for task in tasks]
        return (
            None if not parts or any(part is None for part in parts) else [part for part in parts if part is not None]
        )

    def _of_task(self, cells: Sequence[dict[str, Any]], half: bool | None) -> Array | None:
        sides = [self.sweep.items.get(cell["cell"]) for cell in cells]
        if any(side is None or not self._is_mean(side, cell) for side, cell in zip(sides, cells, strict=True)):
            return None
        known = [side for side in sides if side is not None]
        before = self._baseline(known[0], cells[0])
        if before is None:
            return None
        docs, columns = align([before, *known], self.metric)
        table: Array = np.column_stack([column for column in columns if column is not None]).astype(float)
        if half is not None:
            reported = dict(zip(known[0].docs.tolist(), halves_of(known[0]).tolist(), strict=True))
            table = table[[reported.get(doc) == half for doc in docs.tolist()]]
        return table if len(table) else None

    def _is_mean(self, items: Items, cell: dict[str, Any]) -> bool:
        values = items.values.get(self.metric)
        score = self.scores.get(cell["cell"], {}).get(self.metric)
        return values is not None and aggregate_of(values, None if score is None else score[0]) is MEAN

    def _baseline(self, like: Items, cell: dict[str, Any]) -> Items | None:
        if self.sweep.is_shift(self.metric):
            return Items(like.docs, {self.metric: np.zeros(len(like.docs))})
        items = self.sweep.items.get(cell["baseline_cell"])
        values = None if items is None else baseline_values(items, self.metric, cell["steered"])
        return None if items is None or values is None else Items(items.docs, {self.metric: values})

    def control_scores(self, point: _Point, at: float | str) -> dict[int, float]:
        """Seed -> success of each random set, or other instruction: at the same damage where that was searched for."""
        cells, half = list(point.cells.values()), at == BEST
        common = (self.metric, self.scores)
        for damage in point.asked if isinstance(at, str) else (at,):
            of_cells = [control_scores(self.sweep, cell, *common, self.by_damage, half, damage) for cell in cells]
            if values := means_of_sets(of_cells):
                return values
        return means_of_sets([control_scores(self.sweep, cell, *common, self.by_place, half) for cell in cells])

    def beside(self, kind: str, steered: str, factor: float, metric: str) -> tuple[float, int]:
        """Mean score of another metric at the very same setting, and its items."""
        frame = self.frame
        rows = frame[(frame["kind"] == kind) & (frame["steered"] == steered) & (frame["metric"] == metric)]
        rows = rows[rows["factor"].isna() if math.isnan(factor) else rows["factor"] == factor]
        return float(rows["score"].mean()), int(rows["n"].sum())


def _key(factor: float) -> float | None:
    return None if math.isnan(factor) else factor


# --- One method at one setting: a point of its curve, or why there is none


def _at_damage(curve: Mapping[str, Sequence[_Point]], language: str, target: float) -> _Point | str:
    """The point whose factor was searched for; of a method that has one point, that one where it costs no more."""
    points = curve.get(language, ())
    for point in points:
        if target in point.asked:
            return point
    if any(point.asked for of_language in curve.values() for point in of_language):
        return "no factor does this damage"
    if not points:
        return "no finished cell"
    if len(points) > 1:
        return "its factors were not searched for"
    (point,) = points
    if math.isnan(point.damage):
        return "its damage was not measured"
    if point.damage > target * (1 + TOLERANCE):
        return f"its one point does a damage of {number(point.damage)}"
    return point


def _at_best(curve: Mapping[str, Sequence[_Point]], language: str, factor: float | None) -> _Point | str:
    """The point at the factor that is best on the items to choose on; of a method that has one point, that one."""
    points = curve.get(language, ())
    if not points:
        return "no finished cell"
    if len(points) == 1:
        return points[0]
    return next((point for point in points if point.factor == factor), "its items cannot be halved")


# --- One language at one setting


class _Language:
    """Methods on one language at one setting, compared over the same items."""

    def __init__(self, facts: _Facts, steered: str, at: float | str, points: Mapping[str, _Point | str]) -> None:
        self.facts, self.steered, self.at = facts, steered, at
        self.half = True if at == BEST else None
        self.missing = {kind: point for kind, point in points.items() if isinstance(point, str)}
        compared = {kind: point for kind, point in points.items() if isinstance(point, _Point)}
        for kind in [kind for kind, point in compared.items() if facts.values([point], self.half) is None]:
            del compared[kind]
            self.missing[kind] = "its items were not kept" if self.half is None else "its items cannot be halved"
        values = facts.values(list(compared.values()), self.half) if compared else []
        if values is None:  # methods that were run on other tasks each
            self.missing |= dict.fromkeys(compared, "no task that all methods have")
            compared, values = {}, []
        self.points, self._values = compared, values
        self.pairs = self._compared()

    def _compared(self) -> dict[tuple[str | None, str], _Pair]:
        """(the other method, or None for the baseline; method) -> success of the method minus the other's."""
        sides = [None, *self.points]
        numbers = list(itertools.combinations(range(len(sides)), 2))
        if not numbers:
            return {}
        first, second = (np.array(column) for column in zip(*numbers, strict=True))
        compared = [compare(Arm(part).of(first), Arm(part).of(second)) for part in self._values]
        pairs = {}
        for index, (one, other) in enumerate(numbers):
            replicates = np.column_stack([of_task.replicates[:, index] for of_task in compared])
            alone = compared[0] if len(compared) == 1 else None
            low, high = interval_of(replicates.mean(axis=1)) if alone is None else (alone.low[index], alone.high[index])
            pairs[sides[one], str(sides[other])] = _Pair(
                sum(int(of_task.n[index]) for of_task in compared),
                float(np.mean([of_task.difference[index] for of_task in compared])), float(low), float(high),
                float("nan") if alone is None else float(alone.p_value[index]), replicates,
            )  # fmt: skip
        return pairs

    def success(self, kind: str | None) -> float:
        """Mean over the tasks; of the baseline for None."""
        column = [None, *self.points].index(kind)
        return float(np.mean([np.nanmean(part[:, column]) for part in self._values]))

    def rows(self) -> list[dict[str, Any]]:
        """Of `MethodComparison.rows`, methods in the order of the plan."""
        return [self.row(kind) for kind in self.facts.curves]

    def row(self, kind: str) -> dict[str, Any]:
        """Of one method."""
        row: dict[str, Any] = {"at": _at(self.at), "steered": self.steered, "languages": 1, "kind": kind}
        point = self.points.get(kind)
        if point is None:
            return row | {"wins": False, "ahead_of": "", "missing": self.missing[kind]}
        pair = self.pairs[None, kind]
        lss, n_lss = self.facts.beside(kind, self.steered, point.factor, "lss")
        shift = self.facts.sweep.is_shift(self.facts.metric)
        return row | {
            "factor": point.factor, "damage": point.damage, "n": pair.n,
            "baseline": np.nan if shift else self.success(None), "success": self.success(kind),
            "difference": pair.difference, "low": pair.low, "high": pair.high, "lss": lss, "n_lss": n_lss,
            "degenerate": self.facts.beside(kind, self.steered, point.factor, DEGENERATE)[0], "missing": "",
        } | _ahead(kind, self.points, self.pairs) | _against_sets(
            self.success(kind), self.facts.control_scores(point, self.at)
        )  # fmt: skip

    def pair_rows(self) -> list[dict[str, Any]]:
        """Of `MethodComparison.pairs`."""
        return [
            {"at": _at(self.at), "steered": self.steered, "languages": 1} | _pair_row(one, other, pair)
            for (one, other), pair in self.pairs.items() if one is not None
        ]  # fmt: skip


def _at(at: float | str) -> str:
    return at if isinstance(at, str) else f"{at:g}"


def _pair_row(first: str, second: str, pair: _Pair) -> dict[str, Any]:
    values = {"n": pair.n, "difference": pair.difference, "low": pair.low, "high": pair.high, "p": pair.p}
    return {"kind": second, "other": first} | values


def _ahead(kind: str, kinds: Iterable[str], pairs: Mapping[tuple[str | None, str], _Pair]) -> dict[str, Any]:
    """Which methods a method exceeds by the whole interval, and whether these are all others."""
    others = [other for other in kinds if other != kind]
    ahead = [
        other for other in others
        if (pairs[other, kind].low > 0 if (other, kind) in pairs else pairs[kind, other].high < 0)
    ]  # fmt: skip
    return {"wins": bool(others) and len(ahead) == len(others), "ahead_of": " + ".join(ahead)}


def _against_sets(success: float, sets: Mapping[int, float]) -> dict[str, Any]:
    """Where a success stands among the same success of random sets, by their seeds."""
    if not sets:
        return {"sets": 0}
    null = against_random(success, list(sets.values()))
    return {
        "sets": null.sets, "random_lowest": null.lowest, "random_mean": null.mean, "random_highest": null.highest,
        "random_reached": round(null.share * null.sets),
    }  # fmt: skip


# --- The mean over languages: the same ones for every method


def _over_languages(blocks: Sequence[_Language], at: float | str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and pairs of the means over the languages of the methods that have most; other methods are missing."""
    kinds = list(blocks[0].facts.curves)
    blocks_of = {kind: [block for block in blocks if kind in block.points] for kind in kinds}
    most = max(blocks_of.values(), key=len)
    if len(most) < 2:
        return [], []
    whole = [kind for kind in kinds if blocks_of[kind] == most]
    names = [(one, other) for one, other in most[0].pairs if other in whole and one in (None, *whole)]
    replicates = [block.pairs[name].replicates for name in names for block in most]
    owners = [index for index, name in enumerate(names) for block in most for _ in block.pairs[name].replicates.T]
    codes = [block.steered for name in names for block in most for _ in block.pairs[name].replicates.T]
    groups = {str(index): np.array(owners) == index for index in range(len(names))}
    drawn = over_languages(np.concatenate(replicates, axis=1), codes, codes, groups)
    pairs: dict[tuple[str | None, str], _Pair] = {}
    for index, name in enumerate(names):
        of_languages = [block.pairs[name] for block in most]
        low, high = interval_of(drawn[str(index)])
        difference = float(np.mean([pair.difference for pair in of_languages]))
        n = sum(pair.n for pair in of_languages)
        pairs[name] = _Pair(n, difference, float(low), float(high), np.nan, drawn[str(index)][:, None])
    common = {"at": _at(at), "steered": MEAN_OVER, "languages": len(most)}
    rows = [common | {"kind": kind} | _mean_row(kind, whole, most, pairs, blocks) for kind in kinds]
    named = [common | _pair_row(one, other, pair) for (one, other), pair in pairs.items() if one is not None]
    return rows, named


def _mean_row(
    kind: str,
    whole: Sequence[str],
    blocks: Sequence[_Language],
    pairs: Mapping[tuple[str | None, str], _Pair],
    everywhere: Sequence[_Language],
) -> dict[str, Any]:
    if kind not in whole:
        codes = [block.steered for block in everywhere if kind in block.points]
        reasons = dict.fromkeys(block.missing[kind] for block in everywhere if kind in block.missing)
        why = f"of other languages: {listed(codes)}" if codes else listed(list(reasons))
        return {"wins": False, "ahead_of": "", "missing": why}
    rows = [block.row(kind) for block in blocks]
    means = {
        name: float(np.mean([row[name] for row in rows]))
        for name in ("damage", "baseline", "success", "lss", "degenerate")
    }
    facts, at = blocks[0].facts, blocks[0].at
    sets = means_of_sets([facts.control_scores(block.points[kind], at) for block in blocks])
    pair = pairs[None, kind]
    return {
        "factor": np.nan, **means, "n": pair.n, "difference": pair.difference, "low": pair.low, "high": pair.high,
        "n_lss": sum(row["n_lss"] for row in rows), "missing": "",
    } | _ahead(kind, whole, pairs) | _against_sets(means["success"], sets)  # fmt: skip
