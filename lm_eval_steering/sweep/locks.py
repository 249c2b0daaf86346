"""One runner per cell: locks that the kernel drops when their owner dies, however it dies.

`flock` works between the processes of a machine and, on Linux, between the machines that mount one NFS or Lustre
folder, unless it is mounted with locks that are local to each machine, which `why_unsafe` reports. Where a lock fails
all the same, a cell is computed twice and stored once, because a finished folder appears by one rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError

_LOCAL = {"nolock", "local_lock=all", "local_lock=flock", "localflock"}


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether the lock was free and is now ours; it is given back at the end, or when this process dies.

    Args:
        path: the lock's file; it holds the owner's name while the lock is held.
        wait: for another owner to finish.

    Raises:
        SteeringError: if the file system knows no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _acquire(path, wait)
    if handle is None:
        yield False
        return
    try:
        with contextlib.suppress(OSError):  # a full disk: the name is for people, the lock needs no room
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path, wait: bool) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            os.close(handle)
            raise SteeringError(
                f"{path.parent}: this file system knows no locks ({error.strerror}), so one runner at a time only; "
                "put --out on another one, or merge folders that were run separately"
            ) from None
        except BaseException:
            os.close(handle)
            raise
        if _is_same(handle, path):
            return handle
        os.close(handle)  # its owner removed the file meanwhile: the next one is another lock


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.fstat(handle).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def owners(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of each lock that is held, and who holds it; locks of dead owners are not among them."""
    owners_by_key: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.lock")):
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            owners_by_key[path.stem] = _owner(handle)
        except OSError:
            continue
        finally:
            os.close(handle)
    return owners_by_key


def _owner(handle: int) -> dict[str, Any]:
    try:
        return dict(json.loads(os.read(handle, 4096) or b"{}"))
    except ValueError:
        return {}


def why_unsafe(folder: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """Why locks in this folder do not reach other machines; None where they do, or nothing is known."""
    if not mounts.is_file():
        return None
    lines = [line.split() for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    whole = str(folder.resolve()) + "/"
    around = [line for line in lines if len(line) >= 4 and whole.startswith(line[1].rstrip("/") + "/")]
    if not around:
        return None
    _, mount_point, kind, options, *_ = max(around, key=lambda line: len(line[1]))
    if wrong := _LOCAL & set(options.split(",")):
        return f"{mount_point} ({kind}) is mounted with {sorted(wrong)[0]}: locks do not reach other machines"
    if kind == "lustre" and "flock" not in options.split(","):
        return f"{mount_point} (lustre) is mounted without flock: locks do not reach other machines"
    return None
