"""Where the units are: the table against the probe, families outside it, the option, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.utils import simple_parse_args_string
from transformers import AutoConfig, AutoModelForCausalLM

from lm_eval_steering.architectures import (
    FAMILIES,
    ModelSites,
    Shape,
    discover,
    family_of,
    model_type_of,
    parse_sites,
    shape_of,
    sites_of,
    text_config_of,
)
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.architectures.weights import weights_digest, weights_sketch
from lm_eval_steering.errors import ArchitectureError, NeuronSetError, SteeringError
from lm_eval_steering.neurons.neuron_set import Provenance
from lm_eval_steering.neurons.rows import TokenRows
from lm_eval_steering.neurons.running import Batches, count_active
from lm_eval_steering.steering.attach import Steering, fitting_sites
from lm_eval_steering.steering.compiled import compile_intervention
from lm_eval_steering.steering.intervention import from_arguments
from tests.conftest import CONFIGS, GEMMA, GPT, LAYERS, TOKENS, UNITS, USUAL, make_set, tiny_model

IDS = torch.tensor([[0, 5, 6, 7, 8, 9]])
ROWS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [5], [9, 9, 3, 4], [20, 21], [30] * 9]
XGLM = {"d_model": 16, "ffn_dim": UNITS, "num_layers": LAYERS, "attention_heads": 2, "max_position_embeddings": 64}
# model_type -> config, activation and last linear layer inside a layer, gated; none of them is in the table.
UNKNOWN: dict[str, tuple[dict[str, Any], str, str, bool]] = {
    **{
        name: (USUAL, "mlp.act_fn", "mlp.down_proj", True)
        for name in ("granite", "stablelm", "seed_oss", "ernie4_5", "cohere2")
    },
    "helium": (GEMMA, "mlp.act_fn", "mlp.down_proj", True),
    "glm": (GEMMA, "mlp.activation_fn", "mlp.down_proj", True),
    "recurrent_gemma": (
        GEMMA
        | {"intermediate_size": 2 * UNITS, "lru_width": 16, "block_types": ["attention"] * LAYERS}
        | {"attention_window_size": 16},
        "mlp_block.act_fn",
        "mlp_block.down_proj",
        True,
    ),
    "nemotron": (USUAL, "mlp.act_fn", "mlp.down_proj", False),
    "persimmon": (USUAL, "mlp.act", "mlp.dense_4h_to_h", False),
    "gpt_bigcode": (GPT, "mlp.act", "mlp.c_proj", False),
    "xglm": (TOKENS | XGLM, "activation_fn", "fc2", False),
}
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "deepseek_v2", "deepseek_v3", "jamba", "llama4",
           "dbrx", "phimoe", "granitemoe", "ernie4_5_moe")  # fmt: skip
OPTION = "model.layers:mlp.act_fn:mlp.down_proj"


def build(name: str, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **config)).eval()


def gemma3(**changes: Any) -> Any:
    """The composite model, with a vision tower of as many layers as the text part has."""
    vision = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    return build("gemma3", {"text_config": GEMMA | changes, "vision_config": vision, "mm_tokens_per_image": 4})


def unknown_llama() -> Any:
    """A model of a family that no table has, with the modules of llama."""
    model = tiny_model("llama")
    model.config.model_type = "lama"
    return model


class Mixed(torch.nn.Module):
    """An MLP that calls itself a mixer, as a state-space block does."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mixer = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mixer(hidden)


class Several(torch.nn.Module):
    """The same MLP, or several, added up; draws a random number as well."""

    def __init__(self, *mlps: torch.nn.Module) -> None:
        super().__init__()
        self.first, self.last = mlps[0], mlps[-1]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.first(hidden) + self.last(hidden) + 0 * torch.rand(1)


def same(one: ModelSites, other: ModelSites) -> bool:
    return (
        one.decoder is other.decoder
        and (one.shape, one.gated) == (other.shape, other.gated)
        and all(
            (a.layer, id(a.activation), id(a.down)) == (b.layer, id(b.activation), id(b.down))
            for a, b in zip(one.layers, other.layers, strict=True)
        )
    )


def recorded(sites: ModelSites) -> np.ndarray:
    """(layer, unit) the same, as the recorder counts it, in padded batches through the decoder alone."""
    return count_active(sites, Batches(TokenRows.of(ROWS), [0], sites, batch_size=3))


