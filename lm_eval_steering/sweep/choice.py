"""Which intervention is taken on to `then`: the best on the half that is chosen on, the first of equals."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lm_eval_steering.errors import SteeringError, did_you_mean
from lm_eval_steering.languages import same_language
from lm_eval_steering.sweep.cells import BASELINE, Cell, Grid, PlannedIntervention, group_of
from lm_eval_steering.sweep.halves import ALL, CHOOSE, REPORT, item_of, metrics_by_half, positions_of
from lm_eval_steering.sweep.plan import DEFAULT_METRIC, Choose, PlanError
from lm_eval_steering.sweep.store import Store, StoredCell


@dataclass(frozen=True)
class Group:
    """Interventions of which one is chosen, and the cells that must be done before.

    Attributes:
        name: what it is chosen for, a language.
        candidates: in the order of the plan.
        cells: of the tasks whose metric is compared.
        bounded: metric of `choose.at_most` -> cells of the tasks that measure it, the baseline's among them.
    """

    name: str
    candidates: tuple[PlannedIntervention, ...]
    cells: tuple[Cell, ...]
    bounded: Mapping[str, tuple[Cell, ...]]

    @property
    def file(self) -> str:
        """File of the choice, within the folder of the sweep."""
        return f"then/{re.sub(r'[^A-Za-z0-9_+-]', '_', self.name)}.json"

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages that its candidates steer to."""
        return self.candidates[0].languages

    @property
    def needed(self) -> list[Cell]:
        """Every cell that must be done before the choice."""
        return list({cell.key: cell for cells in (self.cells, *self.bounded.values()) for cell in cells}.values())


def groups_of(grid: Grid) -> list[Group]:
    """What there is to choose, in the order of the plan; nothing where the plan does not choose.

    Raises:
        SteeringError: if `choose.tasks` names a task that the plan does not have, or `choose.at_most` a metric that no
            task of the plan measures.
    """
    choose = grid.plan.choose
    if choose is None:
        return []
    tasks = _choosing_tasks(grid, choose)
    candidates: dict[str, list[PlannedIntervention]] = {}
    for planned in grid.candidates():
        candidates.setdefault(group_of(planned, grid.plan), []).append(planned)
    return [
        Group(
            name,
            tuple(members),
            tuple(cell for cell in grid.cells if cell.task in tasks and cell.intervention in members),
            {metric: tuple(_cells_with(grid, metric, members)) for metric in choose.at_most},
        )
        for name, members in candidates.items()
    ]


def _choosing_tasks(grid: Grid, choose: Choose) -> tuple[str, ...]:
    tasks = grid.book.spelled_out(choose.tasks or grid.plan.tasks)
    known = grid.book.spelled_out(grid.plan.tasks)
    if unknown := [name for name in tasks if name not in known]:
        raise SteeringError(
            f"choose.tasks: {unknown[0]} is not among the plan's tasks{did_you_mean(unknown[0], known)}"
        )
    return tasks


def _metrics_of(grid: Grid, cell: Cell) -> set[str]:
    """Names of the metrics that a task declares."""
    return set(grid.book.task(cell.task, cell.target).aggregation())


def _cells_with(grid: Grid, metric: str, candidates: Sequence[PlannedIntervention]) -> list[Cell]:
    """Cells of candidates and baseline on the tasks that measure a metric.

    Damage is that of text in the steered language: where tasks are known to be in that language, those alone.

    Raises:
        PlanError: if no task measures it.
    """
    languages = candidates[0].languages
    targets = {None, candidates[0].target}
    cells = [
        cell
        for cell in grid.cells
        if (cell.intervention in candidates or (cell.intervention.is_baseline and cell.target in targets))
        and metric in _metrics_of(grid, cell)
    ]
    if not any(cell.intervention.is_baseline for cell in cells):
        known = sorted({name for cell in grid.cells for name in _metrics_of(grid, cell)})
        raise PlanError(
            f"choose.at_most: no task of the plan measures {metric} for {'+'.join(languages)} and its baseline; "
            f"add one to tasks, or leave {metric} out; the plan's tasks measure {', '.join(known)}"
        )
    in_language = [
        cell for cell in cells if cell.evaluated and any(same_language(cell.evaluated, code) for code in languages)
    ]
    return in_language or cells


