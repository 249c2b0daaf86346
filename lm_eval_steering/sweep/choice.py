"""Which intervention is taken on to `then`: the best on the half that is chosen on, the first of equals."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_steering.errors import SteeringError, did_you_mean
from lm_eval_steering.sweep.cells import ALL, CHOOSE, REPORT, Cell, Grid, PlannedIntervention, group_of
from lm_eval_steering.sweep.store import Store, StoredCell

# --- Two halves of the items, the same for all tasks and languages: what a factor is chosen on is never reported on
#
# The half is a seeded hash of the source item, which an item shares with its translations, so that no translation of
# an item that was chosen on is reported on.

FIELDS = ("id", "idx", "question_id", "item_id")
POSITION = "doc_id"


def half_of(item: str, seed: int) -> str:
    """`choose` or `report`: the first bit of SHA-256 over seed and item."""
    return REPORT if hashlib.sha256(f"{seed} {item}".encode()).digest()[0] & 1 else CHOOSE


def item_of(document: Mapping[str, Any], position: int, field: str | None) -> str | None:
    """What names a document's source item in every language; None where it has no such field.

    Args:
        document: of lm-eval.
        position: of the document in its task.
        field: of the document; None takes the first of FIELDS, `doc_id` the position.
    """
    if field == POSITION:
        return str(position)
    names = (field,) if field else FIELDS
    return next((str(document[name]) for name in names if document.get(name) is not None), None)


def source_item(document: Mapping[str, Any], position: int, field: str | None, task: str) -> str:
    """As `item_of`, of a task that is to be split.

    Raises:
        SteeringError: naming the task, if the document has no such field.
    """
    item = item_of(document, position, field)
    if item is None:
        raise SteeringError(
            f"{task}: its documents have no {field or ' or '.join(FIELDS)} to split them by; name the field that a "
            "document shares with its translations, choose: {item: FIELD}, or doc_id where the order is the same in "
            f"all languages, or choose: {{split: whole}}; fields: {', '.join(map(str, document))}"
        )
    return item


def positions_of(task: Any, name: str, half: str, seed: int, field: str | None) -> list[int]:
    """Places of a task's documents that belong to one half.

    Raises:
        SteeringError: if there is none.
    """
    found = [
        place
        for place, document in enumerate(task.eval_docs)
        if half_of(source_item(document, place, field, name), seed) == half
    ]
    if not found:
        raise SteeringError(f"{name}: no item falls into the half to {half} on; take another choose.seed or more items")
    return found


def halves(task: Any, name: str, samples: Sequence[Mapping[str, Any]], seed: int, field: str | None) -> dict[str, Any]:
    """Half -> metrics, by the task's own aggregation over its items, and the number of items that each is over.

    Args:
        task: of lm-eval.
        name: of the task.
        samples: lm-eval's, of one cell.
        seed: of the split.
        field: as in `source_item`.

    Raises:
        SteeringError: as `source_item`.
    """
    aggregation = task.aggregation()
    values: dict[str, dict[str, list[Any]]] = {CHOOSE: {}, REPORT: {}}
    for sample in samples:
        half = half_of(source_item(sample["doc"], sample["doc_id"], field, name), seed)
        for metric in sample["metrics"]:
            values[half].setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return {
        half: {
            "n": {key: len(own) for key, own in sorted(values[half].items())},
            "metrics": {key: _aggregate(aggregation, key, own) for key, own in sorted(values[half].items())},
        }
        for half in (CHOOSE, REPORT)
    }


def _aggregate(aggregation: Mapping[str, Any], key: str, values: list[Any]) -> Any:
    """As lm-eval does it: the mean where a metric has no aggregation of its own; of one that fails, how it did."""
    from lm_eval.api.metrics import mean

    try:
        return aggregation.get(key.partition(",")[0], mean)(values)
    except Exception as error:  # whatever a task's own function raises on fewer items must not end the sweep
        return repr(error)


@dataclass(frozen=True)
class Group:
    """Interventions of which one is chosen, and the cells that must be done before.

    Attributes:
        name: what it is chosen for, a language.
        variants: in the order of the plan.
        cells: of the tasks that are chosen on.
    """

    name: str
    variants: tuple[PlannedIntervention, ...]
    cells: tuple[Cell, ...]

    @property
    def place(self) -> str:
        """File of the choice."""
        return f"then/{re.sub(r'[^A-Za-z0-9_+-]', '_', self.name)}.json"


def groups_of(grid: Grid) -> list[Group]:
    """What there is to choose, in the order of the plan; nothing where the plan does not choose.

    Raises:
        SteeringError: if `choose.tasks` names a task that the plan does not have.
    """
    choose = grid.plan.choose
    if choose is None:
        return []
    tasks = grid.book.spelled_out(choose.tasks or grid.plan.tasks)
    own = grid.book.spelled_out(grid.plan.tasks)
    if wrong := [name for name in tasks if name not in own]:
        raise SteeringError(f"choose.tasks: {wrong[0]} is not among the plan's tasks{did_you_mean(wrong[0], own)}")
    found: dict[str, list[PlannedIntervention]] = {}
    for variant in grid.candidates():
        found.setdefault(group_of(variant, grid.plan), []).append(variant)
    return [
        Group(
            name,
            tuple(variants),
            tuple(cell for cell in grid.cells if cell.task in tasks and cell.variant in variants),
        )
        for name, variants in found.items()
    ]


def check_choice(grid: Grid) -> None:
    """Refuse, before anything is run, a choice that could not be made or reported.

    Raises:
        SteeringError: for a task that is not the plan's, and for items that cannot be split or are all in one half.
    """
    groups = groups_of(grid)
    rule = grid.plan.choose
    if rule is None or rule.split == "whole":
        return
    then = grid.then_cells([group.variants[0] for group in groups])
    for half, cells in ((CHOOSE, [cell for group in groups for cell in group.cells]), (REPORT, then)):
        for name, target in dict.fromkeys((cell.task, cell.target) for cell in cells):
            positions_of(grid.book.task(name, target), name, half, rule.seed, rule.item)


def choose(grid: Grid, store: Store, group: Group) -> dict[str, Any]:
    """The chosen intervention of a group whose cells are done, with every candidate's value, and the cells of `then`.

    Raises:
        SteeringError: if no task has the metric, or its value is not a number.
    """
    rule = grid.plan.choose
    assert rule is not None
    values: dict[str, list[float]] = {}
    better: set[bool] = set()
    for cell in group.cells:
        facts = store.read(cell.key).facts
        key = _metric(facts, rule.metric)
        if key is None:
            if rule.tasks is not None:
                raise SteeringError(f"choose.metric: {cell.task} has no {rule.metric}{_known(facts)}")
            continue
        metrics = facts["metrics"]
        if rule.split == "half":  # computed anew: a plan can be edited, and a cell serves every split of its items
            metrics = _halves(grid, cell, store.samples(cell))[CHOOSE]["metrics"]
        values.setdefault(cell.variant.name, []).append(_number(metrics.get(key), cell, rule.metric))
        better.add(bool(facts["higher_is_better"].get(rule.metric, True)))
    if not values:
        raise SteeringError(f"choose.metric: no task of the plan has {rule.metric}{_known(facts)}")
    if rule.goal is None and len(better) > 1:
        raise SteeringError(f"choose.metric: tasks do not agree whether more {rule.metric} is better; say choose.goal")
    sign = {"max": 1, "min": -1}.get(rule.goal or "", 1 if better == {True} else -1)
    means = {name: sum(own) / len(own) for name, own in values.items()}
    chosen = max(
        (variant for variant in group.variants if variant.name in means), key=lambda variant: sign * means[variant.name]
    )
    return {
        "plan_hash": grid.plan_hash,
        "group": group.name,
        "metric": rule.metric,
        "split": rule.split,
        "seed": rule.seed,
        "values": means,
        "chosen": chosen.name,
        "factor": chosen.factor,
        "cells": [cell.describe() for cell in grid.then_cells([chosen])],
    }


def keep_halves(grid: Grid, store: Store, cells: Iterable[Cell]) -> None:
    """Note what finished cells of the first stage come to on each half, where that is not noted under this rule.

    A task whose documents name no source item is not split.
    """
    wanted, there = grid.plan.choose, store.folders()
    if wanted is None or wanted.split == "whole":
        return
    rule = {"seed": wanted.seed, "item": wanted.item}
    for cell in cells:
        if cell.items != ALL or cell.key[:10] not in there:
            continue
        stored = StoredCell(there[cell.key[:10]])
        if store.halves(stored, rule) is not None:
            continue
        samples = store.samples(cell)
        if all(item_of(sample["doc"], sample["doc_id"], wanted.item) is not None for sample in samples):
            store.keep_halves(stored, rule, _halves(grid, cell, samples))


def _halves(grid: Grid, cell: Cell, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rule = grid.plan.choose
    assert rule is not None
    return halves(grid.book.task(cell.task, cell.target), cell.task, samples, rule.seed, rule.item)


def _metric(facts: Mapping[str, Any], name: str) -> str | None:
    """The key of a metric, which lm-eval writes with its filter."""
    return next((key for key in sorted(facts["metrics"]) if name in (key, key.split(",")[0])), None)


def _known(facts: Mapping[str, Any]) -> str:
    return f"; the last task has {', '.join(sorted({key.split(',')[0] for key in facts['metrics']}))}"


def _number(found: Any, cell: Cell, metric: str) -> float:
    if not isinstance(found, int | float) or not math.isfinite(found):
        raise SteeringError(f"choose.metric: {metric} of {cell.name} is {found!r}, no finite number to compare")
    return float(found)
