"""The logit lens: the model's head on every family, the paper's aggregation, and a plain loop on the demo model."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lm_eval_steering import resources, steer
from lm_eval_steering.analysis.logit_lens import (
    Lens,
    LensSettings,
    ModelHead,
    TokenLabels,
    by_class,
    masses,
    run_lens,
    table,
    write,
)
from lm_eval_steering.analysis.prompts import Prompts, demo_prompts
from lm_eval_steering.architectures import sites_of
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.cli import analysis
from lm_eval_steering.errors import ArchitectureError, DidNotHappenError, InterventionError, SteeringError
from lm_eval_steering.metrics.language_id import LanguageIdentifier
from lm_eval_steering.neurons.neuron_set import NeuronSet
from tests.conftest import CONFIGS, make_set, tiny_model, tiny_tokenizer

IDS = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 10, 11, 12, 13, 14]])
STRONG = {"op": "add", "value": 3.0, "factor": 2.0}
FRENCH = {"language": "fra_Latn", "op": "add", "value": "mean", "factor": 4.0, "site": "product"}


def lens_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer, row * position, vocabulary) logits of the lens, and (row * position, vocabulary) of the model."""
    head = ModelHead(model, sites_of(model))
    with torch.no_grad(), head.states() as states:
        own = model(IDS).logits
    return torch.stack([head.logits(state.flatten(0, 1)) for state in states]), own.flatten(0, 1)


def check_last_layer(model: Any) -> None:
    lens, own = lens_of(model)
    assert torch.allclose(lens[-1], own, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(lens[0], own, rtol=1e-3, atol=1e-3), "the first layer is the last one"


STREAMS = {"gemma3n_text"}  # their layers return several residual streams, which no lens reads as one


def test_the_last_layers_lens_is_the_models_output(family: str, model: nn.Module) -> None:
    if family in STREAMS:
        with pytest.raises(ArchitectureError, match="expected hidden states"):
            check_last_layer(model)
    else:
        check_last_layer(model)


def test_steered_too(family: str, model: nn.Module, neuron_set: NeuronSet) -> None:
    if family in STREAMS:
        return  # refused, as above
    head = ModelHead(model, sites_of(model))
    with torch.no_grad(), steer(model, neuron_set, "fra_Latn", **STRONG), head.states() as states:
        own = model(IDS).logits
    plain = lens_of(model)[1]
    assert torch.allclose(head.logits(states[-1].flatten(0, 1)), own.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(own.flatten(0, 1), plain, atol=1e-3)


SCALED: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.5},
    "opt": {"word_embed_proj_dim": 8},
}


