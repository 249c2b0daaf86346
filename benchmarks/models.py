"""Shapes of the random Llamas that benchmarks run, and random neuron sets of any model."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm_eval_steering.architectures.weights import weights_sketch
from lm_eval_steering.neurons.neuron_set import NeuronSet, Provenance

# Arguments of LlamaConfig: a small model for a CPU, and one of 8B shape for a GPU.
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
STEERED = 1 / 32  # share of the units that are steered in each layer


def random_set(model: Any) -> NeuronSet:
    """A random neuron set of a model, 1 unit of 32 in each layer."""
    generator = np.random.default_rng(0)
    layers, units = model.config.num_hidden_layers, model.config.intermediate_size
    rows = np.array([
        [layer, unit]
        for layer in range(layers)
        for unit in np.sort(generator.choice(units, int(units * STEERED), replace=False))
    ])  # fmt: skip
    provenance = Provenance("random", "", model.config.model_type, layers, units, weights=weights_sketch(model))
    return NeuronSet(("fra_Latn",), {"fra_Latn": rows}, provenance)
