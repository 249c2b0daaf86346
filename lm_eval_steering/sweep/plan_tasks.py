"""The tasks of a plan: names spelled out, built once and kept, and which of them know the steered language."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import UndefinedForLanguageError, did_you_mean
from lm_eval_steering.lmeval.compat import release_requests
from lm_eval_steering.lmeval.registration import register_all
from lm_eval_steering.lmeval.task_families.common import read_task_file
from lm_eval_steering.lmeval.task_families.lss import UNDEFINED
from lm_eval_steering.metrics.likelihood import MADE_FOR
from lm_eval_steering.provenance import fingerprint
from lm_eval_steering.resources import tasks_folder
from lm_eval_steering.sweep.plan import PlanError, SweepPlan

# --- What a task is, as a hash: its settings, the functions it names, its documents. Where it lies is no part of it

_PLACE = "config_source"  # path of the task's file, which lm-eval puts among its metadata
_PLAIN = (str, int, float, bool, type(None))


def settings_digest(task: Any) -> str:
    """Hash over the settings of a task of lm-eval, as they are before an evaluation changes some of them."""
    config = task.config.to_dict(keep_callable=True)
    config["metadata"] = {key: value for key, value in (config.get("metadata") or {}).items() if key != _PLACE}
    return fingerprint({"settings": _described(config)})


def documents_digest(task: Any, limit: int | None) -> str:
    """Hash over the documents that are evaluated: the first `limit`, or all."""
    found = task.eval_docs
    if hasattr(found, "with_format"):  # a Dataset; as a table its rows are read ten times as fast
        found = found.with_format("arrow")[: limit or len(found)].to_pylist()
    return fingerprint({"documents": list(found)[:limit]})


def _described(value: Any) -> Any:
    """Plain data in place of functions and other objects; the same in every process and on every machine."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(key): _described(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_described(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, partial):
        return [_described(value.func), _described(value.args), _described(value.keywords)]
    return _named(value) if hasattr(value, "__qualname__") else _named(type(value))


def _named(function: Any) -> list[str]:
    """Names of module and function: what moving a module to another package does not change.

    A module beside a task's file, which lm-eval calls by its path, is known by the file's name and hash.
    """
    path = Path(f"{function.__module__}.py")
    if not path.is_absolute():
        package, _, rest = function.__module__.partition(".")
        return [package, rest.rpartition(".")[2], function.__qualname__]
    return [path.name, hashlib.sha256(path.read_bytes()).hexdigest(), function.__qualname__]


