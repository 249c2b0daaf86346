"""A scaling as a LoRA: loaded by peft against hooks, factors that share a file, and what an adapter cannot hold."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lm_eval_steering.errors import InterventionError
from lm_eval_steering.export.job import export_lora
from lm_eval_steering.export.lora import CONFIG, PEFT_CONVERTS, WEIGHTS
from tests.conftest import CONFIGS
from tests.export.conftest import hooked, job_of, load, logits, share, silence

Saved = Callable[[str], Path]
FRENCH = {"language": "fra_Latn", "op": "scale"}
BOTH = {"language": "fra_Latn+deu_Latn", "op": "scale", "factor": 2.0, "deactivate": "eng_Latn"}


def adapted(model: Path, adapter: Path) -> Any:
    with silence():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        return PeftModel.from_pretrained(load(model), str(adapter)).eval()


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_an_adapter_is_what_the_hooks_do(family: str, saved: Saved, tmp_path: Path) -> None:
    if family in PEFT_CONVERTS:
        with pytest.raises(InterventionError, match="peft renames the modules"):
            export_lora(job_of(saved(family), family, tmp_path / "out", **BOTH))
        return
    export_lora(job_of(saved(family), family, tmp_path / "out", **BOTH))
    plain = load(saved(family))
    expected = hooked(plain, family, **BOTH)
    found = adapted(saved(family), tmp_path / "out")
    assert share(logits(found), expected) <= 1e-5
    assert share(logits(found.merge_and_unload()), expected) <= 1e-5
    assert share(expected, logits(plain)) > 0.001


def test_adapters_of_several_factors_share_one_file(saved: Saved, tmp_path: Path) -> None:
    export_lora(job_of(saved("llama"), "llama", tmp_path / "out", **FRENCH), factors=(-1.0, 0.1, 1.0, 3.0))
    folders = sorted((tmp_path / "out").iterdir())
    assert [folder.name for folder in folders] == ["factor--1", "factor-0.1", "factor-1", "factor-3"]
    assert len({(folder / WEIGHTS).stat().st_ino for folder in folders}) == 1
    configs = [json.loads((folder / CONFIG).read_text()) for folder in folders]
    assert [config.pop("lora_alpha") for config in configs] == pytest.approx([-4.0, -1.8, 0.0, 4.0])
    assert all(config == configs[0] for config in configs)
    plain = load(saved("llama"))
    for folder in folders:
        factor = float(folder.name.removeprefix("factor-"))
        found = logits(adapted(saved("llama"), folder))
        assert share(found, hooked(plain, "llama", **FRENCH, factor=factor)) <= 1e-5
        assert (factor == 1) == torch.equal(found, logits(plain))


def test_an_adapter_keeps_to_what_vllm_reads(saved: Saved, tmp_path: Path) -> None:
    export_lora(job_of(saved("llama"), "llama", tmp_path / "out", **FRENCH, factor=2))
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    # vllm/lora/peft_helper.py: one rank and one alpha for all, no bias, nothing saved beside, neither rsLoRA nor DoRA.
    assert (config["rank_pattern"], config["alpha_pattern"], config["bias"]) == ({}, {}, "none")
    assert not any(config[name] for name in ("modules_to_save", "use_rslora", "use_dora"))
    assert config["target_modules"] == ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]


def test_a_rank_above_the_limit_names_the_layers(saved: Saved, tmp_path: Path) -> None:
    job = job_of(saved("llama"), "llama", tmp_path / "out", language="fra_Latn+deu_Latn", op="scale", factor=2)
    with pytest.raises(InterventionError, match=r"layer 0 needs 2, layer 1 needs 2; export it --as checkpoint"):
        export_lora(job, largest_rank=1)
    assert not list(tmp_path.iterdir())
    export_lora(job, largest_rank=2)


@pytest.mark.parametrize(
    ("arguments", "factors", "message"),
    [
        ({"language": "fra_Latn", "op": "add"}, (), "a LoRA can scale units and not add to them"),
        ({**FRENCH, "factor": 2}, (2.0,), "--factor conflicts with --factors"),
        ({**FRENCH, "deactivate": "eng_Latn"}, (2.0,), "single step op=scale"),
        ({"language": "fra_Latn", "op": "add"}, (2.0,), "single step op=scale"),
    ],
)
def test_what_an_adapter_cannot_hold_is_refused(
    arguments: dict[str, Any], factors: tuple[float, ...], message: str, saved: Saved, tmp_path: Path
) -> None:
    with pytest.raises(InterventionError, match=message):
        export_lora(job_of(saved("llama"), "llama", tmp_path / "out", **arguments), factors)
    assert not list(tmp_path.iterdir())
