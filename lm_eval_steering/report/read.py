"""Read a sweep's folder for a report."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.files import read_json_lines
from lm_eval_steering.lmeval.evaluated_language import evaluated_language
from lm_eval_steering.metrics.degenerate import degenerate
from lm_eval_steering.metrics.language_id import UNKNOWN
from lm_eval_steering.provenance import versions
from lm_eval_steering.report import naming
from lm_eval_steering.report.naming import SEVERAL
from lm_eval_steering.sweep.halves import REPORT, half_of, item_of
from lm_eval_steering.sweep.store import Store

# --- What a report is made of, wherever it was read from: cells, their scores, their items
#
# `read.py` makes it from a sweep's folder, `read_merged.py` from merged tables, `read_plain.py` from a plain lm-eval
# run. Everything behind it (effects, tables, figures, page) knows these classes and no file.

if TYPE_CHECKING:
    import pandas as pd

BASELINE = "baseline"
CELL_COLUMNS = (
    "cell", "model", "task", "family", "evaluated", "steered", "relation", "kind", "factor", "control", "is_baseline",
    "target", "items", "stage", "signature", "fingerprint", "baseline_cell",
)  # fmt: skip
SCORE_COLUMNS = ("cell", "metric", "value", "text", "n", "higher_is_better")


class ReportError(SteeringError):
    """A report that cannot be made from what was given."""


@dataclass(frozen=True)
class Items:
    """The items of one cell.

    Attributes:
        docs: (items,) lm-eval's document numbers, ascending.
        values: metric -> (items,) numbers, (items, 2) pairs of a sum and its size, or objects (labels, texts); nan or
            None where an item has none.
        reported: (items,) whether the item is in the half that nothing was chosen on; None where nothing was split.
        digests: (items,) of the documents, to see that two runs had the same ones; None where they are not known.
    """

    docs: NDArray[np.int64]
    values: dict[str, NDArray[Any]]
    reported: NDArray[np.bool_] | None = None
    digests: NDArray[np.uint64] | None = None


@dataclass(frozen=True)
class ItemOutput:
    """What a model wrote for one item of one cell."""

    doc: int
    text: str
    language: str


@dataclass
class Samples:
    """Generated text for the explorer.

    Attributes:
        prompts: (task, target or "") -> document number -> prompt.
        outputs: cell -> its outputs, by document.
        left_out: number of outputs that were not kept, because there are too many for one page.
    """

    prompts: dict[tuple[str, str], dict[int, str]] = field(default_factory=dict)
    outputs: dict[str, list[ItemOutput]] = field(default_factory=dict)
    left_out: int = 0

    @property
    def count(self) -> int:
        """Outputs that are there."""
        return sum(map(len, self.outputs.values()))


@dataclass
class Facts:
    """What a reader needs to do it again.

    Attributes:
        title: of the report.
        sources: what it was made from.
        command: that made it.
        plan: text of the plan, empty where it is not known.
        versions: package -> version.
        neurons: name or path of the neuron set, as the plan has it.
        choices: what the sweep itself chose, one mapping a group.
        notes: what a reader should know: cells left out, halves, baselines that are missing.
    """

    title: str
    sources: list[str] = field(default_factory=list)
    command: str = ""
    plan: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    neurons: str = ""
    choices: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Sweep:
    """A sweep, or a comparison of two.

    Attributes:
        cells: CELL_COLUMNS. `steered` is empty for a baseline; `evaluated` is empty where the items are in several
            languages; `control` is the seed of a random control; `baseline_cell` is what the cell is compared with.
        scores: SCORE_COLUMNS, one row a cell and metric.
        items: cell -> items; a cell without items has scores and no intervals.
        timings: cell, seconds, tokens.
        missing: planned cells that are not done: cell, task, status, why.
        samples: generated text.
        facts: the rest.
        against: what a difference is to: `baseline`, or the name of the other run.
    """

    cells: pd.DataFrame
    scores: pd.DataFrame
    items: dict[str, Items]
    timings: pd.DataFrame
    missing: pd.DataFrame
    samples: Samples
    facts: Facts
    against: str = BASELINE

    def is_shift(self, metric: str) -> bool:
        """Whether a score is itself a comparison with the unsteered model (LSS), whose null is random sets."""
        return self.against == BASELINE and metric.startswith("lss")

    def steered_cells(self) -> pd.DataFrame:
        """Interventions on a language's own neurons: neither baselines nor controls."""
        return self.cells[~self.cells["is_baseline"] & self.cells["control"].isna()]


