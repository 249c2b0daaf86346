"""The real commands, each in a process of its own, on the demo model: what a user types and what a user sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.resources import demo_model, find_neuron_set
from tests.commands import run_together

BIN = Path(sys.executable).parent
MODEL = f"pretrained={demo_model()}"
TASK = "steering_demo_continuation_fra_Latn"
STEERED = f"{MODEL},neurons=demo,language=fra_Latn,op=add,value=mean,site=product,factor=4"

# In the fields of cambridgeltl/xcopa and with the prompt of lm-eval's own xcopa_it; the items are ours.
XCOPA = [
    {"premise": "Il bicchiere è caduto dal tavolo.", "choice1": "Si è rotto.", "choice2": "Si è riempito.",
     "question": "effect", "label": 0},
    {"premise": "La ragazza ha aperto l'ombrello.", "choice1": "Faceva caldo.", "choice2": "Pioveva forte.",
     "question": "cause", "label": 1},
    {"premise": "Ho dimenticato di mettere la sveglia.", "choice1": "Sono arrivato in ritardo.",
     "choice2": "Ho fatto colazione con calma.", "question": "effect", "label": 0},
    {"premise": "Il cane ha abbaiato tutta la notte.", "choice1": "I vicini hanno dormito bene.",
     "choice2": "Qualcuno era alla porta.", "question": "cause", "label": 1},
]  # fmt: skip
XCOPA_YAML = """
task: xcopa_it_local
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{premise[:-1]}}}} {{{{'perché' if question == 'cause' else 'quindi'}}}}"
doc_to_choice: "{{{{[choice1[0]|lower + choice1[1:], choice2[0]|lower + choice2[1:]]}}}}"
doc_to_target: label
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def local_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, XCOPA)))
    (folder / "xcopa_it_local.yaml").write_text(XCOPA_YAML.format(file=folder / "items.jsonl"))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    work = tmp_path_factory.mktemp("work")

    def command(*arguments: str | Path, fails: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [BIN / str(arguments[0]), *map(str, arguments[1:])],
            capture_output=True, text=True, cwd=work, env={**os.environ, **environment}, check=False,
        )  # fmt: skip
        assert (done.returncode != 0) == fails, done.stderr[-3000:]
        return done

    return command


def results_of(out: Path) -> dict[str, Any]:
    (found,) = [path for path in out.rglob("*") if path.name.startswith("results_")]
    return json.loads(found.read_text())


