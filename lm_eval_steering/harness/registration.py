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
from inspect import BoundArguments, signature
from types import ModuleType, TracebackType
from typing import Any

from lm_eval_steering.errors import DidNotHappenError, SteeringError
from lm_eval_steering.harness.indexing import answer_from_ours, put_off, read_ours_once
from lm_eval_steering.resources import tasks_folder

MODELS = {
    "steered-hf": "lm_eval_steering.harness.model:SteeredHFLM",
    "steered-vllm": "lm_eval_steering.vllm.model:SteeredVLLM",
}
# Name -> where it is, whether more is better, and how the values of the items become one.
METRICS = {
    "lfs": ("lm_eval_steering.metrics.registered:lfs", True, "mean"),
    "lang_expected": ("lm_eval_steering.metrics.registered:lang_expected", True, "mean"),
    "output_language": ("lm_eval_steering.metrics.registered:counted_language", True, "language_counts"),
    "lang_confidence": ("lm_eval_steering.metrics.registered:lang_confidence", True, "mean"),
    "lang_unknown": ("lm_eval_steering.metrics.registered:lang_unknown", False, "mean"),
    "lpr": ("lm_eval_steering.metrics.registered:lpr", True, "mean"),
    "lpr_skipped": ("lm_eval_steering.metrics.registered:lpr_skipped", False, "mean"),
    "wpr": ("lm_eval_steering.metrics.registered:wpr", True, "mean"),
    "lcpr": ("lm_eval_steering.metrics.registered:lcpr", True, "lcpr"),
    "script_share": ("lm_eval_steering.metrics.registered:script_share", True, "mean"),
    "degenerate": ("lm_eval_steering.metrics.registered:degenerate", False, "mean"),
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
    _score_with_documents()
    manager = module.TaskManager
    if getattr(manager.__init__, "_lm_eval_steering", False):
        return
    original = manager.__init__
    try:
        read_ours_once(importlib.import_module("lm_eval.tasks._index"))
        answer_from_ours(manager, original)
        lazy = True
    except (ImportError, AttributeError):  # another lm-eval indexes as it does, at its own cost
        lazy = False

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            arguments = _with_our_tasks(signature(original).bind(self, *args, **kwargs))
        except Exception as error:  # whatever lm-eval has become, it works on without our tasks
            print(f"lm-eval-steering could not add its tasks: {error!r}", file=sys.stderr)
            arguments = None
        if arguments is None:
            original(self, *args, **kwargs)
        elif lazy and arguments.arguments["include_path"] == [tasks_folder()]:  # tasks of the user may go by any name
            put_off(self, arguments)
        else:
            original(*arguments.args, **arguments.kwargs)

    init._lm_eval_steering = True  # type: ignore[attr-defined]
    manager.__init__ = init


def _score_with_documents() -> None:
    from lm_eval_steering.harness.expected import score_ours

    try:
        from lm_eval.api.task import ConfigurableTask

        score_ours(ConfigurableTask)
    except (ImportError, AttributeError) as error:  # whatever lm-eval has become, the rest works on
        print(f"lm-eval-steering could not score by documents: {error!r}", file=sys.stderr)


def _with_our_tasks(arguments: BoundArguments) -> BoundArguments | None:
    """The manager's arguments with our folder before the user's, whose tasks win over ours of the same name."""
    if not arguments.arguments.get("include_defaults", True):
        return None
    users = arguments.arguments.get("include_path") or []
    users = list(users) if isinstance(users, list | tuple) else [users]
    arguments.arguments["include_path"] = [tasks_folder(), *users]
    return arguments


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


def debugging() -> bool:
    """Whether the user wants tracebacks: LMEVAL_LOG_LEVEL=DEBUG or --verbosity DEBUG, which lm-eval applies late."""
    asked = "--verbosity=DEBUG" in sys.argv or ("--verbosity", "DEBUG") in zip(sys.argv, sys.argv[1:], strict=False)
    return asked or logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG)


def _install_excepthook() -> None:
    """Print our own errors as one line instead of a traceback, unless lm_eval logs at DEBUG."""
    previous = sys.excepthook
    if getattr(previous, "_lm_eval_steering", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, SteeringError | DidNotHappenError) and not debugging():
            print(one_line(error), file=sys.stderr)
        else:
            previous(kind, error, trace)

    hook._lm_eval_steering = True  # type: ignore[attr-defined]
    sys.excepthook = hook
