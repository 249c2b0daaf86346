"""What tasks there are, read from the task files without lm-eval, and the fetching of their data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lm_eval_steering.errors import SteeringError, did_you_mean
from lm_eval_steering.lmeval.sources import DataError, RowsSource, observed, write_rows
from lm_eval_steering.lmeval.task_families import modules
from lm_eval_steering.resources import tasks_folder

NOTHING = "nothing: its data travel with the package"


@dataclass(frozen=True)
class Listed:
    """One task or group of ours."""

    name: str
    family: str
    group: bool
    languages: tuple[str, ...]
    variant: str
    metrics: tuple[str, ...]
    output_type: str


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads `!function a.b` as text."""


_Loader.add_multi_constructor("!function", lambda loader, suffix, node: str(node.value))


def _read(path: Path) -> dict[str, Any]:
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a subclass of the safe loader
    if "include" in config:
        return {**_template(path.parent / config.pop("include")), **config}
    return config


@cache
def _template(path: Path) -> dict[str, Any]:
    return _read(path)


def listed() -> list[Listed]:
    """Every task and group of ours, by family and name."""
    found = []
    for path in sorted(tasks_folder().glob("*/*.yaml")):
        config = _read(path)
        if "group" in config or "task" in config:
            found.append(_entry(path.parent.name, config))
    return found


def _entry(family: str, config: Mapping[str, Any]) -> Listed:
    metadata = config.get("metadata") or {}
    given = config.get("dataset_kwargs") or {}
    languages = metadata.get("evaluated") or given.get("evaluated") or given.get("base") or ""
    group = config.get("group")
    metrics = config.get("metric_list") or config.get("aggregate_metric_list") or []
    return Listed(
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
    return str(getattr(modules().get(family), "NEEDS", NOTHING))


def fetch(names: Sequence[str], folder: Path | None, settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Load the rows of tasks, groups or tags; write them to a folder where one is named.

    The tasks themselves ask for their rows, so this knows nothing of any family.

    Yields:
        The file written (or what was loaded) and its number of rows, as soon as they are there.

    Raises:
        DataError: after all others were fetched, if some could not be had.
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
        found = manager.match_tasks([name])
        if not found:
            raise SteeringError(f"no task of ours is called {name!r}{did_you_mean(name, manager.all_tasks)}")
        for each in found:
            matched += _members(each, manager)
    return list(dict.fromkeys(matched))


def _members(name: str, manager: Any) -> list[str]:
    entry = manager.task_index[name]
    children = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    if children:
        return [single for child in children for single in _members(str(child), manager)]
    return sorted(entry.tags) if entry.kind.name == "TAG" else [name]
