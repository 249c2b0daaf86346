"""The doctor on real models: all families pass, and a model that is broken on purpose fails by name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lm_eval_steering import resources
from lm_eval_steering.analysis.checks import Bench, Check, random_neurons, tolerance
from lm_eval_steering.analysis.doctor import examine, passed, plain_text, report, rich_table, summary
from lm_eval_steering.architectures import Shape, sites_of
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.architectures.weights import weights_sketch
from lm_eval_steering.errors import NeuronSetError
from lm_eval_steering.neurons.neuron_set import NeuronSet
from tests.conftest import LAYERS, UNITS, make_set, tiny_model, with_hidden_states

silu = nn.functional.silu


def failed(found: list[Check]) -> list[Check]:
    return [check for check in found if not check.passed]


def test_every_family_passes_with_random_neurons(model: nn.Module, family: str) -> None:
    found = examine(model)
    assert failed(found) == []
    assert len(found) == 26
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_a_calibrated_set_passes_and_its_mean_is_checked_too(
    family: str, model: nn.Module, neuron_set: NeuronSet
) -> None:
    if family == "gemma4_text":  # in float32 the strong edit rounds by 2.2e-5 of the largest logit in this tiny model
        model = model.double()
    assert failed(examine(model, neuron_set)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt2", "bloom", "opt"])
def test_other_dtypes_pass_within_their_tolerance(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name).to(dtype)
    found = failed(examine(model))
    eager = name == "gemma2" and model.config._attn_implementation == "eager"  # from transformers 5.21 on
    if dtype is torch.float64 and (eager or name == "bloom"):
        # transformers masks with the least float64 and takes the softmax in float32: a padded row gives NaN.
        assert {check.name for check in found} == {"left padding", "left padding, live statistic"}
        assert all(check.detail == "the unsteered model: inf" for check in found)
    else:
        assert found == []
    assert tolerance(torch.float64) == tolerance(torch.float32) == 1e-5 < tolerance(torch.float16) < 0.01


def bypassed(layer: int = 2) -> Any:
    """A Llama one of whose MLPs computes its activation without the module, as a fused kernel would."""
    model: Any = tiny_model("llama")
    mlp = model.model.layers[layer].mlp
    mlp.forward = lambda x: mlp.down_proj(silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return model


def test_a_bypassed_activation_module_is_named() -> None:
    found = failed(examine(bypassed()))
    assert "model.layers.2.mlp.act_fn ran 0 times" in found[0].detail
    assert "model.layers.2.mlp.act_fn is bypassed" in found[1].detail
    assert "layers.1" not in found[0].detail + found[1].detail
    assert not passed(found)


def test_a_module_that_runs_in_vain_is_named_too() -> None:
    model: Any = tiny_model("llama")
    mlp = model.model.layers[1].mlp

    def forward(x: torch.Tensor) -> torch.Tensor:
        gate = mlp.gate_proj(x)
        mlp.act_fn(gate)  # called, so counting alone sees nothing
        return mlp.down_proj(silu(gate) * mlp.up_proj(x))

    mlp.forward = forward
    (found,) = failed(examine(model))
    assert found.name == "the MLP uses what its activation module returns"
    assert "model.layers.1.mlp.act_fn is bypassed" in found.detail


def test_a_bypassed_last_linear_layer_is_named() -> None:
    model: Any = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)
    assert "model.layers.0.mlp.down_proj ran 0 times" in failed(examine(model))[0].detail


def test_a_module_that_runs_twice_is_named() -> None:
    model: Any = tiny_model("llama")
    mlp, once = model.model.layers[1].mlp, model.model.layers[1].mlp.forward
    mlp.forward = lambda x: (once(x), once(x))[1]
    assert "model.layers.1.mlp.act_fn ran 2 times" in failed(examine(model))[0].detail


def test_a_model_that_depends_on_its_batch_fails_and_says_that_it_does_so_unsteered() -> None:
    model: Any = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda _m, _i, out: out + 0.01 * out.mean(0, keepdim=True))
    found = {check.name: check for check in failed(examine(model))}
    assert "the unsteered model: " in found["a row beside other rows"].detail
    assert "scale by 1 is bit-equal to no intervention" not in found


def test_a_model_with_an_internal_state_fails_the_bit_equal_checks() -> None:
    model: Any = tiny_model("llama")
    calls = [0]

    def drift(_m: nn.Module, _i: Any, out: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return out + 1e-3 * calls[0]

    model.lm_head.register_forward_hook(drift)
    names = {check.name for check in failed(examine(model))}
    assert {"scale by 1 is bit-equal to no intervention", "detaching restores the model"} <= names


def test_a_wrong_edit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An intervention that edits one unit too many, as a hook with a wrong index would."""
    model: Any = tiny_model("llama")
    own = with_hidden_states(make_set({"fra_Latn": [(1, 3)]}, calibrated=False))
    more = with_hidden_states(make_set({"fra_Latn": [(1, 3), (1, 4)]}, calibrated=False))
    from lm_eval_steering.analysis import checks as bench

    real = bench.steer

    def off_by_one(model: Any, neuron_set: Any, *rest: Any, **named: Any) -> Any:
        return real(model, more if neuron_set is own else neuron_set, *rest, **named)

    monkeypatch.setattr(bench, "steer", off_by_one)
    names = {check.name for check in failed(examine(model, own))}
    assert names == {"only chosen units and layers change"}


