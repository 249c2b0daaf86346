"""The wheel holds the data that an editable install reads from the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out], cwd=ROOT, check=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_tasks_neuron_sets_demo_and_start_up_files_travel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for folder in ("tasks", "neuron_sets"):
        own = {
            f"lm_eval_steering/{path.relative_to(ROOT)}"
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert own and own <= names
    assert {"_lm_eval_steering_startup.py", "lm_eval_steering_startup.pth", "lm_eval_steering_startup.start"} <= names
    assert {"lm_eval_steering/demo/demo-model/model.safetensors", "lm_eval_steering/py.typed"} <= names
    plans = {f"lm_eval_steering/plans/{path.name}" for path in (ROOT / "lm_eval_steering" / "plans").glob("*.yaml")}
    assert len(plans) > 15 and plans <= names
    assert not [name for name in names if "lmeval/startup" in name or name.startswith("tests/")]


def test_the_start_up_line_is_one_import_and_the_same_entry_twice(wheel: zipfile.ZipFile) -> None:
    line = wheel.read("lm_eval_steering_startup.pth").decode()
    assert line.startswith("import ") and line.count("\n") == 1
    assert wheel.read("lm_eval_steering_startup.start").decode().strip() == "_lm_eval_steering_startup:install"


def test_entry_points_are_what_the_start_up_file_registers(wheel: zipfile.ZipFile) -> None:
    from importlib.metadata import entry_points

    from lm_eval_steering.lmeval.registration import AGGREGATIONS, MODELS
    from lm_eval_steering.metrics.registered import METRICS

    for group, registered in (
        ("lm_eval.models", MODELS),
        ("lm_eval.metrics", {name: f"lm_eval_steering.metrics.registered:{name}" for name in METRICS}),
        ("lm_eval.aggregations", AGGREGATIONS),
    ):
        declared = {entry.name: entry.value for entry in entry_points(group=group)}
        assert registered.items() <= declared.items()


def test_the_shipped_model_is_small(wheel: zipfile.ZipFile) -> None:
    size = sum(info.file_size for info in wheel.infolist() if "/demo/demo-model/" in info.filename)
    assert 1_000_000 < size <= 16 * 2**20