def numbers(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {task: {k: v for k, v in row.items() if k != "name"} for task, row in results["results"].items()}


def evaluation(out: Path, model: str, model_args: str, *tasks: str, **options: str | Path) -> list[str | Path]:
    extra = [part for key, value in options.items() for part in (f"--{key}", value)]
    return [
        "lm_eval", "--model", model, "--model_args", model_args, "--tasks", ",".join(tasks), "--device", "cpu",
        "--batch_size", "16", "--output_path", out, "--log_samples", *extra,
    ]  # fmt: skip


def test_bare_lm_eval_steers_and_proves_it_and_a_second_run_comes_from_the_cache(run: Run, tmp_path: Path) -> None:
    tasks = (TASK, "steering_demo_lss_eng_Latn", "steering_demo_perplexity_fra_Latn", "steering_demo_forcing")
    for name in ("one", "two"):
        done = run(*evaluation(tmp_path / name, "steered-hf", STEERED, *tasks, use_cache=tmp_path / "cache"))
        assert "fatal: not a git repository" not in done.stderr
    first, again = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    report = first["config"]["steering"]
    assert report["signature"].startswith("op:add|value:mean|factor:4|lang:fra_Latn|site:product|layers:all|neurons:")
    assert report["neuron_set"]["model"] == "demo-model"
    sketch = tuple(map(float, report["neuron_set"]["weights"].split()))  # on one line of the file
    assert sketch == tuple(NeuronSet.load("demo").provenance.weights) and len(sketch) == 256
    assert all(report["evidence"][name] > 0 for name in ("forwards", "fired", "positions", "neurons", "largest_change"))
    assert report["evidence"]["fired"] == report["evidence"]["forwards"] * report["evidence"]["modules"]
    assert again["config"]["steering"]["evidence"]["forwards"] == 0
    assert again["config"]["steering"]["fingerprint"] == report["fingerprint"]
    assert numbers(again) == numbers(first)
    scores = first["results"]
    assert scores["steering_demo_lss_eng_Latn"]["lss,none"] > 0.7
    assert scores["steering_demo_perplexity_fra_Latn"]["token_perplexity,none"] > 1
    samples = next(p for p in (tmp_path / "one").rglob("*") if p.name.startswith("samples_steering_demo_forcing"))
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 40
    assert {"lfs", "output_language", "lang_confidence"} <= set(rows[0])
    assert scores["steering_demo_forcing"]["lfs,none"] == sum(row["lfs"] for row in rows) / 40


def test_bare_lm_eval_prompts_and_its_results_pair_with_the_unsteered_ones(tmp_path: Path) -> None:
    tasks = (TASK, "steering_demo_lss_eng_Latn", "steering_demo_perplexity_fra_Latn")
    # As JSON: in `key=value,...` lm-eval takes a brace for the beginning of JSON.
    prompted = json.dumps(
        dict(part.split("=") for part in MODEL.split(","))
        | {"instruction": "Answer in {language}.", "language": "fra_Latn"}
    )
    french = evaluation(tmp_path / "one", "steered-hf", prompted, *tasks, use_cache=tmp_path / "cache")
    run_together(
        evaluation(tmp_path / "base", "steered-hf", MODEL, TASK, "steering_demo_perplexity_fra_Latn"),
        french, [tmp_path / "two" if part == tmp_path / "one" else part for part in french],
        evaluation(tmp_path / "empty", "steered-hf", f"{MODEL},instruction=,language=fra_Latn", *tasks),
        ("lm-eval-steering", "report", tmp_path / "one", "--baseline", tmp_path / "base", "--out", tmp_path / "report"),
    )  # fmt: skip
    base, first, again, empty = (results_of(tmp_path / name) for name in ("base", "one", "two", "empty"))
    report = first["config"]["steering"]
    assert report["signature"].startswith('prompt:"Answer in French."|lang:fra_Latn|lid:')
    assert report["evidence"]["prompts"] > 100 and again["config"]["steering"]["evidence"]["prompts"] == 0
    assert numbers(again) == numbers(first)
    assert empty["results"]["steering_demo_lss_eng_Latn"]["lss,none"] == 0
    for task, row in numbers(base).items():
        assert numbers(empty)[task] == row != numbers(first)[task]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "prompt &#34;Answer in {language}.&#34;" in page or 'prompt "Answer in {language}."' in page


def test_factor_one_gives_the_numbers_of_hf_to_the_last_digit(tmp_path: Path) -> None:
    one = f"{MODEL},neurons=demo,language=fra_Latn,op=scale,factor=1,scoring=plain"
    tasks = (TASK, "steering_demo_continuation_deu_Latn")
    run_together(
        evaluation(tmp_path / "hf", "hf", MODEL, *tasks), evaluation(tmp_path / "ours", "steered-hf", one, *tasks)
    )
    assert numbers(results_of(tmp_path / "ours")) == numbers(results_of(tmp_path / "hf"))

    def log_likelihoods(folder: str) -> list[Any]:
        files = sorted(p for p in (tmp_path / folder).rglob("*") if p.name.startswith("samples_"))
        return [json.loads(line)["resps"] for file in files for line in file.read_text().splitlines()]

    assert len(log_likelihoods("hf")) > 60
    assert log_likelihoods("ours") == log_likelihoods("hf")


def test_other_models_and_tasks_of_the_user_still_work(run: Run, local_task: Path, tmp_path: Path) -> None:
    run(*evaluation(tmp_path, "dummy", "", "xcopa_it_local", TASK, include_path=local_task))
    assert set(numbers(results_of(tmp_path))) == {"xcopa_it_local", TASK}


def test_the_start_up_file_can_be_switched_off_and_our_own_command_does_without(run: Run, tmp_path: Path) -> None:
    arguments = ("--model", "steered-hf", "--model_args", STEERED, "--tasks", TASK, "--device", "cpu")
    off = {"LM_EVAL_STEERING_NO_STARTUP": "1"}
    assert TASK in run("lm_eval", *arguments, fails=True, **off).stderr
    run("lm-eval-steering", "run", *arguments, "--output_path", tmp_path, **off)
    assert results_of(tmp_path)["config"]["steering"]["evidence"]["forwards"] > 0


def test_accelerate_launch_works(run: Run, tmp_path: Path) -> None:
    run(
        "accelerate", "launch", "--cpu", "--num_processes", "1", "-m", "lm_eval", "--model", "steered-hf",
        "--model_args", STEERED, "--tasks", TASK, "--device", "cpu", "--output_path", tmp_path,
    )  # fmt: skip
    assert results_of(tmp_path)["config"]["steering"]["evidence"]["fired"] > 0


def test_a_mistake_is_one_line_and_a_traceback_only_at_debug(run: Run) -> None:
    arguments = STEERED.replace("=demo", "=dmo")
    command = ("lm_eval", "--model", "steered-hf", "--model_args", arguments, "--tasks", TASK)
    error = run(*command, fails=True).stderr
    last = error.splitlines()[-1]
    assert "lm-eval-steering: error: neuron set 'dmo': no such file" in last and "did you mean 'demo'?" in last
    assert "Traceback" not in error
    assert "Traceback" in run(*command, "--verbosity", "DEBUG", fails=True).stderr


def test_a_broken_plugin_does_not_break_lm_eval(run: Run, local_task: Path, tmp_path: Path) -> None:
    package = tmp_path / "lm_eval_steering" / "lmeval"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "registration.py").write_text("raise RuntimeError('broken on purpose')")
    evaluate = (
        "from lm_eval import simple_evaluate; from lm_eval.tasks import TaskManager;"
        f"own = TaskManager(include_path={str(local_task)!r}, include_defaults=False);"
        "print(simple_evaluate('dummy', tasks=['xcopa_it_local'], task_manager=own)['results'])"
    )
    done = run("python", "-c", evaluate, PYTHONPATH=str(tmp_path))
    assert "could not register with lm_eval.models: RuntimeError('broken on purpose')" in done.stderr
    assert "xcopa_it_local" in done.stdout


