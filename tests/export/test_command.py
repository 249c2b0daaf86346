"""The real commands on the demo model, in separate processes: scores, a kill, memory, mistakes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from benchmarks.export import QUICK, measure
from lm_eval_steering.resources import demo_model
from lm_eval_steering.steering.intervention import parse
from tests.commands import run_together
from tests.lmeval.test_command import numbers, results_of

BIN = Path(sys.executable).parent
MODEL = f"pretrained={demo_model()}"
EXPORT = ("export", "--model", str(demo_model()), "--neurons", "demo", "--language", "fra_Latn")
TASKS = ("steering_demo_continuation_fra_Latn", "steering_demo_continuation_deu_Latn")
FORMS = {
    "checkpoint": {"op": "add", "value": "mean", "site": "product", "factor": "4"},
    "lora": {"op": "scale", "factor": "3"},
}
TEXT = "Le chat dort sur la chaise.\n\nThe children play in the garden.\nIl pleut depuis hier matin.\n"


def run(program: str, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [BIN / program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def lm_eval(out: Path, model: str, model_args: str) -> list[str]:
    command = [
        "lm_eval", "--model", model, "--model_args", model_args, "--tasks", ",".join(TASKS), "--device", "cpu",
        "--batch_size", "16", "--output_path", out, "--log_samples",
    ]  # fmt: skip
    return list(map(str, command))


def scores(out: Path) -> tuple[dict[str, float], list[float]]:
    """Accuracy by task, and every log-likelihood in the order of the items."""
    files = sorted(path for path in out.rglob("*") if path.name.startswith("samples_"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    accuracies = {task: row["acc,none"] for task, row in numbers(results_of(out)).items()}
    return accuracies, [float(one[0][0]) for row in rows for one in row["resps"]]


def test_lm_eval_gives_an_export_the_scores_of_steered_hf(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    commands = []
    for form, arguments in FORMS.items():
        out = tmp_path / form
        options = [part for name, value in arguments.items() for part in (f"--{name}", value)]
        commands.append(
            ["lm-eval-steering", *EXPORT, *options, "--as", form, "--out", out, "--verify", "2", "--text", text]
        )
        own = ",".join([MODEL, "neurons=demo", "language=fra_Latn", *(f"{k}={v}" for k, v in arguments.items())])
        commands.append(lm_eval(tmp_path / f"{form}-steered", "steered-hf", own))
        where = f"pretrained={out}" if form == "checkpoint" else f"{MODEL},peft={out}"
        commands.append(lm_eval(tmp_path / f"{form}-hf", "hf", where))
    done = run_together(*commands)
    assert done.stdout.count("verified: 2 prompts") == 2
    for form in FORMS:
        expected, ours = scores(tmp_path / f"{form}-steered")
        found, theirs = scores(tmp_path / f"{form}-hf")
        assert set(found) == set(TASKS) and found == expected
        assert len(theirs) == len(ours) > 50 and max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) <= 1e-4
        record = json.loads((tmp_path / form / "steering.json").read_text())
        assert parse(record["signature"]).model_dump(mode="json") == record["intervention"]
        assert (
            record["signature"] in done.stdout and record["fingerprint"] in (tmp_path / form / "README.md").read_text()
        )


_KILLED = """
import os, signal, sys
from lm_eval_steering.cli import main
from lm_eval_steering.export import checkpoint
write, done = checkpoint.save_file, []
def save_file(*arguments, **named):
    write(*arguments, **named)
    done.append(1)
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = save_file
main()
"""


def test_a_killed_export_leaves_nothing_that_loads_and_the_next_one_is_whole(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [*EXPORT, "--op", "add", "--as", "checkpoint", "--out", out, "--shard-size", "0.003"]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *command], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists() and len(list(partial.glob("*.safetensors"))) == 3
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(partial)
    run("lm-eval-steering", *command)
    assert not partial.exists() and AutoModelForCausalLM.from_pretrained(out).config.mlp_bias


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a process's own memory is read from /proc")
def test_an_export_holds_a_shard_and_not_the_model(tmp_path: Path) -> None:
    measured = measure(tmp_path, QUICK, layers=4, shard_bytes=5 * 10**7)
    assert measured["bytes"] > 4e8 and measured["largest_file"] < 6e7
    assert measured["peak_private"] < 1.5e8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "add", "--as", "checkpoint", "--positions", "last"), "weights treat every token alike"),
        (("--op", "scale", "--as", "checkpoint", "--factors", "1,2"), "--factors conflicts with --as checkpoint"),
        (("--op", "scale", "--as", "lora", "--factors", "1;2"), "--factors 1;2: expected numbers joined by commas"),
        (("--op", "scale", "--factor", "2", "--as", "lora", "--verify", "3"), "--verify without --text"),
        (("--op", "scale", "--as", "lora", "--factor", "2", "--value", "3"), "takes none but a live_ statistic"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lm_eval_steering.cli import app

    done = CliRunner().invoke(app, [*EXPORT, *arguments, "--out", str(tmp_path / "out")])
    assert message in str(done.exception) and "\n" not in str(done.exception)
    assert not list(tmp_path.iterdir())
