"""What tasks there are, read from the task files without lm-eval, and the fetching of their data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError, did_you_mean
from lm_eval_steering.lmeval.sources import DataError, RowsSource, observed, write_rows
from lm_eval_steering.lmeval.task_families import modules
from lm_eval_steering.lmeval.task_families.common import read_task_file
from lm_eval_steering.resources import tasks_folder


@dataclass(frozen=True)
class TaskEntry:
    """One task or group of ours."""

    name: str
    family: str
    group: bool
    languages: tuple[str, ...]
    variant: str
    metrics: tuple[str, ...]
    output_type: str


def task_entries() -> list[TaskEntry]:
    """Every task and group of ours, by family and name."""
    configs = ((path.parent.name, read_task_file(path)) for path in sorted(tasks_folder().glob("*/*.yaml")))
    return [_entry(family, config) for family, config in configs if "group" in config or "task" in config]


def _entry(family: str, config: Mapping[str, Any]) -> TaskEntry:
    metadata = config.get("metadata") or {}
    given = config.get("dataset_kwargs") or {}
    languages = metadata.get("evaluated") or given.get("evaluated") or given.get("base") or ""
    group = config.get("group")
    metrics = config.get("metric_list") or config.get("aggregate_metric_list") or []
    return TaskEntry(
        name=str(group or config["task"]),
        family=family,
        group=bool(group),
        languages=tuple(str(languages).split("-")) if languages else (),
        variant=str(metadata.get("variant", "")),
        metrics=tuple(str(metric["metric"]) for metric in metrics),
        output_type=str(config.get("output_type", "")),
    )


def needs(family: str) -> str:
    """What must be there before the family's tasks run."""
    return str(modules()[family].NEEDS)


def fetch(names: Sequence[str], folder: Path | None, settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Load the rows of tasks, groups or tags; write them to a folder where one is named.

    The tasks themselves ask for their rows, so this knows nothing of any family.

    Yields:
        The file written (or what was loaded) and its number of rows, as soon as they are there.

    Raises:
        DataError: after all others were fetched, if some are unavailable.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False, metadata=dict(settings))
    seen: set[RowsSource] = set()
    failed: list[str] = []
    for name in _matched(names, manager):
        with observed() as loaded:
            try:
                manager.load(name)
            except DataError as error:
                failed.append(f"{name}: {error}")
        for source, rows in loaded:
            if source not in seen:
                seen.add(source)
                yield (str(write_rows(folder, source, rows)) if folder else str(source)), len(rows)
    if failed:
        raise DataError(f"{len(failed)} of the tasks have no data. {failed[0]}")


def _matched(names: Sequence[str], manager: Any) -> list[str]:
    """Single tasks for every name, pattern, group and tag, so that one that fails does not take the others along."""
    matched = []
    for name in names:
        names_of_tasks = manager.match_tasks([name])
        if not names_of_tasks:
            raise SteeringError(f"no task of ours is called {name!r}{did_you_mean(name, manager.all_tasks)}")
        for each in names_of_tasks:
            matched += _members(each, manager)
    return list(dict.fromkeys(matched))


def _members(name: str, manager: Any) -> list[str]:
    entry = manager.task_index[name]
    children = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    if children:
        return [single for child in children for single in _members(str(child), manager)]
    return sorted(entry.tags) if entry.kind.name == "TAG" else [name]