@pytest.mark.parametrize("name", sorted(SCALED))
def test_soft_caps_scales_and_projections_are_the_models(name: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **CONFIGS.get(name, CONFIGS["llama"]) | SCALED[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    check_last_layer(model)
    if name == "gemma2":
        assert lens_of(model)[0].abs().max() <= 0.5, "a layer's logits are beyond the soft-cap"


def test_each_layer_is_normalised_once_as_by_hand() -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
        lens, _ = lens_of(model)
        # transformers' last one is normalised already; those before it are not.
        for layer in range(2):
            by_hand = model.lm_head(model.model.norm(states[layer + 1]))
            assert torch.allclose(lens[layer], by_hand.flatten(0, 1), rtol=1e-5, atol=1e-6)
        assert torch.allclose(lens[2], model.lm_head(states[3]).flatten(0, 1), rtol=1e-5, atol=1e-6)
        twice = model.lm_head(model.model.norm(states[3])).flatten(0, 1)
        model.model.norm.weight.mul_(1.5)
        assert not torch.allclose(lens_of(model)[0][2], twice, rtol=1e-3)


def test_the_head_leaves_no_hook_and_refuses_another_shape() -> None:
    model: Any = tiny_model("gpt2")
    head = ModelHead(model, sites_of(model))
    with pytest.raises(ArchitectureError, match=r"the last layer returned \(2, 1, 16\)"):
        head.logits(torch.zeros(2, 15))
    assert all(not module._forward_hooks for module in model.modules())


def test_a_model_that_does_more_to_its_output_is_refused() -> None:
    model: Any = tiny_model("llama")
    calls: list[int] = []
    # Not a function of the hidden state: another answer at every call.
    model.lm_head.register_forward_hook(lambda _m, _i, out: out + len(calls) + (calls.append(1) or 0))
    lazy = LazyModel.of(model, tiny_tokenizer())
    with pytest.raises(DidNotHappenError, match=r"differs from the model's own logits by .* no number can be trusted"):
        run_lens(
            lazy,
            Prompts(("w1 w2 w3", "w4 w5"), "test"),
            ["fra_Latn"],
            settings=LensSettings(batch_size=1, positions="all"),
        )


# --- aggregation ----------------------------------------------------------------------------------------------------


def test_masses_are_the_papers() -> None:
    """`misc_facts.json`, `logit_lens`: executed from Gurgurov et al.'s own function."""
    labels, probabilities = ["en", "mt", "en", "it", "mt"], [0.4, 0.2, 0.1, 0.05, 0.02]
    names = ["en", "mt", "it"]
    found = masses(np.array([names.index(label) for label in labels]), np.array(probabilities), 3)
    assert found == pytest.approx([0.5, 0.22, 0.05])
    assert found.sum() == pytest.approx(0.77), "renormalised"
    classes = by_class({"eng_Latn": 0.5, "mlt_Latn": 0.22, "ita_Latn": 0.05}, ["mlt_Latn"])
    assert classes == pytest.approx({"target": 0.22, "English": 0.5, "other": 0.05, "unknown": 0.0})


def test_classes_follow_the_identifiers_grain() -> None:
    found = by_class({"zho_Hans": 0.3, "yue_Hant": 0.1, "eng_Latn": 0.2, "unknown": 0.4}, ["zho_Hant"])
    assert found == pytest.approx({"target": 0.3, "English": 0.2, "other": 0.1, "unknown": 0.4})
    english = by_class({"eng_Latn": 0.2, "deu_Latn": 0.1}, ["eng_Latn"])
    assert english == pytest.approx({"target": 0.2, "other": 0.1, "unknown": 0.0})


@pytest.fixture(scope="module")
def demo() -> LazyModel:
    return LazyModel(str(resources.demo_model()), device="cpu")


@pytest.fixture(scope="module")
def demo_set() -> NeuronSet:
    return NeuronSet.load("demo")


def test_special_tokens_pieces_and_ids_beyond_the_vocabulary_are_unknown(demo: LazyModel) -> None:
    labels = TokenLabels(demo.tokenizer, LanguageIdentifier(threshold=0.0, letters=0), len(demo.tokenizer) + 8)
    piece = next(token for token in range(8192) if demo.tokenizer.decode([token]) == "\ufffd")
    (word,) = demo.tokenizer(" elle", add_special_tokens=False)["input_ids"]
    tokens = np.array([demo.tokenizer.bos_token_id, piece, len(demo.tokenizer) + 3, word])
    labels.learn(tokens)
    assert [labels.languages[number] for number in labels.language[tokens]] == ["unknown"] * 3 + ["fra_Latn"]
    assert [labels.scripts[number] for number in labels.script[tokens]] == ["Zyyy"] * 3 + ["Latn"]


def plain_loop(demo: LazyModel, prompts: Prompts, top_k: int) -> list[dict[str, float]]:
    """The definition without batches or hooks: one prompt at a time, Llama's norm and head written out."""
    model, identifier = demo.model, LanguageIdentifier()
    found: list[dict[str, float]] = [defaultdict(float) for _ in range(6)]
    for text in prompts.texts:
        ids = demo.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
            states = [model.model.norm(state) for state in output.hidden_states[1:-1]] + [output.hidden_states[-1]]
            for layer, state in enumerate(states):
                values, tokens = model.lm_head(state[0, -1]).softmax(-1).topk(top_k)
                for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
                    piece = demo.tokenizer.decode([token])
                    spoken = any(map(str.isalpha, piece)) and token not in demo.tokenizer.all_special_ids
                    label = identifier.identify([piece])[0].language if spoken else "unknown"
                    found[layer][label] += value / len(prompts.texts)
    return found


def test_the_numbers_are_those_of_a_plain_loop(demo: LazyModel) -> None:
    prompts = Prompts(demo_prompts(["eng_Latn", "deu_Latn", "jpn_Jpan"], clauses=True).texts[:10], "test")
    expected = plain_loop(demo, prompts, 50)
    (run,) = run_lens(demo, prompts, ["fra_Latn"], settings=LensSettings(top_k=50, batch_size=4)).runs
    for layer, masses_ in enumerate(run.languages):
        assert set(masses_) == set(expected[layer])
        assert masses_ == pytest.approx(dict(expected[layer]), abs=1e-5)
    assert run.evidence is None and run.signature == "none" and run.off_by < 1e-5


def test_top_p_1_reads_everything_and_batches_do_not_matter(demo: LazyModel) -> None:
    prompts = Prompts(demo_prompts(["eng_Latn"], clauses=True).texts[:7], "test")
    one, other = (
        run_lens(demo, prompts, ["fra_Latn"], settings=LensSettings("all", None, 1.0, size)).runs[0] for size in (7, 2)
    )
    for run in (one, other):
        assert [sum(layer.values()) for layer in run.languages] == pytest.approx([1.0] * 6, abs=1e-5)
        assert [sum(layer.values()) for layer in run.scripts] == pytest.approx([1.0] * 6, abs=1e-5)
    for first, second in zip(one.languages, other.languages, strict=True):
        assert first == pytest.approx(second, abs=1e-5)
    small = run_lens(demo, prompts, ["fra_Latn"], settings=LensSettings("last", None, 0.4, 7)).runs[0]
    assert all(0.4 <= sum(layer.values()) <= 1 for layer in small.languages)
    assert sum(small.languages[-1].values()) < 0.6


@pytest.fixture(scope="module")
def lens(demo: LazyModel, demo_set: NeuronSet) -> Lens:
    prompts = demo_prompts(["eng_Latn"], clauses=True)
    return run_lens(demo, prompts, ["fra_Latn"], demo_set, FRENCH, LensSettings(top_k=None, top_p=1.0))


def test_steering_to_french_moves_mass_from_english_to_french(lens: Lens) -> None:
    before, after = (by_class(run.languages[-1], lens.targets) for run in lens.runs)
    assert after["target"] > 5 * before["target"]
    assert after["English"] < 0.6 * before["English"]
    steered = lens.runs[1]
    assert steered.signature.startswith("op:add|value:mean|factor:4|lang:fra_Latn|site:product")
    assert steered.evidence is not None and steered.evidence["forwards"] == math.ceil(60 / 16)
    assert steered.evidence["fired"] == steered.evidence["forwards"] * steered.evidence["modules"]
    assert lens.runs[0].fingerprint != steered.fingerprint
    assert max(run.off_by for run in lens.runs) < 1e-5


def test_what_is_written(lens: Lens, tmp_path: Path) -> None:
    paths = write(lens, tmp_path)
    assert [path.name for path in paths] == [
        "lens.csv", "lens-labels.csv", "logit-lens.json", "logit-lens.png", "logit-lens.svg",
    ]  # fmt: skip
    with (tmp_path / "lens.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6 and list(rows[0])[:6] == ["run", "layer", "target", "english", "other", "unknown"]
    with (tmp_path / "lens-labels.csv").open() as file:
        long = list(csv.DictReader(file))
    french = [row for row in long if row["run"] == "steered" and row["layer"] == "5" and row["label"] == "fra_Latn"]
    assert float(french[0]["mass"]) == pytest.approx(float(rows[-1]["target"]), rel=1e-6)
    assert {row["label"] for row in long if row["by"] == "script"} >= {"Latn", "Cyrl", "Hani", "Zyyy"}
    content = json.loads((tmp_path / "logit-lens.json").read_text())
    assert content["made_with"]["identifier"].startswith("lid.176.ftz@")
    assert {"weights", "neurons", "prompts", "versions", "settings", "seed"} <= set(content["made_with"])
    assert str(Path.cwd()) not in (tmp_path / "logit-lens.json").read_text()
    first = (tmp_path / "logit-lens.svg").read_bytes()
    write(lens, tmp_path)
    assert (tmp_path / "logit-lens.svg").read_bytes() == first
    assert table(lens).count("\n") == 7


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": "first"}, "positions='first': expected last or all"),
        ({"top_k": 5, "top_p": 0.5}, "top_k and top_p: expected one"),
        ({"top_k": None}, "top_k and top_p: expected one"),
        ({"top_k": 0}, "top_k=0: expected a number above 0"),
        ({"top_k": None, "top_p": 1.5}, "top_p=1.5: expected a share"),
    ],
)
def test_what_cannot_be_looked_at(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        LensSettings(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"language": "fra_Latn", "op": "scale"}, "--language without --neurons"),
        ({"neurons": Path("demo")}, "--target is missing"),
        ({"neurons": Path("demo"), "language": "fra_Latn"}, "op="),
        ({"neurons": Path("demo"), "language": "swe", "op": "scale"}, "not in the neuron set"),
        ({"neurons": Path("demo"), "language": "fra", "op": "add", "value": "mode"}, "value='mode'"),
        ({"target": "klingon"}, "unknown language"),
        ({"target": "fra", "prompts": Path("absent.txt")}, "--prompts absent.txt: cannot be read"),
        ({"target": "fra", "lid": "absent.bin"}, "no model file and no name absent.bin"),
    ],
)
def test_mistakes_are_refused_before_the_model_is_loaded(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(SteeringError, match=message):
        analysis.logit_lens(model=str(resources.demo_model()), out=tmp_path, **arguments)


def test_an_intervention_needs_neurons() -> None:
    lazy = LazyModel.of(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(SteeringError, match="an intervention without neurons"):
        run_lens(lazy, Prompts(("w1",), "test"), ["fra_Latn"], intervention=FRENCH)
    with pytest.raises(InterventionError):
        run_lens(lazy, Prompts(("w1",), "t"), ["fra"], make_set({"fra_Latn": [(0, 1)]}), {"language": "fra"})
