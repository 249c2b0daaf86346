"""Tiny models of every family, built here, and the shared data folder where it is at hand."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before anything imports them: no network, no threads that fight over two cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lm_eval_steering import cli
from lm_eval_steering.neurons.neuron_set import SITES, NeuronSet, Provenance, Statistics, union_of

# A busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

LAYERS, UNITS, VOCABULARY = 3, 24, 60
SHARED = Path(os.environ.get("LM_EVAL_STEERING_SHARED", Path(__file__).parents[2] / "shared"))


TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
USUAL: dict[str, Any] = {
    **TOKENS, "hidden_size": 16, "intermediate_size": UNITS, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
GEMMA = USUAL | {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
GPT = {**TOKENS, "n_positions": 64, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_inner": UNITS}
FOUR_TIMES = {**TOKENS, "n_layers": LAYERS, "n_heads": 2, "initializer_range": 0.3}  # of a hidden size of UNITS / 4
FULL_ATTENTION = ["full_attention"] * LAYERS
SMALL_GEMMA = {
    "layer_types": FULL_ATTENTION, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
LINEAR_ATTENTION = {
    "head_dim": 8, "layer_types": ["linear_attention", "full_attention", "full_attention"], "num_experts": 0,
    "mlp_only_layers": [0, 1, 2], "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
DENSE_DEEPSEEK = {
    "first_k_dense_replace": LAYERS, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 1,
    "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # not scaled from 8,192 tokens
CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "olmo2", "cohere", "phi3", "phi", "starcoder2", "gpt_neox"), USUAL),
    **dict.fromkeys(("qwen3", "gemma"), USUAL | {"head_dim": 8}),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    "gpt2": GPT | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_neo": USUAL | {"num_layers": LAYERS, "num_heads": 2, "attention_types": [[["global"], LAYERS]]},
    "bloom": FOUR_TIMES | {"hidden_size": UNITS // 4, "n_layer": LAYERS, "n_head": 2},
    "mpt": FOUR_TIMES | {"d_model": UNITS // 4, "max_seq_len": 64},
    "falcon": USUAL | {"ffn_hidden_size": UNITS, "alibi": False},
    "opt": USUAL | {"ffn_dim": UNITS, "word_embed_proj_dim": 16, "dropout": 0.0},
    **dict.fromkeys(("arcee", "jais2", "nanochat", "olmo3", "smollm3"), USUAL),
    "apertus": USUAL | PLAIN_ROPE,
    **dict.fromkeys(("hunyuan_v1_dense", "ministral", "ministral3"), USUAL | {"head_dim": 8}),
    "cwm": USUAL | {"head_dim": 8} | PLAIN_ROPE,
    "exaone4": USUAL | {"sliding_window": 16, "layer_types": FULL_ATTENTION},
    "vaultgemma": GEMMA,
    "glm4": {key: value for key, value in GEMMA.items() if key != "sliding_window"},  # its layers have none
    "gemma3n_text": GEMMA | SMALL_GEMMA | {
        "intermediate_size": [UNITS] * LAYERS, "altup_num_inputs": 2, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gemma4_text": GEMMA | SMALL_GEMMA | {"global_head_dim": 8},
    **dict.fromkeys(("qwen3_5_text", "qwen3_next"), USUAL | LINEAR_ATTENTION),
    "falcon_h1": USUAL | {
        "mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 8, "mamba_n_groups": 1,
        "mamba_chunk_size": 8, "head_dim": 8,
    },
    "llama4_text": USUAL | {
        "head_dim": 8, "intermediate_size_mlp": UNITS, "moe_layers": [], "layer_types": FULL_ATTENTION,
    },
    "granitemoehybrid": USUAL | {
        "shared_intermediate_size": UNITS, "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 4,
        "layer_types": ["attention"] * LAYERS,
    },
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), USUAL | DENSE_DEEPSEEK),
}  # fmt: skip


def tiny_model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **CONFIGS[family])).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level: `<s>`, `<pad>`, `<unk>`, then w0, w1, ...; adds BOS."""
    vocabulary = {"<s>": 0, "<pad>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(VOCABULARY - 3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<pad>")


def make_set(
    assignments: dict[str, list[tuple[int, int]]], architecture: str = "llama", seed: int = 0, calibrated: bool = True
) -> NeuronSet:
    """A neuron set of the tiny models, with arbitrary statistics."""
    rows = {code: np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2) for code, pairs in assignments.items()}
    union = union_of(list(rows.values()))
    generator = np.random.default_rng(seed)
    values = {
        site: {
            name: generator.normal(size=(len(union), len(rows))).astype(np.float32)
            for name in ("mean", "sentence_mean", "median", "max", "p10")
        }
        for site in SITES
    }
    return NeuronSet(
        tuple(rows),
        rows,
        Provenance("tiny", "", architecture, LAYERS, UNITS),
        Statistics(union, tuple(rows), values) if calibrated else None,
    )


def hidden_size(family: str) -> int:
    """Dimensions of the hidden states that a layer of a tiny model returns; two streams of 16 in Gemma 3n."""
    return {"bloom": UNITS // 4, "mpt": UNITS // 4, "gemma3n_text": 32}.get(family, 16)


def with_hidden_states(neuron_set: NeuronSet, dimensions: int = 16, seed: int = 0) -> NeuronSet:
    """The set with arbitrary statistics of hidden states."""
    generator = np.random.default_rng(seed)
    shape = (LAYERS, dimensions, len(neuron_set.languages))
    means = generator.normal(size=shape).astype(np.float32)
    return replace(neuron_set, residual={"mean": means, "std": np.abs(generator.normal(size=shape)).astype(np.float32)})


@pytest.fixture(autouse=True)
def heard() -> None:
    """What lm-eval logs reaches `caplog`, whatever an earlier test's command made of its logger."""
    logger = logging.getLogger("lm_eval")
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> torch.nn.Module:
    return tiny_model(family)


@pytest.fixture
def neuron_set(family: str) -> NeuronSet:
    return make_set(
        {"fra_Latn": [(0, 1), (0, 5), (2, 3)], "deu_Latn": [(0, 5), (1, 7)], "eng_Latn": [(2, 20)], "tur_Latn": []},
        family,
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no shared data at {SHARED} (set LM_EVAL_STEERING_SHARED): its licences keep it out of here")
    return SHARED / "data"


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Our command in this process: (exit code, output, errors)."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lm-eval-steering", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """A process that is forked must not need the threads of its parent."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
