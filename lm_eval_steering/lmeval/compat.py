"""Every private attribute, patched method and copied behaviour of lm-eval and transformers that we use.

Written for lm-eval 0.4.13 and transformers 5. `tests/lmeval/test_compat.py` searches the syntax trees of the package:
none of these names stands anywhere else, but for the start-up file, which may import nothing, and
`architectures/compat.py`, which works without lm-eval. It also holds each of them against the installed releases.
"""

from __future__ import annotations

import ast
import copy
import inspect
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import Any

from lm_eval_steering.errors import DidNotHappenError

# Name -> the public interface that would replace it.
PRIVATE = {
    "_instances": "Task.clear_instances(), which lets go of built requests",
    "_metric_fn_list": "Task.metrics, the functions of a task's metrics by name",
    "_metric_fn_kwargs": "Task.metrics, with the options of each",
    "_attn_implementation": "a public attribute of PreTrainedConfig that says which attention is in force",
    "_can_compile_fullgraph": "a public attribute of PreTrainedModel that says whether it takes a static cache",
    "_compile_all_devices": "an argument of CompileConfig",
    "_decode": "an attribute of tokenizers that says whether more tokens leave the text of earlier ones as it is",
}
# Attributes of lm-eval's and torch's that are replaced -> the public interface that would make it unnecessary.
PATCHED = {
    "TaskManager.__init__": "entry points for folders of tasks",
    "ConfigurableTask.process_results": "metrics that are called with the document",
    "ConfigurableTask.build_all_requests": "metrics that check their options when a task is loaded",
    "evaluator.get_git_commit_hash": "results without a description of the machine, or one that is kept",
    "collect_env.get_pretty_env_info": "the same",
}
# Methods of HFLM that begin with `_` and that `SteeredHFLM` and `SweepModel` override, as subclasses do -> parameters.
OVERRIDDEN = {
    "_loglikelihood_tokens": ("self", "requests", "disable_tqdm", "override_bs"),
    "_model_call": ("self", "inps", "attn_mask", "labels"),
    "_model_generate": ("self", "context", "max_length", "stop", "generation_kwargs"),
    "_detect_batch_size": ("self", "requests", "pos"),
    "_encode_pair": ("self", "context", "continuation"),
    "_create_model": (
        "self", "pretrained", "revision", "dtype", "trust_remote_code", "parallelize", "gpus", "max_memory_per_gpu",
        "max_cpu_memory", "offload_folder", "tp_plan", "peft", "delta", "autogptq", "gptqmodel", "gguf_file",
        "quantization_config", "subfolder", "kwargs",
    ),
}  # fmt: skip
_MARK = "_lm_eval_steering"  # of a function that was put in place of lm-eval's

# --- tasks of lm-eval 0.4.13


def release_requests(task: Any) -> None:
    """Let go of a task's built requests, which can be large; its documents are kept."""
    task._instances = None


