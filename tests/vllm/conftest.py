"""Engines of real vLLM, started once for many tests. Without vLLM they skip; with CI_VLLM=1 that is an error."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoConfig, AutoModelForCausalLM

from lm_eval_steering.architectures import shape_of
from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.lmeval.task_families import demo as tasks
from lm_eval_steering.neurons.calibrate import calibrate_hidden_states
from lm_eval_steering.neurons.neuron_set import SITES, NeuronSet, Provenance, Statistics, union_of
from lm_eval_steering.neurons.rows import TokenRows
from lm_eval_steering.neurons.running import ModelRunner
from lm_eval_steering.resources import demo_model
from tests.conftest import TOKENS, tiny_tokenizer
from tests.sweep.conftest import spell, task_files  # noqa: F401  fixtures

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by default most of the memory
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

MISSING = "" if find_spec("vllm") else "vLLM is not installed: use scripts/vllm_cpu_environment"


@pytest.fixture(scope="session")
def vllm() -> None:
    """What needs vLLM asks for this."""
    if MISSING and os.environ.get("CI_VLLM") == "1":
        pytest.fail(MISSING)
    if MISSING:
        pytest.skip(MISSING)


@dataclass(frozen=True)
class Mode:
    """How an engine runs. With one worker it runs in this process, else in processes of its own, as by default."""

    eager: bool
    workers: int = 1
    stages: int = 1

    @property
    def processes(self) -> int:
        return self.workers * self.stages

    @property
    def arguments(self) -> dict[str, Any]:
        common: dict[str, Any] = {"enforce_eager": self.eager, "dtype": "float32", "max_model_len": 512}
        one = {"distributed_executor_backend": "uni"}
        many = {"tensor_parallel_size": self.workers, "pipeline_parallel_size": self.stages}
        return common | (many if self.processes > 1 else one)


# Several workers first: vLLM keeps what it has read of the environment once an engine ran in this process.
MODES = {
    "two-workers-compiled": Mode(False, 2),
    "two-workers-eager": Mode(True, 2),
    "compiled": Mode(False),
    "eager": Mode(True),
}


@contextmanager
def in_this_process(processes: int = 1) -> Iterator[None]:
    """Engines of one process run in this one; of more, in processes of their own."""
    from vllm import envs

    envs.disable_envs_cache()
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1" if processes > 1 else "0")
    if processes > 1:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(processes))))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a number that does not depend on the tests before: sums are split by it
    patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # vLLM's worker replaces it
    try:
        yield
    finally:
        patch.undo()
        torch.set_num_threads(threads)


@contextmanager
def running(kind: str, mode: Mode, pretrained: str, **arguments: Any) -> Iterator[Any]:
    """lm-eval's model class over a new engine, which ends with the block.

    Args:
        kind: `steered` or `plain`.
        mode: how the engine runs.
        pretrained: folder.
        **arguments: more of the model's.
    """
    from lm_eval.models.vllm_causallms import VLLM

    from lm_eval_steering.vllm import compat
    from lm_eval_steering.vllm.model import SteeredVLLM

    with in_this_process(mode.processes):
        lm = (SteeredVLLM if kind == "steered" else VLLM)(pretrained, **mode.arguments | arguments)
        try:
            yield lm
        finally:
            compat.shut_down(lm.model)
            del lm
            gc.collect()
            compat.release_memory()


@pytest.fixture(scope="session", params=MODES)
def steered(request: pytest.FixtureRequest, vllm: None) -> Iterator[Any]:
    """The demo model in a steered engine; the intervention of the test before may be on.

    With one worker a plain engine has answered before it: afterwards it would not be the same, since vLLM keeps which
    kernels it chose for an eager engine for a compiled one that follows in the same process.
    """
    mode, plain = MODES[request.param], None
    if mode.workers == 1:
        with running("plain", mode, str(demo_model())) as lm:
            plain = answers(lm)
    with running("steered", mode, str(demo_model())) as lm:
        lm.mode, lm.plain_answers = mode, plain
        yield lm


def answers(lm: Any) -> tuple[list[tuple[float, bool]], list[str]]:
    """Scores and greedy texts."""
    scores = [tuple(score) for score in lm.loglikelihood(scoring(), disable_tqdm=True)]
    return scores, [str(text) for text in lm.generate_until(generating(), disable_tqdm=True)]


@cache
def demo_set() -> NeuronSet:
    """The set that ships, with statistics of the hidden states: of eight sentences of each language."""
    neurons = NeuronSet.load("demo")
    lm = hooks()
    rows = {
        code: TokenRows.of([lm.tok_encode(tasks.sentence(index, code)) for index in range(8)])
        for code in neurons.languages
    }
    found = calibrate_hidden_states(ModelRunner(LazyModel.of(lm.model, lm.tokenizer), 8), rows)
    residual = {name: np.stack([found[code][name] for code in neurons.languages], axis=2) for name in ("mean", "std")}
    return replace(neurons, residual=residual)


@cache
def hooks() -> SteeredHFLM:
    """The demo model under `steered-hf`."""
    return SteeredHFLM(str(demo_model()), dtype="float32", max_length=512, batch_size=8)


def scoring(documents: int = 6, code: str = "fra_Latn", twice: bool = False) -> list[Instance]:
    """Every option of some continuation items of the demo task."""
    doc = {"needs_unsteered_score": True} if twice else {}
    pairs = [
        (item["prompt"], choice)
        for item in list(tasks.continuation_documents(code)["test"])[:documents]
        for choice in item["choices"]
    ]
    return [Instance("loglikelihood", doc, pair, number) for number, pair in enumerate(pairs)]


def generating(number: int = 6, **more: Any) -> list[Instance]:
    """Texts to be continued, greedily."""
    settings = {"until": ["\n"], "do_sample": False, "max_gen_toks": 16, "repetition_penalty": 1.2} | more
    texts = [" ".join(tasks.sentence(index, "eng_Latn").split()[:4]) for index in range(number)]
    return [Instance("generate_until", {}, (text, settings), index) for index, text in enumerate(texts)]


def rolling(number: int = 4) -> list[Instance]:
    texts = [tasks.sentence(index, "deu_Latn") for index in range(number)]
    return [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]


def furthest(found: list[Any], expected: list[Any]) -> float:
    """Largest difference of log-likelihoods, over max(1, |lp|)."""
    numbers = [[float(one[0] if isinstance(one, tuple) else one) for one in many] for many in (found, expected)]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(*numbers, strict=True))


def right(scores: list[Any], documents: int = 6) -> list[int]:
    """Which of each item's four options is the most likely."""
    rows = [[score[0] for score in scores[4 * item : 4 * item + 4]] for item in range(documents)]
    return [row.index(max(row)) for row in rows]


