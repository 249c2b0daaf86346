"""A task's file decides what the task is.

lm-eval gives a `custom_dataset` function one bag of keywords: the file's metadata, overridden by the model arguments
and by `--metadata`. Without a check, `--metadata '{"evaluated": "tur_Latn"}'` would run Turkish under an Italian name,
and the model argument `variant=fp16` would choose a wording.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError

Documents = Callable[..., dict[str, Any]]


def keeps_to_its_file(documents: Documents) -> Documents:
    """A dataset function whose named parameters come from the task's file alone; all else is a setting.

    Raises:
        SteeringError: if a model argument or `--metadata` says something else than the file does.
    """
    parameters = signature(documents).parameters.values()
    names = [each.name for each in parameters if each.kind is not Parameter.VAR_KEYWORD]

    @wraps(documents)
    def checked(*args: Any, **settings: Any) -> dict[str, Any]:
        path = Path(str(settings.get("config_source", "")))
        if path.is_file():  # else it is called from Python
            own = _own(path)
            for name in [name for name in names if name in settings]:
                if name not in own:
                    del settings[name]
                elif settings[name] != own[name]:
                    raise SteeringError(
                        f"{path.stem}: {name} is {own[name]!r} in the task's file and {settings[name]!r} in --metadata "
                        "or the model arguments; leave it out there, or take another task"
                    )
        return documents(*args, **settings)

    return checked


def is_other_wording(variant: str, other: str) -> bool:
    """Whether a task has its family's other wording, of two.

    Raises:
        SteeringError: if it names a third.
    """
    if variant not in ("", other):
        raise SteeringError(f"variant={variant!r}: expected {other!r}, or none for lm-eval's wording")
    return variant == other


def _own(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path, resolve_func=False)
    return {**(config.get("metadata") or {}), **(config.get("dataset_kwargs") or {})}
