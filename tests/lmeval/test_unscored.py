"""A metric that fails costs no answer: the samples are written, the error names the metric, and rescore goes on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from lm_eval_steering.lmeval.rescore import RescoreOptions, rescore
from lm_eval_steering.resources import demo_model
from tests.commands import run_together
from tests.sweep.conftest import PLAIN, Spell, run, spell, task_files  # noqa: F401  # fixtures

STEERED = f"pretrained={demo_model()},neurons=demo,language=fra_Latn,op=add,value=mean,site=product,factor=4"
FUNCTIONS = """
def fails_for_one(document, results):
    if document["id"] == 2:
        raise ZeroDivisionError("no reference to divide by")
    return {"own": float(len(results[0]))}

def fails_for_all(values):
    raise ZeroDivisionError("nothing to divide by")

def own(references, predictions):
    if references[0] == "r2":
        raise ZeroDivisionError("no reference to divide by")
    return 1.0
"""
# What fails: the scores of one document; one metric of a list; a metric's aggregation.
FAILING = {
    "of_document": "process_results: !function functions.fails_for_one\n"
    "metric_list: [{metric: own, aggregation: mean}]",
    "of_metric": "metric_list: [{metric: lang_unknown}, {metric: !function functions.own, aggregation: mean, "
    "higher_is_better: true}]",
    "of_aggregation": "metric_list: [{metric: exact_match, aggregation: !function functions.fails_for_all, "
    "higher_is_better: true}]",
}
YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{reference}}}}"
generation_kwargs: {{do_sample: false, max_gen_toks: 12, min_new_tokens: 8, until: ["\\n"]}}
{scoring}
metadata: {{version: 1.0, expected_language: fra_Latn}}
"""
PROMPTS = ["Le matin", "The children are", "Ce soir nous", "Demain"]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"id": place, "prompt": text, "reference": f"r{place}"} for place, text in enumerate(PROMPTS)]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "functions.py").write_text(FUNCTIONS)
    fine = "metric_list: [{metric: lang_expected}, {metric: lfs}]"
    for name, scoring in (FAILING | {"fine": fine}).items():
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, folder=folder, scoring=scoring))
    return folder


def evaluate(
    tasks: Path, names: str, *more: str | Path, ours: bool = False, fails: bool = True
) -> subprocess.CompletedProcess[str]:
    command = ["lm-eval-steering", "run"] if ours else ["lm_eval"]
    arguments = ["--model", "steered-hf", "--model_args", STEERED, "--tasks", names, "--include_path", tasks]
    return run_together([*command, *arguments, "--device", "cpu", *more], cwd=tasks, fails=fails)


@pytest.mark.parametrize(("name", "metric"), [("of_document", ""), ("of_metric", "own"), ("of_aggregation", "exact")])
def test_the_answers_of_every_task_are_kept_where_the_results_would_lie(tasks: Path, name: str, metric: str) -> None:
    out = tasks.parent / "out"
    done = evaluate(tasks, f"{name},fine", "--output_path", out, "--log_samples", ours=name == "of_metric")
    assert "ZeroDivisionError" in done.stderr
    said = done.stderr.splitlines()[-1]
    assert "what was generated is kept" in said and "lm-eval-steering rescore" in said
    assert metric in said
    assert not list(out.rglob("results_*.json"))
    folders = {path.parent for path in out.rglob("samples_*.jsonl")}
    assert len(folders) == 1 and str(folders.pop()) in said
    samples = {path.name.split("_2")[0]: path for path in out.rglob("samples_*.jsonl")}
    assert samples.keys() == {f"samples_{name}", "samples_fine"}
    rows = [json.loads(line) for line in samples["samples_fine"].read_text().splitlines()]
    assert [row["doc"]["prompt"] for row in rows] == PROMPTS
    # Rescore goes on from there: the target and what the items expect are those of the run.
    (again,) = rescore(out, RescoreOptions())
    good = tasks.parent / "good"
    evaluate(tasks, "fine", "--output_path", good, "--log_samples", fails=False)
    (results,) = good.rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]["fine"]
    assert {key: again.scores["fine"][key] for key in scores if "," in key} == {
        key: value for key, value in scores.items() if "," in key
    }
    assert again.settings["target_languages"] == ["fra_Latn"]
    if name == "of_document":
        assert again.counts[name]["lang_expected,none"] == len(PROMPTS)


def test_without_a_folder_for_results_the_working_folder_gets_them(tasks: Path) -> None:
    done = evaluate(tasks, "of_document")
    assert "what was generated is kept" in done.stderr
    assert len(list((tasks / "unscored").glob("samples_of_document_*.jsonl"))) == 1


def test_a_mistake_before_anything_is_generated_keeps_nothing(tasks: Path) -> None:
    done = evaluate(tasks, "no_such_task")
    assert "what was generated" not in done.stderr
    assert not (tasks / "unscored").exists()


def test_a_cell_of_a_sweep_keeps_its_answers(tasks: Path, spell: Spell, tmp_path: Path) -> None:  # noqa: F811
    grid = spell(PLAIN, tasks=["of_metric"], include_path=[str(tasks)], interventions=[{"op": "scale", "factors": [2]}])
    outcome = run(grid, tmp_path / "sweep")
    assert len(outcome.failed) == 2
    failed = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "sweep" / "failed").glob("*.json")}
    assert all("the metric own failed" in why["error"] and "rescore" in why["error"] for why in failed.values())
    steered = next(cell for cell in outcome.failed if not cell.intervention.is_baseline)
    (again,) = rescore(tmp_path / "sweep" / "failed" / steered.key, RescoreOptions())
    assert again.settings["target_languages"] == ["deu_Latn"]
    assert again.counts["of_metric"]["lang_unknown,none"] == len(PROMPTS)
