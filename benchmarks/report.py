"""Time and memory of a report of 18 languages x 18 x 9 factors x 5 tasks with 1,000 items each, from merged tables.

    python -m benchmarks.report [--folder DIR] [--languages 18] [--factors 9] [--items 1000]

The tables are synthetic (written first, not measured) and have the layout of `lm-eval-steering merge --items`. Four
tasks score 0 or 1, one is a perplexity.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

CODES = [
    "arb_Arab", "deu_Latn", "eng_Latn", "est_Latn", "fra_Latn", "hin_Deva", "ind_Latn", "ita_Latn", "jpn_Jpan",
    "kor_Hang", "por_Latn", "rus_Cyrl", "spa_Latn", "swh_Latn", "tam_Taml", "tha_Thai", "tur_Latn", "zho_Hans",
]  # fmt: skip
FACTORS = (0.5, 1.5, 2, 2.5, 3, 4, 6, 8, 12)
ACCURACIES = ("xcopa", "xnli", "belebele", "xwinograd")
PERPLEXITY = "demo_perplexity"


def cells(languages: int, factors: int) -> Iterator[tuple[str, str, str, float]]:
    """(cell, task, steered language, factor); the baseline is steered to nothing. In the order of the names."""
    cells = []
    for family in (*ACCURACIES, PERPLEXITY):
        for evaluated in CODES[:languages]:
            task = f"steering_{family}_{evaluated}"
            for steered in ("", *CODES[:languages]):
                for factor in FACTORS[:factors] if steered else (0.0,):
                    name = f"{steered}-scale-x{factor:g}" if steered else "baseline"
                    cells.append((f"{name}--{task}--0", task, steered, factor))
    return iter(sorted(cells))


def write(folder: Path, languages: int, factors: int, items: int) -> int:
    """Write metrics.parquet and items.parquet; returns the number of cells."""
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    hardness = generator.uniform(size=items)
    tokens = generator.integers(5, 60, size=items)
    schema = pa.schema([("cell", pa.string()), ("doc_id", pa.int64()), ("half", pa.string()), ("filter", pa.string()),
                        ("response", pa.string()), ("metrics", pa.string())])  # fmt: skip
    spellings = pa.array(['{"acc": 0.0}', '{"acc": 1.0}'])
    batch: list[pa.Table] = []
    with pq.ParquetWriter(folder / "items.parquet", schema) as writer:
        for cell, task, steered, factor in cells(languages, factors):
            shift = 0.04 * (1 if steered and steered in task else -0.5 if steered else 0)
            if PERPLEXITY in task:
                metric, better = "nats_per_token", False
                lp = np.round(-tokens * (2 - shift + generator.normal(0, 0.2, items)), 4)
                texts = pa.array([f'{{"nats_per_token": [{a}, {b}]}}' for a, b in zip(lp, tokens, strict=True)])
                value = -lp.sum() / tokens.sum()
            else:
                metric, better = "acc", True
                right = generator.uniform(size=items) < 0.1 + 0.8 * hardness + shift
                texts, value = spellings.take(pa.array(right.astype(np.int64))), right.mean()
            whole = pa.array([cell] * items), pa.array(np.arange(items)), pa.nulls(items, pa.string())
            batch.append(pa.table([*whole, pa.array(["none"] * items), pa.array(["[]"] * items), texts], schema=schema))
            if len(batch) == 500:
                writer.write_table(pa.concat_tables(batch))
                batch = []
            steps = f"op:scale|factor:{factor:g}|lang:{steered}|site:activation|layers:all" if steered else "none"
            rows.append(
                {
                    "cell": cell, "model": "synthetic", "task": task, "languages": steered, "preset": None,
                    "factor": factor or None, "deactivated": "", "control": None, "target": steered or None,
                    "items": "all", "stage": 1, "fingerprint": "0", "signature": f"{steps}|fp:0|v:0", "metric": metric,
                    "filter": "none", "value": value, "text": None, "n": items, "higher_is_better": better,
                    "planned": True,
                }
            )  # fmt: skip
        if batch:
            writer.write_table(pa.concat_tables(batch))
    pd.DataFrame(rows).to_parquet(folder / "metrics.parquet", index=False)
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--languages", type=int, default=18)
    parser.add_argument("--factors", type=int, default=9)
    parser.add_argument("--items", type=int, default=1000)
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp())
    if not (folder / "items.parquet").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{write(folder, asked.languages, asked.factors, asked.items):,} cells written", file=sys.stderr)
    written = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    from lm_eval_steering.report.page import write_report
    from lm_eval_steering.report.read import read_results

    sweep = read_results(folder)
    read = time.perf_counter() - started
    report = write_report(sweep, folder / "report")
    results = {
        "cells": len(sweep.cells),
        "items": int(sum(len(items.docs) for items in sweep.items.values())),
        "seconds_read": round(read, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "peak_gb_before": round(written / 1e6, 2),
        "page_mb": round(report.page.stat().st_size / 1e6, 1),
    }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
