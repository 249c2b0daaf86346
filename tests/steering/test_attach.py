"""Steering real transformers models: what changes, what must not, and the proof that it happened."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lm_eval_steering import steer
from lm_eval_steering.architectures import FAMILIES, sites_of
from lm_eval_steering.architectures.weights import weights_sketch
from lm_eval_steering.errors import ArchitectureError, DidNotHappenError, InterventionError, NeuronSetError
from lm_eval_steering.neurons.neuron_set import NeuronSet
from tests.conftest import CONFIGS, LAYERS, UNITS, make_set, tiny_model

IDS = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 10, 11, 12, 13, 14]])
STRONG = {"op": "add", "value": 3.0, "factor": 2.0}


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor = IDS, **inputs: torch.Tensor) -> torch.Tensor:
    return model(ids, **inputs).logits


@torch.no_grad()
def units(model: torch.nn.Module, site: str) -> torch.Tensor:
    """(layer, row, position, unit) as the rest of the model sees them."""
    found = []
    hooks = []
    for layer in sites_of(model).layers:
        if site == "activation":
            hooks.append(layer.activation.register_forward_hook(lambda _m, _i, out: found.append(out)))
        else:
            hooks.append(layer.down.register_forward_pre_hook(lambda _m, inputs: found.append(inputs[0])))
    logits(model)
    for hook in hooks:
        hook.remove()
    return torch.stack([out.reshape(*IDS.shape, UNITS) for out in found])


def test_every_family_of_the_table_is_tested(family: str) -> None:
    assert set(FAMILIES) == set(CONFIGS)
    assert tiny_model(family).config.model_type == family


@pytest.mark.parametrize("site", ["activation", "product"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"op": "scale", "factor": 2.5}, lambda a: 2.5 * a),
        ({"op": "scale", "factor": -1}, lambda a: -a),
        ({"op": "add", "value": 0.5, "factor": 3}, lambda a: a + 1.5),
        ({"op": "set", "value": 0.25, "factor": 2}, lambda a: torch.full_like(a, 0.5)),
    ],
)
def test_edited_activations_follow_the_definition(
    model: torch.nn.Module, neuron_set: NeuronSet, site: str, arguments: dict, expected
) -> None:
    before = units(model, site)
    layers, chosen = neuron_set.neurons("fra_Latn").T
    last = int(layers[0])  # later layers see another input; the first edited one is compared unit by unit
    with steer(model, neuron_set, "fra_Latn", site=site, **arguments):
        after = units(model, site)
    own = chosen[layers == last]
    assert torch.allclose(after[last][..., own], expected(before[last][..., own]), rtol=1e-6)
    others = [unit for unit in range(UNITS) if unit not in own]
    assert torch.equal(after[last][..., others], before[last][..., others]), "an untouched unit changed"


def test_a_calibrated_value_is_the_sets(model: torch.nn.Module, neuron_set: NeuronSet) -> None:
    before = units(model, "product")
    rows = neuron_set.neurons("deu_Latn")
    with steer(model, neuron_set, "deu_Latn", op="add", value="mean", factor=2, site="product"):
        after = units(model, "product")
    value = neuron_set.calibrated.lookup(rows, "deu_Latn", "product", "mean")[0]
    layer, unit = rows[0]
    assert torch.allclose(after[layer, ..., unit], before[layer, ..., unit] + 2 * value, rtol=1e-6)


@pytest.mark.parametrize("arguments", [{"op": "scale", "factor": 1}, {"op": "add", "value": "mean", "factor": 0}])
@pytest.mark.parametrize("site", ["activation", "product"])
def test_identity_is_bit_exact(model: torch.nn.Module, neuron_set: NeuronSet, arguments: dict, site: str) -> None:
    before = logits(model)
    with steer(model, neuron_set, "fra_Latn", site=site, **arguments):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_followed_and_identity_stays_exact(family: str, neuron_set: NeuronSet, dtype) -> None:
    model = tiny_model(family).to(dtype)
    before = logits(model)
    with steer(model, neuron_set, "fra_Latn", op="scale", factor=1):
        assert torch.equal(logits(model), before)
    with steer(model, neuron_set, "fra_Latn", **STRONG):
        assert logits(model).dtype == dtype
        assert not torch.equal(logits(model), before)


def test_detaching_restores_exactly_and_leaves_other_hooks(model: torch.nn.Module, neuron_set: NeuronSet) -> None:
    before, calls = logits(model), []
    foreign = sites_of(model).layers[0].activation.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(RuntimeError, match="in the middle"), steer(model, neuron_set, "fra_Latn", **STRONG):
        assert not torch.equal(logits(model), before)
        raise RuntimeError("in the middle")
    assert torch.equal(logits(model), before)
    assert len(calls) == 2
    foreign.remove()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_an_infinite_activation_is_overwritten_not_multiplied(family: str, neuron_set: NeuronSet) -> None:
    model = tiny_model(family)
    layer, unit = neuron_set.neurons("deu_Latn")[1]
    site = sites_of(model).layers[layer]

    def explode(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([int(unit)]), torch.inf)

    hook = site.activation.register_forward_hook(explode)
    with steer(model, neuron_set, deactivate="deu_Latn"):
        assert logits(model).isfinite().all()
    hook.remove()


@pytest.mark.parametrize("site", ["activation", "product"])
def test_a_row_does_not_depend_on_its_batch_padding_or_cache(
    model: torch.nn.Module, neuron_set: NeuronSet, site: str
) -> None:
    row = IDS[:1]
    pad = torch.ones(1, 3, dtype=torch.long)
    with steer(model, neuron_set, "fra_Latn", site=site, **STRONG):
        alone = logits(model, row)[0]
        in_batch = logits(model)[0]
        right = logits(model, torch.cat([row, pad], 1))[0, : row.shape[1]]
        mask = torch.cat([torch.zeros_like(pad), torch.ones_like(row)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        # BLOOM and MPT place tokens by distance and take no positions.
        placed = {"position_ids": positions} if "position_ids" in signature(model.forward).parameters else {}
        left = logits(model, torch.cat([pad, row], 1), attention_mask=mask, **placed)[0, pad.shape[1] :]
        with torch.no_grad():
            prefill = model(row[:, :4], use_cache=True)
            decode = [model(row[:, i : i + 1], past_key_values=prefill.past_key_values).logits for i in (4, 5)]
        cached = torch.cat([prefill.logits, *decode], 1)[0]
    for other in (in_batch, right, left, cached):
        assert torch.allclose(other, alone, rtol=1e-5, atol=1e-5)


def test_evidence_counts_what_happened(model: torch.nn.Module, neuron_set: NeuronSet) -> None:
    steering = steer(model, neuron_set, "fra_Latn", op="set", value=5.0)
    assert steering.evidence().forwards == 0
    with steering:
        logits(model)
        logits(model)
        with steering.suspended():
            logits(model)
        found = steering.evidence()
    assert (found.forwards, found.modules, found.fired, found.neurons) == (2, 2, 4, 3)
    assert found.positions == 2 * IDS.numel()
    assert 1 < found.largest_change < 20
    steering.reset_evidence()
    assert steering.evidence().fired == 0


def test_suspended_is_the_unsteered_model(model: torch.nn.Module, neuron_set: NeuronSet) -> None:
    before = logits(model)
    with steer(model, neuron_set, "fra_Latn", **STRONG) as steering, steering.suspended():
        assert torch.equal(logits(model), before)


def test_a_bypassed_module_is_an_error_not_a_score() -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[2].mlp
    mlp.forward = lambda x: mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    llama_set = make_set({"fra_Latn": [(2, 3)]})
    with (
        pytest.raises(DidNotHappenError, match="activation of layer 2 took place 0 times"),
        steer(model, llama_set, "fra_Latn", **STRONG),
    ):
        logits(model)


def test_another_width_is_refused(family: str, neuron_set: NeuronSet) -> None:
    model = tiny_model(family)
    site = sites_of(model).layers[0]
    hook = site.activation.register_forward_hook(lambda _m, _i, out: out[..., : UNITS // 2])
    with (
        pytest.raises(ArchitectureError, match="12 units where 24 were expected"),
        steer(model, neuron_set, "fra_Latn", **STRONG),
    ):
        logits(model)
    hook.remove()


def test_two_steered_models_do_not_disturb_each_other(family: str, neuron_set: NeuronSet) -> None:
    one, other = tiny_model(family), tiny_model(family)
    plain = logits(one)
    with steer(one, neuron_set, "fra_Latn", **STRONG):
        steered = logits(one)
        with steer(other, neuron_set, "deu_Latn", **STRONG):
            assert torch.equal(logits(one), steered)
        assert torch.equal(logits(other), plain)


def test_no_activation_is_kept_alive_and_no_gradient_needed(model: torch.nn.Module, neuron_set: NeuronSet) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    hook = (
        sites_of(model).layers[0].down.register_forward_pre_hook(lambda _m, inputs: seen.append(weakref.ref(inputs[0])))
    )
    with steer(model, neuron_set, "fra_Latn", **STRONG):
        assert not logits(model).requires_grad
        gc.collect()
        assert seen[0]() is None
    hook.remove()


def test_attaching_twice_and_other_models_are_refused(model: torch.nn.Module, neuron_set: NeuronSet) -> None:
    with (
        steer(model, neuron_set, "fra_Latn", **STRONG) as steering,
        pytest.raises(InterventionError, match="attached already"),
    ):
        steering.attach()
    with pytest.raises(NeuronSetError, match="the neuron set is for tiny"):
        steer(model, make_set({"fra_Latn": [(0, 0)]}, "rwkv"), "fra_Latn", **STRONG)


def test_a_set_found_in_other_weights_needs_force(family: str) -> None:
    model, own = tiny_model(family), make_set({"fra_Latn": [(0, 1)]}, family)
    found = replace(own, provenance=replace(own.provenance, weights=weights_sketch(model)))
    with steer(model, found, "fra_Latn", **STRONG):
        logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    with pytest.raises(NeuronSetError, match=r"found in tiny, whose weights are not those of this model.*force=true"):
        steer(model, found, "fra_Latn", **STRONG)
    steer(model, found, "fra_Latn", force=True, **STRONG)


def test_peft_models_are_steered() -> None:
    from peft import LoraConfig, get_peft_model

    neuron_set = make_set({"fra_Latn": [(0, 1)]})
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False))
    model.eval()
    assert len(sites_of(model).layers) == LAYERS
    before = logits(model)
    with steer(model, neuron_set, "fra_Latn", site="product", **STRONG):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


def test_layers_that_run_without_their_decoder_are_no_evidence() -> None:
    model = tiny_model("llama")
    with steer(model, make_set({"fra_Latn": [(0, 1)]}), "fra_Latn", **STRONG) as steering:
        model.model.layers[0].mlp(torch.zeros(1, 2, 16))
        with pytest.raises(DidNotHappenError, match="outside a forward pass"):
            steering.evidence()


def test_the_table_in_the_docs_is_the_table_in_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")
    ]
    expected = [
        [name, family.layers, family.activation, family.down, "yes" if family.gated else "no"]
        for name, family in FAMILIES.items()
    ]
    assert rows[1:] == expected  # the first one is the header


def test_what_others_hold_is_not_written_over() -> None:
    """The activation of these models gives its input back, which another hook has seen and a gradient may need."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **CONFIGS["llama"], hidden_act="linear")
    model = AutoModelForCausalLM.from_config(config).eval()
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _m, _i, out: held.append((out, out.clone())))
    plain = logits(model)
    with steer(model, make_set({"fra_Latn": [(0, 1), (2, 3)]}), "fra_Latn", **STRONG):
        steered = logits(model)
        loss = model(IDS).logits.sum()
    loss.backward()
    assert not torch.equal(steered, plain) and len(held) == 3
    assert all(torch.equal(out, copy) for out, copy in held)


