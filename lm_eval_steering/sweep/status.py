"""What a sweep's folder and a plan say: how far it is, what is missing, and how long that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lm_eval_steering.files import write_text
from lm_eval_steering.progress import readable_seconds
from lm_eval_steering.sweep import locks
from lm_eval_steering.sweep.cells import Cell, Grid
from lm_eval_steering.sweep.choice import check_choice
from lm_eval_steering.sweep.damage import described, resolved
from lm_eval_steering.sweep.estimate import Estimate
from lm_eval_steering.sweep.store import DONE, FAILED, MISSING, RUNNING, Store

_STATES = (DONE, RUNNING, FAILED, MISSING)


def status(out: Path) -> str:
    """Done, running, failed and missing cells by task; writes `missing.csv`.

    Raises:
        StoreError: if no sweep was run here.
    """
    store = Store(out)
    missing = store.missing()
    cells, states = store.planned(), store.states()
    lines = [_table(cells, states)]
    held = locks.owners(out / "locks")
    names = {cell.key: cell.name for cell in cells}
    lines += [
        f"running  {names[key]}  on {owner.get('host', '?')}, process {owner.get('pid', '?')}"
        for key, owner in held.items()
        if key in names and states[key] == RUNNING
    ]
    lines += [f"failed   {cell.name}  {store.why(cell)}" for cell in cells if states[cell.key] == FAILED]
    left = [cell for cell in cells if states[cell.key] in (MISSING, RUNNING)]
    lines += _cells_left(store, left)
    plan = store.json("plan.json")
    if number := plan.get("searches"):
        lines.append(f"factors of equal damage are being searched for: {number} searches")
    if not any(cell.stage == 2 for cell in cells) and (bound := plan["then_bound"]):
        lines.append(f"then: at most {bound} more cells, known when the choosing cells are done")
    other = len(store.folders()) - sum(state == DONE for state in states.values())
    if other:
        lines.append(f"{other} finished cells are not in the last plan")
    write_text(out / "missing.csv", missing.to_csv(index=False, lineterminator="\n"))
    lines.append(f"wrote {out / 'missing.csv'}")
    return "\n".join(lines)


def describe(grid: Grid, out: Path) -> str:
    """What a plan would run: its cells by task, how many are done, and an estimate for the others.

    Raises:
        StoreError: if the folder is another model's.
    """
    store = Store(out)
    store.check(grid)
    check_choice(grid)
    searches = described(grid, store) if grid.searches else []
    if searches:
        grid = resolved(grid, store) or grid
    folders, held = store.folders(), locks.owners(out / "locks")
    states = {cell.key: store.state(cell.key, folders, held) for cell in grid.cells}
    controls = sum(planned.control is not None and not planned.is_prompt for planned in grid.interventions)
    naming = sum(planned.control is not None and planned.is_prompt for planned in grid.interventions)
    interventions = len(grid.interventions) - controls - naming - 1
    lines = [
        f"{len(grid.cells)} cells: baseline, {interventions} interventions and {controls} random controls, "
        f"{f'{naming} instructions that name another language, ' if naming else ''}"
        f"on {len({cell.task for cell in grid.cells})} tasks",
        *searches,
        *(
            ["the cells below are as many as there can be; their factors are known when the searches are done"]
            if grid.is_open
            else []
        ),
        *grid.notes,
        _table(grid.cells, states),
        *_cells_left(store, [cell for cell in grid.cells if states[cell.key] in (MISSING, RUNNING)]),
    ]
    if bound := grid.then_bound():
        lines.append(f"then: at most {bound} cells, known when the choosing cells are done")
    return "\n".join(lines)


def _table(cells: Sequence[Cell], states: Mapping[str, str]) -> str:
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    width = max(len(task) for task in [*tasks, "task"])
    rows = [f"{'task':<{width}}" + "".join(f"{state:>9}" for state in _STATES)]
    for task in [*tasks, None]:
        counts = Counter(states[cell.key] for cell in cells if task in (None, cell.task))
        rows.append(f"{task or 'all':<{width}}" + "".join(f"{counts[state]:>9}" for state in _STATES))
    return "\n".join(rows)


def _cells_left(store: Store, cells: Sequence[Cell]) -> list[str]:
    if not cells:
        return []
    seconds = Estimate(timing for _, timing in store.timing_files()).of(cells)
    if seconds is None:
        return [f"{len(cells)} cells left; how long they take is known when the first are done"]
    return [f"{len(cells)} cells left, about {readable_seconds(seconds)} for one runner"]