def align(found: Sequence[Items], metric: str) -> tuple[NDArray[np.int64], list[NDArray[Any] | None]]:
    """Documents that any of these items has, and for each its values over them, nan where it has none.

    Returns:
        (documents,), and arrays (documents,) or (documents, 2); None for items without the metric.
    """
    docs = found[0].docs
    if any(own.docs is not docs and not np.array_equal(own.docs, docs) for own in found):
        docs = np.unique(np.concatenate([own.docs for own in found]))
    aligned: list[NDArray[Any] | None] = []
    for own in found:
        values = own.values.get(metric)
        if values is None or len(own.docs) == len(docs):
            aligned.append(values)
            continue
        empty = None if values.dtype == object else np.nan
        spread = np.full((len(docs), *values.shape[1:]), empty, dtype=values.dtype)
        spread[np.searchsorted(docs, own.docs)] = values
        aligned.append(spread)
    return docs, aligned


def check_same_documents(first: Items, second: Items, task: str) -> None:
    """Refuse to pair items that are not the same documents.

    Raises:
        ReportError: naming the task.
    """
    if first.digests is None or second.digests is None:
        return
    _, ours, theirs = np.intersect1d(first.docs, second.docs, return_indices=True)
    if not len(ours):
        raise ReportError(f"{task}: the two runs have no document in common; they cannot be paired")
    if differ := int((first.digests[ours] != second.digests[theirs]).sum()):
        raise ReportError(
            f"{task}: {differ} of {len(ours)} documents differ between a cell and its baseline; they cannot be paired: "
            "evaluate both on the same data"
        )


if TYPE_CHECKING:
    import pandas as pd

MAX_SAMPLES = 100_000
_PAIR = 2


def read_store(path: Path, max_samples: int = MAX_SAMPLES) -> Sweep:
    """The sweep in a folder.

    Raises:
        StoreError: if a finished cell is damaged.
        ReportError: if nothing is finished.
    """
    import pandas as pd

    store = Store(path)
    frame = store.frame()
    if frame.empty:
        raise ReportError(f"{path}: no cell is done yet; `lm-eval-steering status {path}` says what is missing")
    facts = Facts(title=path.resolve().name, sources=[str(path)], versions=versions())
    cells, scores = from_frame(frame, facts)
    items, samples, rule = {}, Samples(), store.rule()
    for row in cells.itertuples():
        found = store.samples(row.cell)
        split = store.read(row.cell.rsplit("--", 1)[-1]).facts.get("split") or rule
        items[row.cell] = items_of(found, split)
        if pd.isna(row.control):
            keep_outputs(samples, row, found, max_samples)
    _plan_of(path, facts)
    return Sweep(cells, scores, items, store.timings(), store.missing(), samples, facts)


def _plan_of(path: Path, facts: Facts) -> None:
    if (path / "plan.json").is_file():
        plan = json.loads((path / "plan.json").read_text(encoding="utf-8"))["plan"]
        facts.plan = yaml.safe_dump(_without_defaults(plan), sort_keys=False, allow_unicode=True)
        facts.neurons = str(plan.get("neurons", ""))
    facts.choices = [json.loads(found.read_text(encoding="utf-8")) for found in sorted((path / "then").glob("*.json"))]


def _without_defaults(plan: Any) -> Any:
    """A plan as a person would have written it."""
    if isinstance(plan, Mapping):
        kept = {key: _without_defaults(value) for key, value in plan.items() if key != "slurm"}
        return {key: value for key, value in kept.items() if value not in (None, {}, [], False)}
    return [_without_defaults(part) for part in plan] if isinstance(plan, list) else plan


