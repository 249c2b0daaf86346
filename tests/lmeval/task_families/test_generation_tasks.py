"""Every task of these families builds its requests and scores on the excerpts; one run through the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager

from lm_eval_steering.languages import normalise
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.task_families import clas_bench, flores, forcing, language_confusion, lss, open_generation
from lm_eval_steering.metrics.output_language import METRICS
from lm_eval_steering.resources import demo_model, tasks_folder
from tests.lmeval.task_families.conftest import Evaluate, write_rows

MODULES = (clas_bench, flores, forcing, language_confusion, lss, open_generation)


def named(module: Any) -> dict[str, dict[str, Any]]:
    """What is generated, by the name of its task; groups apart."""
    read = (yaml.safe_load(text) for text in module.generated_files().values())
    return {file["task"]: file for file in read if isinstance(file["task"], str)}


def at_hand(shared_data: Path) -> list[str]:
    """Tasks whose rows are among the excerpts, or in the package."""
    here = {path.name.split(".")[0] for path in (shared_data / "evaluation" / "flores200").iterdir()}
    names = [*named(open_generation), *(name for name in named(forcing) if "clas_bench" not in name)]
    for module in (flores, lss):
        for name, file in named(module).items():
            codes = str(file["metadata"].get("evaluated", "eng_Latn")).split("-")
            if "mlama" not in name and set(codes) <= here:
                names.append(name)
    return sorted(names)


@pytest.fixture
def first_rows(shared_data: Path, tmp_path: Path) -> Path:
    """The beginning of the first two rows of each excerpt: hundreds of tasks read them, and the model with them."""
    for folder, column in {"flores200": "sentence", "mvicuna": "prompt"}.items():
        for path in (shared_data / "evaluation" / folder).iterdir():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:2]]
            write_rows(tmp_path / folder / path.name, [row | {column: row[column][:32]} for row in rows])
    return tmp_path


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rsplit(".", maxsplit=1)[-1])
def test_files_are_current_thin_and_name_their_languages(module: Any) -> None:
    files = module.generated_files()
    stale = [str(path) for path, text in files.items() if (tasks_folder() / path).read_text(encoding="utf-8") != text]
    assert stale == [], "run python scripts/generate_tasks.py"
    folder = tasks_folder() / module.__name__.rsplit(".", maxsplit=1)[-1]
    assert {path.name for path in folder.glob("*.yaml") if (folder.name / Path(path.name)) not in files} == {
        path.name for path in folder.glob("_*.yaml") if not path.name.startswith("_group_")
    }
    for name, file in named(module).items():
        assert name.startswith(f"steering_{folder.name}_")
        for code in str(file["metadata"].get("evaluated") or "fra_Latn").split("-"):
            assert normalise(code) == code


def test_the_names_are_known_to_lm_eval_and_belong_to_nobody_else() -> None:
    known = TaskManager(include_path=str(tasks_folder()), include_defaults=False)
    names = [name for module in MODULES for name in named(module)]
    assert set(names) <= set(known.all_subtasks) and len(names) == len(set(names))
    groups = {
        *("steering_lss", "steering_lss_mlama", "steering_flores_from_english", "steering_flores_to_english_gurgurov"),
        *("steering_flores_perplexity", "steering_forcing", "steering_clas_bench", "steering_open_generation"),
    }
    assert groups <= set(known.all_groups)


def test_every_task_scores_on_the_excerpts(
    french: SteeredHFLM, evaluate: Evaluate, shared_data: Path, first_rows: Path
) -> None:
    names = at_hand(shared_data)
    settings = {
        "language": "fra_Latn", "data_dir": str(first_rows), "pair": "deu_Latn-fra_Latn",
        "bleu_tokenizer": "char",
    }  # fmt: skip
    french.batch_size_per_gpu = 64
    found = evaluate(french, *names, limit=1, tokens=2, **settings)["results"]
    assert len(names) > 300 and set(found) == set(names)
    for name, scores in found.items():
        metrics = {key for key in scores if key.endswith(",none") and "stderr" not in key}
        assert metrics or name == "steering_lss_fra_Latn", name


def test_every_template_lists_every_metric_that_it_can_give() -> None:
    for folder in ("clas_bench", "flores", "forcing", "language_confusion", "open_generation", "demo"):
        text = "".join(path.read_text(encoding="utf-8") for path in (tasks_folder() / folder).glob("_*.yaml"))
        listed = {name for name in METRICS if f"metric: {name}," in text}
        assert listed == set(METRICS) - ({"lang_expected"} if folder == "demo" else set()), folder


def test_the_real_command_runs_tasks_and_a_group_offline(tmp_path: Path, shared_data: Path) -> None:
    tasks = ["steering_lss_eng_Latn", "steering_open_generation", "steering_flores_fra_Latn_perplexity"]
    done = subprocess.run(
        [
            Path(sys.executable).parent / "lm_eval", "--model", "steered-hf", "--model_args",
            f"pretrained={demo_model()},neurons=demo,language=fra_Latn,op=add,value=mean,site=product,factor=4",
            "--tasks", ",".join(tasks), "--limit", "3", "--device", "cpu", "--batch_size", "16",
            "--gen_kwargs", "max_gen_toks=8", "--output_path", tmp_path, "--log_samples",
        ],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "STEERING_DATA": str(shared_data / "evaluation")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    lss_row = found["results"]["steering_lss_eng_Latn"]
    assert lss_row["lss_shift_low,none"] <= lss_row["lss_shift,none"] <= lss_row["lss_shift_high,none"]
    assert found["configs"]["steering_lss_eng_Latn"]["metadata"]["evaluated"] == "eng_Latn"
    assert "|lss_shift_low " in done.stdout and "|lfs " in done.stdout
    members = found["group_subtasks"]["steering_open_generation"]
    group, single = found["groups"]["steering_open_generation"], [found["results"][name] for name in members]
    assert group["lfs,none"] == pytest.approx(sum(row["lfs,none"] for row in single) / 7)
    assert 0 < group["lfs,none"] < 1 and 0 < group["lfs_stderr,none"] < 0.5
    for name, row in zip(members, single, strict=True):
        (path,) = tmp_path.rglob(f"samples_{name}_*.jsonl")
        values = [json.loads(line)["lfs"] for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(values) == 3 and row["lfs,none"] == pytest.approx(fmean(values))
        assert row["lfs_stderr,none"] == pytest.approx(stdev(values) / 3**0.5)  # of the mean over three items


def test_without_a_target_a_group_has_the_other_metrics(
    unsteered: SteeredHFLM, evaluate: Evaluate, first_rows: Path
) -> None:
    found = evaluate(unsteered, "steering_open_generation", limit=1, tokens=4, data_dir=str(first_rows))
    group = found["groups"]["steering_open_generation"]
    assert "lang_expected,none" in group and "lfs,none" not in group
