"""The folder of a sweep, and how to read it. `docs/sweep.md` has the layout.

runs/x/sweep.json            which model the folder is for
       plan.json             the cells of the plan that was run last
       then/GROUP.json       what was chosen, and the cells that follow from it
       cells/NAME/           a finished cell: cell.json, results_DATE.json, samples_TASK_DATE.jsonl
       halves/KEY.json       its metrics on each half of the items, under the last plan's rule
       timings/KEY.json      how long it took, and where
       failed/KEY.json       why it failed, with the traceback
       locks/KEY.lock        held by the runner that is at it
       controls/             calibrated random neuron sets
       damaged/              what was found broken and was put aside
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_steering.neurons.storage import write_bytes
from lm_eval_steering.sweep import locks
from lm_eval_steering.sweep.stored import StoredCell, StoreError, as_json, read_json

if TYPE_CHECKING:
    import pandas as pd

    from lm_eval_steering.sweep.cells import Cell, Grid

FORMAT_VERSION = 2
# What may lie in the folder of a sweep that other runners are beginning at this moment.
_OURS = {
    "plan.json", "then", "cells", "halves", "timings", "failed", "locks", "controls", "damaged", "jobs", "engine",
    "missing.csv",
}  # fmt: skip
DONE, RUNNING, FAILED, MISSING = "done", "running", "failed", "missing"


class Store:
    """What a sweep has done so far.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # --- for people -----------------------------------------------------------------------------------------------

    def frame(self) -> pd.DataFrame:
        """One row a finished cell and metric; `planned` says whether the cell belongs to the last plan.

        Raises:
            StoreError: if a finished cell is damaged; it names the file.
        """
        from lm_eval_steering.sweep.tables import metric_rows, table

        self._refuse_no_sweep()
        planned = {cell.key for cell in self.planned()}
        rule = self.rule()
        rows = [
            row
            for stored in self.stored()
            for row in metric_rows(stored, stored.cell["key"] in planned, self.halves(stored, rule))
        ]
        return table(rows, ("cell", "metric", "filter"))

    def items(self) -> pd.DataFrame:
        """One row a finished cell and item, with every number that the item got."""
        from lm_eval_steering.sweep.tables import item_rows, table

        self._refuse_no_sweep()
        rule = self.rule()
        rows = [row for stored in self.stored() for row in item_rows(stored, self.samples(stored.cell["key"]), rule)]
        return table(rows, ("cell", "doc_id", "filter"))

    def samples(self, cell: Cell | str) -> list[dict[str, Any]]:
        """lm-eval's samples of one finished cell, which is given by its key or its name.

        Raises:
            StoreError: if it is not done, or its file is damaged.
        """
        stored = self.read(self._key(cell))
        text = stored.text(stored.samples_file)
        return [json.loads(line) for line in text.split("\n") if line]  # not splitlines(): text may hold U+2028

    def missing(self) -> pd.DataFrame:
        """Cells of the last plan that are not done: name, task, status (`missing`, `running`, `failed`), why."""
        import pandas as pd

        self._refuse_no_sweep()
        states = self.states()
        rows = [
            (cell.name, cell.task, cell.stage, states[cell.key], self.why(cell))
            for cell in self.planned()
            if states[cell.key] != DONE
        ]
        return pd.DataFrame(rows, columns=["cell", "task", "stage", "status", "why"])

    def timings(self) -> pd.DataFrame:
        """Seconds, tokens and place of each finished cell: everything that differs from run to run."""
        from lm_eval_steering.sweep.tables import table

        return table([found for _, found in sorted(self.timing_files())], ("cell",))

    # --- what is there ----------------------------------------------------------------------------------------------

    def planned(self) -> list[Cell]:
        """Cells of the last plan, those of `then` as far as they are known; none where no plan was run."""
        from lm_eval_steering.sweep.cells import Cell

        if not (self.path / "plan.json").is_file():
            return []
        plan = self.json("plan.json")
        cells = [Cell.read(found) for found in plan["cells"]]
        for path in sorted((self.path / "then").glob("*.json")):
            found = read_json(path)
            if found["plan_hash"] == plan["plan_hash"]:
                cells += [Cell.read(cell) for cell in found["cells"]]
        return list({cell.key: cell for cell in cells}.values())

    def rule(self) -> dict[str, Any] | None:
        """How the last plan halves the items (seed, item); None where it does not."""
        if not (self.path / "plan.json").is_file():
            return None
        choose = self.json("plan.json")["plan"].get("choose") or {}
        return {key: choose[key] for key in ("seed", "item")} if choose.get("split") == "half" else None

    def states(self) -> dict[str, str]:
        """Key of each planned cell -> `done`, `running`, `failed` or `missing`."""
        held, there = locks.owners(self.path / "locks"), self.folders()
        return {cell.key: self.state(cell.key, there, held) for cell in self.planned()}

    def state(self, key: str, there: Mapping[str, Path], held: Mapping[str, Any]) -> str:
        """State of one cell, given the finished folders and the locks that are held."""
        if key[:10] in there:
            return DONE
        if key in held:
            return RUNNING
        return FAILED if self.failure(key) else MISSING

    def folders(self) -> dict[str, Path]:
        """First ten digits of the key -> folder, of each finished cell."""
        cells = self.path / "cells"
        found = cells.iterdir() if cells.is_dir() else ()
        return {path.name.rsplit("--", 1)[-1]: path for path in found if not path.name.startswith(".")}

    def is_done(self, key: str) -> bool:
        """Whether a cell is finished."""
        return any((self.path / "cells").glob(f"*--{key[:10]}"))

    def stored(self) -> Iterator[StoredCell]:
        """All finished cells, by name."""
        for folder in sorted(self.folders().values()):
            yield StoredCell(folder)

    def read(self, key: str) -> StoredCell:
        """One finished cell.

        Raises:
            StoreError: if it is not done, or damaged.
        """
        folder = self.folders().get(key[:10])
        if folder is None:
            raise StoreError(f"{self.path}: the cell {key[:10]} is not done")
        return StoredCell(folder)

    def _refuse_no_sweep(self) -> None:
        if not (self.path / "sweep.json").is_file():
            raise StoreError(f"{self.path}: no sweep is here (no sweep.json)")
        self._begun()

    def _begun(self) -> dict[str, Any]:
        found = self.json("sweep.json")
        if found.get("format_version") != FORMAT_VERSION:
            raise StoreError(f"{self.path}: format {found.get('format_version')}, this release reads {FORMAT_VERSION}")
        return found

    def _key(self, cell: Cell | str) -> str:
        return (cell.rsplit("--", 1)[-1] if isinstance(cell, str) else cell.key)[:10]

    def halves(self, stored: StoredCell, rule: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """A finished cell's metrics on each half under a rule; None where they are not known (yet)."""
        path = self.path / "halves" / f"{stored.cell['key']}.json"
        if rule is None or not path.is_file():
            return None
        found = read_json(path)
        return dict(found["halves"]) if found["of"] == _halved(stored, rule) else None

    def keep_halves(self, stored: StoredCell, rule: Mapping[str, Any], halves: Mapping[str, Any]) -> None:
        """Note a finished cell's metrics on each half, and what they were computed from."""
        self.keep(f"halves/{stored.cell['key']}.json", {"of": _halved(stored, rule), "halves": halves})

    # --- beside the cells -------------------------------------------------------------------------------------------

    def failure(self, key: str) -> dict[str, Any] | None:
        """Why a cell failed."""
        path = self.path / "failed" / f"{key}.json"
        return read_json(path) if path.is_file() else None

    def why(self, cell: Cell) -> str:
        """One line on why a cell is not done, empty where it was not tried."""
        found = self.failure(cell.key)
        return str(found["error"]).strip().splitlines()[0] if found else ""

    def timing_files(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, timing) of each finished cell that has one."""
        there = self.folders()
        for path in sorted((self.path / "timings").glob("*.json")):
            if path.stem[:10] in there:
                yield path.stem, read_json(path)

    def keep(self, place: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file of the folder, in one step."""
        try:
            write_bytes(self.path / place, as_json(content).encode())
        except OSError as error:
            raise StoreError(
                f"{self.path / place}: {error.strerror or error}; what was finished before is whole: make room and run "
                "the same command again"
            ) from error

    def json(self, place: str) -> dict[str, Any]:
        """A JSON file of the folder."""
        return read_json(self.path / place)

    # --- for runners ------------------------------------------------------------------------------------------------

    def check(self, grid: Grid) -> None:
        """Refuse a folder of another model, or one that is no sweep's.

        Raises:
            StoreError: naming both.
        """
        if not (self.path / "sweep.json").is_file():
            there = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
            if foreign := sorted(name for name in there - _OURS if not name.endswith(".partial")):
                raise StoreError(f"{self.path}: there are files here and no sweep ({foreign[0]}); take another folder")
            return
        found = self._begun()
        if found["model"] != grid.model:
            wrong = sorted(k for k in {*found["model"], *grid.model} if found["model"].get(k) != grid.model.get(k))
            said = ", ".join(f"{key}: {found['model'].get(key)!r} here, {grid.model.get(key)!r} now" for key in wrong)
            raise StoreError(f"{self.path} is the sweep of another model ({said}); take another folder")

    def begin(self, grid: Grid) -> None:
        """Note the model and the plan; what is finished stays, whatever the plan was before."""
        self.check(grid)
        if not (self.path / "sweep.json").is_file():
            self.keep("sweep.json", {"format_version": FORMAT_VERSION, "model": grid.model})
        self.keep(
            "plan.json",
            {
                "plan_hash": grid.plan_hash,
                "plan": grid.plan.model_dump(mode="json"),
                "cells": [cell.describe() for cell in grid.cells],
                "then_bound": grid.then_bound(),
                "notes": grid.notes,
            },
        )

    def check_weights(self, digest: str) -> None:
        """Refuse a loaded model whose weights are not those of the cells that are here.

        Raises:
            StoreError: naming the folder.
        """
        found = self.json("sweep.json")
        if found.setdefault("weights", digest) != digest:
            raise StoreError(f"{self.path}: the model of this name had other weights when this sweep began")
        self.keep("sweep.json", found)

    def put_aside_damaged(self, cells: Iterable[Cell]) -> list[str]:
        """Move finished cells that are not whole out of the way, to be done again; says which, and why."""
        there, said = self.folders(), []
        for cell in cells:
            folder = there.get(cell.key[:10])
            if folder is None:
                continue
            try:
                StoredCell(folder).check(cell.key)
            except StoreError as error:
                place = self.path / "damaged"
                place.mkdir(exist_ok=True)
                number = len(list(place.iterdir()))
                with suppress(FileNotFoundError):  # another runner was faster
                    folder.rename(place / f"{folder.name}.{number}")
                said.append(f"{error}; it is in {place} now and is done again")
        return said


def _halved(stored: StoredCell, rule: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell's halves follow from."""
    return {**rule, "samples": stored.files[stored.samples_file]["sha256"]}
