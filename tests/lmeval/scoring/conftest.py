"""Models and requests of the scoring tests."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.instance import Instance

from lm_eval_steering.lmeval.model import SteeredHFLM
from lm_eval_steering.neurons.neuron_set import NeuronSet
from tests.conftest import hidden_size, make_set, tiny_model, tiny_tokenizer, with_hidden_states

FRENCH = {"language": "fra_Latn", "op": "set", "value": 2.0}
HIDDEN = {"language": "fra_Latn", "op": "add", "value": "diffmean", "site": "residual", "layers": "0-1"}
LONG = " ".join(f"w{i % 50}" for i in range(70))  # more than the tiny models' 64 positions
# Shared contexts, options that are prefixes of one another, duplicates, a context that is another's, no context,
# one-token options, and what is too long.
PAIRS = [
    ("w1 w2 w3 w4", " w5 w6"), ("w1 w2 w3 w4", " w5 w6 w7"), ("w1 w2 w3 w4", " w5"), ("w1 w2 w3 w4", " w8"),
    ("w1 w2 w3 w4", " w5 w6"), ("w1 w2", " w3 w4 w5"), ("w1 w2 w3", " w4 w9 w9 w9"), ("", "w9 w8 w7"), ("", "w9"),
    ("w7", " w7"), (LONG, " w1 w2"), (LONG, " w1 w3 w4"), ("w9 " * 30, " w2"), ("w9 " * 30, " w3 w1"),
]  # fmt: skip


def neurons(family: str = "llama") -> NeuronSet:
    made = make_set({"fra_Latn": [(0, 1), (0, 5), (2, 3)], "deu_Latn": [(0, 5), (1, 7)]}, family)
    return with_hidden_states(made, hidden_size(family))


def loaded(model: torch.nn.Module | None = None, batch_size: Any = 3, **arguments: Any) -> SteeredHFLM:
    model = tiny_model("llama") if model is None else model
    return SteeredHFLM(model, tokenizer=tiny_tokenizer(), batch_size=batch_size, **({"max_length": 64} | arguments))


def instances(pairs: list[tuple[str, str]] = PAIRS, doc: Any = None) -> list[Instance]:
    return [Instance("loglikelihood", doc or {}, pair, number) for number, pair in enumerate(pairs)]
