"""Interventions against the published MLP code of Gurgurov et al. 2025, through a real LlamaMLP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lm_eval_steering.architectures import sites_of
from lm_eval_steering.neurons.neuron_set import SITES, NeuronSet, Provenance, Statistics
from lm_eval_steering.steering.attach import Steering
from lm_eval_steering.steering.compiled import compile_intervention
from lm_eval_steering.steering.intervention import build, from_arguments

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "gurgurov_mlp_interventions.json").read_text())
UNITS = 6


def model() -> LlamaForCausalLM:
    """One layer whose MLP computes silu(x[:6]) * x[6:], the golden file's layout."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=2 * UNITS, intermediate_size=UNITS, num_hidden_layers=1, num_attention_heads=1
    )
    made = LlamaForCausalLM(config).eval()
    mlp, eye = made.model.layers[0].mlp, torch.eye(UNITS)
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(torch.cat([eye, 0 * eye], 1))
        mlp.up_proj.weight.copy_(torch.cat([0 * eye, eye], 1))
        mlp.down_proj.weight.copy_(torch.cat([eye, 0 * eye], 0))
    return made


def neuron_set(case: dict[str, Any]) -> NeuronSet:
    """The activated units belong to French, the deactivated ones to German; the values are French statistics."""
    active, silent = case.get("activate", []), case.get("deactivate", [])
    union = sorted({*active, *silent})
    table = np.zeros((len(union), 2), dtype=np.float32)
    for unit, value in zip(active, case.get("values", []), strict=True):
        table[union.index(unit), 0] = value

    def rows(units: list[int]) -> np.ndarray:
        return np.array([[0, unit] for unit in units], dtype=np.int64).reshape(-1, 2)

    codes = ("fra_Latn", "deu_Latn")
    statistics = Statistics(rows(union), codes, {site: {"mean": table} for site in SITES})
    own = {"fra_Latn": rows(active), "deu_Latn": rows(silent)}
    return NeuronSet(codes, own, Provenance("golden", "", "llama", 1, UNITS), statistics)


def run(case: dict[str, Any], steps: list[dict[str, Any]], key: str) -> torch.Tensor:
    made = model()
    plan = compile_intervention(build({"steps": steps}), neuron_set(case))
    inputs = torch.tensor(GOLDEN[f"input_{key}"])
    with torch.no_grad(), Steering(sites_of(made), plan):
        return made.model.layers[0].mlp(inputs)[..., :UNITS]


def deactivate(value: float) -> dict[str, Any]:
    # The published code composes literally: a neuron in both sets is silenced first and then activated.
    return {"op": "set", "value": value, "languages": ["deu_Latn"], "deactivation": True, "keep_shared": False}


def activate(op: str, factor: float = 1.0) -> dict[str, Any]:
    return {"op": op, "value": "mean", "languages": ["fra_Latn"], "factor": factor}


CASES = {
    "none": [],
    "fallback_zero": [deactivate(0)],
    "fallback_negative": [deactivate(-1.5)],
    "gen_activate_additive": [activate("add", 2.5)],
    "gen_activate_replacement": [activate("set")],
    "gen_activate_diffmean": [activate("add")],  # the golden values are the differences already
    "gen_deactivate_activate_additive": [deactivate(-1.5), activate("add", 2.5)],
    "gen_deactivate_activate_replacement": [deactivate(-1.5), activate("set")],
    "gen_deactivate_activate_diffmean": [deactivate(-1.5), activate("add")],
    "flores_activate": [activate("add")],
}


@pytest.mark.parametrize("key", ["2d", "3d"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_published_ones(name: str, key: str) -> None:
    if key not in GOLDEN[name]:
        assert key == "3d"  # the published run has two-dimensional outputs alone for this method
        return
    assert torch.allclose(run(GOLDEN[name], CASES[name], key), torch.tensor(GOLDEN[name][key]), atol=2e-6)


@pytest.mark.parametrize("key", ["2d", "3d"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("fallback_zero", {"deactivate": "de"}),
        ("fallback_negative", {"deactivate": "de", "deactivate_to": -1.5}),
        ("fallback_mean", {"deactivate": "de", "deactivate_to": "live_mean"}),  # over all units of the same token
        ("fallback_mask", {"deactivate": "de", "deactivate_to": "mask"}),
        ("fallback_invert", {"deactivate": "de", "deactivate_to": "negate"}),
        ("gen_activate_additive", {"language": "fr", "preset": "additive", "factor": 2.5}),
        ("gen_activate_replacement", {"language": "fr", "preset": "replacement"}),
    ],
)
def test_the_papers_names_are_the_published_operations(name: str, arguments: dict[str, Any], key: str) -> None:
    if key in GOLDEN[name]:
        steps = [step.model_dump() for step in from_arguments(arguments).steps]
        assert torch.allclose(run(GOLDEN[name], steps, key), torch.tensor(GOLDEN[name][key]), atol=2e-6)


def test_diffmean_is_the_published_one() -> None:
    golden = GOLDEN["diffmean"]
    table = np.array(golden["avg"], dtype=np.float32)  # (layer, unit, language)
    codes = ("eng_Latn", "deu_Latn", "fra_Latn", "spa_Latn")
    union = np.array([[layer, unit] for layer in range(2) for unit in range(5)])
    statistics = Statistics(union, codes, {"activation": {"mean": table.reshape(10, 4)}})
    rows = np.array([[golden["layer"], unit] for unit in golden["neurons"]])
    code = codes[golden["target_language_index"]]
    assert np.allclose(statistics.lookup(rows, code, "activation", "diffmean"), golden["result"], atol=1e-6)