def metric_of(grid: Grid) -> str:
    """Name of the metric that candidates are compared by: `choose.metric`, else `lfs_clean`.

    Raises:
        PlanError: if the plan names none and no task measures `lfs_clean`.
    """
    choose = grid.plan.choose
    assert choose is not None
    if choose.metric is not None:
        return choose.metric
    tasks = _choosing_tasks(grid, choose)
    known = sorted({name for cell in grid.cells if cell.task in tasks for name in _metrics_of(grid, cell)})
    if DEFAULT_METRIC not in known:
        raise PlanError(
            f"choose.metric is missing, and no task to choose on measures {DEFAULT_METRIC}, its default; name one of "
            f"{', '.join(known)}"
        )
    return DEFAULT_METRIC


def check_choice(grid: Grid) -> None:
    """Refuse, before anything is run, a choice that could not be made or reported.

    Raises:
        SteeringError: for a task that is not the plan's, a metric that no task measures, and items that cannot be split
            or are all in one half.
    """
    groups = groups_of(grid)
    choose = grid.plan.choose
    if choose is None:
        return
    metric_of(grid)
    if choose.split == "whole":
        return
    then = grid.then_cells([group.candidates[0] for group in groups])
    for half, cells in ((CHOOSE, [cell for group in groups for cell in group.needed]), (REPORT, then)):
        for name, target in dict.fromkeys((cell.task, cell.target) for cell in cells):
            positions_of(grid.book.task(name, target), name, half, choose.seed, choose.item)


def choose(grid: Grid, store: Store, group: Group) -> dict[str, Any]:
    """The chosen intervention of a group whose cells are done, with every candidate's value, and the cells of `then`.

    `values` holds each candidate's value of the metric; `rises`, for each metric of `choose.at_most`, each candidate's
    rise over the baseline. Where no candidate keeps to `at_most`, `chosen` is the baseline.

    Raises:
        SteeringError: if no task has the metric, or its value is not a number.
    """
    rule = grid.plan.choose
    assert rule is not None
    metric = metric_of(grid)
    values: dict[str, list[float]] = {}
    better: set[bool] = set()
    for cell in group.cells:
        facts = store.read(cell.key).facts
        value = _value(grid, store, cell, metric)
        if value is None:
            if rule.tasks is not None:
                raise SteeringError(f"choose.metric: {cell.task} has no {metric}{_known(facts)}")
            continue
        values.setdefault(cell.intervention.name, []).append(value)
        better.add(bool(facts["higher_is_better"].get(metric, True)))
    if not values:
        raise SteeringError(f"choose.metric: no task of the plan has {metric}{_known(facts)}")
    if rule.goal is None and len(better) > 1:
        raise SteeringError(f"choose.metric: tasks do not agree whether more {metric} is better; say choose.goal")
    sign = {"max": 1, "min": -1}.get(rule.goal or "", 1 if better == {True} else -1)
    means = {name: fmean(per_task) for name, per_task in values.items()}
    rises = {bounded: _rises(grid, store, cells, bounded) for bounded, cells in group.bounded.items()}
    qualified = [
        planned
        for planned in group.candidates
        if planned.name in means
        and all(rises[bounded][planned.name] <= limit for bounded, limit in rule.at_most.items())
    ]
    chosen = max(qualified, key=lambda planned: sign * means[planned.name], default=None)
    then = grid.then_cells([] if chosen is None else [chosen], group.languages)
    return {
        "plan_hash": grid.plan_hash,
        "group": group.name,
        "metric": metric,
        "split": rule.split,
        "seed": rule.seed,
        "values": means,
        "at_most": dict(rule.at_most),
        "rises": rises,
        "chosen": BASELINE if chosen is None else chosen.name,
        "factor": None if chosen is None else chosen.factor,
        "cells": [cell.describe() for cell in then],
    }