# --- cells and scores -----------------------------------------------------------------------------------------------


def from_frame(frame: pd.DataFrame, facts: Facts) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells and scores from `Store.frame()`; what was left out is noted.

    Raises:
        ReportError: if the cells are of several models.
    """
    if frame["planned"].any() and not frame["planned"].all():
        unplanned = frame.loc[~frame["planned"].astype(bool), "cell"].nunique()
        facts.notes.append(f"{unplanned} finished cells are not in the last plan and are left out.")
        frame = frame[frame["planned"].astype(bool)]
    models = sorted(frame["model"].astype(str).unique())
    if len(models) > 1:
        raise ReportError(f"cells of {len(models)} models ({', '.join(models)}): a report is about one; use compare")
    scores = frame.assign(
        metric=[naming.metric_label(*pair) for pair in zip(frame["metric"], frame["filter"].fillna(""), strict=True)]
    )
    cells = cells_of(frame.drop_duplicates("cell"))
    link_baselines(cells, facts)
    return cells, scores.reindex(columns=list(SCORE_COLUMNS)).reset_index(drop=True)


def cells_of(rows: pd.DataFrame) -> pd.DataFrame:
    """CELL_COLUMNS of one row a cell of `Store.frame()`."""
    import pandas as pd

    rows = rows.reset_index(drop=True)
    languages, off = rows["languages"].fillna("").astype(str), rows["deactivated"].fillna("").astype(str)
    family = naming.families(sorted(rows["task"].astype(str).unique()))
    evaluated = {task: evaluated_language(task) or "" for task in family}
    off_beside = naming.silenced(list(languages), list(off))
    presets = [None if pd.isna(preset) else str(preset) for preset in rows["preset"]]
    asked = list(zip(rows["signature"].astype(str), presets, off_beside, strict=True))
    kinds = {one: naming.kind_of(*one) for one in set(asked)}
    # An intervention that only silences is about the languages that it silences.
    cells = rows.assign(steered=languages.where(languages != "", off), kind=[kinds[one] for one in asked])
    cells["family"] = cells["task"].map(family)
    cells["evaluated"] = cells["task"].map(evaluated)
    relations = {
        pair: naming.relation_of(*pair) for pair in set(zip(cells["steered"], cells["evaluated"], strict=True))
    }
    cells["relation"] = [relations[pair] for pair in zip(cells["steered"], cells["evaluated"], strict=True)]
    cells["is_baseline"] = cells["steered"] == ""
    cells["target"] = cells["target"].fillna("").astype(str)
    cells["items"] = cells["items"].fillna("all")
    cells["factor"] = cells["factor"].astype(float)
    cells["control"] = cells["control"].astype("Int64")
    return cells.reindex(columns=list(CELL_COLUMNS))


def link_baselines(cells: pd.DataFrame, facts: Facts) -> None:
    """Set `baseline_cell`: same task and items; made for the same target where the task is another for each."""
    baselines = {(row.task, row.items, row.target): row.cell for row in cells[cells["is_baseline"]].itertuples()}
    cells["baseline_cell"] = [
        "" if row.is_baseline
        else baselines.get((row.task, row.items, row.target)) or baselines.get((row.task, row.items, ""), "")
        for row in cells.itertuples()
    ]  # fmt: skip
    alone = int(((cells["baseline_cell"] == "") & ~cells["is_baseline"]).sum())
    if alone:
        facts.notes.append(f"{alone} steered cells have no finished baseline: their differences are left blank.")


# --- items ----------------------------------------------------------------------------------------------------------


def items_of(samples: Sequence[Mapping[str, Any]], split: Mapping[str, Any] | None = None) -> Items:
    """Items of one cell from lm-eval's samples; shares that can be seen from the outputs are added.

    Args:
        samples: of lm-eval.
        split: how a sweep halved the items (seed, item), None where it did not; a task whose documents name no source
            item is not halved.
    """
    docs = sorted({int(sample["doc_id"]) for sample in samples})
    place = {doc: number for number, doc in enumerate(docs)}
    columns: dict[str, list[Any]] = {}
    digests, reported = np.zeros(len(docs), dtype=np.uint64), np.zeros(len(docs), dtype=bool)
    for sample in samples:
        row = place[int(sample["doc_id"])]
        digests[row] = int(str(sample.get("doc_hash") or "0")[:16], 16)
        item = item_of(sample["doc"], sample["doc_id"], split["item"]) if split else None
        if split and item is not None:
            reported[row] = half_of(item, split["seed"]) == REPORT
        else:
            split = None
        for metric, value in values_of(sample).items():
            label = naming.metric_label(metric, str(sample.get("filter", "")))
            columns.setdefault(label, [None] * len(docs))[row] = value
    values = {metric: as_array(column) for metric, column in columns.items()}
    known = digests if digests.any() else None
    return Items(np.array(docs, dtype=np.int64), values, reported if split else None, known)


def values_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Metric -> value of one sample, with `lang_unknown` and `degenerate` of generated text where it has none."""
    found = {metric: sample.get(metric) for metric in sample["metrics"]}
    if "output_language" in found:
        found.setdefault("lang_unknown", float(found["output_language"] == UNKNOWN))
        text = text_of(sample)
        if text is not None:
            found.setdefault("degenerate", float(degenerate(text)))
    return found