def plain_loop(model: Any, sites: ModelSites) -> list[np.ndarray]:
    """layer -> (unit,) tokens with activation > 0, one row at a time through the whole model, head included."""
    counts = [np.zeros(sites.shape.width(layer), dtype=np.int64) for layer in range(LAYERS)]
    for row in ROWS:
        found: list[torch.Tensor] = []
        hooks = [
            site.activation.register_forward_hook(lambda _m, _i, out, found=found: found.append(out))
            for site in sites.layers
        ]
        with torch.no_grad():
            model(torch.tensor([[0, *row]]))
        for hook in hooks:
            hook.remove()
        for count, out in zip(counts, found, strict=True):
            np.add(count, (out.reshape(-1, len(count))[1:] > 0).sum(0).numpy(), out=count)
    return counts


# --- the table and the probe --------------------------------------------------------------------------------------


def test_the_probe_finds_what_the_table_says(family: str, model: torch.nn.Module) -> None:
    assert same(discover(model), sites_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_probe_works_in_other_dtypes(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    assert same(discover(model), sites_of(model))


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_family_outside_the_table_is_discovered_and_recorded(name: str) -> None:
    config, activation, down, gated = UNKNOWN[name]
    model = build(name, config)
    if name != "xglm":  # whose own code cannot mask in double precision
        model.double()
    assert name not in FAMILIES and family_of(model.config) is None
    sites = sites_of(model)
    assert sites.shape == shape_of(model.config) == Shape(LAYERS, UNITS)
    assert sites.gated is gated
    paths = {id(module): path for path, module in model.named_modules()}
    for number, site in enumerate(sites.layers):
        assert paths[id(site.activation)].endswith(f".{number}.{activation}")
        assert paths[id(site.down)].endswith(f".{number}.{down}")
    assert np.array_equal(recorded(sites), plain_loop(model, sites))


@pytest.mark.parametrize("name", ["granite", "glm", "gpt_bigcode", "xglm"])
@pytest.mark.parametrize("site", ["activation", "product"])
def test_a_discovered_family_is_steered_and_restored(name: str, site: str) -> None:
    model = build(name, UNKNOWN[name][0])
    with torch.no_grad():
        before = model(IDS).logits
        neurons = make_set({"fra_Latn": [(0, 1), (2, 3)], "deu_Latn": [(1, 1)]}, name)
        intervention = from_arguments({"language": "fra_Latn", "op": "add", "value": 3.0, "site": site})
        with Steering(sites_of(model), compile_intervention(intervention, neurons)) as steering:
            assert not torch.equal(model(IDS).logits, before)
            evidence = steering.evidence()
        assert torch.equal(model(IDS).logits, before)
    assert (evidence.forwards, evidence.fired) == (1, 2)


# --- the probe leaves no trace ------------------------------------------------------------------------------------


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = unknown_llama().train()
    model.model.layers[1].eval()
    calls: list[int] = []
    handles = [
        model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append(1)),
        model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
            lambda *_, **__: calls.append(2), with_kwargs=True
        ),
    ]
    modes = [module.training for module in model.modules()]
    hooks = [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in model.modules()]
    state = torch.random.get_rng_state()
    discover(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert hooks == [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in model.modules()]
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert torch.is_grad_enabled()
    assert calls == [], "hooks of others ran in the probe"
    model(IDS)
    assert sorted(calls) == [1, 2], "hooks of others do not run after the probe"
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_failing_probe_leaves_the_model_as_it_was() -> None:
    model = unknown_llama().train()
    model.model.layers[1].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ArchitectureError, match=r"'lama': the forward pass of 5 tokens .* failed: ZeroDivisionError"):
        discover(model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_random_numbers_of_the_model_are_given_back() -> None:
    model = unknown_llama()
    for layer in model.model.layers:
        layer.mlp = Several(layer.mlp)
    state = torch.random.get_rng_state()
    with pytest.raises(ArchitectureError, match=r"mlp\.first\.act_fn ran 2 times"):
        sites_of(model)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_attached_intervention_does_not_disturb_discovery() -> None:
    model, twin = unknown_llama(), tiny_model("llama")
    plan = compile_intervention(
        from_arguments({"language": "fra_Latn", "op": "add", "value": 3.0, "site": "product"}),
        make_set({"fra_Latn": [(0, 1)], "deu_Latn": [(1, 1)]}),
    )
    with Steering(sites_of(model), plan) as steering:
        assert len(sites_of(model).layers) == len(sites_of(twin).layers)
        assert steering.evidence().forwards == 0


def test_peft_models_are_probed_and_the_adapter_is_the_linear_layer() -> None:
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(target_modules=["down_proj", "up_proj", "gate_proj"], r=2, init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), adapters)
    assert same(discover(model.get_base_model()), sites_of(model))
    assert same(sites_of(model, OPTION), sites_of(model))


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_bypassed_activation_is_not_discovered() -> None:
    model = unknown_llama()
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    with pytest.raises(
        ArchitectureError, match=r"'lama' is not in the table.*layer 0 has none.*mlp\.act_fn ran 0 times.*sites="
    ):
        sites_of(model)
    with pytest.raises(
        ArchitectureError, match=rf"sites={OPTION}: layer 0: mlp\.act_fn was called 0 times, expected once"
    ):
        sites_of(model, OPTION)


