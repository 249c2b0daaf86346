"""The stage before the grid: factors of equal damage, searched for cell by cell, and what was found in `factors/`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from lm_eval_steering.sweep.cells import SINGLE, Cell, FoundFactor, Grid, Search
from lm_eval_steering.sweep.damage_search import MOST_EVALUATIONS, Curve, reached, replayed
from lm_eval_steering.sweep.damage_text import METRIC
from lm_eval_steering.sweep.store import Store

_OVERFLOWED = "activations overflowed"  # how `SteeredHFLM` says that a factor is too large for the dtype


def next_cell(
    grid: Grid, store: Store, search: Search, before: Callable[[Cell], None] = lambda _: None
) -> tuple[Curve, Cell | None]:
    """What a search has measured by now, from stored cells, and the cell that it needs next; None at its end.

    Args:
        grid: of the search.
        store: with the finished cells.
        search: one of the grid's.
        before: called with each cell before it is looked up.
    """
    curve = Curve(search.line)
    unsteered = grid.damage_cell(search, None)
    before(unsteered)
    base = _nats(store, unsteered)
    if base is None:
        return curve, unsteered
    if search.is_single:
        cell = grid.damage_cell(search, SINGLE)
        before(cell)
        nats = _nats(store, cell)
        if nats is None:
            return curve, cell
        curve.points[SINGLE] = nats - base
        return curve, None
    known: dict[float, float] = {}
    while True:
        curve, factor = replayed(search.line, search.targets, known)
        if factor is None:
            return curve, None
        cell = grid.damage_cell(search, factor)
        before(cell)
        nats = _nats(store, cell)
        if nats is None:
            return curve, cell
        known[factor] = nats - base


def overflowed(store: Store, cell: Cell) -> bool:
    """Whether a cell failed because its factor is too large for the dtype: more damage than any other."""
    failure = store.failure(cell.key)
    return failure is not None and _OVERFLOWED in str(failure["error"])


def _nats(store: Store, cell: Cell) -> float | None:
    """Nats per token of a cell; inf where it overflowed, None where it is not done."""
    if store.is_done(cell.key):
        value = store.read(cell.key).facts["metrics"][f"{METRIC},none"]
        return float(value) if math.isfinite(value) else math.inf
    return math.inf if overflowed(store, cell) else None


def keep_factors(grid: Grid, store: Store, search: Search, curve: Curve) -> None:
    """Write what a finished search found."""
    store.keep(
        f"factors/{search.name}.json",
        {
            "search": asdict(search),
            "targets": [
                asdict(result) | {"damage": _finite(result.damage)} for result in reached(curve, search.targets)
            ],
            "evaluations": [
                {"factor": factor, "damage": _finite(damage), "cell": grid.damage_cell(search, factor).name}
                for factor, damage in sorted(curve.points.items(), key=lambda point: search.line.distance(point[0]))
            ],
        },
    )  # fmt: skip


def _finite(damage: float) -> float | None:
    """JSON has no infinity."""
    return damage if math.isfinite(damage) else None


def forget_others(grid: Grid, store: Store) -> None:
    """Remove what searches of other plans found; their evaluations stay."""
    names = {f"{search.name}.json" for search in grid.searches}
    for path in (store.path / "factors").glob("*.json"):
        if path.name not in names:
            path.unlink(missing_ok=True)


def resolved(grid: Grid, store: Store, without: Iterable[Search] = ()) -> Grid | None:
    """The grid at the factors that were found; None where a search is not finished.

    Args:
        grid: whose factors are searched for.
        store: with the finished cells.
        without: searches that failed, whose factors are left out.
    """
    failed = {search.key for search in without}
    found: dict[tuple[int, str, int | None], list[FoundFactor]] = {}
    cells: dict[str, Cell] = {}
    notes: list[str] = []
    for search in grid.searches:
        if search.key in failed:
            notes.append(f"{search.name}: its damage could not be measured; it is left out")
            continue
        curve, missing = next_cell(grid, store, search)
        if missing is not None:
            return None
        if search.is_single:
            found[search.key] = [FoundFactor(SINGLE, (), _finite(curve.points[SINGLE]))]
        evaluated = [grid.damage_cell(search, factor) for factor in (None, *curve.points)]
        cells |= {cell.key: cell for cell in evaluated if not overflowed(store, cell)}
        factors: dict[float, list[float]] = {}
        for result in reached(curve, search.targets):
            if result.why:
                notes.append(f"{search.name}, damage {result.target:g}: {result.why}")
            if result.factor is not None and math.isfinite(result.damage):
                factors.setdefault(result.factor, []).append(result.target)
        if not search.is_single:
            found[search.key] = [
                FoundFactor(factor, tuple(targets), curve.points[factor]) for factor, targets in factors.items()
            ]
    return grid.with_factors(found, cells.values(), notes)


def bound(grid: Grid) -> int:
    """Largest number of cells that the searches can take.

    That is 12 each, one for an instruction, and the unsteered model once for each language.
    """
    evaluations = sum(1 if search.is_single else MOST_EVALUATIONS for search in grid.searches)
    return evaluations + len({search.language for search in grid.searches})


def described(grid: Grid, store: Store) -> list[str]:
    """How far the searches are, in a line."""
    finished, evaluated = 0, 0
    for search in grid.searches:
        curve, missing = next_cell(grid, store, search)
        finished, evaluated = finished + (missing is None), evaluated + len(curve.points)
    return [
        f"damage: {len(grid.searches)} searches for factors, of at most {MOST_EVALUATIONS} cells each: at most "
        f"{bound(grid)} cells; {finished} searches are done, {evaluated} factors evaluated"
    ]


def summary(curve: Curve, search: Search) -> str:
    """One line for the log."""
    parts: list[Any] = [f"{curve.points[SINGLE]:.3g}"] if search.is_single else []
    for result in reached(curve, search.targets):
        if result.factor is None:
            parts.append(f"{result.target:g}: none")
        else:
            marked = "" if result.within else " (not within 10%)"
            parts.append(f"{result.target:g}: factor {result.factor:g}, {result.damage:.3g} reached{marked}")
    return f"{search.name}: damage " + "; ".join(parts)
