"""lm-eval's index of task files at less cost: ours are read once each, and lm-eval's own only where they are asked for.

lm-eval 0.4.13 reads some 14,000 files whenever a `TaskManager` is made. Where nothing but names of ours is asked of it,
a manager of our files alone answers; the first question of any other kind makes the whole index, as lm-eval does.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from inspect import BoundArguments
from pathlib import Path
from typing import Any

import yaml

from lm_eval_steering.resources import tasks_folder

PREFIX = "steering_"  # of the names of all tasks, groups and tags of ours, and of none of lm-eval's
_LATER, _OURS = "_steering_later", "_steering_ours"


# --- reading --------------------------------------------------------------------------------------------------------


@lru_cache
def _loader(folder: Path) -> type:
    """A loader that leaves functions of a folder's files unresolved, in lm-eval's form."""

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    Loader.add_constructor("!function", lambda loader, node: str(folder / loader.construct_scalar(node)))
    return Loader


def read(path: Path) -> dict[str, Any]:
    """One of our task files with what it includes, functions unresolved: the same as lm-eval's `load_yaml`."""
    config = yaml.load(path.read_bytes(), Loader=_loader(path.parent))  # a subclass of the safe loader
    if "include" not in config:
        return config
    template = path.parent / config.pop("include")
    return {**pickle.loads(_template(template, template.stat().st_mtime_ns)), **config}


@lru_cache
def _template(path: Path, _changed: int) -> bytes:
    """A template, of which each file gets its own copy."""
    config = read(path)
    config.pop("task_list", None)
    return pickle.dumps(config)


def read_ours_once(index: Any) -> None:
    """Make lm-eval's module that builds the index read our files in our way."""
    original = index.load_yaml
    if hasattr(original, "_lm_eval_steering"):
        return
    folder = f"{tasks_folder()}{os.sep}"  # as managers are given it: to resolve 14,000 paths takes seconds

    def load_yaml(path: str | Path, *, resolve_func: bool = True, **options: Any) -> dict[str, Any]:
        if resolve_func or options.get("recursive") is False or not os.fspath(path).startswith(folder):
            return original(path, resolve_func=resolve_func, **options)
        return read(Path(path).resolve())

    load_yaml._lm_eval_steering = True  # type: ignore[attr-defined]
    index.load_yaml = load_yaml


# --- asking ---------------------------------------------------------------------------------------------------------


def put_off(manager: Any, arguments: BoundArguments) -> None:
    """Leave the index of a `TaskManager` to the first question that needs it.

    Args:
        manager: not initialised yet.
        arguments: of its own `__init__`.
    """
    manager.include_path = arguments.arguments["include_path"]
    manager.metadata = arguments.arguments.get("metadata")
    manager.__dict__[_LATER] = arguments


def answer_from_ours(kind: Any, initialise: Callable[..., None]) -> None:
    """Make a class of managers answer from our files alone what concerns nothing else.

    Args:
        kind: lm-eval's `TaskManager`.
        initialise: its own `__init__`.
    """
    match_tasks, load, task_index = kind.match_tasks, kind.load, kind.task_index

    def ours(manager: Any) -> Any:
        if _OURS not in manager.__dict__:
            small = manager.__dict__[_OURS] = kind.__new__(kind)
            initialise(small, include_path=[tasks_folder()], include_defaults=False, metadata=manager.metadata)
        return manager.__dict__[_OURS]

    def matched(self: Any, task_list: list[str]) -> list[str]:
        return match_tasks(ours(self) if _concerns_ours(self, task_list) else self, task_list)

    def loaded(self: Any, task_list: Any) -> Any:
        names = task_list if isinstance(task_list, list) else [task_list]
        known = _concerns_ours(self, names) and all(name in ours(self).task_index for name in names)
        return load(ours(self) if known else self, task_list)

    def index(self: Any) -> Any:
        return _Index(self, ours) if _LATER in self.__dict__ else task_index.fget(self)

    def missing(self: Any, name: str) -> Any:
        later = None if name.startswith("__") else self.__dict__.pop(_LATER, None)
        if later is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        initialise(*later.args, **later.kwargs)
        return getattr(self, name)

    kind.match_tasks, kind.load, kind.task_index, kind.__getattr__ = matched, loaded, property(index), missing


class _Index(Mapping[str, Any]):
    """The index of a manager that has none yet: `lm_eval` looks up every task that it has loaded, to log its path."""

    def __init__(self, manager: Any, ours: Callable[[Any], Any]) -> None:
        self._manager, self._ours = manager, ours

    def __getitem__(self, name: str) -> Any:
        manager = self._ours(self._manager) if _concerns_ours(self._manager, name) else self._manager
        return manager._index[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._manager._index)

    def __len__(self) -> int:
        return len(self._manager._index)


def _concerns_ours(manager: Any, names: Sequence[Any]) -> bool:
    """Whether a manager has no index yet and names or patterns can be ours alone."""
    asked = names if isinstance(names, list) else [names]
    return _LATER in manager.__dict__ and all(isinstance(name, str) and name.startswith(PREFIX) for name in asked)
