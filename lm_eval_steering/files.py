"""One kind of file for everything that is kept: safetensors whose header holds canonical JSON, written in one step.

The JSON stands under one key, with sorted keys and without dates, so that the same work gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

FORMAT_VERSION = 1
_HEADER_KEY = "lm_eval_steering"

NamedArrays = dict[str, NDArray[Any]]


def write(path: Path, kind: str, metadata: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write a file that is whole, or leave the one that was there before.

    Args:
        path: of the file; its folder is made.
        kind: what it holds, checked when it is read.
        metadata: what JSON can hold.
        tensors: name -> array.
    """
    said = {"format_version": FORMAT_VERSION, "kind": kind, **metadata}
    header = canonical(said | {"metadata_sha256": _digest(said)})
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_bytes(path, save(whole, metadata={_HEADER_KEY: header}))


def memory_map(path: Path, name: str) -> NDArray[Any]:
    """A tensor of a file that stays on disk until parts of it are looked at."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        about = json.loads(file.read(length))[name]
    dtype = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}[about["dtype"]]
    return np.memmap(path, dtype, "r", 8 + length + about["data_offsets"][0], tuple(about["shape"]))


def write_bytes(path: Path, content: bytes) -> None:
    """Write and rename: a reader, or a crash, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _digest(metadata: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(metadata).encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def read(path: Path, kind: str, error: Callable[[str], Exception]) -> tuple[dict[str, Any], NamedArrays]:
    """Metadata and tensors of a file.

    Args:
        path: of the file.
        kind: what it must hold.
        error: the class to raise.

    Raises:
        error: if it is missing, cut short, of another kind or of a format that this release does not read.
    """
    with _opened(path, error) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return _metadata(path, kind, file.metadata(), error), tensors


def read_metadata(path: Path, kind: str, error: Callable[[str], Exception]) -> dict[str, Any]:
    """Metadata of a file; its tensors stay where they are. Raises as `read` does."""
    with _opened(path, error) as file:
        return _metadata(path, kind, file.metadata(), error)


@contextmanager
def _opened(path: Path, error: Callable[[str], Exception]) -> Iterator[Any]:
    if not path.is_file():
        raise error(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as problem:
        raise error(f"{path}: not a whole safetensors file ({problem})") from None


def _metadata(
    path: Path, kind: str, found: Mapping[str, str] | None, error: Callable[[str], Exception]
) -> dict[str, Any]:
    header = (found or {}).get(_HEADER_KEY)
    if header is None:
        raise error(f"{path}: a safetensors file, but not a {kind} (no {_HEADER_KEY!r} in its header)")
    try:
        metadata: dict[str, Any] = json.loads(header)
    except ValueError as problem:
        raise error(f"{path}: the metadata are not JSON ({problem})") from None
    if metadata.get("format_version") != FORMAT_VERSION:
        raise error(f"{path}: format version {metadata.get('format_version')}, this release reads {FORMAT_VERSION}")
    if metadata.get("kind") != kind:
        raise error(f"{path}: a {metadata.get('kind')}, expected a {kind}")
    if metadata.pop("metadata_sha256", None) != _digest(metadata):
        raise error(f"{path}: the metadata do not match their own checksum; the file was damaged or edited")
    return metadata
