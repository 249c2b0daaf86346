"""Evaluate language models while their language-specific neurons are steered.

Importing this package loads neither torch nor transformers nor lm_eval; the public names below are loaded when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lm_eval_steering.neurons.neuron_set import NeuronSet as NeuronSet
    from lm_eval_steering.steering.attach import steer as steer

_LAZY = {
    "NeuronSet": "lm_eval_steering.neurons.neuron_set",
    "steer": "lm_eval_steering.steering.attach",
}
__all__ = ["NeuronSet", "__version__", "steer"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