def test_a_wrong_value_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval_steering.analysis import checks as bench

    real = bench.steer

    def off_by_little(*given: Any, **named: Any) -> Any:
        if named.get("factor") not in {None, 0, 1}:
            named["factor"] *= 1.001
        return real(*given, **named)

    monkeypatch.setattr(bench, "steer", off_by_little)
    names = {check.name for check in failed(examine(tiny_model("llama")))}
    assert names == {
        "activations follow the definition", "products follow the definition", "hidden states follow the definition",
    }  # fmt: skip


def test_a_model_whose_units_are_not_found_has_this_check_alone() -> None:
    model: Any = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = model.model.layers[0].mlp.act_fn
    (found,) = examine(model)
    assert not found.passed and "share one activation module" in found.detail


def test_a_set_of_another_model_or_without_neurons_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(NeuronSetError, match="the neuron set is for tiny"):
        examine(model, make_set({"fra_Latn": [(0, 1)]}, "gpt2"))
    with pytest.raises(NeuronSetError, match="no language of the neuron set has neurons"):
        examine(model, make_set({"fra_Latn": []}))


def test_random_neurons_are_seeded_and_leave_layers_out() -> None:
    one, same, other = (random_neurons(Shape(6, 500), "llama", seed) for seed in (0, 0, 1))
    assert one.content_hash() == same.content_hash() != other.content_hash()
    assert set(one.neurons("eng_Latn")[:, 0]) == set(range(6))
    assert set(one.neurons("fra_Latn")[:, 0]) == {0, 2, 4}
    assert np.all(np.bincount(one.neurons("eng_Latn")[:, 0]) == 5)


def test_rows_are_seeded_ordinary_tokens() -> None:
    model = tiny_model("llama")
    bench = Bench(model, make_set({"fra_Latn": [(0, 1)]}), sites_of(model))
    assert [len(row) for row in bench.rows] == [12, 9, 7, 12]
    assert not set(torch.cat(bench.rows).tolist()) & {0, 1}, "BOS or padding among them"
    again = Bench(model, bench.neurons, bench.sites).rows
    assert all(torch.equal(one, other) for one, other in zip(bench.rows, again, strict=True))


def test_the_table_is_plain_text_or_rich_and_says_an_error_once() -> None:
    from rich.console import Console

    found = examine(bypassed())
    text = plain_text(found)
    assert "\x1b" not in text and text.endswith(summary(found))
    assert text.count("took place 0 times") == 1 and "the same error as above" in text
    assert len({line.index("MLP") for line in text.splitlines() if line.startswith("pass  the units")}) == 1
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(rich_table(found))
    shown = console.export_text()
    assert "FAIL" in shown and "model.layers.2.mlp.act_fn ran 0 times" in shown


