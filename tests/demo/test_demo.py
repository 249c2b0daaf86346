"""What the demo claims, by its own plan on two languages; the files that ship with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

from lm_eval_steering import resources
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.lmeval.task_families.demo import demo_languages
from lm_eval_steering.neurons.find import Method, find_with
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.neurons.recorder import Recorder, Search
from lm_eval_steering.neurons.recording import RecordingFolder
from lm_eval_steering.neurons.running import ModelRunner
from lm_eval_steering.sweep import Store
from lm_eval_steering.sweep.plan import read_plan
from tests.commands import run_together

LANGUAGES = ("deu_Latn", "tur_Latn")
PAIRS = (LANGUAGES, LANGUAGES[::-1])
RATE = 0.05
TASKS = ["steering_demo_forcing_choose", *(f"steering_demo_perplexity_{code}" for code in LANGUAGES)]
THEN = ["steering_demo_forcing", "steering_demo_open", *(f"steering_demo_lss_{code}" for code in LANGUAGES)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The plan for all twelve languages, cut down to two of them and one factor."""
    out = tmp_path_factory.mktemp("demo")
    changes = {"languages": LANGUAGES, "interventions.0.factors": [8], "tasks": TASKS, "then.tasks": THEN}
    edits = [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    run_together(["lm-eval-steering", "sweep", resources.demo_plan_all(), "--out", out / "sweep", *edits], cwd=out)
    return Store(out / "sweep").frame()


def value(
    results: pd.DataFrame, task: str, metric: str, steered: str = "", deactivated: str = "", random: bool = False
) -> float:
    """A metric of one cell: of the model that is steered to a language, or without one; or of its random control."""
    rows = results[(results.task == f"steering_demo_{task}") & (results.metric == metric)]
    rows = rows[(rows.languages == steered) & (rows.deactivated == deactivated) & (rows.control.notna() == random)]
    assert len(rows) == 1, rows
    return float(rows.value.iloc[0])


def test_each_language_is_hurt_most_by_deactivating_its_own_neurons(results: pd.DataFrame) -> None:
    def rise(deactivated: str, evaluated: str, random: bool = False) -> float:
        task = f"perplexity_{evaluated}"
        steered = value(results, task, "nats_per_token", deactivated=deactivated, random=random)
        return steered - value(results, task, "nats_per_token")

    for self_, cross in PAIRS:
        assert rise(self_, self_) > 0.1 and rise(self_, self_) > 5 * rise(self_, cross)
        assert rise(self_, self_) > 5 * abs(rise(self_, self_, random=True))


def test_amplification_moves_preference_and_output(results: pd.DataFrame) -> None:
    for self_, cross in PAIRS:
        lss = [value(results, f"lss_{cross}", "lss", self_, random=random) for random in (False, True)]
        assert lss[0] >= 0.9 > lss[1]
        assert value(results, "forcing", "lfs", self_) >= 0.8
        assert value(results, "forcing", "lfs", self_, random=True) <= 0.1
        assert value(results, "open", "lfs", self_) >= 0.4
    baselines = results[(results.intervention == "baseline") & (results.metric == "lfs")]
    assert set(baselines.task) == {f"steering_demo_{task}" for task in ("forcing_choose", "forcing")}
    assert (baselines[baselines.task == "steering_demo_forcing"].value <= 0.1).all()


def test_the_plan_for_all_languages_names_all_of_them() -> None:
    plan = read_plan(resources.demo_plan_all())
    assert plan.languages == demo_languages()


@pytest.fixture(scope="module")
def neuron_set(tmp_path_factory: pytest.TempPathFactory) -> NeuronSet:
    """What `find` finds on the demo's text."""
    search = Search(str(resources.demo_calibration()), demo_languages(), rows="sentences")
    runner = ModelRunner(LazyModel(str(resources.demo_model())), batch_size=32)
    recorder = Recorder(runner, search, RecordingFolder(tmp_path_factory.mktemp("recording") / "demo"))
    return find_with(recorder, Method(rates=(RATE,)))[0]


def test_the_set_that_ships_is_the_one_that_find_finds(neuron_set: NeuronSet) -> None:
    shipped = NeuronSet.load("demo")
    numbers = {"method": "lape", "rate": RATE, "filter_rate": 0.95, "bar_rate": 0.95}
    assert {name: shipped.provenance.selection[name] for name in numbers} == numbers
    assert shipped.provenance.corpus["sha256"] == neuron_set.provenance.corpus["sha256"]
    assert shipped.calibrated is not None and neuron_set.calibrated is not None
    # Another CPU may round an activation near 0 the other way: nearly all neurons must agree, not all.
    one, other = ({tuple(row) for row in each.union().tolist()} for each in (shipped, neuron_set))
    assert len(one & other) >= 0.98 * len(one)
    both = np.array(sorted(one & other))
    for code in LANGUAGES:
        assert np.allclose(
            shipped.calibrated.lookup(both, code, "product", "mean"),
            neuron_set.calibrated.lookup(both, code, "product", "mean"),
            atol=1e-3,
        )


def test_the_checkpoint_is_half_precision_and_loads_in_full() -> None:
    folder: Path = resources.demo_model()
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
