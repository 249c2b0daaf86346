"""One table from any number of sweeps' folders, as parquet and CSV."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_steering.files import write_bytes, write_text
from lm_eval_steering.sweep.store import Store, StoreError

if TYPE_CHECKING:
    import pandas as pd


def merge(folders: Sequence[Path], out: Path, items: bool = False) -> tuple[list[Path], list[str]]:
    """Write `metrics` (one row per cell and metric), `timings`, and on request `items` (one row per cell and item).

    A cell that is in several folders is taken from the first that has it.

    Args:
        folders: of sweeps.
        out: folder for the tables.
        items: whether to write the items too.

    Returns:
        The files, and what a user should know.

    Raises:
        StoreError: if a folder is no sweep's, holds nothing finished, or is damaged.
    """
    if out.exists() and not out.is_dir():
        raise StoreError(f"--out {out} is a file; expected a folder for the tables, or the name of a new one")
    stores = [Store(folder) for folder in folders]
    metrics = [store.frame() for store in stores]
    if all(frame.empty for frame in metrics):
        raise StoreError(f"{', '.join(map(str, folders))}: no cell is done yet")
    whole, notes = _one(metrics, ["cell", "metric", "filter"])
    tables = {"metrics": whole, "timings": _one([store.timings() for store in stores], ["cell"])[0]}
    if items:
        tables["items"] = _one([store.items() for store in stores], ["cell", "doc_id", "filter"])[0]
    return [path for name, table in tables.items() for path in _write(table, out, name)], notes


def _one(frames: Sequence[pd.DataFrame], key: list[str]) -> tuple[pd.DataFrame, list[str]]:
    import pandas as pd

    filled = [frame for frame in frames if not frame.empty]
    if not filled:
        return pd.DataFrame(columns=key), []
    whole = pd.concat(filled, ignore_index=True)
    repeated = whole.duplicated(key, keep="first")
    notes = []
    if "versions" in whole and len(mixed := sorted(whole.versions.unique())) > 1:
        notes.append(f"warning: the cells were made with different releases: {'; '.join(mixed)}")
    if repeated.any() and "value" in whole:
        # A metric that is no number stands in `text`.
        spread = whole.groupby(key, dropna=False)[["value", "text"]].nunique(dropna=False).max(axis=1)
        differing = spread[spread > 1]
        notes.append(f"{int(repeated.sum())} rows are in several folders; the first folder's are kept")
        if len(differing):
            notes.append(f"{len(differing)} of them differ between folders, such as {' '.join(differing.index[0])}")
    return whole[~repeated].sort_values(key, kind="stable", ignore_index=True), notes


def _write(table: pd.DataFrame, out: Path, name: str) -> list[Path]:
    parquet = io.BytesIO()
    table.to_parquet(parquet, index=False, engine="pyarrow")
    paths = [out / f"{name}.parquet", out / f"{name}.csv"]
    write_bytes(paths[0], parquet.getvalue())
    write_text(paths[1], table.to_csv(index=False, lineterminator="\n"))
    return paths
