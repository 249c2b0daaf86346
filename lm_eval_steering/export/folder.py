"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lm_eval_steering.errors import SteeringError


def check_free(out: Path) -> None:
    """Refuse a place where something is already.

    Raises:
        SteeringError: naming it.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SteeringError(f"--out {out}: there is something already; name another folder, or remove this one")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder to write in, OUT.partial, which becomes OUT when everything inside is on the disk.

    What an interrupted run has left there is replaced; what an error leaves there stays for a look.

    Raises:
        SteeringError: if there is something at OUT.
    """
    check_free(out)
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    readable = partial.stat().st_mode & 0o666  # safetensors makes files that nobody else may read
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(readable)
        _to_disk(path)
    _to_disk(partial)
    partial.replace(out)
    _to_disk(out.parent)


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
