"""The sets of CLaS-Bench that ship: what they are, what they refuse, and what a model of their shape does with them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lm_eval_steering.errors import NeuronSetError, SteeringError
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.neurons import neuron_set as neuron_set_module
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.resources import find_neuron_set, neuron_sets_folder
from tests.conftest import USUAL, Command, tiny_model, tiny_tokenizer

# name -> (their file, model, its type, rate)
SHIPPED = {
    "llama-3.1-8b-instruct-lape-1": ("llama-1", "meta-llama/Llama-3.1-8B-Instruct", "llama", 0.01),
    "llama-3.1-8b-instruct-lape-5": ("llama-5", "meta-llama/Llama-3.1-8B-Instruct", "llama", 0.05),
    "aya-expanse-8b-lape-1": ("aya-1", "CohereLabs/aya-expanse-8b", "cohere", 0.01),
}
LARGEST = 400_000  # bytes of a file in the repository


@pytest.fixture(scope="module")
def same_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the layers and units of Llama 3.1 8B and eight hidden dimensions."""
    torch.manual_seed(0)
    sizes = USUAL | {"hidden_size": 8, "num_hidden_layers": 32, "intermediate_size": 14336}
    folder = tmp_path_factory.mktemp("shape") / "thin"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def not_warned_yet() -> None:
    neuron_set_module._warn_of_unknown_weights.cache_clear()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_set_is_small_and_says_what_it_is(name: str, command: Command) -> None:
    file, model, architecture, rate = SHIPPED[name]
    path = find_neuron_set(name)
    assert path.stat().st_size <= LARGEST
    loaded = NeuronSet.load(path)
    provenance = loaded.provenance
    assert (provenance.model, provenance.architecture, loaded.shape) == (model, architecture, (32, 14336))
    assert len(loaded.languages) == 32 and all(len(loaded.neurons(code)) for code in loaded.languages)
    assert len(loaded.union()) == round(rate * 32 * 14336)
    assert provenance.selection["file"] == file and provenance.selection["license"] == "Apache-2.0"
    code, out, _ = command("inspect", name)
    text = " ".join(out.split())
    assert code == 0 and "license Apache-2.0" in text and "github.com/d-gurgurov/CLaS-Bench" in text
    assert "not known: another checkpoint cannot be detected" in text and provenance.selection["sha256"] in text


@pytest.mark.parametrize("name", SHIPPED)
def test_it_holds_what_its_authors_published(name: str, shared_data: Path) -> None:
    theirs = torch.load(shared_data / "published_neuron_sets" / "clas-bench" / SHIPPED[name][0], weights_only=True)
    ours = NeuronSet.load(name)
    for code, layers in zip(ours.languages, theirs, strict=True):
        rows = [(layer, int(unit)) for layer, units in enumerate(layers) for unit in sorted(units.tolist())]
        assert np.array_equal(ours.neurons(code), np.array(rows))


def test_the_licence_stands_beside_them() -> None:
    text = (neuron_sets_folder() / "clas-bench.LICENSE.txt").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0" in text
    readme = (neuron_sets_folder() / "README.md").read_text(encoding="utf-8")
    assert all(f"{name}.safetensors" in readme for name in SHIPPED) and "clas-bench.LICENSE.txt" in readme


@pytest.mark.parametrize("name", SHIPPED)
def test_a_model_of_another_shape_is_refused_before_it_is_loaded(name: str, tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)  # no weights: loading would fail otherwise
    with pytest.raises(NeuronSetError, match=r"32 layers of 14336 units.* 3 layers of 24 units"):
        SteeredHFLM(pretrained=str(tmp_path), neurons=name, language="fra_Latn", op="scale", factor=2)


def test_another_hub_id_is_refused_by_name() -> None:
    with pytest.raises(SteeringError, match="the neuron set is for CohereLabs/aya-expanse-8b, the model is"):
        from lm_eval_steering.lmeval.arguments import refuse_other_name

        refuse_other_name(NeuronSet.load("aya-expanse-8b-lape-1"), "CohereLabs/aya-23-8B")


@pytest.mark.parametrize(
    "arguments", [{"language": "fra_Latn", "op": "scale", "factor": 2}, {"deactivate": "fra_Latn"}], ids=str
)
def test_a_model_of_that_shape_is_steered_with_a_warning(
    arguments: dict[str, object], same_shape: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "llama-3.1-8b-instruct-lape-1"
    with caplog.at_level(logging.WARNING, logger="lm_eval.steering"):
        model = SteeredHFLM(pretrained=str(same_shape), neurons=name, batch_size=1, **arguments)  # type: ignore[arg-type]
    assert "no sketch of the weights" in caplog.text and "32 layers of 14336 units" in caplog.text
    from lm_eval.api.instance import Instance

    request = Instance("loglikelihood", {}, ("w1 w2", " w3 w4"), 0)
    (steered,) = model.loglikelihood([request])
    plain = SteeredHFLM(pretrained=str(same_shape), batch_size=1)
    (unsteered,) = plain.loglikelihood([request])
    assert steered[0] != unsteered[0]
    neurons = NeuronSet.load(name).neurons("fra_Latn")
    assert model.get_model_info()["steering"]["evidence"]["neurons"] == len(neurons)


def test_a_statistic_is_refused_until_calibrate_adds_it_and_the_sketch(
    same_shape: Path, tmp_path: Path, command: Command
) -> None:
    name = "llama-3.1-8b-instruct-lape-1"
    steer = {"pretrained": str(same_shape), "language": "fra_Latn", "op": "add", "value": "mean"}
    with pytest.raises(SteeringError, match="calibrate"):
        SteeredHFLM(neurons=name, **steer)  # type: ignore[arg-type]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, code in enumerate(NeuronSet.load(name).languages):
        lines = [" ".join(f"w{(number + word * step) % 50}" for word in range(8)) for step in (1, 3)]
        (corpus / f"{code}.txt").write_text("\n".join(lines) + "\n")
    out = tmp_path / "calibrated.safetensors"
    code, _, error = command("calibrate", name, "--model", same_shape, "--corpus", corpus, "--out", out)
    assert code == 0, error
    calibrated = NeuronSet.load(out)
    assert calibrated.provenance.weights and calibrated.provenance.selection["license"] == "Apache-2.0"
    assert len(calibrated.statistics("fra_Latn", "mean")) == len(calibrated.neurons("fra_Latn"))
    SteeredHFLM(neurons=str(out), **steer)  # type: ignore[arg-type]
