"""The same model arguments in every command: a set that was found on an adapter fits that model without force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

from lm_eval_steering.architectures.loading import LazyModel, quantization_config
from lm_eval_steering.architectures.weights import same_weights, weights_digest, weights_sketch
from lm_eval_steering.cli import app
from lm_eval_steering.cli.options import read_model_arguments
from lm_eval_steering.errors import NeuronSetError, SteeringError
from lm_eval_steering.metrics.language_id import LanguageIdentifier
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.sweep.cells import declared_model, model_arguments
from lm_eval_steering.sweep.plan import build_plan
from lm_eval_steering.sweep.sweep_model import SweepModel
from tests.conftest import CONFIGS, make_set, tiny_model, tiny_tokenizer


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
    assert "26 checks passed" in capsys.readouterr().out


# --- The same loading in every command: adapters, GGUF files, weights quantised while they are loaded

INT8 = {"_type": "Int8WeightOnlyConfig", "_data": {}, "_version": 2}
BIG = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # bitsandbytes packs 64 values of a row
# Kind -> the library that it needs, and its model arguments.
LOADED: dict[str, tuple[str, dict[str, Any]]] = {
    "peft": ("peft", {"peft": "{folder}/adapter"}),
    "gguf": ("gguf", {"gguf_file": "model.gguf", "tokenizer": "{folder}/base"}),
    "8 bits": ("bitsandbytes", {"load_in_8bit": True}),
    "4 bits": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "4 bits as a config": (
        "bitsandbytes",
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ),
    "torchao": ("torchao", {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": INT8}}}),
}


def write_gguf(model: Any, path: Path) -> None:
    """A llama as llama.cpp's converter writes it: rows of queries and keys in the order of its rotary embeddings."""
    import gguf

    config, heads = model.config, model.config.num_attention_heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "layers": "blk",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        parts = [parts[0], parts[1], names[parts[2]]] if parts[0] == "layers" else parts
        writer.add_tensor(".".join([names[parts[0]], *parts[1:]]) + ".weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(params=list(LOADED))
def otherwise(
    request: pytest.FixtureRequest, adapted: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, Any]]:
    """A folder with a model and a text, and the model arguments of one kind of loading."""
    library, arguments = LOADED[request.param]
    pytest.importorskip(library)
    if library != "peft":
        monkeypatch.setitem(CONFIGS, "llama", CONFIGS["llama"] | BIG)
        model = tiny_model("llama")
        model.save_pretrained(adapted / "base")
    if library == "gguf":
        write_gguf(model, adapted / "base" / "model.gguf")
    filled = {
        key: value.format(folder=adapted) if isinstance(value, str) else value for key, value in arguments.items()
    }
    return adapted, filled


