"""What cannot be written into weights is refused with the reason and the way out, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lm_eval_steering.errors import ArchitectureError, InterventionError, NeuronSetError, SteeringError
from lm_eval_steering.export import verify as reproduce
from lm_eval_steering.export.job import Job, export_checkpoint, export_lora, written_whole
from lm_eval_steering.export.layouts import as_llama
from lm_eval_steering.export.verify import Loader, VerificationError
from lm_eval_steering.lmeval.compat import attention_implementation
from lm_eval_steering.neurons.neuron_set import NeuronSet
from tests.conftest import Command, make_set
from tests.export.conftest import ASSIGNMENTS, job_of, neurons_of, save_model

Saved = Callable[[str], Path]
ADD = {"language": "fra_Latn", "op": "add"}
SCALE = {"language": "fra_Latn", "op": "scale", "factor": 2}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({**SCALE, "positions": "generated"}, "positions=generated acts on some tokens"),
        ({**ADD, "positions": "3:10"}, "positions=3:10 acts on some tokens"),
        ({**ADD, "value": "live_max"}, "value=live_max is a statistic of the current activations"),
        ({**SCALE, "preset": "+max", "op": None, "factor": None}, "value=live_max is a statistic"),
        ({"deactivate": "fra_Latn", "deactivate_to": "noise"}, "value=normal is drawn anew for every token"),
        ({**ADD, "site": "residual", "layers": "1"}, "site=residual edits the hidden states between decoder layers"),
    ],
)
@pytest.mark.parametrize("write", [export_checkpoint, export_lora])
def test_dynamic_interventions(
    arguments: dict[str, Any], reason: str, write: Callable[[Job], Any], saved: Saved, tmp_path: Path
) -> None:
    with pytest.raises(InterventionError, match=rf"step 1 cannot be written into weights: .*{reason}.*steered-hf"):
        write(job_of(saved("llama"), "llama", tmp_path / "out", **arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "cohere", "phi3", "mpt"])
def test_a_family_without_biases_says_what_it_can(family: str, saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=rf"{family}: .*no bias.*op=scale and deactivation .*can be exported"):
        export_checkpoint(job_of(saved(family), family, tmp_path / "out", **ADD))


def test_a_sliding_window_that_bites_is_not_llama(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "mistral", sliding_window=8)
    with pytest.raises(ArchitectureError, match=r"no sliding window .here 8 tokens of 64.; op=scale"):
        export_checkpoint(job_of(tmp_path / "model", "mistral", tmp_path / "out", **ADD))
    export_checkpoint(job_of(tmp_path / "model", "mistral", tmp_path / "out", **SCALE))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sliding_window"] == 8


def test_a_family_whose_logits_differ_as_llama(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(config: Any) -> Any:
        llama = as_llama(config)
        llama.rope_parameters = {"rope_type": "default", "rope_theta": 100.0}
        return llama

    job = job_of(saved("qwen2"), "qwen2", tmp_path / "out", **ADD)
    reproduce.refuse_unless_llama(job.loader.model().config)
    monkeypatch.setattr(reproduce, "as_llama", wrong)
    with pytest.raises(ArchitectureError, match=r"qwen2: exported as Llama, .* gives other logits"):
        export_checkpoint(job)


def test_other_weights_or_another_shape(saved: Saved, tmp_path: Path) -> None:
    own = neurons_of("llama")
    provenance = {**own.provenance.__dict__, "weights": (1.0,) * 256}
    stranger = NeuronSet(own.languages, own.assignments, type(own.provenance)(**provenance), own.calibrated)
    job = job_of(saved("llama"), "llama", tmp_path / "out", **SCALE)
    with pytest.raises(NeuronSetError, match="force=true"):
        export_checkpoint(Job(job.loader, stranger, SCALE, job.out, log=job.log))
    export_checkpoint(Job(job.loader, stranger, SCALE, job.out, force=True, log=job.log))
    with pytest.raises(NeuronSetError, match=r"the neuron set is for tiny .gpt2"):
        export_checkpoint(Job(job.loader, make_set(ASSIGNMENTS, "gpt2"), SCALE, tmp_path / "two", log=job.log))


def test_a_checkpoint_that_lacks_a_tensor_or_is_cut_short(saved: Saved, tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SteeringError, match=r"no tensor model.norm.weight in its files"):
        export_checkpoint(job_of(tmp_path / "model", "llama", tmp_path / "out", **SCALE))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SteeringError, match="not a whole checkpoint file"):
        export_checkpoint(job_of(tmp_path / "model", "llama", tmp_path / "out", **SCALE))
    assert not (tmp_path / "out").exists()


def test_a_quantised_checkpoint(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    path = tmp_path / "model" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ArchitectureError, match="quantised"):
        export_checkpoint(job_of(tmp_path / "model", "llama", tmp_path / "out", **SCALE))


@pytest.mark.parametrize(
    ("argument", "way_out"),
    [
        ("peft=a", "merge_and_unload"), ("gguf_file=m.gguf", "save_pretrained"), ("subfolder=a", "as --model"),
        ("load_in_4bit=True", "quantise the export"),
    ],
)  # fmt: skip
def test_model_arguments_that_make_other_weights(
    saved: Saved, tmp_path: Path, command: Command, argument: str, way_out: str
) -> None:
    steps = ["--neurons", "demo", "--language", "fra_Latn", "--op", "scale", "--factor", "2", "--as", "checkpoint"]
    given = ["export", "--model", saved("llama"), "--out", tmp_path / "out", "--model-args", argument]
    code, _, error = command(*given, *steps)
    assert code == 2 and argument.split("=", maxsplit=1)[0] in error and way_out in error
    assert not (tmp_path / "out").exists()


def test_model_arguments_that_leave_the_weights_reach_the_loading(saved: Saved, tmp_path: Path) -> None:
    loader = Loader(str(saved("llama")), device="cpu", arguments={"attn_implementation": "eager"})
    assert attention_implementation(loader.model().model.config) == "eager"
    with pytest.raises(SteeringError, match="unknown model argument 'attn'"):
        Loader(str(saved("llama")), arguments={"attn": "eager"}).model()


def test_what_is_there_stays_there(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(SteeringError, match=r"--out .*out: exists already"):
        export_checkpoint(job_of(saved("llama"), "llama", tmp_path / "out", **SCALE))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_an_export_that_is_not_the_steered_model_is_not_called_good(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval_steering.export import fold

    job = job_of(saved("llama"), "llama", tmp_path / "out", **ADD)
    job = Job(job.loader, job.neurons, ADD, job.out, prompts=("w1 w2 w3 w4", "w9 w8"), log=job.log)
    good = export_checkpoint(job, 8)[-1]
    assert good.startswith("verified: 2 prompts")
    monkeypatch.setattr(fold, "GATE_BIAS", 31.0)
    with pytest.raises(VerificationError, match=r"the export is NOT the steered model, it stays at .*two.partial"):
        export_checkpoint(Job(job.loader, job.neurons, ADD, tmp_path / "two", prompts=job.prompts, log=job.log), 8)
    assert not (tmp_path / "two").exists()


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError), written_whole(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        raise KeyError
    assert not (tmp_path / "out").exists()
    with written_whole(tmp_path / "out") as folder:
        (folder / "whole").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]
