"""Read merged tables (`lm-eval-steering merge --items`) for a report: the way for sweeps of thousands of cells.

`metrics.parquet` gives cells and scores; `items.parquet`, where it is there, the items. It is read in batches, and each
distinct text of values is parsed once, because right and wrong have two spellings in millions of rows.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lm_eval_steering.neurons.loading import versions
from lm_eval_steering.report import naming
from lm_eval_steering.report.data import Facts, Items, Output, ReportError, Samples, Sweep
from lm_eval_steering.report.read import MAX_SAMPLES, as_array, from_frame
from lm_eval_steering.sweep.split import REPORT

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
            Output(row["doc_id"], _first_text(row["response"]), str(labels.get(row["doc_id"]) or "")) for row in rows
        ]
        prompts = samples.prompts.setdefault(tuple(places.loc[cell]), {})
        prompts |= {row["doc_id"]: f"document {row['doc_id']} (merged tables hold no prompts)" for row in rows}
    return samples


def _first_text(response: str) -> str:
    found = json.loads(response)
    while isinstance(found, list) and found:
        found = found[0]
    return str(found)
