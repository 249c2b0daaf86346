"""The same model arguments in every command: a set that was found on an adapter fits that model without force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lm_eval_steering.architectures.loading import LazyModel, quantization_config
from lm_eval_steering.cli import app
from lm_eval_steering.cli.options import read_model_arguments
from lm_eval_steering.errors import NeuronSetError, SteeringError
from lm_eval_steering.neurons.neuron_set import NeuronSet
from tests.conftest import tiny_model, tiny_tokenizer


@pytest.fixture
def adapted(tmp_path: Path) -> Path:
    """A folder with a model, an adapter of it that changes its MLPs, and a text in two languages."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["down_proj", "gate_proj"], r=2, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    (tmp_path / "text").mkdir()
    generator = np.random.default_rng(0)
    for number, code in enumerate(("fra_Latn", "deu_Latn")):
        lines = [" ".join(f"w{i + 25 * number}" for i in generator.integers(0, 25, size=8)) for _ in range(6)]
        (tmp_path / "text" / f"{code}.txt").write_text("\n".join(lines))
    return tmp_path


def test_a_set_found_on_an_adapter_fits_that_model_alone(adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lm_eval_steering.lmeval.model import SteeredHFLM

    base, adapter, out = adapted / "base", adapted / "adapter", adapted / "set.safetensors"
    common = ["--model", base, "--model-args", f"peft={adapter}", "--device", "cpu"]
    find = ["find", *common, "--corpus", adapted / "text", "--languages", "fr,de", "--rate", "0.2", "--out", out]
    app([str(word) for word in [*find, "--rows", "sentences"]], standalone_mode=False)
    neurons = NeuronSet.load(out)
    assert len(neurons.neurons("fr"))
    steered = {"neurons": str(out), "language": "fr", "op": "scale", "factor": 2, "device": "cpu"}
    lm = SteeredHFLM(str(base), peft=str(adapter), **steered)
    assert lm.steering is not None
    with pytest.raises(NeuronSetError, match="force=true"):
        SteeredHFLM(str(base), **steered)
    app([str(word) for word in ["doctor", *common, "--neurons", out]], standalone_mode=False)
    assert "25 checks passed" in capsys.readouterr().out


def test_arguments_are_read_and_refused_by_name(adapted: Path) -> None:
    assert read_model_arguments("gguf_file=m.gguf,load_in_8bit=True,prefix_token_id=2,peft=a=b") == {
        "gguf_file": "m.gguf", "load_in_8bit": True, "prefix_token_id": 2, "peft": "a=b",
    }  # fmt: skip
    assert read_model_arguments('{"quantization_config": {"quant_method": "torchao"}}') == {
        "quantization_config": {"quant_method": "torchao"}
    }
    with pytest.raises(SteeringError, match="expected key=value joined by commas, got 'peft'"):
        read_model_arguments("peft")
    with pytest.raises(SteeringError, match="unknown model argument 'gguf'; did you mean 'gguf_file'"):
        LazyModel(str(adapted / "base"), arguments={"gguf": "m.gguf"})
    with pytest.raises(SteeringError, match=r"peft='.*nowhere'"):
        _ = LazyModel(str(adapted / "base"), arguments={"peft": str(adapted / "nowhere")}).model
    with pytest.raises(SteeringError, match="quantization_config conflicts with load_in_8bit"):
        quantization_config({"quantization_config": {}, "load_in_8bit": True}, "float32")
    assert quantization_config({"load_in_4bit": False}, "float32") is None


def test_a_home_folder_is_expanded(adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(adapted))
    assert LazyModel("~/base").name == "base"
    app(["select", "--help"], standalone_mode=False)
