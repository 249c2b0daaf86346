"""From a sweep to a folder with the page, the figures and the tables."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_eval_steering.files import write_bytes
from lm_eval_steering.report.gallery import draw, gallery, layers_of
from lm_eval_steering.report.page import render
from lm_eval_steering.report.read import MAX_SAMPLES, ReportError, Sweep, read_merged, read_store
from lm_eval_steering.report.results import Results, compute
from lm_eval_steering.report.sentences import answer
from lm_eval_steering.report.table_files import write_tables

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        results: the data frames.
        page: the HTML file.
        files: everything, the page first.
        sentences: the answer.
    """

    results: Results
    page: Path
    files: tuple[Path, ...]
    sentences: tuple[str, ...]


def read_sweep(path: Path, max_samples: int = MAX_SAMPLES) -> Sweep:
    """A sweep's folder, or a folder of merged tables.

    Raises:
        SteeringError: if it is neither, is damaged, or holds nothing finished.
    """
    path = Path(path)
    if (path / "sweep.json").is_file():
        return read_store(path, max_samples)
    if path.name == "metrics.parquet":
        path = path.parent
    if (path / "metrics.parquet").is_file():
        return read_merged(path, max_samples)
    said = "is no folder" if not path.is_dir() else "holds neither sweep.json (a sweep) nor metrics.parquet (merged)"
    raise ReportError(f"{path} {said}; run lm-eval-steering sweep PLAN --out {path} first")


def make_report(sweep: Sweep, out: Path, command: Sequence[str] = ()) -> Report:
    """Write the page, `figures/` (SVG, PDF, PNG) and `tables/` (CSV, parquet, Markdown, LaTeX).

    Args:
        sweep: as `read_sweep` gave it, or `comparison.compare_sweeps`.
        out: folder; files of an earlier report of that name are replaced.
        command: that asked for it, to be printed.
    """
    out = Path(out)
    sweep.facts.command = shlex.join(command)
    results = compute(sweep)
    results.neurons = layers_of(sweep.facts.neurons, sorted({code for code in sweep.cells["steered"] if code}))
    figured, files = draw(gallery(results), out / "figures")
    files += write_tables(results, out / "tables")
    page = out / PAGE
    write_bytes(page, render(results, figured).encode("utf-8", "replace"))
    return Report(results, page, (page, *files), answer(results).sentences)