def test_a_bypass_in_one_layer_is_named() -> None:
    model = unknown_llama()
    mlp = model.model.layers[2].mlp
    mlp.forward = lambda x: mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    with pytest.raises(
        ArchitectureError, match=r"layer 2 has none.*where layer 0 has mlp\.act_fn before mlp\.down_proj"
    ):
        sites_of(model)


def test_two_mlps_in_a_layer_are_listed_and_the_option_takes_one() -> None:
    model = unknown_llama()
    for layer in model.model.layers:
        layer.mlp = Several(layer.mlp, copy.deepcopy(layer.mlp))
    with pytest.raises(ArchitectureError, match=r"mlp\.first\.act_fn before .* and mlp\.last\.act_fn before"):
        sites_of(model)
    assert sites_of(model, "model.layers:mlp.last.act_fn:mlp.last.down_proj").shape == Shape(LAYERS, UNITS)


@pytest.mark.parametrize("in_table", [True, False])
def test_layers_that_share_one_activation_module_are_refused(in_table: bool) -> None:
    model = tiny_model("llama") if in_table else unknown_llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = model.model.layers[0].mlp.act_fn
    for override in (None, OPTION):
        with pytest.raises(ArchitectureError, match="the layers share one activation module"):
            sites_of(model, override)


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("granite", **USUAL))
    with pytest.raises(ArchitectureError, match=r"'granite': .* meta device"):
        sites_of(model)


def test_another_width_than_the_configs_is_refused() -> None:
    model = unknown_llama()
    model.config.intermediate_size = 32
    with pytest.raises(ArchitectureError, match=r"3 layers of 24 units at mlp.act_fn, by the config 3 .* 32 units"):
        sites_of(model)


