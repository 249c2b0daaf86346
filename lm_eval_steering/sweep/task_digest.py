"""What a task is, as a hash: its settings, the functions it names, its documents. Where it lies is no part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval_steering.fingerprint import fingerprint

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
    """Module and name; of a module beside a task's file, which lm-eval calls by its path, the file's name and hash."""
    path = Path(f"{function.__module__}.py")
    if not path.is_absolute():
        return [function.__module__, function.__qualname__]
    return [path.name, hashlib.sha256(path.read_bytes()).hexdigest(), function.__qualname__]