# --- tiny random models -----------------------------------------------------------------------------------------

# Heads of 32 dimensions, the fewest that vLLM's attention on CPU takes.
_USUAL: dict[str, Any] = {
    **TOKENS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
}  # fmt: skip
_GEMMA = _USUAL | {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}
TINY: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "olmo2", "cohere", "phi3", "phi", "gpt_neox"), _USUAL),
    **dict.fromkeys(("qwen3", "gemma"), _USUAL | {"head_dim": 32}),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "gpt2": {**TOKENS, "n_positions": 128, "n_embd": 64, "n_layer": 3, "n_head": 2, "n_inner": 96}
    | {"initializer_range": 0.1},
    "bloom": {**TOKENS, "hidden_size": 64, "n_layer": 3, "n_head": 2, "initializer_range": 0.1},
    # vLLM gives Falcon four times the hidden size, whatever its config says.
    "falcon": _USUAL | {"ffn_hidden_size": 256, "alibi": False, "new_decoder_architecture": False},
    "opt": _USUAL | {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
}


def save_tiny(folder: Path, family: str, **changed: Any) -> tuple[str, str]:
    """A random model, and a folder with a tokenizer alone: AutoTokenizer would take the family's own class."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY[family] | changed)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return str(folder / "model"), str(folder / "tokenizer")


def made_up_set(pretrained: str, family: str, pairs: dict[str, list[tuple[int, int]]]) -> NeuronSet:
    """A set of a model's shape with made-up statistics, and no sketch of its weights.

    Args:
        pretrained: folder of the model.
        family: its `model_type`.
        pairs: language -> its neurons, (layer, unit).
    """
    config = AutoConfig.from_pretrained(pretrained)
    shape = shape_of(config)
    rows = {code: np.array(sorted(neurons), dtype=np.int64).reshape(-1, 2) for code, neurons in pairs.items()}
    union = union_of(list(rows.values()))
    generator = np.random.default_rng(0)
    values = {
        site: {
            name: generator.normal(size=(len(union), len(rows))).astype(np.float32)
            for name in ("mean", "sentence_mean", "median", "max", "p10")
        }
        for site in SITES
    }
    made = Provenance("made-up", "", family, shape.layers, shape.units)
    means = generator.normal(size=(shape.layers, config.hidden_size, len(rows))).astype(np.float32)
    return NeuronSet(tuple(rows), rows, made, Statistics(union, tuple(rows), values), {"mean": means})


def tiny_set(pretrained: str, family: str) -> NeuronSet:
    """Neurons at both ends of the layers, so that each of two workers has some."""
    last = shape_of(AutoConfig.from_pretrained(pretrained)).units - 1
    return made_up_set(
        pretrained,
        family,
        {"fra_Latn": [(0, 1), (0, last), (2, 3)], "deu_Latn": [(0, last), (1, 7)], "eng_Latn": [(2, 20)]},
    )


WORDS = [("w1 w2 w3", " w4 w5"), ("w5 w6", " w9"), ("", "w3 w4 w5 w6"), ("w1 w2 w3 w4 w5 w6 w7", " w20 w21 w22")]


def words() -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(WORDS)]
