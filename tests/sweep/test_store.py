"""What a finished sweep is: ordinary lm-eval files, one table, and a factor that was chosen on other items."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.sweep import Store
from lm_eval_steering.sweep.cells import Grid
from lm_eval_steering.sweep.estimate import CellLog
from lm_eval_steering.sweep.halves import half_of
from lm_eval_steering.sweep.merge import merge
from lm_eval_steering.sweep.plan_tasks import settings_digest
from lm_eval_steering.sweep.store import cell_versions
from tests.sweep.conftest import ITEMS, PLAIN, Spell, run


def test_each_cell_is_an_ordinary_lm_eval_run(finished: Path, grid: Grid) -> None:
    for cell in grid.cells:
        folder = finished / "cells" / cell.name
        (results,) = (json.loads(path.read_text()) for path in folder.glob("results_*.json"))
        assert set(results["results"]) == {cell.task}
        assert results["config"]["model"] == "steered-hf"
        assert results["config"]["model_args"]["pretrained"].endswith("demo-model")
        assert results["config"]["steering"]["intervention"]["steps"] == cell.intervention.resolved["steps"]
        assert results["n-samples"][cell.task]["effective"] == ITEMS
        assert {"versions", "higher_is_better", "task_hashes", "total_evaluation_time_seconds"} <= results.keys()
        (samples,) = (path.read_text().splitlines() for path in folder.glob(f"samples_{cell.task}_*.jsonl"))
        assert [json.loads(line)["doc_id"] for line in samples] == list(range(ITEMS))
        assert "gen_args_0" in json.loads(samples[0])["arguments"]


def test_frame_samples_items_and_missing(finished: Path, grid: Grid) -> None:
    store = Store(finished)
    frame = store.frame()
    assert set(frame.cell) == {cell.name for cell in store.planned()}
    lss = frame[(frame.task == "small_lss") & (frame.metric == "lss") & (frame.factor == 8) & (frame.control.isna())]
    assert list(lss.languages) == ["deu_Latn", "tur_Latn"]
    for row in lss.itertuples():
        samples = store.samples(row.cell)
        assert row.value == pytest.approx(sum(sample["lss"] for sample in samples) / ITEMS, abs=0)
        assert samples == store.samples(next(cell for cell in grid.cells if cell.name == row.cell))
    items = store.items()
    assert len(items[items.cell == lss.cell.iloc[0]]) == ITEMS
    assert store.missing().empty
    assert set(store.timings().cell) == set(frame.cell)
    with pytest.raises(SteeringError, match="is not done"):
        store.samples("no-such-cell--0123456789")
    with pytest.raises(SteeringError, match="no sweep is here"):
        Store(finished.parent).frame()


def test_the_unsteered_lss_is_not_run(finished: Path) -> None:
    frame = Store(finished).frame()
    assert set(frame[frame.intervention == "baseline"].task) == {"small_forcing", "small_nats"}


def test_releases_stand_in_every_cell_and_a_mix_is_said(finished: Path, grid: Grid, tmp_path: Path) -> None:
    store = Store(finished)
    expected = cell_versions()
    assert set(expected) == {"lm-eval-steering", "lm-eval", "transformers", "torch"}
    assert all(stored.versions == expected for stored in store.stored())
    assert store.mixed_versions(grid.cells) is None
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    path = sorted(other.glob("cells/*small_lss*/cell.json"))[0]
    path.write_text(path.read_text().replace(f'"torch": "{expected["torch"]}"', '"torch": "1.0"'))
    log = io.StringIO()
    assert run(grid, other, progress=CellLog(stream=log)).ran == 0
    (line,) = [line for line in log.getvalue().splitlines() if "torch 1.0" in line]
    assert line.startswith("warning: 1 finished cells were made with") and f"torch {expected['torch']}" in line
    _, notes = merge([finished, other], tmp_path / "tables")
    assert any("different releases" in note and "torch 1.0" in note for note in notes)
    for folder in (tmp_path / "file",):
        folder.write_text("")
        with pytest.raises(SteeringError, match="is a file"):
            merge([finished], folder)


def test_the_prompts_that_were_sent_have_a_hash_in_every_cell(finished: Path) -> None:
    by_task: dict[tuple[str, str | None], set[str]] = {}
    for stored in Store(finished).stored():
        cell = stored.cell
        if cell["task"] != "small_nats":
            by_task.setdefault((cell["task"], cell["target"]), set()).add(stored.facts["prompts"])
    assert all(len(hashes) == 1 for hashes in by_task.values())  # whatever the intervention
    by_name = {name: {next(iter(by_task[key])) for key in by_task if key[0] == name} for name, _ in by_task}
    assert not by_name["small_lss"] & by_name["small_forcing"]


def test_outside_a_git_repository_nothing_is_said_of_git(task_files: Path, tmp_path: Path) -> None:
    plan = PLAIN | {"include_path": [str(task_files)], "interventions": [{"op": "scale", "factor": 2}]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "lm_eval_steering", "sweep", "plan.yaml", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "git" not in done.stderr.replace("github", "") and "2 cells done" in done.stdout


def test_the_factor_is_chosen_on_one_half_and_reported_on_the_other(finished: Path, grid: Grid) -> None:
    store = Store(finished)
    seen: set[int] = set()
    for language in ("deu_Latn", "tur_Latn"):
        choice = store.json(f"then/{language}.json")
        candidates = [
            cell for cell in grid.cells if cell.intervention.name in choice["values"] and cell.task == "small_lss"
        ]
        values = {}
        for cell in candidates:
            half = [s["lss"] for s in store.samples(cell) if half_of(str(s["doc"]["id"]), 2) == "choose"]
            values[cell.intervention.name] = sum(half) / len(half)
        assert choice["values"] == values and len(values) == 2
        assert choice["chosen"] == max(values, key=lambda name: values[name])
        then = [cell for cell in store.planned() if cell.stage == 2 and cell.target == language]
        assert {cell.intervention.name for cell in then} == {choice["chosen"], f"{choice['chosen']}-random0"}
        for cell in then:
            reported = {sample["doc"]["id"] for sample in store.samples(cell)}
            assert {half_of(str(item), 2) for item in reported} == {"report"}
            seen |= reported
    assert len(seen) == sum(half_of(str(item), 2) == "report" for item in range(20, 20 + ITEMS))
    frame = store.frame()
    assert set(frame[frame.stage == 2]["items"]) == {"report"}
    lss = frame[(frame.metric == "lss") & (frame.control.isna()) & (frame.factor == 8)].iloc[0]
    own = [s["lss"] for s in store.samples(lss.cell) if half_of(str(s["doc"]["id"]), 2) == "report"]
    assert lss.value_report == sum(own) / len(own) and lss.n_report == len(own)


def test_the_whole_set_where_the_plan_says_so(spell: Spell, tmp_path: Path) -> None:
    grid = spell(
        PLAIN,
        choose={"metric": "token_perplexity", "split": "whole", "tasks": ["small_nats"], "by": "intervention"},
        tasks=["small_nats"],
        interventions=[{"op": "scale", "factors": [2, 9]}],
        then={"tasks": ["small_choice"]},
    )
    assert run(grid, tmp_path).exit_code == 0
    store = Store(tmp_path)
    choice = next(json.loads(path.read_text()) for path in (tmp_path / "then").iterdir())
    assert choice["split"] == "whole"
    assert choice["chosen"] == min(choice["values"], key=lambda name: choice["values"][name])  # less is better
    frame = store.frame()
    assert set(frame["items"]) == {"all"} and set(frame[frame.stage == 2].n) == {ITEMS}


# --- the commands -----------------------------------------------------------------------------------------------------


def test_sweep_status_and_merge(command, spell: Spell, task_files: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    plan, out = tmp_path / "plan.yaml", tmp_path / "run"
    plan.write_text(yaml.safe_dump(PLAIN | {"include_path": [str(task_files)]}))
    code, message, _ = command("sweep", plan, "--out", out, "--set", "interventions.0.factors=[2]", "--dry-run")
    assert code == 0 and "2 cells: baseline, 1 interventions and 0 random controls, on 1 tasks" in message
    code, message, err = command("sweep", plan, "--out", out, "--shard", "1/2")
    assert code == 0 and "2 cells done, 2 of them now" in message
    assert "[0/2] baseline--small_choice--" in err and "tokens/s" in err and "left" in err
    code, message, _ = command("status", out)
    assert code == 0 and "wrote" in message
    assert list(pd.read_csv(out / "missing.csv").status) == ["missing"]
    code, message, _ = command("merge", out, "--out", tmp_path / "tables", "--items")
    assert code == 0
    table = pd.read_parquet(tmp_path / "tables" / "metrics.parquet")
    assert table.cell.nunique() == 2 and pd.read_csv(tmp_path / "tables" / "metrics.csv").shape == table.shape
    assert len(pd.read_csv(tmp_path / "tables" / "items.csv")) == 2 * ITEMS
    code, _, err = command("sweep", plan, "--out", out, "--shard", "3/2")
    assert code == 2 and "expected i/n" in err
    code, _, err = command("merge", tmp_path / "nothing", "--out", tmp_path / "tables")
    assert code == 2 and "no sweep is here" in err


def test_the_demo_plan_ships(command) -> None:  # type: ignore[no-untyped-def]
    code, message, _ = command("where", "demo-plan")
    assert code == 0
    assert yaml.safe_load(Path(message.strip()).read_text())["model"]["pretrained"] == "demo"


def test_a_tasks_functions_keep_their_hash_where_a_module_is_moved_and_not_where_it_is_another(
    spell: Spell, task_files: Path
) -> None:
    """A folder of results outlives a move of our modules; a function beside a task's file is known by what it says."""
    task = spell(PLAIN).book.task("small_choice", None)
    before = settings_digest(task)

    def score(document: Any, results: Any) -> dict[str, float]:
        return {}

    def digest(module: str, name: str = "score") -> str:
        score.__module__, score.__qualname__ = module, name
        task.set_config(key="process_results", value=score)
        return settings_digest(task)

    moved = digest("lm_eval_steering.tasks.demo")
    assert moved == digest("lm_eval_steering.lmeval.task_families.demo") != before
    family = "lm_eval_steering.lmeval.task_families"
    others = [(f"{family}.lss",), ("another_package.demo",), (f"{family}.demo", "other")]
    assert len({moved, *(digest(*other) for other in others)}) == 4
    places = [task_files / "a", task_files / "b"]
    for place in places:
        place.mkdir(exist_ok=True)
        (place / "functions.py").write_text("def score(document, results): return {}")
    copied = [digest(str(place / "functions")) for place in places]
    assert copied[0] == copied[1]
    (places[1] / "functions.py").write_text("def score(document, results): return {'x': 1}")
    assert digest(str(places[1] / "functions")) != copied[0]