def test_every_command_loads_the_model_alike_and_a_set_found_on_it_fits(
    otherwise: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval_steering.lmeval.model import SteeredHFLM

    folder, arguments = otherwise
    base, out = folder / "base", folder / "set.safetensors"
    common = ["--model", base, "--model-args", json.dumps(arguments), "--device", "cpu"]
    text = ["--corpus", folder / "text", "--languages", "fr,de", "--rows", "sentences"]

    def verb(*words: Any) -> None:
        app([str(word) for word in words], standalone_mode=False)

    verb("find", *common, *text, "--rate", "0.2", "--out", out)
    verb("record", *common, *text, "--out", folder / "recording")
    verb("calibrate", out, *common, "--corpus", folder / "text", "--out", folder / "again.safetensors")
    prompts = folder / "prompts.txt"
    prompts.write_text("w1 w2 w3\nw4 w5\n")
    steps = ["--prompts", prompts, "--out", folder / "pictures"]
    verb("stepwise", *common, "--neurons", out, "--max-new-tokens", "2", *steps)
    verb("logit-lens", *common, "--neurons", out, "--language", "fr", "--op", "scale", "--factor", "2", *steps)
    steered = {"neurons": str(out), "language": "fr", "op": "scale", "factor": 3, "device": "cpu"}
    lm = SteeredHFLM(str(base), **arguments, **steered)  # without force
    assert lm.steering is not None
    lazy = LazyModel(str(base), device="cpu", arguments=arguments)
    assert same_weights(weights_sketch(lm.model), lazy.sketch) and len(lazy.sketch) == 256
    request = Instance("loglikelihood", {}, ("w1 w2", " w3"), 0)
    (score,) = lm.loglikelihood([request], disable_tqdm=True)
    lm.intervene()
    assert lm.loglikelihood([request], disable_tqdm=True)[0] != score
    if "peft" in arguments or "gguf_file" in arguments:  # quantised rows depend on the others of their batch
        verb("doctor", *common, "--neurons", out)
        assert "26 checks passed" in capsys.readouterr().out


def test_a_plan_takes_the_same_arguments(otherwise: tuple[Path, dict[str, Any]]) -> None:
    folder, arguments = otherwise
    base = str(folder / "base")
    lazy = LazyModel(base, device="cpu", arguments=arguments)
    make_set({"fra_Latn": [(0, 1), (2, 3)]}).save(folder / "set.safetensors")
    plan = build_plan(
        {"model": {"pretrained": base, **arguments}, "neurons": str(folder / "set.safetensors"), "languages": ["fr"],
         "interventions": [{"op": "scale", "factor": 2}], "tasks": ["t"]}
    )  # fmt: skip
    given = model_arguments(plan)
    assert declared_model(plan)["name"] == "base" and arguments.items() <= declared_model(plan).items()
    lm = SweepModel(given.pop("pretrained"), device="cpu", **given)
    assert weights_digest(lm.model) == weights_digest(lazy.model)


def test_a_gguf_file_is_the_model_that_it_was_made_of(adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setitem(CONFIGS, "llama", CONFIGS["llama"] | BIG)
    model = tiny_model("llama")
    write_gguf(model, adapted / "model.gguf")
    loaded = LazyModel(
        str(adapted), device="cpu", arguments={"gguf_file": "model.gguf", "tokenizer": str(adapted / "base")}
    )
    assert loaded.shape.units == BIG["intermediate_size"]
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"gguf_file": "none.gguf"}, "none.gguf|pip install gguf|gguf"),
        ({"peft": "{folder}/nowhere"}, "Can't find 'adapter_config.json'"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "only one can be used"),
        ({"quantization_config": {"quant_method": "nonsense"}}, "Unknown quantization type, got nonsense"),
        ({"quantization_config": "int8"}, "quantization_config='int8': expected a mapping"),
        ({"quantization_config": {"quant_method": "awq"}, "load_in_8bit": True}, "conflicts with load_in_8bit"),
        ({"attn_implementation": "flash_attention_9"}, "flash_attention_9"),
        ({"dtype": "float3"}, "float3.*expected auto, bfloat16"),
    ],
)
def test_what_cannot_be_loaded_so_is_one_line_in_every_loading(
    adapted: Path, arguments: dict[str, Any], reason: str
) -> None:
    from lm_eval_steering.lmeval.model import SteeredHFLM

    base = str(adapted / "base")
    filled = {
        key: value.format(folder=adapted) if isinstance(value, str) else value for key, value in arguments.items()
    }
    with pytest.raises(SteeringError, match=reason) as ours:
        SteeredHFLM(base, device="cpu", **filled)
    dtype = {"dtype": filled.pop("dtype")} if "dtype" in filled else {}
    with pytest.raises(SteeringError, match=reason) as theirs:
        _ = LazyModel(base, device="cpu", arguments=filled, **dtype).model
    assert "\n" not in f"{ours.value}{theirs.value}"


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
    from lm_eval_steering.lmeval.model import SteeredHFLM

    monkeypatch.setenv("HOME", str(adapted))
    lazy = LazyModel("~/base", device="cpu", arguments={"peft": "~/adapter", "tokenizer": "~/base"})
    assert lazy.name == "base"
    make_set({"fra_Latn": [(0, 1), (2, 3)]}).save(adapted / "set.safetensors")
    (adapted / "steps.yaml").write_text("- {op: scale, factor: 2, language: fra_Latn}\n")
    arguments = {"peft": "~/adapter", "tokenizer": "~/base", "neurons": "~/set.safetensors", "device": "cpu"}
    lm = SteeredHFLM("~/base", intervention="~/steps.yaml", force=True, **arguments)
    assert weights_digest(lm.model) == weights_digest(lazy.model) and lm.intervention.steps[0].factor == 2
    (adapted / "lid.bin").write_bytes(LanguageIdentifier().file.read_bytes())
    assert LanguageIdentifier.named("~/lid.bin").file == adapted / "lid.bin"
    app(["select", "--help"], standalone_mode=False)


def test_a_mistyped_folder_is_named_before_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "models" / "falcon").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("./models/falcn", str(tmp_path / "models/falcn"), "../x/models/falcn"):
        with pytest.raises(SteeringError, match="no such folder"):
            LazyModel(name)
    assert not caplog.records
    monkeypatch.chdir(tmp_path / "models")
    for where, name, meant in ((tmp_path / "models", "falcn", "falcon"), (tmp_path, "models/falcn", "models/falcon")):
        monkeypatch.chdir(where)
        caplog.clear()
        with pytest.raises(SteeringError, match=rf"no folder of that name either; did you mean '{meant}'"):
            LazyModel(name)  # may be an id of the hub, which is asked
        assert f"no such folder; did you mean '{meant}'?; looking for it on the hub" in caplog.text