def test_the_config_names_layers_of_different_widths() -> None:
    layers = {"num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS, "num_kv_shared_layers": 0}
    config = AutoConfig.for_model("gemma3n_text", **layers, intermediate_size=[24, 32, 24])
    assert shape_of(config) == Shape(LAYERS, 32, (24, 32, 24))
    assert [shape_of(config).width(layer) for layer in range(LAYERS)] == [24, 32, 24]
    config.intermediate_size = [24, 24, 24]
    assert shape_of(config) == Shape(LAYERS, UNITS)
    config.intermediate_size = [24, 24]
    with pytest.raises(ArchitectureError, match="gemma3n_text: 2 widths of the MLP for 3 layers"):
        shape_of(config)


DOUBLE_WIDE = CONFIGS["gemma4_text"] | {"use_double_wide_mlp": True, "num_kv_shared_layers": 1}


def test_layers_of_different_widths_are_found_recorded_and_steered() -> None:
    model = build("gemma4_text", DOUBLE_WIDE).double()
    sites = sites_of(model)
    assert sites.shape == shape_of(model.config) == Shape(LAYERS, 2 * UNITS, (UNITS, UNITS, 2 * UNITS))
    assert same(discover(model), sites)
    counts = recorded(sites)
    assert counts.shape == (LAYERS, 2 * UNITS)
    assert not counts[:2, UNITS:].any() and counts[2, UNITS:].any()
    expected = plain_loop(model, sites)
    assert all(np.array_equal(counts[layer, : len(units)], units) for layer, units in enumerate(expected))
    steered = replace(
        make_set({"fra_Latn": [(0, 1), (1, 23)], "deu_Latn": [(1, 1)]}, "gemma4_text"),
        provenance=Provenance("wide", "", "gemma4_text", LAYERS, 2 * UNITS, widths=(UNITS, UNITS, 2 * UNITS)),
    )
    wide = replace(
        steered, assignments=steered.assignments | {"fra_Latn": np.array([[0, 1], [2, 47]])}, calibrated=None
    )
    plan = compile_intervention(from_arguments({"language": "fra_Latn", "op": "add", "value": 3.0}), wide)
    with torch.no_grad():
        before = model(IDS).logits
        with Steering(fitting_sites(model, wide), plan) as steering:
            assert not torch.equal(model(IDS).logits, before)
            assert steering.evidence().fired == 2
        assert torch.equal(model(IDS).logits, before)
    with pytest.raises(NeuronSetError, match=r"3 layers of 24 units.*with 3 layers of 24 to 48 units"):
        fitting_sites(model, make_set({"fra_Latn": [(0, 1)]}, "gemma4_text"))


def test_an_activation_without_a_module_gets_no_advice_that_cannot_help() -> None:
    model = build("lfm2", USUAL | {"layer_types": ["full_attention"] * LAYERS, "block_auto_adjust_ff_dim": False})
    with pytest.raises(ArchitectureError, match=r"F\.silu.*`sites=` cannot help; use an implementation") as error:
        sites_of(model)
    assert "name it" not in str(error.value)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_a_deepseek_names_its_key_and_works_without_expert_layers(name: str) -> None:
    config = CONFIGS[name]
    with pytest.raises(ArchitectureError, match=rf"{name}: a mixture of experts \(n_routed_experts=4\)"):
        shape_of(AutoConfig.for_model(name, **config | {"first_k_dense_replace": 1}))
    assert shape_of(AutoConfig.for_model(name, **config)) == Shape(LAYERS, UNITS)


def test_a_granite_hybrid_with_one_expert_is_a_mixture() -> None:
    config = AutoConfig.for_model("granitemoehybrid", **CONFIGS["granitemoehybrid"] | {"num_local_experts": 1})
    with pytest.raises(ArchitectureError, match=r"a mixture of experts \(num_local_experts=1\)"):
        shape_of(config)


def test_a_config_that_does_not_say_its_shape_is_refused_before_loading() -> None:
    assert shape_of(AutoConfig.for_model("gpt_bigcode", **GPT | {"n_inner": None})) == Shape(LAYERS, 4 * 16)
    config = AutoConfig.for_model("bloom", **CONFIGS["bloom"])
    config.model_type = "bloomy"
    with pytest.raises(
        ArchitectureError, match=r"'bloomy' is not in the table.*number of MLP units.*ffn_dim.*FAMILIES"
    ):
        shape_of(config)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_is_refused_by_name_before_loading(name: str) -> None:
    config = AutoConfig.for_model(name)
    with pytest.raises(
        ArchitectureError, match=rf"^{name}(_text)?: a mixture of experts \(\w+=\d+\).*use a dense model$"
    ):
        shape_of(config)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_loaded_experts_are_refused_with_the_option_too(name: str) -> None:
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": UNITS}
    model = build(name, GEMMA | experts)
    for override in (None, "model.layers:mlp.experts.act_fn:mlp.gate"):
        with pytest.raises(ArchitectureError, match=rf"^{name}: a mixture of experts \(num_\w*experts=4\)"):
            sites_of(model, override)


def test_experts_that_the_config_does_not_count_are_seen_in_the_model() -> None:
    model = build("hunyuan_v1_moe", USUAL | {"num_experts": 1, "moe_topk": 1, "head_dim": 8})
    with pytest.raises(ArchitectureError, match=r"hunyuan_v1_moe: a mixture of experts \(modules .*experts"):
        sites_of(model)


def test_encoder_decoder_models_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="t5: an encoder-decoder model"):
        shape_of(AutoConfig.for_model("t5"))


# --- the option ---------------------------------------------------------------------------------------------------


def test_the_option_survives_model_args() -> None:
    assert simple_parse_args_string(f"pretrained=x,sites={OPTION},factor=3")["sites"] == OPTION
    assert str(parse_sites(OPTION)) == OPTION
    for wrong in ("model.layers", "model.layers:mlp.act_fn", "a:b:c:d", "a::c", "a:b=c:d", "a.:b:c", ""):
        with pytest.raises(ArchitectureError, match="expected three module paths joined by colons"):
            parse_sites(wrong)


def test_the_option_points_at_the_modules() -> None:
    model, opt = unknown_llama(), tiny_model("opt")
    assert same(sites_of(model, OPTION), discover(model))
    assert same(sites_of(opt, "model.decoder.layers:activation_fn:fc2"), sites_of(opt))


