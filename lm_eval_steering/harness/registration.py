"""Makes our model, metrics, aggregations and tasks known to lm-eval, and keeps our own errors to one line.

Called by the start-up file after lm_eval's modules are imported, or by `lm-eval-steering run`. lm-eval releases that
read entry points find the same names there; whoever comes second finds them registered and leaves them alone.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType, TracebackType
from typing import Any

from lm_eval_steering.errors import DidNotHappenError, SteeringError

MODELS = {"steered-hf": "lm_eval_steering.harness.model:SteeredHFLM"}
METRICS = {"lfs": ("lm_eval_steering.metrics.output_language:lfs", True, "mean")}
AGGREGATIONS = {
    "language_counts": "lm_eval_steering.metrics.output_language:language_counts",
    "token_perplexity": "lm_eval_steering.metrics.likelihood:token_perplexity",
    "nats_per_token": "lm_eval_steering.metrics.likelihood:nats_per_token",
}


def on_import(module: ModuleType) -> None:
    """Register what belongs to one lm_eval module that has just been executed."""
    _REGISTRARS[module.__name__](module)


def register_all() -> None:
    """Register everything now, for a command that does not rely on the start-up file."""
    for name in _REGISTRARS:
        on_import(importlib.import_module(name))


def _register_models(_module: ModuleType) -> None:
    from lm_eval.api.registry import model_registry

    for name, value in MODELS.items():
        if name not in model_registry:
            # Equal to the entry point in our own metadata, so that a later discovery finds no conflict.
            model_registry.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    _install_excepthook()


def _register_metrics(_module: ModuleType) -> None:
    from lm_eval.api import registry

    for name, value in AGGREGATIONS.items():
        if name not in registry.aggregation_registry:
            # The function itself: lm-eval compares aggregations by identity.
            registry.aggregation_registry.register(name, target=_load(value))
    for name, (value, higher_is_better, aggregation) in METRICS.items():
        if name not in registry.metric_registry:
            registry.metric_registry.register(name, target=_load(value))
            registry.higher_is_better_registry.register(name, target=higher_is_better)
            registry.metric_agg_registry.register(name, target=registry.aggregation_registry.get(aggregation))


def _register_tasks(module: Any) -> None:
    manager = module.TaskManager
    if getattr(manager.__init__, "_lm_eval_steering", False):
        return
    original = manager.__init__

    def init(
        self: Any, verbosity: Any = None, include_path: Any = None, include_defaults: bool = True, metadata: Any = None
    ) -> None:
        paths = include_path
        if include_defaults:
            from lm_eval_steering.resources import tasks_folder

            users = [include_path] if isinstance(include_path, str) or hasattr(include_path, "__fspath__") else None
            # The user's own folders come last, so that their tasks win over ours of the same name.
            paths = [tasks_folder(), *(users if users is not None else include_path or [])]
        original(self, verbosity, paths, include_defaults, metadata)
        self.include_path = include_path

    init._lm_eval_steering = True  # type: ignore[attr-defined]
    manager.__init__ = init


_REGISTRARS: dict[str, Callable[[Any], None]] = {
    "lm_eval.models": _register_models,
    "lm_eval.api.metrics": _register_metrics,
    "lm_eval.tasks.manager": _register_tasks,
}


def _load(value: str) -> Any:
    module, _, name = value.partition(":")
    return getattr(importlib.import_module(module), name)


def one_line(error: BaseException) -> str:
    """How the command line prints an error of ours."""
    kind = "error" if isinstance(error, SteeringError) else "the intervention did not take place"
    return f"lm-eval-steering: {kind}: {error}"


def _install_excepthook() -> None:
    """Print our own errors as one line instead of a traceback, unless lm_eval logs at DEBUG."""
    previous = sys.excepthook
    if getattr(previous, "_lm_eval_steering", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        ours = isinstance(error, SteeringError | DidNotHappenError)
        if ours and not logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG):
            print(one_line(error), file=sys.stderr)
        else:
            previous(kind, error, trace)

    hook._lm_eval_steering = True  # type: ignore[attr-defined]
    sys.excepthook = hook
