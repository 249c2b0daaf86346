"""What is paired with what: results of lm-eval of any kind, steered or not, by what was asked of which model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.report.comparison import compare_runs
from lm_eval_steering.report.read import ReportError, add_baseline, read_results
from lm_eval_steering.report.tables import compute
from tests.conftest import Command
from tests.report.synthetic import FolderOfCells, right

DATE = "2026-01-01T00-00-00.000000"
TASK = "made_up_choice"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lm_eval_run(
    folder: Path, share: float, *, factor: float = 0, shots: int = 0, revision: str = "main", task: str = TASK,
    old: bool = False, samples: bool = True, metadata: dict[str, Any] | None = None, prompts: str = "",
) -> Path:  # fmt: skip
    """Files as lm-eval writes them: `old` as 0.4.8, whose samples name neither filter nor metrics."""
    folder.mkdir(parents=True)
    values = right(share)
    prefix = prompts or "an example. " * shots
    results: dict[str, Any] = {
        "results": {task: {"alias": task, "acc,none": sum(values) / len(values), "acc_stderr,none": 0.1}},
        "configs": {task: {"task": task, "metadata": metadata or {}}},
        "n-shot": {task: shots}, "higher_is_better": {task: {"acc": True}},
        "n-samples": {task: {"original": 40, "effective": 40}}, "date": 1.0,
        "config": {"model": "hf", "model_args": f"pretrained=org/model,revision={revision}"},
    }  # fmt: skip
    if factor:
        step = {"op": "scale", "languages": ["fra_Latn"], "value": None, "factor": factor, "deactivation": False}
        signature = f"op:scale|factor:{factor:g}|lang:fra_Latn|site:activation|layers:all|fp:{factor}|v:0"
        results["config"] |= {
            "model": "steered-hf", "model_args": {"pretrained": "org/model", "revision": revision, "factor": factor},
            "steering": {"signature": signature, "fingerprint": f"{factor}", "intervention": {"steps": [step]}},
        }  # fmt: skip
    file = folder / f"results_{DATE}.json"
    file.write_text(json.dumps(results))
    if samples:
        rows = [
            {
                "doc_id": place, "doc": {"id": place}, "target": 0, "acc": value, "filtered_resps": [["-1.0", "False"]],
                "arguments": {"gen_args_0": {"arg_0": f"{prefix}prompt {place}", "arg_1": " yes"}},
                "doc_hash": digest(f"document {place}"), "prompt_hash": digest(f"{prefix}prompt {place}"),
                **({} if old else {"filter": "none", "metrics": ["acc"]}),
            }
            for place, value in enumerate(values)
        ]  # fmt: skip
        (folder / f"samples_{task}_{DATE}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def difference(first: Path, second: Path, **options: Any) -> float:
    frame = compute(compare_runs(read_results(first), read_results(second), **options)).effects.frame
    (value,) = frame.loc[frame["metric"] == "acc", "difference"]
    return float(value)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 2), (2, 4), (2, 0), (2, 2)])
def test_any_two_runs_of_lm_eval_are_compared(tmp_path: Path, first: float, second: float, old: bool) -> None:
    """Neither steered, one of them, both with one intervention or with two."""
    one = lm_eval_run(tmp_path / "a" / "org__model", 0.5, factor=first, old=old)
    two = lm_eval_run(tmp_path / "b", 0.75, factor=second, old=old)
    assert difference(one, two) == pytest.approx(0.25)
    assert difference(tmp_path / "a", tmp_path / "b") == pytest.approx(0.25)  # folders, at any depth


def test_runs_without_samples_are_compared_without_an_interval(tmp_path: Path) -> None:
    files = [lm_eval_run(tmp_path / name, share, samples=False) for name, share in (("a", 0.5), ("b", 0.75))]
    results = compute(compare_runs(*map(read_results, files)))
    (row,) = results.effects.frame.to_dict("records")
    assert row["difference"] == pytest.approx(0.25) and pd.isna(row["low"]) and pd.isna(row["p"])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"shots": 2}, "few-shot examples: 0 and 2"),
        ({"revision": "step1000"}, "revision step1000"),
        ({"prompts": "Answer: "}, "40 of 40 prompts differ"),
    ],
)
def test_different_prompts_or_models_are_refused_or_stated_with_every_table(
    tmp_path: Path, command: Command, other: dict[str, Any], named: str
) -> None:
    one, two = lm_eval_run(tmp_path / "a", 0.5), lm_eval_run(tmp_path / "b", 0.75, **other)
    code, _, error = command("compare", one, two, "--out", tmp_path / "out")
    assert code == 2 and named in error and "--allow-different-prompts" in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "report.html").exists()
    assert command("compare", one, two, "--out", tmp_path / "out", "--allow-different-prompts")[0] == 0
    assert named in (tmp_path / "out" / "tables" / "WARNINGS.txt").read_text()
    assert named in (tmp_path / "out" / "report.html").read_text()
    printed = [*(tmp_path / "out" / "tables").glob("*.md")]
    assert printed and all(named in file.read_text() for file in printed)


def changed(file: Path, key: str, value: Any, task: str = TASK) -> Path:
    """A results file with something else in the run's config, or in the task's."""
    results = json.loads(file.read_text())
    (results["config"]["steering"] if key in ("few_shot", "notes") else results["configs"][task])[key] = value
    file.write_text(json.dumps(results))
    return file


def test_other_generation_arguments_are_another_question(tmp_path: Path) -> None:
    """lm-eval writes `--gen_kwargs` over those of the task, and the result into the task's config."""
    greedy, sampled = {"do_sample": False, "until": ["\n"]}, {"do_sample": True, "temperature": 0.7, "until": ["\n"]}
    one = changed(lm_eval_run(tmp_path / "a", 0.5), "generation_kwargs", greedy)
    two = changed(lm_eval_run(tmp_path / "b", 0.75), "generation_kwargs", sampled)
    same = changed(lm_eval_run(tmp_path / "c", 0.75), "generation_kwargs", greedy)
    assert difference(one, same) == pytest.approx(0.25)
    with pytest.raises(ReportError, match=r"differ in generation arguments.*'temperature': 0\.7"):
        difference(one, two)


