"""What was generated and could not be scored, kept as samples: a metric that fails costs no answer.

lm-eval scores after all answers of all tasks are there, and writes its files after that. Where scoring fails, the
samples of every task whose answers are complete are written where those of the run would lie, without values of
metrics, and `lm-eval-steering rescore` goes on from there.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from lm_eval_steering.errors import DidNotHappenError, SteeringError
from lm_eval_steering.files import write_json, write_json_lines
from lm_eval_steering.lmeval.compat import evaluation_in, failed_metric

FOLDER = "unscored"  # in the working folder, where a run names none for its results
_built: weakref.WeakSet[Any] = weakref.WeakSet()  # tasks of lm-eval whose requests were built in this process


def remember(task: Any) -> None:
    """A task whose requests are built."""
    _built.add(task)


@dataclass(frozen=True)
class Kept:
    """What was written.

    Attributes:
        folder: with the samples.
        tasks: whose samples they are.
        metric: that failed; empty where that is not known.
    """

    folder: Path
    tasks: tuple[str, ...]
    metric: str

    def sentence(self) -> str:
        """One line for the user."""
        metric = f"the metric {self.metric} failed; " if self.metric else ""
        return (
            f"{metric}what was generated is kept: samples of {', '.join(self.tasks)} in {self.folder}; "
            f"`lm-eval-steering rescore {self.folder}` scores their language"
        )


def keep_of_run(trace: TracebackType | None) -> Kept | None:
    """Write the answers of a run of lm-eval that an error ended; None where none are complete, or there was no run.

    Args:
        trace: of the error.
    """
    evaluation = evaluation_in(trace)
    if evaluation is None:
        return None
    tracker = evaluation["evaluation_tracker"]
    folder = Path.cwd() / FOLDER
    if tracker is not None and tracker.output_path:
        output = Path(tracker.output_path)
        sanitized = str(tracker.general_config_tracker.model_name_sanitized)
        folder = output.parent if output.suffix == ".json" else output / sanitized
    config: dict[str, Any] = {"model": str(evaluation["model"]), "model_args": evaluation["model_args"]}
    lm = getattr(evaluation["lm"], "lm", evaluation["lm"])  # lm-eval's cache wraps it
    if hasattr(lm, "steering_report"):
        with suppress(SteeringError, DidNotHappenError):  # it is the error that ended the run
            config["steering"] = lm.steering_report()
    tasks = sorted(_built, key=lambda task: str(task.config.task))
    _built.clear()
    return keep(folder, tasks, config, failed_metric(trace))


def keep(
    folder: Path,
    tasks: Iterable[Any],
    config: Mapping[str, Any],
    metric: str = "",
    positions: Sequence[int] | None = None,
) -> Kept | None:
    """Write the samples of tasks that generate and whose answers are complete; None where there are none.

    Args:
        folder: to write to.
        tasks: of lm-eval.
        config: of the run, as lm-eval's results have it.
        metric: that failed.
        positions: of the documents among all, where only some were asked; None where they are counted from the first.
    """
    complete = [task for task in tasks if _is_complete(task)]
    if not complete:
        return None
    date = datetime.now().isoformat().replace(":", "-")
    for task in complete:
        write_json_lines(folder / f"samples_{task.config.task}_{date}.jsonl", samples_of(task, positions))
    names = tuple(str(task.config.task) for task in complete)
    configs = {str(task.config.task): _plain(task.dump_config()) for task in complete}
    write_json(folder / f"unscored_{date}.json", {"configs": configs, "config": _plain(config)}, indent=2)
    return Kept(folder, names, metric)


def _is_complete(task: Any) -> bool:
    instances = task.instances or []
    return task.OUTPUT_TYPE == "generate_until" and bool(instances) and all(each.resps for each in instances)


def samples_of(task: Any, positions: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """Samples of a task in lm-eval's fields, without those of metrics.

    Where a filter is what failed, the filter is `none` and the answer is as it was generated.
    """
    from lm_eval.utils import hash_string

    try:
        task.apply_filters()
        filters = list(task.instances[0].filtered_resps)
    except Exception:  # a filter of the user's may fail in any way
        filters = []
    for name in filters or ["none"]:
        for instance in task.instances:
            answer = instance.filtered_resps[name] if filters else instance.resps[0]
            document = _plain(instance.doc)
            yield {
                "doc_id": positions[instance.doc_id] if positions is not None else instance.doc_id,
                "doc": document,
                "arguments": _plain({"gen_args_0": dict(zip(("arg_0", "arg_1"), instance.args, strict=False))}),
                "resps": [[str(response) for response in instance.resps]],
                "filtered_resps": [answer if isinstance(answer, str) else _plain(answer)],
                "filter": name,
                "metrics": [],
                "doc_hash": hash_string(json.dumps(document, indent=2, ensure_ascii=False)),
                "prompt_hash": hash_string(instance.args[0]),
            } | _thought(instance.resps[0])


def _thought(answer: Any) -> dict[str, float]:
    """What the text of an answer does not say of itself."""
    unfinished = getattr(answer, "unfinished", None)
    return {} if unfinished is None else {"unfinished": float(unfinished)}


def _plain(value: Any) -> Any:
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(value, default=handle_non_serializable))