def text_of(sample: Mapping[str, Any]) -> str | None:
    """What the model wrote; None for likelihoods."""
    answer = sample["filtered_resps"]
    while isinstance(answer, list) and answer:
        answer = answer[0]
    return answer if isinstance(answer, str) else None


def as_array(column: Sequence[Any]) -> NDArray[Any]:
    """Numbers as (items,), pairs of numbers as (items, 2), everything else as objects."""
    first = next((value for value in column if value is not None), None)
    blank = [np.nan] * _PAIR if isinstance(first, list | tuple) else np.nan
    try:
        numbers = np.array([blank if value is None else value for value in column])
    except ValueError:  # of several lengths
        numbers = np.empty(0, dtype=object)
    if numbers.dtype.kind in "biuf" and (numbers.ndim == 1 or numbers.shape[1:] == (_PAIR,)):
        return numbers.astype(np.float64)
    found = np.empty(len(column), dtype=object)
    found[:] = [tuple(value) if isinstance(value, list) else value for value in column]
    return found


# --- samples --------------------------------------------------------------------------------------------------------


def keep_outputs(samples: Samples, cell: Any, found: Iterable[Mapping[str, Any]], limit: int) -> None:
    """Put a cell's generated text where the explorer finds it, as long as there is room."""
    own: dict[int, ItemOutput] = {}
    prompts = samples.prompts.setdefault((cell.task, cell.target), {})
    room = limit - samples.count
    for sample in found:
        text = text_of(sample)
        if text is None or int(sample["doc_id"]) in own:  # a second filter reads the same output
            continue
        if len(own) >= room:
            samples.left_out += 1
            continue
        own[int(sample["doc_id"])] = ItemOutput(int(sample["doc_id"]), text, str(sample.get("output_language") or ""))
        prompts.setdefault(int(sample["doc_id"]), _prompt_of(sample))
    if own:
        samples.outputs[cell.cell] = list(own.values())


def _prompt_of(sample: Mapping[str, Any]) -> str:
    arguments = sample.get("arguments") or {}
    first = next(iter(arguments.values()), {}) if isinstance(arguments, Mapping) else arguments[0]
    return str(first.get("arg_0", "") if isinstance(first, Mapping) else first[0])


# --- Read a plain lm-eval run (`results_*.json`, with `samples_*.jsonl` beside it where they were logged) as baselines