@pytest.mark.parametrize("shots", [0, 2])
def test_examples_that_were_drawn_per_rank_are_no_pair(tmp_path: Path, shots: int) -> None:
    """A task without examples has nothing to draw."""
    runs = [
        changed(lm_eval_run(tmp_path / name, share, factor=factor, shots=shots), "few_shot", "per rank, of 2 processes")
        for name, share, factor in (("a", 0.5, 2), ("b", 0.75, 4))
    ]
    if not shots:
        assert difference(*runs) == pytest.approx(0.25)
        return
    with pytest.raises(ReportError, match="drawn per rank"):
        difference(*runs)
    assert difference(*runs, allow_different_prompts=True) == pytest.approx(0.25)


def test_the_same_is_true_of_a_baseline(tmp_path: Path) -> None:
    steered = lm_eval_run(tmp_path / "steered", 0.75, factor=2)
    sweep = read_results(steered)
    add_baseline(sweep, lm_eval_run(tmp_path / "same", 0.5))
    (row,) = compute(sweep).effects.frame.to_dict("records")
    assert row["difference"] == pytest.approx(0.25) and row["n"] == 40
    sweep = read_results(steered)
    add_baseline(sweep, lm_eval_run(tmp_path / "two-shot", 0.5, shots=2))
    with pytest.raises(ReportError, match="few-shot examples: 2 and 0"):
        compute(sweep)


def test_a_steered_baseline_is_refused(tmp_path: Path) -> None:
    sweep = read_results(lm_eval_run(tmp_path / "steered", 0.75, factor=2))
    with pytest.raises(ReportError, match=r"factor:4.*a baseline is a run without an intervention"):
        add_baseline(sweep, lm_eval_run(tmp_path / "other", 0.5, factor=4))


def test_another_models_sweep_is_no_pair(tmp_path: Path) -> None:
    """The name of a local folder is compared by its last part, a name of a hub as a whole."""
    run = lm_eval_run(tmp_path / "a", 0.5)
    for place, name, same in (("b", "/models/model", True), ("c", "other/model", False)):
        file = lm_eval_run(tmp_path / place, 0.75)
        file.write_text(file.read_text().replace("org/model", name))
        if same:
            assert difference(run, file) == pytest.approx(0.25)
        else:
            with pytest.raises(ReportError, match=r"different models: org/model .* and other/model"):
                difference(run, file)


def test_the_newest_of_several_results_of_one_task_is_taken(tmp_path: Path) -> None:
    lm_eval_run(tmp_path / "runs" / "old", 0.25)
    newer = lm_eval_run(tmp_path / "runs" / "new", 0.5)
    newer.write_text(newer.read_text().replace('"date": 1.0', '"date": 2.0'))
    sweep = read_results(tmp_path / "runs")
    assert sweep.scores["value"].tolist() == [0.5] and "1 older results" in sweep.facts.notes[0]


def relation(file: Path, **options: Any) -> str:
    return str(read_results(file, **options).cells["relation"].iloc[0])


def test_the_language_of_the_items_is_read_from_metadata_or_given(tmp_path: Path) -> None:
    plain = lm_eval_run(tmp_path / "plain", 0.5, factor=2)
    assert relation(plain) == "several"
    assert relation(plain, evaluated={TASK: "fr"}) == "self"
    assert relation(plain, evaluated={TASK: "deu_Latn"}) == "cross"
    stated = lm_eval_run(tmp_path / "stated", 0.5, factor=2, metadata={"evaluated_language": "fra_Latn"})
    assert relation(stated) == "self"
    with pytest.raises(SteeringError, match="metadata say fra_Latn"):
        read_results(stated, evaluated={TASK: "deu_Latn"})
    with pytest.raises(SteeringError, match="no such task here"):
        read_results(plain, evaluated={"other": "deu_Latn"})


def test_the_language_of_the_items_is_an_option_and_a_key_of_the_plan(tmp_path: Path, command: Command) -> None:
    made = FolderOfCells(tmp_path / "sweep")
    made.add(TASK, {"acc": right(0.5)})
    made.add(TASK, {"acc": right(0.6)}, "fra_Latn", 2)
    assert command("report", made.path, "--out", tmp_path / "out", "--evaluated", f"{TASK}=fra_Latn")[0] == 0
    assert pd.read_csv(tmp_path / "out" / "tables" / "effects.csv")["relation"].tolist() == ["self"]
    (made.path / "plan.json").write_text(
        json.dumps({"plan": {"evaluated": {TASK: "deu"}}, "plan_hash": "", "cells": []})
    )
    assert read_results(made.path).steered_cells()["relation"].tolist() == ["cross"]
    code, _, error = command("report", made.path, "--out", tmp_path / "out", "--evaluated", TASK)
    assert code == 2 and "TASK=CODE" in error
