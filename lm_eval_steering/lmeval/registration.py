"""Makes our model, metrics, aggregations and tasks known to lm-eval, and keeps our own errors to one line.

Called by the start-up file after lm_eval's modules are imported, or by `lm-eval-steering run`. lm-eval releases that
read entry points find the same names there; whoever comes second finds them registered and leaves them alone.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType, TracebackType
from typing import Any

from lm_eval_steering.errors import DidNotHappenError, SteeringError
from lm_eval_steering.lmeval.compat import add_task_folder, score_with_documents
from lm_eval_steering.resources import tasks_folder

MODELS = {
    "steered-hf": "lm_eval_steering.lmeval.model:SteeredHFLM",
    "steered-vllm": "lm_eval_steering.vllm.model:SteeredVLLM",
}
AGGREGATIONS = {
    "language_counts": "lm_eval_steering.metrics.output_language:language_counts",
    "lcpr": "lm_eval_steering.metrics.pass_rates:harmonic_mean",
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

    from lm_eval_steering.metrics.registered import METRICS

    for name, value in AGGREGATIONS.items():
        if name not in registry.aggregation_registry:
            # The function itself: lm-eval compares aggregations by identity.
            function = EntryPoint(name, value, "lm_eval.aggregations").load()
            registry.aggregation_registry.register(name, target=function)
    for name, metric in METRICS.items():
        if name not in registry.metric_registry:
            registry.metric_registry.register(name, target=metric)
            registry.higher_is_better_registry.register(name, target=metric.higher_is_better)
            registry.metric_agg_registry.register(name, target=registry.aggregation_registry.get(metric.aggregation))


def _register_tasks(module: Any) -> None:
    from lm_eval_steering.lmeval.expected_language import check_task, values_with_document
    from lm_eval_steering.lmeval.unscored import remember

    def built(task: Any) -> None:
        check_task(task)
        remember(task)

    add_task_folder(module.TaskManager, tasks_folder())
    score_with_documents(values_with_document, built)


_REGISTRARS: dict[str, Callable[[Any], None]] = {
    "lm_eval.models": _register_models,
    "lm_eval.api.metrics": _register_metrics,
    "lm_eval.tasks.manager": _register_tasks,
}


def one_line(error: BaseException) -> str:
    """How the command line prints an error that needs no traceback."""
    kind = "the intervention did not take place" if isinstance(error, DidNotHappenError) else "error"
    return f"lm-eval-steering: {kind}: {error}"


def keep_answers(error: BaseException) -> None:
    """After an error in a run of lm-eval: keep what was generated, and say where."""
    from lm_eval_steering.lmeval.unscored import keep_of_run

    if not isinstance(error, Exception):
        return
    try:
        kept = keep_of_run(error.__traceback__)
    except Exception as problem:  # the error that is on its way out matters more
        print(f"lm-eval-steering: what was generated could not be kept: {problem!r}", file=sys.stderr)
        return
    if kept is not None:
        print(f"lm-eval-steering: {kept.sentence()}", file=sys.stderr)


def debugging() -> bool:
    """Whether the user wants tracebacks: LMEVAL_LOG_LEVEL=DEBUG or --verbosity DEBUG; lm-eval reads both late."""
    asked = "--verbosity=DEBUG" in sys.argv or ("--verbosity", "DEBUG") in zip(sys.argv, sys.argv[1:], strict=False)
    asked = asked or os.environ.get("LMEVAL_LOG_LEVEL", "").upper() == "DEBUG"
    return asked or logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG)


def _install_excepthook() -> None:
    """Print our own errors as one line instead of a traceback, unless lm_eval logs at DEBUG; and keep the answers."""
    previous = sys.excepthook
    if getattr(previous, "_lm_eval_steering", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, SteeringError | DidNotHappenError) and not debugging():
            print(one_line(error), file=sys.stderr)
        else:
            previous(kind, error, trace)
        keep_answers(error)

    hook._lm_eval_steering = True  # type: ignore[attr-defined]
    sys.excepthook = hook
