"""Evaluate language models while their language-specific neurons are steered.

Importing this package loads neither torch nor transformers nor lm_eval; the public names below are loaded when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lm_eval_steering.neurons.find import Method as Method
    from lm_eval_steering.neurons.find import find_neurons as find_neurons
    from lm_eval_steering.neurons.find import select as select
    from lm_eval_steering.neurons.neuron_set import NeuronSet as NeuronSet
    from lm_eval_steering.report.page import write_report as write_report
    from lm_eval_steering.report.read import read_results as read_results
    from lm_eval_steering.steering.attach import steer as steer
    from lm_eval_steering.steering.intervention import Intervention as Intervention
    from lm_eval_steering.sweep.store import Store as Store

_MODULES = {
    "Intervention": "steering.intervention",
    "Method": "neurons.find",
    "NeuronSet": "neurons.neuron_set",
    "Store": "sweep.store",
    "find_neurons": "neurons.find",
    "read_results": "report.read",
    "select": "neurons.find",
    "steer": "steering.attach",
    "write_report": "report.page",
}
__all__ = [
    "Intervention", "Method", "NeuronSet", "Store", "__version__", "find_neurons", "read_results", "select", "steer",
    "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