def test_where_answers_people_and_scripts(run: Run) -> None:
    def where(name: str) -> str:
        return run("lm-eval-steering", "where", name).stdout.strip()

    assert (Path(where("demo-model")) / "model.safetensors").is_file()
    assert Path(where("demo-neurons")) == find_neuron_set("demo")
    assert where("demo-languages").splitlines()[0] == "eng_Latn" and len(where("demo-languages").splitlines()) == 12
    assert where("demo-task") == TASK
    assert (Path(where("tasks")) / "demo").is_dir()
    assert (Path(where("neuron-sets")) / "README.md").is_file()
    assert run("lm-eval-steering", "where", "nothing", fails=True).returncode == 2


def test_find_writes_a_set_that_lm_eval_takes(run: Run, local_task: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for code, line in (("fra_Latn", "Je ne sais pas où il est."), ("deu_Latn", "Ich weiß nicht, wo er ist.")):
        (tmp_path / "text" / f"{code}.txt").write_text(f"{line}\n" * 3)
    out = tmp_path / "found.safetensors"
    base = ("lm-eval-steering", "find", "--model", demo_model(), "--corpus", tmp_path / "text", "--rows", "sentences")
    run(*base, "--languages", "fr,de", "--out", out)
    assert out.is_file()


def test_help_is_light(run: Run) -> None:
    probe = (
        "import sys, lm_eval_steering, lm_eval_steering.cli;"
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'datasets') if m in sys.modules])"
    )
    assert run("python", "-c", probe).stdout.strip() == "[]"