def test_the_option_finds_what_discovery_leaves_alone() -> None:
    model = unknown_llama()
    for layer in model.model.layers:
        layer.mlp = Mixed(layer.mlp)
    with pytest.raises(ArchitectureError, match="name it"):
        sites_of(model)
    sites = sites_of(model, "model.layers:mlp.mixer.act_fn:mlp.mixer.down_proj")
    assert sites.shape == Shape(LAYERS, UNITS) and sites.gated


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("layers:mlp.act_fn:mlp.down_proj", "list of layers: no module 'layers' in LlamaForCausalLM"),
        ("model:mlp.act_fn:mlp.down_proj", "model is a LlamaModel, expected a list of layers"),
        ("model.layers:mlp.act:mlp.down_proj", "activation of layer 0: no module 'mlp.act'"),
        ("model.layers:mlp.act_fn:mlp.down", "down projection of layer 0: no module 'mlp.down'"),
        ("model.layers:mlp.act_fn:mlp.up_proj", r"layer 0: the input of mlp.up_proj \(5, 16\) is neither the output"),
        ("model.layers:mlp.gate_proj:mlp.down_proj", "neither the output of mlp.gate_proj .* nor its product"),
        ("model.layers:mlp.up_proj:mlp.down_proj", "neither the output|no activation function of single units"),
        ("model.layers:input_layernorm:self_attn.q_proj", "input_layernorm is not an activation function"),
    ],
)
def test_a_wrong_option_is_refused_with_what_does_not_hold(option: str, message: str) -> None:
    with pytest.raises(ArchitectureError, match=f"^sites={option}: .*{message}" if "|" not in message else message):
        sites_of(unknown_llama(), option)


# --- composite models ---------------------------------------------------------------------------------------------


def test_gemma3_is_its_text_part() -> None:
    model = gemma3()
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert (model.config.model_type, model_type_of(model.config)) == ("gemma3", "gemma3_text")
    assert text_config_of(model.config) is model.config.text_config
    assert model_type_of(model.config.text_config) == "gemma3_text"
    assert shape_of(model.config) == Shape(LAYERS, UNITS)
    sites = sites_of(model)
    assert sites.decoder is model.model.language_model
    assert same(sites, discover(model))
    assert same(sites, sites_of(model, "model.language_model.layers:mlp.act_fn:mlp.down_proj"))


def test_gemma3_is_recorded_and_steered() -> None:
    model = gemma3().double()
    assert np.array_equal(recorded(sites_of(model)), plain_loop(model, sites_of(model)))
    neurons = make_set({"fra_Latn": [(0, 1), (2, 3)], "deu_Latn": [(1, 1)]}, "gemma3_text")
    plan = compile_intervention(from_arguments({"language": "fra_Latn", "op": "add", "value": 3.0}), neurons)
    with torch.no_grad():
        before = model(IDS).logits
        with Steering(sites_of(model), plan) as steering:
            assert not torch.equal(model(IDS).logits, before)
            assert (steering.evidence().forwards, steering.evidence().fired) == (1, 2)
        assert torch.equal(model(IDS).logits, before)


# --- what a sketch reads of weights that are no plain tensors ---------------------------------------------------------


class Int8(torch.Tensor):
    """Weights as whole numbers and a scale, behind a tensor that knows no operation but `dequantize`, as torchao's."""

    whole: torch.Tensor

    @staticmethod
    def __new__(cls, whole: torch.Tensor) -> Int8:
        made = torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=torch.float32)
        made.whole = whole
        return made

    def dequantize(self) -> torch.Tensor:
        return self.whole.float() / 64

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].whole)
        raise NotImplementedError(f"no implementation of {function}")


class Opaque(Int8):
    def dequantize(self) -> torch.Tensor:
        raise NotImplementedError("no dequantize here")


def with_weights(kind: type | None) -> torch.nn.Module:
    model = tiny_model("llama")
    for layer in model.model.layers:
        whole = (layer.mlp.up_proj.weight.data * 64).round().to(torch.int8)
        value = whole.float() / 64 if kind is None else kind(whole)
        layer.mlp.up_proj.weight = torch.nn.Parameter(value, requires_grad=False)
    return model


def test_tensor_subclasses_are_sampled_after_dequantising() -> None:
    plain, subclass = with_weights(None), with_weights(Int8)
    assert type(subclass.state_dict()["model.layers.0.mlp.up_proj.weight"]) is Int8
    assert weights_sketch(subclass) == weights_sketch(plain)
    assert weights_digest(subclass) == weights_digest(plain)
    with pytest.raises(ArchitectureError, match=r"up_proj.weight': a Opaque, whose values cannot be read \(no dequant"):
        weights_sketch(with_weights(Opaque))


def test_a_model_without_an_mlp_is_told_so() -> None:
    model = build("mamba", TOKENS | {"hidden_size": 16, "num_hidden_layers": LAYERS, "state_size": 4})
    with pytest.raises(ArchitectureError, match=r"hold no MLP.*state space") as error:
        sites_of(model)
    assert "F.silu" not in str(error.value)


@pytest.mark.parametrize(("name", "reason"), [("t5", "encoder-decoder model"), ("vit", "no causal language model")])
def test_a_model_that_is_no_decoder_is_refused_with_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    with pytest.raises(SteeringError, match=reason):
        _ = LazyModel(str(tmp_path)).model