@pytest.mark.parametrize("factor", [1e20, -1e25, 1e38])
@pytest.mark.parametrize("site", ["activation", "product"])
def test_an_overflow_inside_a_norm_is_an_overflow(
    model: torch.nn.Module, neuron_set: NeuronSet, site: str, factor: float
) -> None:
    with steer(model, neuron_set, "fra_Latn", op="add", factor=factor, site=site) as steering:
        logits(model)
        assert steering.overflowed()
        steering.reset_evidence()
        assert not steering.overflowed()


def test_a_strong_change_is_no_overflow(model: torch.nn.Module, neuron_set: NeuronSet) -> None:
    with steer(model, neuron_set, "fra_Latn", op="add", factor=1e6) as steering:
        assert logits(model).isfinite().all() and not steering.overflowed()
        assert steering.evidence().nonfinite == 0


def test_a_hidden_state_of_zeros_is_what_a_norm_makes_of_an_overflow(neuron_set_of_llama: NeuronSet) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[:, 3] = 1e9  # a small change of the unit, a huge one of the stream
    with steer(model, neuron_set_of_llama, "fra_Latn", op="set", value=1e12, layers="2", site="product") as steering:
        assert logits(model).isfinite().all()
        assert steering.evidence().nonfinite == 1 and steering.overflowed()


@pytest.fixture
def neuron_set_of_llama() -> NeuronSet:
    return make_set({"fra_Latn": [(0, 1), (0, 5), (2, 3)]})


def test_a_set_is_given_by_its_path_or_name_too(model: torch.nn.Module, neuron_set: NeuronSet, tmp_path: Path) -> None:
    neuron_set.save(tmp_path / "set.safetensors")
    for given in (tmp_path / "set.safetensors", str(tmp_path / "set.safetensors")):
        with steer(model, neuron_set, "fra_Latn", op="scale", factor=3):
            expected = logits(model)
        with steer(model, given, "fra_Latn", op="scale", factor=3):
            assert torch.equal(logits(model), expected)
    with pytest.raises(NeuronSetError, match="the neuron set is for demo-model"):
        steer(model, "demo", "fra_Latn", op="scale", factor=3)
    with pytest.raises(NeuronSetError, match="got dict, expected a NeuronSet, or the path or name"):
        steer(model, {}, "fra_Latn")  # type: ignore[arg-type]
