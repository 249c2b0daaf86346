"""Read a plain lm-eval run (`results_*.json`, with `samples_*.jsonl` beside it where they were logged) as baselines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_eval_steering.harness.evaluated import evaluated_language
from lm_eval_steering.report import naming
from lm_eval_steering.report.data import CELL_COLUMNS, SCORE_COLUMNS, SEVERAL, Facts, ReportError, Samples, Sweep
from lm_eval_steering.report.read import MAX_SAMPLES, items_of, keep_outputs, link_baselines


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
    text = found.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]  # not splitlines(): text may hold U+2028