def read_plain(path: Path, max_samples: int = MAX_SAMPLES) -> Sweep:
    """One baseline cell a task of an lm-eval run.

    Raises:
        ReportError: if the file is not lm-eval's results.
    """
    import pandas as pd

    results = _results(path)
    facts = Facts(title=path.stem, sources=[str(path)])
    counts, better = results.get("n-samples", {}), results.get("higher_is_better", {})
    tasks = [task for task in results["results"] if task in results.get("configs", results["results"])]
    rows, scores, items, samples = [], [], {}, Samples()
    model = str((results.get("config") or {}).get("model_args") or results.get("model_name") or path.stem)
    families = naming.families(tasks)
    for task in tasks:
        cell = f"{path.stem}--{task}"
        rows.append(
            dict.fromkeys(CELL_COLUMNS, "")
            | {"cell": cell, "model": model, "task": task, "family": families[task], "relation": SEVERAL}
            | {"evaluated": evaluated_language(task) or "", "items": "all", "factor": float("nan"), "is_baseline": True}
            | {"stage": 1, "control": None, "signature": "plain lm-eval run"}
        )
        scores += _scores(cell, results["results"][task], counts.get(task) or {}, better.get(task) or {})
        found = _samples(path, task)
        if found:
            items[cell] = items_of(found)
            keep_outputs(samples, _Row(cell, task), found, max_samples)
    cells = pd.DataFrame(rows, columns=list(CELL_COLUMNS)).astype({"control": "Int64", "is_baseline": bool})
    if not items:
        facts.notes.append(f"{path.name} has no samples beside it (--log_samples): its scores cannot be paired.")
    frame = pd.DataFrame(scores, columns=list(SCORE_COLUMNS))
    return Sweep(cells, frame, items, pd.DataFrame(), pd.DataFrame(columns=["cell"]), samples, facts)


class _Row:
    """What `keep_outputs` asks of a cell."""

    target = ""

    def __init__(self, cell: str, task: str) -> None:
        self.cell, self.task = cell, task


def add_baseline(sweep: Sweep, path: Path) -> None:
    """Give a sweep the tasks of a plain run as baselines, where it has none of its own.

    Raises:
        ReportError: if the run has none of the sweep's tasks.
    """
    import pandas as pd

    plain = read_plain(path)
    own = set(sweep.cells.loc[sweep.cells["is_baseline"], "task"])
    added = plain.cells[plain.cells["task"].isin(set(sweep.cells["task"]) - own)]
    if added.empty:
        shared = sorted(set(plain.cells["task"]) & own)
        why = (
            f"the sweep has its own baselines of {', '.join(shared)}" if shared else "it has none of the sweep's tasks"
        )
        raise ReportError(f"{path}: nothing to add, {why}")
    sweep.cells = pd.concat([sweep.cells, added], ignore_index=True)
    sweep.scores = pd.concat([sweep.scores, plain.scores[plain.scores["cell"].isin(added["cell"])]], ignore_index=True)
    sweep.items |= plain.items
    sweep.samples.outputs |= plain.samples.outputs
    sweep.facts.sources += plain.facts.sources
    sweep.facts.notes = [note for note in sweep.facts.notes if "no finished baseline" not in note] + plain.facts.notes
    sweep.facts.notes.append(f"Baselines of {', '.join(added['task'])} are of the plain run {path.name}.")
    link_baselines(sweep.cells, sweep.facts)


def _results(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: not a results file of lm-eval ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("results"), dict):
        raise ReportError(f"{path}: not a results file of lm-eval (no key 'results')")
    return found


