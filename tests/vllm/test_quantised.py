"""Quantised weights: int8 with activations that are quantised at each linear layer, which vLLM runs on CPU.

Around the MLP's activation everything is floating point, so an intervention is what it is in the whole model. The whole
model here is the one of the rounded weights, under `steered-hf`; what differs is the rounding of activations to 8 bits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_eval_steering.errors import NeuronSetError
from lm_eval_steering.lmeval.model import SteeredHFLM
from tests.vllm.conftest import MODES, demo_set, running, save_tiny, tiny_set, words

STRONG: dict[str, Any] = {"language": "fra_Latn", "op": "add", "value": 2.0, "factor": 2.0}
SCHEME = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
        }
    },
}  # fmt: skip


def quantised(folder: Path) -> tuple[str, str, str]:
    """Folders of a tiny Llama in int8, of the same weights in float32, and of the tokenizer."""
    pretrained, tokenizer = save_tiny(folder, "llama")
    stored: dict[str, torch.Tensor] = {}
    rounded: dict[str, torch.Tensor] = {}
    for name, weight in load_file(Path(pretrained) / "model.safetensors").items():
        stored[name] = rounded[name] = weight
        if name.endswith("proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            stored[name] = (weight / scale).round().clamp(-127, 127).to(torch.int8)
            stored[name.replace(".weight", ".weight_scale")] = scale
            rounded[name] = stored[name].float() * scale
    for kind, tensors in (("int8", stored), ("rounded", rounded)):
        shutil.copytree(pretrained, folder / kind)
        save_file(tensors, folder / kind / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "int8" / "config.json").read_text())
    (folder / "int8" / "config.json").write_text(json.dumps(config | {"quantization_config": SCHEME}))
    return str(folder / "int8"), str(folder / "rounded"), tokenizer


def shifts(lm: Any, pretrained: str) -> list[float]:
    """What an intervention adds to each log-likelihood, in nats."""
    lm.intervene()
    before = lm.loglikelihood(words(), disable_tqdm=True)
    lm.intervene(tiny_set(pretrained, "llama"), **STRONG)
    after = lm.loglikelihood(words(), disable_tqdm=True)
    return [one[0] - other[0] for one, other in zip(after, before, strict=True)]


def test_int8_weights_are_steered(vllm: None, tmp_path: Path) -> None:
    pretrained, rounded, tokenizer = quantised(tmp_path)
    expected = shifts(SteeredHFLM(rounded, tokenizer=tokenizer, dtype="float32"), rounded)
    with running("steered", MODES["eager"], pretrained, tokenizer=tokenizer, max_model_len=64, dtype="bfloat16") as lm:
        found = shifts(lm, rounded)
        evidence = lm.steering.evidence()
        lm.intervene(tiny_set(rounded, "llama"), language="fra_Latn", op="scale", factor=1)
        both = lm.loglikelihood(words(), disable_tqdm=True)
        lm.intervene()
        assert lm.loglikelihood(words(), disable_tqdm=True) == both, "an identity is exact"
    assert max(expected) > 1
    assert found == pytest.approx(expected, abs=0.05)
    assert evidence.positions == evidence.asked > 0 and evidence.neurons == 3


def test_a_set_of_the_whole_weights_is_refused_unless_it_is_forced(vllm: None, tmp_path: Path) -> None:
    """Before an engine starts: quantised weights have no sketch that could be compared."""
    from lm_eval_steering.vllm.weights import checkpoint_weights, refuse_other_weights

    pretrained, _, _ = quantised(tmp_path)
    weights = checkpoint_weights(pretrained, {})
    assert not weights.sketch and weights.why
    with pytest.raises(NeuronSetError, match="cannot be compared with those that the neuron set was found in"):
        refuse_other_weights(demo_set(), weights, "a quantised model", None)
