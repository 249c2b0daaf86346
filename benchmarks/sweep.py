"""One sweep against the shell loop over `lm_eval` that does the same cells: wall time, and equal scores.

    python -m benchmarks.sweep                       # 4 languages x (5 factors + 1 preset), 2 random controls, 4 tasks
    python -m benchmarks.sweep --cells 12 --json sweep.json
    python -m benchmarks.sweep --engine              # 8 factors x 4 tasks in one engine of vLLM

The loop's time is extrapolated from a few cells, evenly spaced over the plan; half of them run before the sweep and
half after it. Each of them must have the sweep's scores to the last digit.

With --engine, one sweep in a live engine against the same sweep by `steered-hf`, and against what one had to do before:
export a checkpoint for each factor and run `lm_eval --model vllm` on it, extrapolated from some of the factors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from benchmarks.measure import report
from lm_eval_steering.resources import demo_model
from lm_eval_steering.sweep.cells import Cell, Grid, model_arguments, spell_out
from lm_eval_steering.sweep.controls import ControlSets
from lm_eval_steering.sweep.plan import build_plan
from lm_eval_steering.sweep.store import Store

BIN = Path(sys.executable).parent
LIMIT_RATIO = 5
PLAN: dict[str, Any] = {
    "model": {"pretrained": "demo", "batch_size": 8},
    "neurons": "demo",
    "languages": ["deu_Latn", "spa_Latn", "tur_Latn", "jpn_Jpan"],
    "interventions": [
        {"op": "add", "value": "mean", "site": "product", "factors": [2, 4, 6, 8, 12]},
        {"preset": "p_max"},
    ],
    "controls": {"random": 2, "calibration": "demo"},
    "tasks": [
        "steering_demo_lss_eng_Latn",
        "steering_demo_continuation_fra_Latn",
        "steering_demo_perplexity_deu_Latn",
        "steering_demo_forcing_choose",
    ],
    "limit": 10,
    "bootstrap_iters": 0,
}


def timed(command: Sequence[str]) -> float:
    """Seconds of a command, offline and by one thread; it must succeed."""
    start = time.perf_counter()
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=os.environ | offline)
    return time.perf_counter() - start


def loop_once(grid: Grid, cell: Cell, controls: Path, out: Path) -> float:
    """Seconds of the `lm_eval` command that does one cell."""
    arguments = model_arguments(grid.plan) | cell.intervention.arguments
    if cell.intervention.control is not None:
        arguments["neurons"] = str(next(controls.glob(f"random{cell.intervention.control}-*")))
    elif not cell.intervention.is_baseline:
        arguments["neurons"] = grid.plan.neurons
    if cell.target and cell.intervention.is_baseline:
        arguments["target_language"] = cell.target
    rows = str(arguments.pop("batch_size"))
    text = ",".join(f"{name}={value}" for name, value in arguments.items())
    return timed([
        str(BIN / "lm_eval"), "run", "--model", "steered-hf", "--model_args", text, "--tasks", cell.task,
        "--batch_size", rows, "--limit", str(grid.plan.limit), "--output_path", str(out), "--log_samples",
    ])  # fmt: skip


def scores(results: dict[str, Any], task: str) -> dict[str, Any]:
    """Metrics of a results file, without standard errors, which the loop bootstraps."""
    metrics = results["results"][task]
    return {key: value for key, value in metrics.items() if "," in key and "_stderr," not in key}


def measured_controls(grid: Grid, folder: Path) -> Path:
    """Folder with the control sets, which the loop needs as files."""
    from lm_eval_steering.neurons.running import Ranks
    from lm_eval_steering.sweep.sweep_model import SweepModel

    arguments = model_arguments(grid.plan)
    ControlSets(grid, Store(folder), Ranks())(0, SweepModel(arguments.pop("pretrained"), **arguments))
    return folder / "controls"


def compare(number: int, folder: Path) -> dict[str, Any]:
    """Run some cells of the loop, the whole sweep, and the other cells of the loop."""
    grid = spell_out(build_plan(PLAN))
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    controls = measured_controls(grid, folder / "for-the-loop")
    # Of each task about as many, in the middle of equal stretches of its cells.
    chosen = [grid.cells[int((i + 0.5) * len(grid.cells) / number)] for i in range(number)]
    seconds: dict[str, float] = {}

    def loop(cells: Sequence[Cell]) -> None:
        for cell in cells:
            seconds[cell.name] = loop_once(grid, cell, controls, folder / "loop" / cell.name)
            print(f"{cell.name}: {seconds[cell.name]:.1f} s", file=sys.stderr, flush=True)

    loop(chosen[::2])
    whole = timed([str(BIN / "lm-eval-steering"), "sweep", str(folder / "plan.yaml"), "--out", str(folder / "run")])
    print(f"the sweep of {len(grid.cells)} cells: {whole:.1f} s", file=sys.stderr, flush=True)
    loop(chosen[1::2])
    store, differing = Store(folder / "run"), []
    for cell in chosen:
        (path,) = (folder / "loop" / cell.name).rglob("results_*.json")
        if scores(json.loads(path.read_text()), cell.task) != scores(store.read(cell.key).results, cell.task):
            differing.append(cell.name)
    by_loop = sum(seconds.values()) / number * len(grid.cells)
    return {
        "cells": len(grid.cells),
        "sweep_seconds": round(whole, 1),
        "loop_seconds_a_cell": {name: round(value, 1) for name, value in seconds.items()},
        "loop_seconds_extrapolated": round(by_loop),
        "ratio": round(by_loop / whole, 1),
        "differing_scores": differing,
    }


FACTORS = [1.5, 2, 3, 4, 5, 6, 8, 10]
ENGINE: dict[str, Any] = {"enforce_eager": True, "max_model_len": 512}
ENGINE_PLAN: dict[str, Any] = {
    "model": {"pretrained": "demo", "dtype": "float32", "batch_size": 32},
    "neurons": "demo",
    "languages": ["deu_Latn"],
    "interventions": [{"op": "add", "value": "mean", "site": "product", "factors": FACTORS}],
    "tasks": [
        "steering_demo_continuation_fra_Latn",
        "steering_demo_continuation_deu_Latn",
        "steering_demo_perplexity_deu_Latn",
        "steering_demo_forcing_choose",
    ],
    "bootstrap_iters": 0,
}


def engines(number: int, folder: Path) -> dict[str, Any]:
    """Seconds of both sweeps and of the exports with their `lm_eval`, and how far the scores are apart."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by default most of the memory
    seconds: dict[str, float] = {}
    for name, engine in (("steered-vllm", {"name": "steered-vllm", "arguments": ENGINE}), ("steered-hf", "steered-hf")):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(ENGINE_PLAN | {"engine": engine}))
        command = [str(BIN / "lm-eval-steering"), "sweep", str(folder / f"{name}.yaml"), "--out", str(folder / name)]
        seconds[name] = timed(command)
        print(f"{name}: {seconds[name]:.1f} s", file=sys.stderr, flush=True)
    stores = {name: Store(folder / name) for name in seconds}
    cells = {(cell.intervention.factor, cell.task): cell for cell in stores["steered-vllm"].planned()}
    hooks = {(cell.intervention.factor, cell.task): cell for cell in stores["steered-hf"].planned()}
    furthest = max(_apart(stores, cells[place], hooks[place]) for place in cells)
    exports, runs = [], []
    for factor in FACTORS[:: len(FACTORS) // number][:number]:
        out = folder / f"export-{factor}"
        exports.append(timed([
            str(BIN / "lm-eval-steering"), "export", "--as", "checkpoint", "--model", str(demo_model()),
            "--neurons", "demo", "--language", "deu_Latn", "--op", "add", "--value", "mean", "--site", "product",
            "--factor", str(factor), "--dtype", "float32", "--out", str(out),
        ]))  # fmt: skip
        text = ",".join(f"{name}={value}" for name, value in {"pretrained": out, "dtype": "float32", **ENGINE}.items())
        runs.append(timed([
            str(BIN / "lm_eval"), "run", "--model", "vllm", "--model_args", text,
            "--tasks", ",".join(ENGINE_PLAN["tasks"]), "--batch_size", "auto",
            "--output_path", str(folder / f"run-{factor}"), "--log_samples",
        ]))  # fmt: skip
        print(f"factor {factor}: export {exports[-1]:.1f} s, lm_eval {runs[-1]:.1f} s", file=sys.stderr, flush=True)
    loop = sum(exports + runs) / number * len(FACTORS) + runs[0]  # and the baseline
    return {
        "cells": len(cells),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seconds_of_an_export": [round(value, 1) for value in exports],
        "seconds_of_lm_eval_on_it": [round(value, 1) for value in runs],
        "seconds_by_exports_extrapolated": round(loop),
        "ratio": round(loop / seconds["steered-vllm"], 1),
        "steered-hf over steered-vllm": round(seconds["steered-hf"] / seconds["steered-vllm"], 2),
        "largest_difference_of_likelihoods": furthest,
        "differing_scores": [],
    }


def _apart(stores: dict[str, Store], ours: Cell, hooks: Cell) -> float:
    """Largest difference of a metric between two engines, over max(1, |value|)."""
    found = stores["steered-vllm"].read(ours.key).facts["metrics"]
    expected = stores["steered-hf"].read(hooks.key).facts["metrics"]
    numbers = [key for key, value in expected.items() if isinstance(value, int | float)]
    return max(abs(found[key] - expected[key]) / max(1.0, abs(expected[key])) for key in numbers)


def main() -> None:
    """Compare, print, and fail where the sweep is not fast enough or not equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=6, help="cells of the loop that are run")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--engine", action="store_true", help="in a live engine of vLLM")
    parser.add_argument("--factors", type=int, default=2, help="with --engine: factors that are exported and run")
    wanted = parser.parse_args()
    with TemporaryDirectory() as folder:
        result = engines(wanted.factors, Path(folder)) if wanted.engine else compare(wanted.cells, Path(folder))
    report(result, wanted.json)
    if result["differing_scores"] or result["ratio"] < LIMIT_RATIO:
        sys.exit(1)


if __name__ == "__main__":
    main()
