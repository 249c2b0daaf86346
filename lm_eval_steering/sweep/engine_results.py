"""What an engine's run of lm-eval left behind, and whether it is what was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError
from lm_eval_steering.sweep.engine_items import Item
from lm_eval_steering.sweep.plan import SweepPlan

# Arguments that say where and how fast a model runs, and not what it answers.
PLACE = {
    "tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization", "device",
    "batch_size", "max_batch_size", "parallelize", "distributed_executor_backend", "max_num_seqs",
    "max_num_batched_tokens", "enforce_eager", "disable_log_stats",
}  # fmt: skip


class ForeignResultError(SteeringError):
    """Results that are not those of the command that was written, or are damaged."""


@dataclass(frozen=True)
class Asked:
    """What a cell's command asked for, beside the task.

    Attributes:
        arguments: of the engine's model class.
        export: `steering.json` of the exported model; None for the plain one.
        verified: what comparing hooks and export came to; None where they were not compared.
    """

    arguments: Mapping[str, Any]
    export: Mapping[str, Any] | None = None
    verified: str | None = None


@dataclass
class Answer:
    """One task of one run.

    Attributes:
        path: of the results.
        results: lm-eval's.
        samples: of the task.
    """

    path: Path
    results: dict[str, Any]
    samples: list[dict[str, Any]]


def answer_of(folder: Path, task: str) -> Answer | None:
    """The newest run under a folder that has the task; None where there is none.

    Raises:
        ForeignResultError: if a file is damaged, or the run kept no samples.
    """
    for path in sorted(folder.rglob("results_*.json"), key=lambda path: path.name, reverse=True):
        results = _read(path)
        if task in results.get("results", {}):
            date = path.stem.removeprefix("results_")
            return Answer(path, results, list(_samples(path.with_name(f"samples_{task}_{date}.jsonl"))))
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ForeignResultError(f"{path}: no results of lm-eval, or cut short ({error}); remove it") from None


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise ForeignResultError(f"{path}: there is none; results are read with their samples (--log_samples)")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError):
                raise ForeignResultError(f"{path}, line {number}: no sample of lm-eval, or cut short") from None


def check(answer: Answer, plan: SweepPlan, task: str, asked: Asked, items: Mapping[int, Item], version: Any) -> None:
    """Refuse results of another model, another task, other items or other prompts.

    Args:
        answer: as read.
        plan: the plan.
        task: its name.
        asked: what the command said.
        items: doc_id -> what the item is.
        version: of the task here.

    Raises:
        ForeignResultError: naming the file, what was found and what was expected.
    """

    from lm_eval.utils import hash_string

    def refuse(what: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise ForeignResultError(f"{answer.path}: {what} is {found!r}, expected {expected!r}; it was not read")

    config = answer.results.get("config") or {}
    refuse("config.model", config.get("model"), plan.engine.name)
    _check_arguments(refuse, config.get("model_args"), asked)
    refuse(f"versions.{task}", answer.results.get("versions", {}).get(task), version)
    own = {int(sample["doc_id"]) for sample in answer.samples}
    refuse(f"the number of items of {task}", len(own), len(items))
    hashes = [sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in answer.samples]
    refuse(f"task_hashes.{task}", answer.results.get("task_hashes", {}).get(task), hash_string("".join(hashes)))
    generation = answer.results.get("configs", {}).get(task, {}).get("generation_kwargs")
    for sample in answer.samples:
        number = int(sample["doc_id"])
        refuse(f"{task}, item {number}", Item.of(sample), items.get(number))
        refuse("generation_kwargs", generation, items[number].generation)


def _check_arguments(refuse: Any, found: Any, asked: Asked) -> None:
    from lm_eval.utils import simple_parse_args_string

    given = dict(found) if isinstance(found, Mapping) else simple_parse_args_string(str(found))
    model, expected = str(given.pop("pretrained", "")), dict(asked.arguments)
    wanted = str(expected.pop("pretrained"))
    if asked.export is not None:  # a hash is part of the folder's name, wherever the cluster mounts it
        model, wanted = Path(model).name, Path(wanted).name
    refuse("model_args.pretrained", model, wanted)
    refuse("model_args", _deciding(given), _deciding(expected))


def _deciding(arguments: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in sorted(arguments.items()) if key not in PLACE}