def _scores(cell: str, own: dict[str, Any], counts: dict[str, Any], better: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key, value in own.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        number = float(value) if isinstance(value, int | float) else None
        rows.append(
            {
                "cell": cell, "metric": naming.metric_label(metric, filter_), "value": number,
                "text": value if isinstance(value, str) else None, "n": int(counts.get("effective") or 0),
                "higher_is_better": better.get(metric),
            }
        )  # fmt: skip
    return rows


def _samples(path: Path, task: str) -> list[dict[str, Any]]:
    date = path.stem.removeprefix("results_")
    found = path.parent / f"samples_{task}_{date}.jsonl"
    if not found.is_file():
        return []
    return list(read_json_lines(found))


# --- Read merged tables (`lm-eval-steering merge --items`) for a report: the way for sweeps of thousands of cells
#
# `metrics.parquet` gives cells and scores; `items.parquet`, where it is there, the items. It is read in batches, and
# each distinct text of values is parsed once, because right and wrong have two spellings in millions of rows.

_BATCH = 1 << 20
_COLUMNS = ["cell", "doc_id", "half", "filter", "metrics"]
Part = tuple[NDArray[np.int64], NDArray[Any] | None, dict[str, NDArray[Any]]]


def read_merged(folder: Path, max_samples: int = MAX_SAMPLES) -> Sweep:
    """The sweeps that were merged into a folder.

    Raises:
        ReportError: if there is no `metrics.parquet`, or nothing in it.
    """
    import pandas as pd

    path = folder / "metrics.parquet"
    if not path.is_file():
        raise ReportError(f"{folder}: neither a sweep (sweep.json) nor merged tables (metrics.parquet) are here")
    frame = pd.read_parquet(path)
    if frame.empty:
        raise ReportError(f"{path}: no cell is in it")
    facts = Facts(title=folder.resolve().name, sources=[str(folder)], versions=versions())
    cells, scores = from_frame(frame, facts)
    items: dict[str, Items] = {}
    samples = Samples()
    if (folder / "items.parquet").is_file():
        wanted = set(cells["cell"])
        items = read_items(folder / "items.parquet", wanted)
        samples = _outputs(folder / "items.parquet", cells, items, max_samples)
    else:
        facts.notes.append("There is no items.parquet (merge --items): scores have no intervals and no tests.")
    timings = pd.read_parquet(folder / "timings.parquet") if (folder / "timings.parquet").is_file() else pd.DataFrame()
    missing = pd.DataFrame(columns=["cell", "task", "stage", "status", "why"])
    return Sweep(cells, scores, items, timings, missing, samples, facts)


def read_items(path: Path, wanted: set[str]) -> dict[str, Items]:
    """Items of each wanted cell of `items.parquet`, whose rows are sorted by cell."""
    parts: dict[str, dict[str, list[Part]]] = {}
    for cell, filter_, part in _parts(path):
        if cell in wanted:
            parts.setdefault(cell, {}).setdefault(filter_, []).append(part)
    return {cell: _joined(own) for cell, own in parts.items()}


def _parts(path: Path) -> Iterator[tuple[str, str, Part]]:
    """Runs of rows of one cell and filter, with their values by metric."""
    file = pq.ParquetFile(path, read_dictionary=["cell", "filter", "half", "metrics"])
    for batch in file.iter_batches(batch_size=_BATCH, columns=_COLUMNS):
        cells, filters, halves = (_encoded(batch.column(name)) for name in ("cell", "filter", "half"))
        docs = np.asarray(batch.column("doc_id").cast(pa.int64()))
        texts, codes = _encoded(batch.column("metrics"))
        values = _by_metric(texts)
        there = {metric: _present(column) for metric, column in values.items()}
        starts = np.flatnonzero(np.diff(cells[1], prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(docs)], strict=True):
            for code in np.unique(filters[1][start:end]):
                rows = start + np.flatnonzero(filters[1][start:end] == code)
                own = codes[rows]
                kept = {metric: column[own] for metric, column in values.items() if there[metric][own].any()}
                reported = None if not halves[0] else np.isin(halves[1][rows], _places(halves[0], REPORT))
                yield cells[0][cells[1][start]], filters[0][code] if code >= 0 else "", (docs[rows], reported, kept)


def _encoded(column: Any) -> tuple[list[str], NDArray[np.int64]]:
    """(distinct texts, place of each row's text; -1 for null)."""
    if not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column.cast(pa.string()))
    codes = np.asarray(pc.fill_null(column.indices.cast(pa.int64()), -1))
    return column.dictionary.to_pylist(), codes


