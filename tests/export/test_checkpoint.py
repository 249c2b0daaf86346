"""Hooks against the exported checkpoint: every family, any static composition."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lm_eval_steering.architectures import FAMILIES
from lm_eval_steering.errors import InterventionError
from lm_eval_steering.export.job import export_checkpoint
from lm_eval_steering.export.layouts import AS_LLAMA
from tests.conftest import CONFIGS, tiny_tokenizer
from tests.export.conftest import (
    ASSIGNMENTS,
    VARIANTS,
    exported,
    folded,
    hooked,
    job_of,
    load,
    logits,
    save_model,
    share,
    silence,
)

Saved = Callable[[str], Path]

SCALE_ONLY = {name for name, family in FAMILIES.items() if family.biases is None and name not in AS_LLAMA}
# Kept, lifted and silenced units at both sites: appended units, units in place, and biases at once.
MIXED = [
    {"language": "fra_Latn", "op": "scale", "factor": 2.0},
    {"language": "fra_Latn+deu_Latn", "op": "add", "value": 0.7},
    {"language": "eng_Latn", "op": "set", "value": -1.5},
    {"language": "deu_Latn", "op": "add", "value": "mean", "site": "product", "factor": 3.0},
]

SCALED = [
    {"language": "fra_Latn", "op": "scale", "factor": 2.0},
    {"language": "deu_Latn", "op": "scale", "factor": -0.5, "site": "product"},
    {"deactivate": "eng_Latn"},
]

_languages = st.lists(st.sampled_from(sorted(ASSIGNMENTS)), min_size=1, max_size=2, unique=True).map("+".join)
_numbers = st.floats(-3, 3, allow_nan=False, width=16)
_site = st.sampled_from(["activation", "product"])
_scale = st.fixed_dictionaries({"language": _languages, "op": st.just("scale"), "factor": _numbers, "site": _site})
_silence = st.fixed_dictionaries({"deactivate": _languages, "site": _site, "keep_shared": st.booleans()})
_add = st.fixed_dictionaries(
    {"language": _languages, "op": st.sampled_from(["add", "set"]), "factor": _numbers, "site": _site,
     "value": _numbers | st.sampled_from(["mean", "max"])}
)  # fmt: skip


def steps(variant: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    kinds = _scale | _silence if variant in SCALE_ONLY else _scale | _silence | _add
    return st.lists(kinds, min_size=1, max_size=4)


def test_families_without_biases_can_be_scaled_only() -> None:
    assert {"qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "cohere", "phi3", "mpt"} <= SCALE_ONLY


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_any_static_composition_is_what_the_hooks_do(family: str, saved: Saved) -> None:
    model = load(saved(family))

    @settings(max_examples=4, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(steps(family))
    def check(intervention: list[dict[str, Any]]) -> None:
        try:
            expected = hooked(model, family, intervention=intervention)
        except InterventionError:  # sites in the order that no forward pass has, or nothing left to deactivate
            assume(False)
        with TemporaryDirectory() as folder:
            found = logits(folded(saved(family), family, Path(folder) / "out", intervention))
        assert share(found, expected) <= 1e-5

    check()


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_export_loads_bit_equal_without_a_warning(variant: str, saved: Saved, tmp_path: Path) -> None:
    model, intervention = load(saved(variant)), SCALED if variant in SCALE_ONLY else MIXED
    with silence():
        exported(saved(variant), variant, tmp_path / "out", intervention=intervention)
        found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        again = AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2")
    assert not any(report.values()), report
    own = {name.replace("embed_out.", "lm_head."): tensor for name, tensor in found.state_dict().items()}
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, own[name.replace("embed_out.", "lm_head.")]), name
    expected = hooked(model, variant, intervention=intervention)
    assert share(logits(found.eval()), expected) <= 1e-5
    assert share(expected, logits(model)) > 0.01
    assert again["input_ids"] == AutoTokenizer.from_pretrained(saved(variant))("w1 w2")["input_ids"]


# --- half precision, shapes, files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "falcon", "gemma2"])
def test_in_bfloat16_the_export_is_as_near_as_the_model_is_to_its_float32(
    family: str, saved: Saved, tmp_path: Path
) -> None:
    half, full = load(saved(family), "bfloat16"), load(saved(family))
    intervention = SCALED if family in SCALE_ONLY else MIXED
    exported(saved(family), family, tmp_path / "out", dtype="bfloat16", intervention=intervention)
    found = load(tmp_path / "out")
    assert found.dtype == torch.bfloat16
    expected = hooked(full, family, intervention=intervention)
    rounding = share(hooked(half, family, intervention=intervention), expected)
    assert share(logits(found), expected) <= 2 * max(rounding, share(logits(half), logits(full)))


def test_a_bias_is_as_exact_as_the_model_that_is_loaded_not_as_its_file(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama", torch.float16)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    config.dtype = "float32"
    config.save_pretrained(tmp_path / "model")
    exported(tmp_path / "model", "llama", tmp_path / "out", intervention=MIXED)
    assert share(logits(load(tmp_path / "out")), hooked(load(tmp_path / "model"), "llama", intervention=MIXED)) <= 1e-5


def test_the_width_grows_in_multiples_and_only_where_units_are_appended(saved: Saved, tmp_path: Path) -> None:
    def width(name: str, multiple: int, **arguments: Any) -> int:
        export_checkpoint(job_of(saved("llama"), "llama", tmp_path / name, **arguments), multiple)
        return int(AutoConfig.from_pretrained(tmp_path / name).intermediate_size)

    assert width("add", 16, language="fra_Latn", op="add") == 32
    assert width("wide", 128, language="fra_Latn", op="add") == 128
    assert width("set", 16, language="fra_Latn", op="set", value=3) == 24
    assert width("product", 16, language="fra_Latn", op="add", site="product") == 24


def test_shards_are_read_and_written_one_by_one(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    whole = load(tmp_path / "model")
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    tiny_tokenizer().save_pretrained(tmp_path / "sharded")
    export_checkpoint(job_of(tmp_path / "sharded", "llama", tmp_path / "out", intervention=MIXED), 8, 8000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert share(logits(load(tmp_path / "out")), hooked(whole, "llama", intervention=MIXED)) <= 1e-5


def test_a_checkpoint_of_torch_save_without_the_base_models_prefix(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    weights = load_file(saved("gpt2") / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    torch.save(old | {"h.0.attn.masked_bias": torch.ones(1)}, tmp_path / "old" / "pytorch_model.bin")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved("gpt2") / name, tmp_path / "old" / name)
    exported(tmp_path / "old", "gpt2", tmp_path / "out", intervention=MIXED)
    assert share(logits(load(tmp_path / "out")), hooked(load(saved("gpt2")), "gpt2", intervention=MIXED)) <= 1e-5