def metrics_of(task: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> (function, options) of the metrics in a task's list."""
    return {name: (metric, task._metric_fn_kwargs[name]) for name, metric in task._metric_fn_list.items()}


def without_metrics(task: Any, names: Iterable[str]) -> Any:
    """The same task, but for these metrics in its list: what is scored by it has the others alone."""
    left_out = set(names)
    other = copy.copy(task)
    other._metric_fn_list = {name: metric for name, metric in task._metric_fn_list.items() if name not in left_out}
    return other


def score_with_documents(
    values: Callable[[Any, Any, Any], tuple[set[str], dict[str, Any]]], check: Callable[[Any], None]
) -> None:
    """Make lm-eval's YAML tasks score some of their metrics with the document, which lm-eval does not give a metric.

    Args:
        values: (task, document, results) -> names of the metrics that lm-eval is not to score, and their values.
        check: refuses a task whose metrics cannot be scored; called once its requests are built.
    """
    from lm_eval.api.task import ConfigurableTask

    score, build = ConfigurableTask.process_results, ConfigurableTask.build_all_requests
    if hasattr(score, _MARK):
        return

    def process_results(self: Any, doc: Any, results: Any) -> Any:
        names, ours = values(self, doc, results)
        return score(without_metrics(self, names), doc, results) | ours if names else score(self, doc, results)

    def build_all_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        built = build(self, *args, **kwargs)
        check(self)
        return built

    setattr(process_results, _MARK, True)
    ConfigurableTask.process_results = process_results  # type: ignore[method-assign]
    ConfigurableTask.build_all_requests = build_all_requests  # type: ignore[method-assign]


def evaluation_in(trace: TracebackType | None) -> dict[str, Any] | None:
    """Model, its arguments and the tracker of the `simple_evaluate` that an error came out of; None without one.

    lm-eval hands them to nobody who is called after an error, so they are read from its frame.
    """
    for frame, _ in walk_tb(trace):
        if frame.f_code.co_name == "simple_evaluate" and "lm" in frame.f_locals:
            return {name: frame.f_locals.get(name) for name in ("lm", "model", "model_args", "evaluation_tracker")}
    return None


def failed_metric(trace: TracebackType | None) -> str:
    """The metric that lm-eval was computing when an error came out of it; empty where it was computing none."""
    scoring = ("process_results", "_compute_task_aggregations")
    names = [
        str(frame.f_locals["metric"])
        for frame, _ in walk_tb(trace)
        if frame.f_code.co_name in scoring
        and str(frame.f_globals.get("__name__")).startswith("lm_eval.")
        and "metric" in frame.f_locals
    ]
    return names[-1] if names else ""


def add_task_folder(manager: Any, folder: Path) -> None:
    """Make lm-eval's `TaskManager` index a folder of ours before those of the user, whose tasks win over ours.

    One that is asked for no default tasks (`include_defaults=False`) gets none of ours either.
    """
    original = manager.__init__
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = inspect.signature(original).bind(self, *args, **kwargs)
            if bound.arguments.get("include_defaults", True):
                users = bound.arguments.get("include_path") or []
                users = list(users) if isinstance(users, list | tuple) else [users]
                bound.arguments["include_path"] = [folder, *users]
            args, kwargs = bound.args[1:], bound.kwargs
        except Exception as error:  # whatever lm-eval has become, it works on without our tasks
            print(f"lm-eval-steering could not add its tasks: {error!r}", file=sys.stderr)
        original(self, *args, **kwargs)

    setattr(init, _MARK, True)
    manager.__init__ = init


# --- lm-eval 0.4.13, for many evaluations in one process


def be_quiet() -> None:
    """Errors alone: what lm-eval logs at every evaluation would bury our own lines."""
    for name in ("lm_eval", "transformers", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def describe_machine_once() -> None:
    """lm-eval describes the machine and its checkout anew in each result file, half a second each time.

    It asks git with our stderr, and outside a repository git complains there; so the first answer is taken without it.
    """
    from lm_eval import evaluator
    from torch.utils import collect_env

    for module, name in ((collect_env, "get_pretty_env_info"), (evaluator, "get_git_commit_hash")):
        if not hasattr(getattr(module, name), "cache_info"):
            setattr(module, name, cache(getattr(module, name)))
    with _without_stderr():
        evaluator.get_git_commit_hash()


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Inside, what child processes write to stderr is dropped: the descriptor is, not `sys.stderr` alone."""
    sys.stderr.flush()
    kept, silent = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(silent, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silent)


# What `evaluate` of lm-eval 0.4.13 hands to `gather_object` with `log_samples=True`, in this order: {task: samples},
# then {task: {(metric, filter): values}}.
GATHERED = ("samples", "values")

# --- how HFLM of lm-eval 0.4.13 scores: copied, as it tells its model neither rows nor lengths


def fed_to_model(context: list[int], continuation: list[int], max_length: int) -> list[int]:
    """Token ids that `HFLM` feeds to a causal model: cut on the left; the last token is predicted and never read."""
    return (context + continuation)[-(max_length + 1) : -1]


def strings_to_encode(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """What `TemplateLM` encodes of (context, continuation): the former without its last blanks, and both."""
    strings: dict[str, None] = {}
    for context, continuation in pairs:
        if context:
            strings[context.rstrip()] = strings[context + continuation] = None
    return list(strings)


def in_scoring_order(requests: Sequence[Any], shared: bool) -> Iterator[Any]:
    """The requests, one a row, in the order in which `HFLM` scores them.

    Args:
        requests: (key, context tokens, continuation tokens).
        shared: whether requests of equal tokens are scored by one row (`logits_cache`).
    """
    from lm_eval.models.utils import Collator

    order: Any = Collator(
        list(requests),
        sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
        group_by="contexts" if shared else None,
        group_fn=lambda request: request[1] + request[2][:-1],
    )
    return (request for chunk in order.get_batched(n=1) for request in chunk)


def another_order() -> DidNotHappenError:
    """What is raised where lm-eval batches in another order than `in_scoring_order`."""
    return DidNotHappenError(
        "lm-eval batched its requests in an order that this release of lm-eval-steering does not know, so context "
        "lengths cannot be told; install the lm-eval that it was tested with"
    )


# --- models and tokenizers of transformers 5

# Keys of configs that differ between two copies of one model, or two releases of a library.
_NAMES = {"_name_or_path", "name_or_path", "base_model_name_or_path", "transformers_version", "peft_version"}


def without_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as plain data (`to_dict`), without where its model was read from and by which release."""
    return {key: value for key, value in config.items() if key not in _NAMES}


def attention_implementation(config: Any) -> str:
    """Which attention a model runs with: `sdpa`, `eager`, `flash_attention_2`, ..."""
    return str(getattr(config, "_attn_implementation", None) or "eager")


def takes_static_cache(model: Any) -> bool:
    """Whether a model's forward pass takes a cache of fixed size."""
    return bool(getattr(model, "_can_compile_fullgraph", False)) and not getattr(model.config, "alibi", False)


def compile_config(device: str) -> Any:
    """Settings under which `generate` compiles the forward pass, on CPU as well."""
    from transformers import CompileConfig

    config = CompileConfig(mode="reduce-overhead" if device == "cuda" else "default")
    config._compile_all_devices = True
    return config


def decodes_by_backend(tokenizer: Any) -> bool:
    """Whether a tokenizer decodes as its `tokenizers` backend does, not in a method of its family."""
    from transformers import PreTrainedTokenizerFast

    inherited = getattr(type(tokenizer), "_decode", None) is getattr(PreTrainedTokenizerFast, "_decode", None)
    return bool(tokenizer.is_fast) and inherited


@cache
def from_pretrained_arguments() -> frozenset[str]:
    """Every argument that `from_pretrained` of transformers' models knows.

    Most of them are in no signature: they are read from the source, `kwargs.pop("name", ...)` and the like, and from
    the signatures of the auto class, `cached_file` and the bitsandbytes config, to which the rest is passed on.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
    from transformers.utils.hub import cached_files

    read: set[str] = set()
    for function in (PreTrainedModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        read |= set(inspect.signature(function).parameters) | _keywords_read(function)
    for function in (cached_files, BitsAndBytesConfig):
        read |= set(inspect.signature(function).parameters)
    return frozenset(name for name in read if not name.startswith("_") and name != "kwargs")


def _keywords_read(function: Callable[..., Any]) -> set[str]:
    """Strings that a function's source looks up in its `kwargs`, with those of the tuples that it goes through."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        texts: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("pop", "get"):
            texts = node.args[:1]
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple | ast.List):
            texts = node.iter.elts
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple | ast.List):
            texts = node.value.elts
        names |= {each.value for each in texts if isinstance(each, ast.Constant) and isinstance(each.value, str)}
    return names
