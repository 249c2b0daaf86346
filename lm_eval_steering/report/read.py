"""Read a sweep's folder for a report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from lm_eval_steering.harness.evaluated import evaluated_language
from lm_eval_steering.metrics.degenerate import degenerate
from lm_eval_steering.metrics.language_id import UNKNOWN
from lm_eval_steering.neurons.loading import versions
from lm_eval_steering.report import naming
from lm_eval_steering.report.data import CELL_COLUMNS, SCORE_COLUMNS, Facts, Items, Output, ReportError, Samples, Sweep
from lm_eval_steering.sweep.split import REPORT, half_of, item_of
from lm_eval_steering.sweep.store import Store

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
    own: dict[int, Output] = {}
    prompts = samples.prompts.setdefault((cell.task, cell.target), {})
    room = limit - samples.count
    for sample in found:
        text = text_of(sample)
        if text is None or int(sample["doc_id"]) in own:  # a second filter reads the same output
            continue
        if len(own) >= room:
            samples.left_out += 1
            continue
        own[int(sample["doc_id"])] = Output(int(sample["doc_id"]), text, str(sample.get("output_language") or ""))
        prompts.setdefault(int(sample["doc_id"]), _prompt_of(sample))
    if own:
        samples.outputs[cell.cell] = list(own.values())


def _prompt_of(sample: Mapping[str, Any]) -> str:
    arguments = sample.get("arguments") or {}
    first = next(iter(arguments.values()), {}) if isinstance(arguments, Mapping) else arguments[0]
    return str(first.get("arg_0", "") if isinstance(first, Mapping) else first[0])
