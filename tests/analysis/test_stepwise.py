"""Languages deactivated step by step, on the demo model and on a tiny one whose answer is known."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_eval_steering import resources, steer
from lm_eval_steering.analysis.prompts import Prompts, batches, demo_prompts, read_prompts
from lm_eval_steering.analysis.stepwise import (
    DeactivationStep,
    Decoding,
    Fallback,
    deactivate_stepwise,
    order_of,
    table,
    write,
)
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.cli import analysis
from lm_eval_steering.errors import DidNotHappenError, NeuronSetError, SteeringError, UnknownLanguageError
from lm_eval_steering.metrics.language_id import Identified, LanguageIdentifier
from lm_eval_steering.neurons.neuron_set import NeuronSet
from tests.conftest import make_set, tiny_model, tiny_tokenizer

ORDER = ("tur_Latn", "jpn_Jpan")


@pytest.fixture(scope="module")
def demo() -> LazyModel:
    return LazyModel(str(resources.demo_model()), device="cpu")


@pytest.fixture(scope="module")
def demo_set() -> NeuronSet:
    return NeuronSet.load("demo")


@pytest.fixture(scope="module")
def found(demo: LazyModel, demo_set: NeuronSet) -> Fallback:
    prompts = Prompts(demo_prompts(["eng_Latn", "tur_Latn", "jpn_Jpan"]).texts[:12], "test")
    return deactivate_stepwise(demo, demo_set, prompts, ORDER, Decoding(12, 5))


def test_each_step_deactivates_one_more_language_with_evidence(found: Fallback, demo_set: NeuronSet) -> None:
    assert [step.deactivated for step in found.steps] == [(), ORDER[:1], ORDER]
    assert [step.neurons for step in found.steps] == [len(demo_set.union(ORDER[:k])) for k in range(3)]
    assert found.steps[0].evidence is None and found.steps[0].signature == "none"
    for step in found.steps[1:]:
        evidence = step.evidence
        assert evidence is not None
        # Three batches of 5, 5 and 2 prompts; the first token of each comes from the prefill.
        assert evidence["forwards"] <= 3 * 12
        assert evidence["fired"] == evidence["forwards"] * evidence["modules"] > 0
        assert evidence["neurons"] == step.neurons and evidence["largest_change"] > 0
        assert "+".join(step.deactivated) in step.signature
    assert len({step.fingerprint for step in found.steps}) == 3


def test_outputs_are_those_of_generate_one_by_one(demo: LazyModel, demo_set: NeuronSet, found: Fallback) -> None:
    texts = demo_prompts(["eng_Latn", "tur_Latn", "jpn_Jpan"]).texts[:4]
    for number, step in enumerate(found.steps):
        for place, text in enumerate(texts):
            ids = demo.tokenizer(text, return_tensors="pt")
            arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
            if number:
                with steer(demo.model, demo_set, deactivate="+".join(ORDER[:number])):
                    made = demo.model.generate(**ids, **arguments)
            else:
                made = demo.model.generate(**ids, **arguments)
            new = demo.tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            assert step.outputs[place] == new


def test_labels_are_the_identifiers_and_shares_add_up(found: Fallback) -> None:
    for step in found.steps:
        assert step.identified == tuple(LanguageIdentifier().identify(step.outputs))
        assert sum(step.counts.values()) == 12 and sum(step.shares.values()) == pytest.approx(1)
    assert found.steps[0].in_off == 0


def test_a_repeated_run_is_the_same(demo: LazyModel, demo_set: NeuronSet, found: Fallback) -> None:
    prompts = Prompts(demo_prompts(["eng_Latn", "tur_Latn", "jpn_Jpan"]).texts[:12], "test")
    again = deactivate_stepwise(demo, demo_set, prompts, ORDER, Decoding(12, 5))
    assert [step.outputs for step in again.steps] == [step.outputs for step in found.steps]
    assert [step.fingerprint for step in again.steps] == [step.fingerprint for step in found.steps]


def test_sampling_of_the_checkpoint_is_switched_off(demo: LazyModel, demo_set: NeuronSet, found: Fallback) -> None:
    settings, before = demo.model.generation_config, demo.model.generation_config.to_dict()
    prompts = Prompts(demo_prompts(["eng_Latn", "tur_Latn", "jpn_Jpan"]).texts[:12], "test")
    try:
        settings.do_sample, settings.temperature, settings.repetition_penalty = True, 3.0, 5.0
        settings.no_repeat_ngram_size, settings.num_beams = 2, 3
        wild = deactivate_stepwise(demo, demo_set, prompts, ORDER[:1], Decoding(12, 5))
    finally:
        settings.update(**before)
    assert wild.steps[0].outputs == found.steps[0].outputs


def test_outputs_are_cut_at_a_stop_text(demo: LazyModel, demo_set: NeuronSet, found: Fallback) -> None:
    prompts = Prompts(demo_prompts(["eng_Latn", "tur_Latn", "jpn_Jpan"]).texts[:12], "test")
    cut = deactivate_stepwise(demo, demo_set, prompts, ORDER[:1], Decoding(12, 5, ("e", ".")))
    expected = [min(text.partition("e")[0], text.partition(".")[0], key=len) for text in found.steps[0].outputs]
    assert list(cut.steps[0].outputs) == expected


def test_the_model_may_be_kept_from_ending_at_once(demo: LazyModel, demo_set: NeuronSet) -> None:
    prompts = Prompts(demo_prompts(demo_set.languages).texts[:12], "test")
    free, kept = (
        deactivate_stepwise(demo, demo_set, prompts, demo_set.languages, Decoding(6, 12, min_new_tokens=number)).steps[
            -1
        ]
        for number in (0, 6)
    )
    assert free.shares["empty"] > 0 and "empty" not in kept.shares


def test_the_written_files(found: Fallback, tmp_path: Path) -> None:
    assert [path.name for path in write(found, tmp_path)] == [
        "steps.csv", "stepwise.json", "stepwise.png", "stepwise.svg",
    ]  # fmt: skip
    with (tmp_path / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    for number in range(3):
        own = [row for row in rows if row["step"] == str(number)]
        assert sum(int(row["outputs"]) for row in own) == 12
        assert sum(float(row["share"]) for row in own) == pytest.approx(1)
        assert {row["fingerprint"] for row in own} == {found.steps[number].fingerprint[:8]}
    content = json.loads((tmp_path / "stepwise.json").read_text())
    assert content["made_with"]["settings"]["order"] == list(ORDER)
    assert {"weights", "neurons", "prompts", "identifier", "versions", "seed"} <= set(content["made_with"])
    last = content["steps"][2]
    assert last["evidence"]["fired"] > 0 and last["signature"] == found.steps[2].signature
    assert [output["text"] for output in last["outputs"]] == list(found.steps[2].outputs)
    first = (tmp_path / "stepwise.svg").read_bytes()
    write(found, tmp_path)
    assert (tmp_path / "stepwise.svg").read_bytes() == first


def made_up(deactivated: tuple[str, ...], *labels: str) -> DeactivationStep:
    identified = tuple(Identified(label, 1.0) for label in labels)
    return DeactivationStep(deactivated, len(deactivated), labels, identified, "none", "0" * 64, None, 0.0)


def test_the_table_counts_what_is_off_and_unknown(tmp_path: Path) -> None:
    first = made_up((), "zho_Hans", "zho_Hant", "eng_Latn", "unknown")
    second = made_up(("zho_Hans",), "zho_Hans", "zho_Hant", "eng_Latn", "unknown")
    assert (first.in_off, second.in_off) == (0, 0.5)
    ended = DeactivationStep(
        (), 0, ("", " \n", "Hello"), (Identified("unknown", 0.1),) * 3, "none", "0" * 64, None, 0.0
    )
    assert ended.counts == {"empty": 2, "unknown": 1}, "an output without text is no unknown language"
    lines = table(Fallback((first, second), {})).splitlines()
    assert lines[0].split() == ["step", "off", "neurons", "in", "off", "unknown", "empty", "most", "frequent"]
    assert lines[2].split()[:8] == ["1", "+", "zho_Hans", "1", "0.50", "0.25", "0.00", "eng_Latn"]


def test_more_languages_than_colours_are_drawn_as_other() -> None:
    from lm_eval_steering.analysis.stepwise import _stacked_bars

    codes = [f"{chr(97 + n)}aa_Latn" for n in range(20)]
    bars = _stacked_bars([made_up((), *codes), made_up((codes[3],), *codes, "unknown")])
    assert [part.name for part in bars[-2:]] == ["other", "unknown"] and len(bars) == 16
    assert bars[0].name == codes[3], "the deactivated language stands at the bottom"
    assert sum(part.shares for part in bars) == pytest.approx([1, 1])
    assert len({(part.colour, part.hatch) for part in bars}) == 16


# --- the order and the prompts --------------------------------------------------------------------------------------


def test_the_order_is_the_sets_without_empty_languages() -> None:
    neurons = make_set({"fra_Latn": [(0, 1)], "tur_Latn": [], "eng_Latn": [(1, 2)]})
    assert order_of(neurons, None) == (("fra_Latn", "eng_Latn"), ("tur_Latn",))
    assert order_of(neurons, "en,fr") == (("eng_Latn", "fra_Latn"), ())
    with pytest.raises(NeuronSetError, match="tur_Latn has no neurons in the set"):
        order_of(neurons, "fra,tur")
    with pytest.raises(UnknownLanguageError, match="not in the neuron set"):
        order_of(neurons, "deu")
    with pytest.raises(SteeringError, match="named twice"):
        order_of(neurons, "fra,fr")
    with pytest.raises(NeuronSetError, match="nothing to deactivate"):
        order_of(make_set({"fra_Latn": []}), None)


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffHello \n\n  \nWie geht's?\n", encoding="utf-8")
    assert read_prompts(path, "any", ["fra_Latn"]).texts == ("Hello ", "Wie geht's?")
    path.write_text("\n \n")
    with pytest.raises(SteeringError, match="no prompt in it"):
        read_prompts(path, "any", ["fra_Latn"])
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SteeringError, match="cannot be read as UTF-8"):
        read_prompts(path, "any", ["fra_Latn"])
    with pytest.raises(SteeringError, match="--prompts is missing"):
        read_prompts(None, "meta-llama/Llama-3.1-8B", ["fra_Latn"])
    turns = read_prompts(None, str(resources.demo_model()), ["jpn_Jpan", "swe_Latn", "eng_Latn"])
    assert turns.texts[1] == "If you are hungry now, there is some soup in the kitchen."
    assert len(turns.texts) == 60 and " " not in turns.texts[0]
    with pytest.raises(SteeringError, match="not in swe_Latn"):
        demo_prompts(["swe_Latn"])


def test_batches_pad_on_the_left_and_refuse_what_does_not_fit() -> None:
    lazy = LazyModel.of(tiny_model("llama"), tiny_tokenizer())
    (batch,) = batches(lazy, ["w1", "w1 w2 w3"], 2)
    assert batch.ids.tolist() == [[1, 1, 0, 4], [0, 4, 5, 6]] and batch.mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch.positions().tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    with pytest.raises(SteeringError, match=r"62 tokens and 3 to generate, the context has 64"):
        list(batches(lazy, [" ".join(["w1"] * 61)], 1, new_tokens=3))


# --- what must not go wrong -----------------------------------------------------------------------------------------


def test_a_bypassed_module_is_an_error_not_a_table() -> None:
    model: Any = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    lazy = LazyModel.of(model, tiny_tokenizer())
    with pytest.raises(DidNotHappenError, match="layer 0"):
        deactivate_stepwise(
            lazy, make_set({"fra_Latn": [(0, 1)]}), Prompts(("w1 w2",), "test"), ["fra_Latn"], Decoding(2)
        )
    assert all(not module._forward_hooks for module in model.modules())


def test_the_command_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("When it rains,\nWenn es regnet,\n")
    analysis.stepwise(
        model=str(resources.demo_model()),
        neurons=Path("demo"),
        out=tmp_path / "out",
        prompts=prompts,
        order="eng,deu",
        max_new_tokens=8,
        batch_size=2,
        device="cpu",
    )
    printed = capsys.readouterr().out
    assert "+ deu_Latn" in printed and f"wrote {tmp_path / 'out' / 'stepwise.png'}" in printed
    log = json.loads((tmp_path / "out" / "stepwise.log.json").read_text())
    assert [step["number"] for step in log["steps"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "swe"}, "not in the neuron set"),
        ({"prompts": Path("absent.txt")}, "cannot be read"),
        ({"neurons": Path("absent")}, "no such file"),
        ({"lid": "absent.bin"}, "no model file"),
    ],
)
def test_mistakes_are_refused_before_the_model_is_loaded(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(SteeringError, match=message):
        analysis.stepwise(
            **{"model": str(resources.demo_model()), "neurons": Path("demo"), "out": tmp_path} | arguments
        )