def why_baseline(choice: Mapping[str, Any]) -> str | None:
    """One line where the baseline was chosen, None where an intervention was."""
    if choice["chosen"] != BASELINE:
        return None
    limits = ", ".join(f"{metric} by at most {limit:g}" for metric, limit in choice["at_most"].items())
    return f"{choice['group']}: no candidate keeps to choose.at_most ({limits}); the baseline is chosen"


def _value(grid: Grid, store: Store, cell: Cell, metric: str) -> float | None:
    """A finished cell's metric on the items that are chosen on; None where its task does not have it."""
    rule = grid.plan.choose
    assert rule is not None
    facts = store.read(cell.key).facts
    key = _metric_key(facts, metric)
    if key is None:
        return None
    metrics = facts["metrics"]
    if rule.split == "half":  # computed anew: a plan can be edited, and a cell serves every split of its items
        metrics = _halves(grid, cell, store.samples(cell))[CHOOSE]["metrics"]
    return _number(metrics.get(key), cell, metric)


def _rises(grid: Grid, store: Store, cells: Sequence[Cell], metric: str) -> dict[str, float]:
    """Intervention -> rise of a metric over the baseline, the mean over the tasks that measure it."""
    baseline: dict[tuple[str, str | None], float] = {}
    steered: dict[str, list[tuple[tuple[str, str | None], float]]] = {}
    for cell in cells:
        value = _value(grid, store, cell, metric)
        if value is None:
            raise SteeringError(f"choose.at_most: {cell.name} has no {metric}{_known(store.read(cell.key).facts)}")
        target = cell.target if grid.book.is_targeted(cell.task) else None
        if cell.intervention.is_baseline:
            baseline[cell.task, target] = value
        else:
            steered.setdefault(cell.intervention.name, []).append(((cell.task, target), value))
    return {
        name: fmean(value - baseline[documents] for documents, value in of_tasks) for name, of_tasks in steered.items()
    }


def keep_halves(grid: Grid, store: Store, cells: Iterable[Cell]) -> None:
    """Note what finished cells of the first stage come to on each half, where that is not noted under this rule.

    A task whose documents name no source item is not split.
    """
    choose, folders = grid.plan.choose, store.folders()
    if choose is None or choose.split == "whole":
        return
    rule = {"seed": choose.seed, "item": choose.item}
    for cell in cells:
        if cell.items != ALL or cell.key[:10] not in folders:
            continue
        stored = StoredCell(folders[cell.key[:10]])
        if store.halves(stored, rule) is not None:
            continue
        samples = store.samples(cell)
        if all(item_of(sample["doc"], sample["doc_id"], choose.item) is not None for sample in samples):
            store.keep_halves(stored, rule, _halves(grid, cell, samples))


def _halves(grid: Grid, cell: Cell, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rule = grid.plan.choose
    assert rule is not None
    return metrics_by_half(grid.book.task(cell.task, cell.target), cell.task, samples, rule.seed, rule.item)


def _metric_key(facts: Mapping[str, Any], name: str) -> str | None:
    """The key of a metric, which lm-eval writes with its filter."""
    return next((key for key in sorted(facts["metrics"]) if name in (key, key.split(",")[0])), None)


def _known(facts: Mapping[str, Any]) -> str:
    return f"; the last task has {', '.join(sorted({key.split(',')[0] for key in facts['metrics']}))}"


def _number(value: Any, cell: Cell, metric: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise SteeringError(f"choose.metric: {metric} of {cell.name} is {value!r}, expected a finite number")
    return float(value)
