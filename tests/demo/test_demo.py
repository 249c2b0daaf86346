"""The demo on two languages: its claims, its files, and the neuron set that ships."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lm_eval_steering.demo.figures import Figures
from lm_eval_steering.demo.run import RATE, run_demo, steered_languages
from lm_eval_steering.demo.tables import summary
from lm_eval_steering.errors import SteeringError, UnknownLanguageError
from lm_eval_steering.lmeval.task_families.demo import demo_languages
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.resources import demo_model, find_neuron_set

LANGUAGES = ("deu_Latn", "tur_Latn")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def figures(out: Path) -> Figures:
    return run_demo(out, LANGUAGES, controls=1)


def test_each_language_is_hurt_most_by_silencing_its_own_neurons(figures: Figures) -> None:
    for own, other in (LANGUAGES, LANGUAGES[::-1]):
        rise = {code: figures.deactivated_nats[own][code] - figures.baseline_nats[code] for code in LANGUAGES}
        assert rise[own] > 0.1 and rise[own] > 5 * rise[other]
        random = figures.deactivated_control_nats[own][0][own] - figures.baseline_nats[own]
        assert rise[own] > 5 * abs(random)


def test_amplification_moves_preference_and_output(figures: Figures) -> None:
    for own, other in (LANGUAGES, LANGUAGES[::-1]):
        assert figures.lss[own][other] >= 0.9 > figures.lss_control[own][other][0]
        assert figures.lfs[own]["steered"] >= 0.8 and figures.lfs[own]["baseline"] <= 0.1
        assert figures.lfs_control[own][0] <= 0.1
        assert figures.lfs_open[own]["steered"] >= 0.4
        assert figures.chosen[own] in figures.factors


def test_the_command_writes_what_it_measured(figures: Figures, out: Path) -> None:
    saved = json.loads((out / "figures.json").read_text())
    assert saved["lss"] == figures.lss
    assert summary(figures)[1] in (out / "tables.txt").read_text().replace("\n", " ")
    assert (out / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    results = [path for path in (out / "lm_eval" / "deu_Latn-chosen").rglob("results_*.json")]
    assert json.loads(results[0].read_text())["config"]["steering"]["evidence"]["forwards"] > 0


def test_the_set_that_ships_is_the_one_that_the_demo_finds(figures: Figures, out: Path) -> None:
    shipped, found = NeuronSet.load(find_neuron_set("demo")), NeuronSet.load(out / "neurons.safetensors")
    numbers = {"method": "lape", "rate": RATE, "filter_rate": 0.95, "bar_rate": 0.95}
    assert {name: shipped.provenance.selection[name] for name in numbers} == numbers
    assert shipped.provenance.corpus["sha256"] == found.provenance.corpus["sha256"]
    assert shipped.calibrated is not None and found.calibrated is not None
    # Another processor may round an activation near 0 the other way: nearly all neurons must agree, not all.
    own, other = ({tuple(row) for row in one.union().tolist()} for one in (shipped, found))
    assert len(own & other) >= 0.98 * len(own)
    both = np.array(sorted(own & other))
    for code in LANGUAGES:
        assert np.allclose(
            shipped.calibrated.lookup(both, code, "product", "mean"),
            found.calibrated.lookup(both, code, "product", "mean"),
            atol=1e-3,
        )


def test_the_checkpoint_is_half_precision_and_loads_in_full() -> None:
    config = json.loads((demo_model() / "config.json").read_text())
    assert config["dtype"] == "float32"
    with safe_open(demo_model() / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_languages_of_the_demo_are_chosen_by_any_code() -> None:
    assert steered_languages("all") == demo_languages()
    assert steered_languages("de,tr,de") == LANGUAGES
    with pytest.raises(UnknownLanguageError, match="not in the demo"):
        steered_languages("deu,ind")
    with pytest.raises(SteeringError, match="at least two"):
        steered_languages("deu")
