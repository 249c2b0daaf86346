"""A checkpoint on disk, read tensor by tensor: the model is never in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

from lm_eval_steering.architectures.loading import LazyModel
from lm_eval_steering.errors import SteeringError

_FILES = ("model.safetensors", "pytorch_model.bin")
# (prefix in a file, prefix in the model) where the two differ.
_OTHER_NAMES = (("embed_out.", "lm_head."), ("lm_head.", "embed_out."))


class _Opened(Protocol):
    def get_tensor(self, name: str) -> torch.Tensor: ...

    def keys(self) -> list[str]: ...


class Tensors:
    """The tensors of some files, memory-mapped: a file is opened when one of its tensors is first read."""

    def __init__(self, file_of: Mapping[str, Path], stack: ExitStack) -> None:
        """Take name of a tensor -> its file, and the stack that closes the files."""
        self._file_of, self._stack = file_of, stack
        self._opened: dict[Path, _Opened] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._file_of[name]
        if path not in self._opened:
            self._opened[path] = self._stack.enter_context(_open(path))
        return self._opened[path].get_tensor(name)


class _Pickled:
    """A file of torch.save, memory-mapped; no code in it is executed."""

    def __init__(self, path: Path) -> None:
        self._tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def keys(self) -> list[str]:
        return list(self._tensors)


@contextmanager
def _open(path: Path) -> Iterator[_Opened]:
    """A file of safetensors or of torch.save.

    Raises:
        SteeringError: if it is cut short or of another format than its suffix says.
    """
    try:
        opening = nullcontext(_Pickled(path)) if path.suffix == ".bin" else safe_open(path, "pt")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise SteeringError(f"{path}: not a whole checkpoint file ({str(error).splitlines()[0]})") from None
    with opening as file:
        yield file


class CheckpointSource:
    """A model's checkpoint, in a folder or on the hub."""

    def __init__(self, pretrained: str, revision: str, lazy: LazyModel) -> None:
        """Find its files; on the hub, fetch them.

        Raises:
            SteeringError: if there is no checkpoint that can be read.
        """
        self.pretrained, self.revision, self.lazy = pretrained, revision, lazy
        self._named = f"model {pretrained!r}"
        self.files = self._find()

    def _file(self, name: str) -> Path | None:
        try:
            path = cached_file(
                self.pretrained, name, revision=self.revision, _raise_exceptions_for_missing_entries=False
            )
        except (OSError, ValueError) as error:
            raise SteeringError(f"{self._named}: {str(error).splitlines()[0]}") from error
        return None if path is None else Path(path)

    def _find(self) -> tuple[Path, ...]:
        for name in _FILES:
            index = self._file(f"{name}.index.json")
            if index is not None:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                return tuple(self._shard(shard) for shard in shards)
            whole = self._file(name)
            if whole is not None:
                return (whole,)
        raise SteeringError(f"{self._named}: none of {', '.join(_FILES)}, whole or in shards")

    def _shard(self, name: str) -> Path:
        path = self._file(name)
        if path is None:
            raise SteeringError(f"{self._named}: its index names {name}, and there is no such file")
        return path

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        """Name of each tensor in the files -> its file."""
        file_of: dict[str, Path] = {}
        for path in self.files:
            with _open(path) as file:
                file_of |= dict.fromkeys(file.keys(), path)
        return file_of

    @contextmanager
    def reading(self) -> Iterator[Tensors]:
        """The tensors; their memory is freed at the end unless the caller keeps some.

        Raises:
            SteeringError: if a file is cut short or of another format than its suffix says.
        """
        with ExitStack() as stack:
            yield Tensors(self._file_of, stack)

    @cached_property
    def names(self) -> dict[str, str]:
        """Name of each tensor in the model -> its name in the files; tensors that the model does not use are left out.

        Raises:
            SteeringError: if a tensor that the model needs is not in the files, or has another shape.
        """
        model = skeleton_of(self.lazy.config)
        known, prefix = model.state_dict(), f"{model.base_model_prefix}."
        names = {
            model_name: name
            for name in self._file_of
            if (model_name := _name_in_model(name, known, prefix)) is not None
        }
        with self.reading() as tensors:
            for model_name, name in names.items():
                if (shape := tuple(tensors[name].shape)) != (wanted := tuple(known[model_name].shape)):
                    raise SteeringError(f"{self._named}: {name} has the shape {shape}, its config says {wanted}")
        shared: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(name)
        for same in shared.values():
            if not any(name in names for name in same):
                raise SteeringError(
                    f"{self._named}: no tensor {same[0]} in its files; load it with transformers and write "
                    "it once with save_pretrained"
                )
        return names

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """The model with memory-mapped weights, to read some of their values."""
        with self.reading() as tensors:
            model = skeleton_of(self.lazy.config)
            weights = {model_name: tensors[name] for model_name, name in self.names.items()}
            model.load_state_dict(weights, assign=True, strict=False)
            model.tie_weights()
            yield model


def skeleton_of(config: Any) -> Any:
    """A model without weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _name_in_model(name: str, known: Mapping[str, Any], prefix: str) -> str | None:
    """The model's name of a tensor of a file: the same, or with or without the prefix of its base model."""
    others = [new + name.removeprefix(old) for old, new in _OTHER_NAMES if name.startswith(old)]
    return next((each for each in (name, prefix + name, name.removeprefix(prefix), *others) if each in known), None)