def _places(texts: list[str], wanted: str) -> list[int]:
    return [place for place, text in enumerate(texts) if text == wanted]


def _by_metric(texts: list[str]) -> dict[str, NDArray[Any]]:
    """Metric -> value in each distinct text."""
    gc.disable()  # a million small lists at once: the collector would look at each again and again
    try:
        parsed: list[dict[str, Any]] = json.loads(f"[{','.join(texts)}]")
    finally:
        gc.enable()
    names = dict.fromkeys(name for found in parsed for name in found)
    return {name: as_array([found.get(name) for found in parsed]) for name in names}


def _present(column: NDArray[Any]) -> NDArray[np.bool_]:
    """(texts,) whether a text has a value."""
    if column.dtype == object:
        return np.array([value is not None for value in column], dtype=bool)
    return ~np.isnan(column).reshape(len(column), -1).all(axis=1)


def _joined(filters: dict[str, list[Part]]) -> Items:
    """One cell from its runs; several filters share the documents."""
    values: dict[str, NDArray[Any]] = {}
    docs = reported = None
    for filter_, parts in filters.items():
        numbers = np.concatenate([part[0] for part in parts]) if len(parts) > 1 else parts[0][0]
        order = None if (np.diff(numbers) > 0).all() else np.argsort(numbers, kind="stable")
        own = _concatenated(parts)
        if order is not None:
            numbers, own = numbers[order], {name: column[order] for name, column in own.items()}
        values |= {naming.metric_label(name, filter_): column for name, column in own.items()}
        if docs is None:
            docs = numbers
            halves = [part[1] for part in parts if part[1] is not None]
            if len(halves) == len(parts):
                whole = np.concatenate(halves)
                reported = whole if order is None else whole[order]
    assert docs is not None
    _add_unknown(values)
    return Items(docs, values, reported)


def _concatenated(parts: list[Part]) -> dict[str, NDArray[Any]]:
    names = dict.fromkeys(name for part in parts for name in part[2])
    found = {}
    for name in names:
        there = [part[2].get(name) for part in parts]
        like = next(column for column in there if column is not None)
        filled = [
            np.full((len(part[0]), *like.shape[1:]), None if like.dtype == object else np.nan, dtype=like.dtype)
            if column is None else column
            for part, column in zip(parts, there, strict=True)
        ]  # fmt: skip
        found[name] = np.concatenate(filled) if len(filled) > 1 else filled[0]
    return found


def _add_unknown(values: dict[str, NDArray[Any]]) -> None:
    if "output_language" in values and "lang_unknown" not in values:
        values["lang_unknown"] = (values["output_language"] == "unknown").astype(np.float64)


def _outputs(path: Path, cells: Any, items: dict[str, Items], limit: int) -> Samples:
    """Generated text of the first cells that fit; merged tables hold no prompts."""
    samples = Samples()
    own = cells[cells["control"].isna()]
    generated = [cell for cell in own["cell"] if cell in items and "output_language" in items[cell].values]
    places = own.set_index("cell")[["task", "target"]]
    for cell in generated:
        if samples.count + len(items[cell].docs) > limit:
            samples.left_out += len(items[cell].docs)
            continue
        rows = pq.read_table(path, columns=["doc_id", "response"], filters=[("cell", "==", cell)]).to_pylist()
        labels = dict(zip(items[cell].docs.tolist(), items[cell].values["output_language"], strict=True))
        samples.outputs[cell] = [
            ItemOutput(row["doc_id"], _first_text(row["response"]), str(labels.get(row["doc_id"]) or ""))
            for row in rows
        ]
        prompts = samples.prompts.setdefault(tuple(places.loc[cell]), {})
        prompts |= {row["doc_id"]: f"document {row['doc_id']} (merged tables hold no prompts)" for row in rows}
    return samples


def _first_text(response: str) -> str:
    found = json.loads(response)
    while isinstance(found, list) and found:
        found = found[0]
    return str(found)
