"""The folder of a sweep, and how to read it. `docs/sweep.md` has the layout.

runs/x/sweep.json            which model the folder is for
       plan.json             the cells of the plan that was run last
       factors/SEARCH.json   factors of equal damage: what was found, and every evaluation
       then/GROUP.json       what was chosen, and the cells that follow from it
       cells/NAME/           a finished cell: cell.json, results_DATE.json, samples_TASK_DATE.jsonl
       halves/KEY.json       its metrics on each half of the items, under the last plan's rule
       timings/KEY.json      how long it took, and where
       failed/KEY.json       why it failed, with the traceback
       locks/KEY.lock        held by the runner that evaluates the cell
       controls/             calibrated random neuron sets
       damaged/              cells that were not whole
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.files import write_text
from lm_eval_steering.provenance import versions
from lm_eval_steering.sweep import locks
from lm_eval_steering.sweep.halves import ALL, CHOOSE, REPORT, half_of, item_of

if TYPE_CHECKING:
    import pandas as pd

    from lm_eval_steering.sweep.cells import Cell, Grid

FORMAT_VERSION = 3
# Files that other runners may have written already, before this one begins the sweep.
_KNOWN_FILES = {
    "plan.json", "factors", "then", "cells", "halves", "timings", "failed", "locks", "controls", "damaged", "jobs",
    "missing.csv",
}  # fmt: skip
DONE, RUNNING, FAILED, MISSING = "done", "running", "failed", "missing"

# --- One finished cell on disk, and JSON files of a sweep's folder, read with care


class StoreError(SteeringError):
    """A sweep's folder that is not one, is another model's, or is damaged."""


class StoredCell:
    """One finished cell on disk.

    Attributes:
        folder: of the cell.
        facts: its `cell.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = read_json(folder / "cell.json")
        if not {"cell", "files", "metrics"} <= self.facts.keys():
            raise StoreError(f"{folder / 'cell.json'}: not a cell's description; run the sweep again to repair it")

    @property
    def cell(self) -> dict[str, Any]:
        """What `Cell.describe` gave."""
        return dict(self.facts["cell"])

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Name -> bytes and sha256."""
        return dict(self.facts["files"])

    @property
    def versions(self) -> dict[str, str]:
        """Package -> release that made the cell."""
        return dict(self.facts["versions"])

    @property
    def samples_file(self) -> str:
        """Name of the file with lm-eval's samples."""
        return next(name for name in self.files if name.startswith("samples_"))

    @cached_property
    def results(self) -> dict[str, Any]:
        """lm-eval's results."""
        return dict(json.loads(self.text(next(name for name in self.files if name.startswith("results_")))))

    def text(self, name: str) -> str:
        """A file's text.

        Raises:
            StoreError: if it is not what was written.
        """
        path = self.folder / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != self.files[name]["sha256"]:
            raise StoreError(f"{path}: not what was written; run the sweep again, which does the cell anew")
        return content.decode()

    def check(self, key: str) -> None:
        """Raise StoreError where a file is missing, cut short or changed."""
        if self.cell["key"] != key:
            raise StoreError(f"{self.folder / 'cell.json'}: of another cell")
        for name in self.files:
            self.text(name)


def cell_versions() -> dict[str, str]:
    """Releases that stand beside a cell's fingerprint: lm-eval-steering, lm-eval, transformers, torch."""
    installed = versions()
    return {name: installed[name] for name in ("lm-eval-steering", "lm-eval", "transformers", "torch")}


def versions_text(releases: Mapping[str, str]) -> str:
    """Such as `lm-eval-steering 0.9.0 lm-eval 0.4.13 transformers 5.1.0 torch 2.9.0`."""
    return " ".join(f"{name} {release}" for name, release in releases.items())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a sweep's folder.

    Raises:
        StoreError: if it is missing or damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path}: damaged ({error}); run the sweep again to repair it") from None


def as_json(content: Mapping[str, Any]) -> str:
    """JSON for people and for comparison: sorted, indented."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, indent=1) + "\n"


# --- Rows of the merged tables, from finished cells. No dates or machines, so equal work gives equal bytes

# Columns of a step; `value` is that of the metric.
_STEP = {
    "op": "op", "value": "step_value", "site": "site", "layers": "layers", "positions": "positions", "scope": "scope",
    "seed": "seed",
}  # fmt: skip


def metric_rows(
    stored: StoredCell, planned: Cell | None = None, halves: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """One row per metric of a finished cell.

    `planned` is the last plan's cell of the same key, which says what damage its factor was searched for.

    `value` is lm-eval's, over the items of the cell (`items`: all, or the half to report on); `value_choose` and
    `value_report` are over the `halves` where there are any; what is no number stands in `text`. `n`, `n_choose` and
    `n_report` count the items that have the metric.
    """
    facts, halves = stored.facts, halves or {}
    scores = stored.results["results"][facts["cell"]["task"]]
    for key, value in sorted(facts["metrics"].items()):
        metric, _, filter_ = key.partition(",")
        by_half = {half: halves.get(half, {}) for half in (CHOOSE, REPORT)}
        yield {
            **identity(facts),
            **_damage(stored, planned),
            "metric": metric,
            "filter": filter_,
            "value": _number(value),
            "stderr": _number(scores.get(f"{metric}_stderr,{filter_}")),
            "text": value if isinstance(value, str) else None,
            "n": facts["n"].get(key, 0),
            **{f"value_{half}": _number(part.get("metrics", {}).get(key)) for half, part in by_half.items()},
            **{f"n_{half}": part["n"].get(key, 0) if part else None for half, part in by_half.items()},
            "higher_is_better": facts["higher_is_better"].get(metric),
            "planned": planned is not None,
        }


def _damage(stored: StoredCell, planned: Cell | None) -> dict[str, Any]:
    """Damage that the factor was searched for (several joined by `+`) and that was measured at it, in nats per token.

    A cell serves every plan that has its factor, so it is the last plan that says what it was searched for.
    """
    described = stored.cell["intervention"] if planned is None else planned.describe()["intervention"]
    asked = "+".join(f"{damage:g}" for damage in described.get("damage") or ())
    return {"damage_asked": asked or None, "damage_reached": described.get("reached")}


def item_rows(
    stored: StoredCell, samples: Sequence[Mapping[str, Any]], rule: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """One row an item and filter of a finished cell; a metric that is no number is JSON.

    Args:
        stored: the cell.
        samples: its samples.
        rule: how the plan halves the items; a cell of one half alone has its own.
    """
    facts = stored.facts
    split = facts.get("split") or rule
    for sample in samples:
        item = half = None
        if split:
            item = item_of(sample["doc"], sample["doc_id"], split["item"])
            half = None if item is None else half_of(item, split["seed"])
        yield {
            **{key: identity(facts)[key] for key in ("cell", "task", "languages", "factor", "control", "target")},
            "doc_id": sample["doc_id"],
            "item": item,
            "half": half,
            "filter": sample["filter"],
            "response": json.dumps(sample["filtered_resps"], ensure_ascii=False),
            "metrics": json.dumps({m: sample[m] for m in sorted(sample["metrics"])}, ensure_ascii=False),
        }


def identity(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a cell, as columns; of an intervention of several steps the last one that steers."""
    cell = facts["cell"]
    intervention = cell["intervention"]
    steps = intervention["resolved"]["steps"]
    step = next((step for step in reversed(steps) if not step["deactivation"]), steps[-1] if steps else {})
    silenced = [code for step in steps if step["deactivation"] for code in step["languages"]]
    if prompt := intervention["resolved"].get("prompt"):
        step = {"op": "prompt", "value": prompt["instruction"]}
    return {
        "cell": cell["name"],
        "model": facts["model"],
        "engine": facts.get("engine", "steered-hf"),
        "task": cell["task"],
        "intervention": intervention["name"],
        "languages": "+".join(intervention["languages"]),
        "preset": intervention["arguments"].get("preset"),
        **{column: None if step.get(name) is None else str(step[name]) for name, column in _STEP.items()},
        "factor": step.get("factor"),
        "deactivated": "+".join(silenced),
        "control": intervention["control"],
        "target": cell["target"],
        "evaluated": cell.get("evaluated"),
        "items": cell.get("items", ALL),
        "stage": cell["stage"],
        "fingerprint": facts["fingerprint"],
        "signature": facts["signature"],
        "versions": versions_text(facts.get("versions", {})),
    }


def table(rows: Sequence[Mapping[str, Any]], order: Sequence[str]) -> pd.DataFrame:
    """A table of rows, sorted; whole numbers stay whole where some are absent."""
    import pandas as pd

    frame = pd.DataFrame(list(rows))
    for name in ("control", "n", "n_choose", "n_report", "stage", "doc_id"):
        if name in frame:
            frame[name] = frame[name].astype("Int64")
    if frame.empty:
        return frame
    return frame.sort_values(list(order), kind="stable", ignore_index=True)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


# --- The folder


class Store:
    """The folder of a sweep: what was done so far.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # --- for people -----------------------------------------------------------------------------------------------

    def frame(self) -> pd.DataFrame:
        """One row per finished cell and metric; `planned` says whether the cell belongs to the last plan.

        Raises:
            StoreError: if a finished cell is damaged; it names the file.
        """
        self._refuse_no_sweep()
        planned = {cell.key: cell for cell in self.planned()}
        rule = self.rule()
        rows = [
            row
            for stored in self.stored()
            for row in metric_rows(stored, planned.get(stored.cell["key"]), self.halves(stored, rule))
        ]
        return table(rows, ("cell", "metric", "filter"))

    def items(self) -> pd.DataFrame:
        """One row per finished cell and item; `metrics` holds the item's scores as JSON."""
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
        """Seconds, tokens and machine of each finished cell: everything that differs from run to run."""
        return table([timing for _, timing in sorted(self.timing_files())], ("cell",))

    # --- finished cells ---------------------------------------------------------------------------------------------

    def planned(self) -> list[Cell]:
        """Cells of the last plan, those of `then` as far as they are known; none where no plan was run."""
        from lm_eval_steering.sweep.cells import Cell

        if not (self.path / "plan.json").is_file():
            return []
        plan = self.json("plan.json")
        cells = [Cell.read(cell) for cell in plan["cells"]]
        for path in sorted((self.path / "then").glob("*.json")):
            choice = read_json(path)
            if choice["plan_hash"] == plan["plan_hash"]:
                cells += [Cell.read(cell) for cell in choice["cells"]]
        return list({cell.key: cell for cell in cells}.values())

    def evaluated(self) -> dict[str, str]:
        """Task -> language of its items, for each task with a finished cell where the task or the plan says it."""
        plan = self.json("plan.json")["plan"] if (self.path / "plan.json").is_file() else {}
        stated = dict(plan.get("evaluated", {}))
        return stated | {
            stored.cell["task"]: stored.cell["evaluated"] for stored in self.stored() if stored.cell.get("evaluated")
        }

    def mixed_versions(self, cells: Iterable[Cell]) -> str | None:
        """One line where finished cells were made with other releases than those installed; None where none was."""
        folders, installed = self.folders(), cell_versions()
        made = [StoredCell(folders[cell.key[:10]]).versions for cell in cells if cell.key[:10] in folders]
        other = [releases for releases in made if releases != installed]
        if not other:
            return None
        return (
            f"warning: {len(other)} finished cells were made with {', '.join(sorted(set(map(versions_text, other))))}; "
            f"the others are made with {versions_text(installed)}"
        )

    def rule(self) -> dict[str, Any] | None:
        """How the last plan halves the items (seed, item); None where it does not."""
        if not (self.path / "plan.json").is_file():
            return None
        choose = self.json("plan.json")["plan"].get("choose") or {}
        return {key: choose[key] for key in ("seed", "item")} if choose.get("split") == "half" else None

    def states(self) -> dict[str, str]:
        """Key of each planned cell -> `done`, `running`, `failed` or `missing`."""
        held, folders = locks.owners(self.path / "locks"), self.folders()
        return {cell.key: self.state(cell.key, folders, held) for cell in self.planned()}

    def state(self, key: str, folders: Mapping[str, Path], held: Mapping[str, Any]) -> str:
        """State of one cell, given the finished folders and the locks that are held."""
        if key[:10] in folders:
            return DONE
        if key in held:
            return RUNNING
        return FAILED if self.failure(key) else MISSING

    def folders(self) -> dict[str, Path]:
        """First ten digits of the key -> folder, of each finished cell."""
        cells = self.path / "cells"
        finished = cells.iterdir() if cells.is_dir() else ()
        return {path.name.rsplit("--", 1)[-1]: path for path in finished if not path.name.startswith(".")}

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
        sweep = self.json("sweep.json")
        if (version := sweep.get("format_version")) != FORMAT_VERSION:
            raise StoreError(
                f"{self.path}: format {version}, this release reads {FORMAT_VERSION}; run the plan in a new folder"
            )
        return sweep

    def _key(self, cell: Cell | str) -> str:
        return (cell.rsplit("--", 1)[-1] if isinstance(cell, str) else cell.key)[:10]

    def halves(self, stored: StoredCell, rule: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """A finished cell's metrics on each half under a rule; None where they are not known (yet)."""
        path = self.path / "halves" / f"{stored.cell['key']}.json"
        if rule is None or not path.is_file():
            return None
        kept = read_json(path)
        return dict(kept["halves"]) if kept["of"] == _halved(stored, rule) else None

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
        failure = self.failure(cell.key)
        return str(failure["error"]).strip().splitlines()[0] if failure else ""

    def timing_files(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, timing) of each finished cell that has one."""
        folders = self.folders()
        for path in sorted((self.path / "timings").glob("*.json")):
            if path.stem[:10] in folders:
                yield path.stem, read_json(path)

    def keep(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file of the folder, in one step."""
        try:
            write_text(self.path / name, as_json(content))
        except OSError as error:
            raise StoreError(
                f"{self.path / name}: {error.strerror or error}; what was finished before is whole: free some "
                "space and run the same command again"
            ) from error

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder."""
        return read_json(self.path / name)

    # --- for runners ------------------------------------------------------------------------------------------------

    def check(self, grid: Grid) -> None:
        """Refuse a folder of another model, or one that is no sweep's.

        Raises:
            StoreError: naming both.
        """
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"--out {self.path} is a file; expected a folder for the cells, or the name of a new one")
        if not (self.path / "sweep.json").is_file():
            names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
            if foreign := sorted(name for name in names - _KNOWN_FILES if not name.endswith(".partial")):
                raise StoreError(
                    f"{self.path}: there are files here and no sweep ({foreign[0]}); choose another folder"
                )
            return
        model = self._begun()["model"]
        if model != grid.model:
            wrong = sorted(key for key in {*model, *grid.model} if model.get(key) != grid.model.get(key))
            difference = ", ".join(f"{key}: {model.get(key)!r} here, {grid.model.get(key)!r} now" for key in wrong)
            raise StoreError(f"{self.path} is the sweep of another model ({difference}); choose another folder")

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
                "cells": [cell.describe() for cell in (*grid.searched, *(() if grid.is_open else grid.cells))],
                "searches": len(grid.searches) if grid.is_open else 0,
                "then_bound": grid.then_bound(),
                "notes": grid.notes,
            },
        )

    def check_weights(self, digest: str) -> None:
        """Refuse a loaded model whose weights are not those of the cells that are here.

        Raises:
            StoreError: naming the folder.
        """
        sweep = self.json("sweep.json")
        if sweep.setdefault("weights", digest) != digest:
            raise StoreError(f"{self.path}: the model of this name had other weights when this sweep began")
        self.keep("sweep.json", sweep)

    def put_aside_damaged(self, cells: Iterable[Cell]) -> list[str]:
        """Move finished cells that are not whole out of the way, to be done again; says which, and why."""
        folders, lines = self.folders(), []
        for cell in cells:
            folder = folders.get(cell.key[:10])
            if folder is None:
                continue
            try:
                StoredCell(folder).check(cell.key)
            except StoreError as error:
                damaged = self.path / "damaged"
                damaged.mkdir(exist_ok=True)
                number = len(list(damaged.iterdir()))
                with suppress(FileNotFoundError):  # another runner was faster
                    folder.rename(damaged / f"{folder.name}.{number}")
                lines.append(f"{error}; it is in {damaged} now and is done again")
        return lines


def _halved(stored: StoredCell, rule: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell's halves follow from."""
    return {**rule, "samples": stored.files[stored.samples_file]["sha256"]}