def test_the_report_holds_results_model_set_and_versions() -> None:
    model = LazyModel.of(tiny_model("llama"), None)
    content = json.loads(json.dumps(report(examine(model.model), model, None, 7)))
    assert content["passed"] and content["neurons"] == {"random": True, "seed": 7}
    assert content["model"]["layers"] == LAYERS and content["model"]["units"] == UNITS
    assert content["checks"][1]["found"] == "9 of 9 modules"


# --- the real command -----------------------------------------------------------------------------------------------

_COMMAND = """
import sys
from lm_eval_steering import cli
BEFORE
sys.argv = ["lm-eval-steering", *ARGUMENTS]
cli.main()
"""
_BYPASS = """
import torch
from transformers.models.llama.modeling_llama import LlamaMLP
LlamaMLP.forward = lambda self, x: self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
"""


def command(*arguments: Any, before: str = "") -> subprocess.CompletedProcess[str]:
    text = _COMMAND.replace("ARGUMENTS", repr([str(argument) for argument in arguments])).replace("BEFORE", before)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)


def test_the_command_passes_on_the_demo_model(tmp_path: Path) -> None:
    demo = resources.demo_model()
    found = command("doctor", "--model", demo, "--neurons", "demo", "--device", "cpu", "--json", tmp_path / "d.json")
    assert found.returncode == 0, found.stderr
    assert "checks passed" in found.stdout and "FAIL" not in found.stdout and "\x1b" not in found.stdout
    content = json.loads((tmp_path / "d.json").read_text())
    assert content["passed"] and content["neurons"] == NeuronSet.load("demo").content_hash()


def test_the_command_exits_with_1_and_names_the_bypassed_module(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    found = command("doctor", "--model", tmp_path / "tiny", "--device", "cpu", before=_BYPASS)
    assert found.returncode == 1, found.stderr
    assert "model.layers.0.mlp.act_fn ran 0 times" in found.stdout
    assert "Traceback" not in found.stderr


def test_a_set_of_another_model_is_refused_before_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval_steering.cli import app

    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(NeuronSetError, match="the neuron set is for demo-model"):
        app(["doctor", "--model", str(tmp_path / "tiny"), "--neurons", "demo"], standalone_mode=False)
    wrong = make_set({"fra_Latn": [(0, 1)]})
    replace(wrong, provenance=replace(wrong.provenance, units=UNITS + 1)).save(tmp_path / "wide.safetensors")
    with pytest.raises(NeuronSetError, match="25 units"):
        app(
            ["doctor", "--model", str(tmp_path / "tiny"), "--neurons", str(tmp_path / "wide.safetensors")],
            standalone_mode=False,
        )


def test_a_model_that_breaks_inside_a_check_gets_its_whole_table() -> None:
    model: Any = tiny_model("llama")
    forward = model.forward

    def no_cache(*given: Any, **named: Any) -> Any:
        if named.get("past_key_values") is not None:
            raise RuntimeError("this model keeps no cache\nand says so in two lines")
        return forward(*given, **named)

    model.forward = no_cache
    found = examine(model)
    assert len(found) == 26
    assert {(check.found, check.detail) for check in failed(found)} == {("RuntimeError", "this model keeps no cache")}


def test_the_random_set_has_the_models_sketch(caplog: pytest.LogCaptureFixture) -> None:
    examine(tiny_model("llama"))
    assert "no sketch" not in caplog.text


def test_a_set_of_other_weights_is_refused_unless_forced() -> None:
    model = tiny_model("llama")
    found = make_set({"fra_Latn": [(0, 1)]})
    other = replace(found, provenance=replace(found.provenance, weights=(0.5,) * len(weights_sketch(model))))
    with pytest.raises(NeuronSetError, match=r"--force of doctor"):
        examine(model, other)
    assert all(check.passed for check in examine(model, other, force=True))
