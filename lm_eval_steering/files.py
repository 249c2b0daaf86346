"""Files that are written whole or not at all, and read with errors that name the file and the line.

Neuron sets and recordings are safetensors files whose header holds canonical JSON under one key: sorted keys and no
dates, so that the same work gives the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lm_eval_steering.errors import SteeringError

NamedArrays = dict[str, NDArray[Any]]
ErrorClass = Callable[[str], Exception]

# --- Bytes, text and JSON -------------------------------------------------------------------------------------------


def expand_home(path: Any) -> Any:
    """A path with `~` replaced by the home folder; what is no text, or does not begin with `~`, as it is."""
    return str(Path(path).expanduser()) if isinstance(path, str) and path.startswith("~") else path


def write_bytes(path: Path, content: bytes) -> None:
    """Write and rename: a reader, or a crash, sees the old file or the new one. The folder is made."""
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


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int | None = 1, sort_keys: bool = False) -> None:
    """Write one JSON value and a newline as `write_bytes` does."""
    text = json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False)
    write_text(path, f"{text}\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line as `write_bytes` does."""
    write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def canonical(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def read_lines(path: Path, error: ErrorClass = SteeringError) -> Iterator[tuple[int, str]]:
    r"""(number from 1, line with its newline) of a plain or gzipped file.

    Only \n ends a line: `str.splitlines` would also cut at characters that text may hold, such as U+2028.

    Raises:
        error: naming the file, and the line that is not UTF-8.
    """
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as problem:
                    raise error(f"{path}, line {number}: not UTF-8 ({problem.reason})") from None
    except (OSError, EOFError, zlib.error) as problem:
        raise error(f"{path}: cannot be read ({problem})") from None


def read_json_lines(path: Path, error: ErrorClass = SteeringError) -> Iterator[dict[str, Any]]:
    """The JSON object of each line that is not blank, of a plain or gzipped file.

    Raises:
        error: naming the file and the line that is not UTF-8, not JSON or not an object.
    """
    for number, line in read_lines(path, error):
        if line.strip():
            yield parse_json_line(line, f"{path}, line {number}", error)


def parse_json_line(line: str, where: str, error: ErrorClass = SteeringError) -> dict[str, Any]:
    """One JSON object.

    Raises:
        error: beginning with `where`, for what is not JSON or not an object.
    """
    try:
        record = json.loads(line)
    except ValueError as problem:
        raise error(f"{where}: not JSON ({problem})") from None
    if not isinstance(record, dict):
        raise error(f"{where}: expected a JSON object, got {type(record).__name__}")
    return record


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in lines:
                raise yaml.YAMLError(f"the key {key!r} is written twice, in line {lines[key]} and in line {line}")
            lines[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(source: Path | str, error: ErrorClass = SteeringError) -> Any:
    """The value of a YAML file, or of YAML text: a `Path` is read, a `str` is the text itself.

    Raises:
        error: naming the file, if it cannot be read, is no YAML, or has a key twice in one mapping (naming both lines).
    """
    prefix = f"{source}: " if isinstance(source, Path) else ""
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        return yaml.load(text, _StrictLoader)
    except OSError as problem:
        raise error(f"{prefix}{problem.strerror or problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as problem:
        raise error(f"{prefix}not a YAML file: {' '.join(str(problem).split())}") from None


# --- Tensors with metadata ------------------------------------------------------------------------------------------

FORMAT_VERSION = 1
_HEADER_KEY = "lm_eval_steering"


def write_tensors(
    path: Path,
    kind: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    version: int = FORMAT_VERSION,
) -> None:
    """Write a safetensors file, as `write_bytes` does.

    Args:
        path: of the file.
        kind: what it holds, checked when it is read.
        metadata: what JSON can hold.
        tensors: name -> array.
        version: of the format of this kind.
    """
    content = {"format_version": version, "kind": kind, **metadata}
    header = canonical(content | {"metadata_sha256": _digest(content)})
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_bytes(path, save(arrays, metadata={_HEADER_KEY: header}))


def read_tensors(
    path: Path, kind: str, error: ErrorClass, newest: int = FORMAT_VERSION
) -> tuple[dict[str, Any], NamedArrays]:
    """Metadata and tensors of a file.

    Args:
        path: of the file.
        kind: what it must hold.
        error: the class to raise.
        newest: format version up to which this release reads the kind.

    Raises:
        error: if it is missing, cut short, of another kind or of a format that this release does not read.
    """
    with _opened(path, error) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return _checked_metadata(path, kind, file.metadata(), error, newest), tensors


def read_metadata(path: Path, kind: str, error: ErrorClass) -> dict[str, Any]:
    """Metadata of a file; its tensors stay on disk. Raises as `read_tensors` does."""
    with _opened(path, error) as file:
        return _checked_metadata(path, kind, file.metadata(), error, FORMAT_VERSION)


def memory_map(path: Path, name: str) -> NDArray[Any]:
    """A tensor of a file that stays on disk until parts of it are looked at."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(length))[name]
    dtype = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}[entry["dtype"]]
    return np.memmap(path, dtype, "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))


@contextmanager
def _opened(path: Path, error: ErrorClass) -> Iterator[Any]:
    if not path.is_file():
        raise error(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as problem:
        raise error(f"{path}: not a whole safetensors file ({problem})") from None


def _checked_metadata(
    path: Path, kind: str, header: Mapping[str, str] | None, error: ErrorClass, newest: int
) -> dict[str, Any]:
    text = (header or {}).get(_HEADER_KEY)
    if text is None:
        raise error(f"{path}: a safetensors file, but not a {kind} (no {_HEADER_KEY!r} in its header)")
    try:
        metadata: dict[str, Any] = json.loads(text)
    except ValueError as problem:
        raise error(f"{path}: the metadata are not JSON ({problem})") from None
    version = metadata.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= newest:
        raise error(f"{path}: format version {version}, this release reads 1 to {newest}; a newer release reads it")
    if metadata.get("kind") != kind:
        raise error(f"{path}: a {metadata.get('kind')}, expected a {kind}")
    if metadata.pop("metadata_sha256", None) != _digest(metadata):
        raise error(f"{path}: the metadata do not match their own checksum; the file was damaged or edited")
    return metadata


def _digest(metadata: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(metadata).encode()).hexdigest()