class TaskBook:
    """lm-eval's tasks for one plan.

    A task whose documents depend on the steered language (LSS, language forcing) is another one for each language, and
    its baseline too; every other task has one baseline. Which is which is seen from the documents.
    """

    def __init__(self, plan: SweepPlan) -> None:
        register_all()
        self._plan = plan
        self._managers: dict[tuple[Path, str | None], Any] = {}
        self._tasks: dict[tuple[str, str | None], Any] = {}
        self._settings: dict[tuple[str, str | None], str] = {}
        self._digests: dict[tuple[str, str | None], str] = {}
        self._targeted: dict[str, bool] = {}
        self._undefined: dict[tuple[str, str | None], str] = {}
        self._added: set[str] = set()

    # --- names --------------------------------------------------------------------------------------------------

    @cached_property
    def _everything(self) -> Any:
        """lm-eval's TaskManager with all tasks; with lm-eval's own only where they are wanted, which takes seconds."""
        wanted = self._plan.tasks + (self._plan.then.tasks if self._plan.then else ())
        users = self._plan.include_path
        # A family's folder has the family's name, and its names begin with it: most plans need few of our 1,700 files.
        families = [each for each in sorted(tasks_folder().iterdir()) if each.is_dir()]
        asked_for = [str(each) for each in families if any(name.startswith(f"steering_{each.name}") for name in wanted)]
        for folders in (asked_for, [str(tasks_folder())]):
            found = _indexed((*folders, *users))
            if all(name in found.task_index for name in wanted):
                return found
        return _indexed(tuple(self._plan.include_path), defaults=True)

    def spelled_out(self, names: Sequence[str]) -> tuple[str, ...]:
        """Single tasks, tags and plain groups replaced by their members, each once.

        Raises:
            PlanError: for a name that lm-eval does not know.
        """
        return tuple(dict.fromkeys(leaf for name in names for leaf in self._leaves(name)))

    def _leaves(self, name: str) -> list[str]:
        index = self._everything.task_index
        entry = index.get(name)
        if entry is None:
            raise PlanError(f"tasks: lm-eval knows no task {name!r}{did_you_mean(name, index)}")
        if entry.kind.name == "TAG":
            return [leaf for member in sorted(entry.tags) for leaf in self._leaves(member)]
        if entry.kind.name != "GROUP":
            return [name]
        members = _members(entry)
        if not all(isinstance(member, str) and member in index for member in members):
            raise PlanError(f"tasks: the group {name} changes its members' settings; name its tasks one by one")
        return [leaf for member in members for leaf in self._leaves(member)]

    # --- tasks --------------------------------------------------------------------------------------------------

    def manager(self, name: str, target: str | None) -> Any:
        """lm-eval's TaskManager for one task and steered language.

        It knows the folder of the task alone: an index of all tasks takes seconds, and the languages are many.
        """
        if name in self._added:
            return _indexed((str(tasks_folder() / "demo"),))
        place = (self._everything.task_index[name].yaml_path.parent, target)
        if place not in self._managers:
            from lm_eval.tasks import TaskManager

            metadata = {**self._plan.metadata, **({"target_language": target} if target else {})}
            self._managers[place] = TaskManager(
                include_path=[str(place[0])], include_defaults=False, metadata=metadata or None
            )
        return self._managers[place]

    def add(self, name: str, target: str, task: Any) -> None:
        """A task that no file describes, whose documents are made for a steered language."""
        self._tasks[name, target], self._targeted[name] = task, True
        settings, documents = settings_digest(task), documents_digest(task, None)
        self._settings[name, target] = settings
        self._digests[name, target] = fingerprint({"settings": settings, "documents": documents})
        self._added.add(name)

    def is_targeted(self, name: str) -> bool:
        """Whether the task's documents depend on the steered language.

        Raises:
            SteeringError: if it has no documents at all, such as DataError where its rows cannot be had.
        """
        if name not in self._targeted:
            try:
                self._targeted[name] = MADE_FOR in _first_document(self._built(name, None))
            except UndefinedForLanguageError:
                self._targeted[name] = True  # it asks for one
        return self._targeted[name]

    def why_undefined(self, name: str, target: str | None) -> str | None:
        """Why a task has no documents for a steered language, such as LSS towards its own base; None where it has.

        Raises:
            SteeringError: if it should have some, and they cannot be had.
        """
        if target is None or not self.is_targeted(name):
            return None
        place = (name, target)
        if place not in self._undefined:
            try:
                blank = _first_document(self._built(name, target)).get(UNDEFINED)
                self._undefined[place] = "it is not defined for that language" if blank else ""
            except UndefinedForLanguageError as error:
                self._undefined[place] = str(error)
        return self._undefined[place] or None

    def task(self, name: str, target: str | None) -> Any:
        """The task, built at most once for each set of documents."""
        return self._built(name, target if self.is_targeted(name) else None)

    def digest(self, name: str, target: str | None) -> str:
        """Hash over what decides the task's items and their scores: its settings and its documents."""
        place = (name, target if self.is_targeted(name) else None)
        if place not in self._digests:
            documents = documents_digest(self._built(*place), self._plan.limit)
            self._digests[place] = fingerprint({"settings": self._settings[place], "documents": documents})
        return self._digests[place]

    def forget_all_but(self, name: str, target: str | None) -> None:
        """Let go of other tasks' requests, which can be large; their documents are kept."""
        kept = self.task(name, target)
        for task in self._tasks.values():
            if task is not kept:
                release_requests(task)

    def _built(self, name: str, target: str | None) -> Any:
        place = (name, target)
        if place not in self._tasks:
            (task,) = self.manager(name, target).load([name])["tasks"].values()
            self._tasks[place], self._settings[place] = task, settings_digest(task)
        return self._tasks[place]


@cache
def _indexed(folders: tuple[str, ...], defaults: bool = False) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[*folders], include_defaults=defaults)


def _members(entry: Any) -> list[Any]:
    config = entry.cfg or read_task_file(Path(entry.yaml_path))
    found = config.get("task", [])
    return found if isinstance(found, list) else [found]


def _first_document(task: Any) -> Mapping[str, Any]:
    first = next(iter(task.eval_docs), None)
    return first if isinstance(first, Mapping) else {}
