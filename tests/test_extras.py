"""The core works without the extras, and a command that needs a missing extra names it before it does anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lm_eval_steering import __version__, extras
from lm_eval_steering.cli import NEEDS, app
from lm_eval_steering.resources import demo_model

ROOT = Path(__file__).parents[1]
# lm-eval itself imports pandas (datasets), scipy (scikit-learn) and jinja2: what matters is what our modules import.
OF_EXTRAS = sorted({module for modules in extras.EXTRAS.values() for module in modules})
_EVALUATE = """
import builtins, json, sys
from pathlib import Path

wanted, imported, out = json.loads(sys.argv[1]), set(), sys.argv[2]
real = builtins.__import__

def recorded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if level == 0 and name.split(".")[0] in wanted and importer.startswith("lm_eval_steering"):
        imported.add((importer, name))
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = recorded
for absent in ("matplotlib", "submitit", "statsmodels", "fontTools"):
    sys.modules[absent] = None  # as if not installed
from lm_eval.__main__ import cli_evaluate
sys.argv = ["lm_eval", *json.loads(sys.argv[3])]
cli_evaluate()
Path(out).write_text(json.dumps(sorted(imported)))
"""


def test_the_core_alone_evaluates_the_demo(tmp_path: Path) -> None:
    arguments = f"pretrained={demo_model()},neurons=demo,language=fra_Latn,op=scale,factor=2"
    command = [
        "--model", "steered-hf", "--model_args", arguments, "--tasks", "steering_demo_continuation_fra_Latn",
        "--device", "cpu", "--batch_size", "16", "--limit", "8", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    out = tmp_path / "imported.json"
    done = subprocess.run(
        [sys.executable, "-c", _EVALUATE, json.dumps(OF_EXTRAS), out, json.dumps(command)],
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(out.read_text()) == []
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert results["config"]["steering"]["evidence"]["forwards"] > 0


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_a_command_without_its_extra_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    for module in extras.EXTRAS[NEEDS[name]]:
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(extras.MissingExtraError) as error:
        CliRunner().invoke(app, [name, *_arguments(name, tmp_path)], catch_exceptions=False, standalone_mode=False)
    message = str(error.value)
    assert f"lm-eval-steering {name}" in message and f'pip install "lm-eval-steering[{NEEDS[name]}]"' in message
    assert "\n" not in message and list(tmp_path.iterdir()) == []


def _arguments(name: str, folder: Path) -> list[str]:
    """Enough for the command line to be read; nothing of it exists, so that an extra must be refused first."""
    out = str(folder / "out")
    model = ["--model", "m", "--neurons", "n", "--out", out]
    return {
        "compare": ["a", "b", "--out", out], "inspect": ["n", "--out", out],
        "merge": ["a", "--out", out], "report": ["a", "--out", out], "stepwise": model,
        "logit-lens": model,
    }[name]  # fmt: skip


def test_the_extras_are_those_of_pyproject() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = declared["optional-dependencies"]
    distributions = {"unidic_lite": "unidic-lite"}
    for extra, modules in extras.EXTRAS.items():
        names = {re.match(r"[\w-]+", line)[0] for line in optional[extra]}  # type: ignore[index]
        assert {distributions.get(module, module) for module in modules} <= names
        assert not names & {re.match(r"[\w-]+", line)[0] for line in declared["dependencies"]}  # type: ignore[index]
        assert extra in optional["all"][0]


def test_version_and_environment() -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).output.strip() == f"lm-eval-steering {__version__}"
    printed = runner.invoke(app, ["env"])
    assert printed.exit_code == 0
    for name in ("torch", "lm-eval", "devices", "engine vllm", "plugin", "hub cache", "neuron sets", "extra report"):
        assert re.search(rf"^{name} +\S", printed.output, re.MULTILINE), name


def test_completion_knows_the_commands() -> None:
    environment = os.environ | {
        "_LM_EVAL_STEERING_COMPLETE": "complete_bash", "COMP_WORDS": "lm-eval-steering rep", "COMP_CWORD": "1",
    }  # fmt: skip
    code = "from lm_eval_steering.cli import app; app(prog_name='lm-eval-steering')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["report"]
