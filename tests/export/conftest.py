"""Tiny models on disk, as a user has them, and the two ways to steer them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from lm_eval_steering.export.checkpoint import Checkpoint
from lm_eval_steering.export.job import Exported, Job, export_checkpoint
from lm_eval_steering.export.layouts import target_of
from lm_eval_steering.export.verify import Loader
from lm_eval_steering.neurons.neuron_set import NeuronSet
from lm_eval_steering.progress import Log
from lm_eval_steering.steering.attach import steer
from tests.conftest import CONFIGS, make_set, tiny_tokenizer

# Settings of a family that change where its biases are; the table's rows are the other cases.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in CONFIGS},
    "llama-biased": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "starcoder2-plain": ("starcoder2", {"use_bias": False}),
    "opt-plain": ("opt", {"enable_bias": False}),
    "falcon-old": ("falcon", {"parallel_attn": False, "alibi": True}),
}
ASSIGNMENTS = {
    "fra_Latn": [(0, 1), (0, 5), (2, 3)],
    "deu_Latn": [(0, 5), (1, 7), (1, 8)],
    "eng_Latn": [(2, 20)],
}
TOKENS = torch.arange(3, 60).reshape(3, 19)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    disable_progress_bar()


def save_model(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changed: Any) -> None:
    """A random model whose biases and norms are random too, with a tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(CONFIGS[family] | changed))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Variant -> the folder of its model."""
    folders: dict[str, Path] = {}

    def of(variant: str) -> Path:
        if variant not in folders:
            family, changed = VARIANTS[variant]
            folders[variant] = tmp_path_factory.mktemp("models") / variant
            save_model(folders[variant], family, **changed)
        return folders[variant]

    return of


def neurons_of(variant: str) -> NeuronSet:
    return make_set(ASSIGNMENTS, VARIANTS[variant][0])


def job_of(model: Path, variant: str, out: Path, dtype: str = "auto", **arguments: Any) -> Job:
    loader = Loader(str(model), dtype=dtype, device="cpu")
    return Job(loader, neurons_of(variant), arguments, out, log=Log(show=False))


def exported(model: Path, variant: str, out: Path, **arguments: Any) -> Path:
    export_checkpoint(job_of(model, variant, out, **arguments), multiple=8)
    return out


def folded(model: Path, variant: str, folder: Path, intervention: list[dict[str, Any]]) -> Any:
    """The exported model without model card and tokenizer, for tests that export many times."""
    folder.mkdir()
    prepared = Exported(job_of(model, variant, folder, intervention=intervention))
    maps = prepared.maps(prepared.job.plan())
    target = target_of(prepared.lazy.config, maps, multiple=8)
    Checkpoint(prepared.source, target, maps, prepared.dtype).write(folder, 10**9, prepared.job.log)
    target.config.save_pretrained(folder)
    return load(folder)


def load(folder: Path, dtype: str = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


def hooked(model: Any, variant: str, **arguments: Any) -> torch.Tensor:
    with steer(model, neurons_of(variant), **arguments):
        return logits(model)


def share(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


class silence:  # noqa: N801
    """Nothing inside may warn, by Python or by transformers' log."""

    def __enter__(self) -> None:
        self.records: list[logging.LogRecord] = []
        self.handler = logging.Handler(logging.WARNING)
        self.handler.emit = self.records.append  # type: ignore[method-assign]
        logging.getLogger("transformers").addHandler(self.handler)
        self.catching = warnings.catch_warnings()
        self.catching.__enter__()
        warnings.simplefilter("error")

    def __exit__(self, *_: object) -> None:
        self.catching.__exit__(None, None, None)
        logging.getLogger("transformers").removeHandler(self.handler)
        assert not self.records, [record.getMessage() for record in self.records]
