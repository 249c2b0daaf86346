"""One finished cell on disk, and JSON files of a sweep's folder, read with care."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval_steering.errors import SteeringError


class StoreError(SteeringError):
    """A sweep's folder that is not one, is another model's, or is damaged."""


class StoredCell:
    """One finished cell on disk.

    Attributes:
        folder: of the cell.
        facts: its `cell.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = read_json(folder / "cell.json")
        if not {"cell", "files", "metrics"} <= self.facts.keys():
            raise StoreError(f"{folder / 'cell.json'}: not a cell's description; run the sweep again to repair it")

    @property
    def cell(self) -> dict[str, Any]:
        """What `Cell.describe` gave."""
        return dict(self.facts["cell"])

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Name -> bytes and sha256."""
        return dict(self.facts["files"])

    @property
    def samples_file(self) -> str:
        """Name of the file with lm-eval's samples."""
        return next(name for name in self.files if name.startswith("samples_"))

    @cached_property
    def results(self) -> dict[str, Any]:
        """lm-eval's results."""
        return dict(json.loads(self.text(next(name for name in self.files if name.startswith("results_")))))

    def text(self, name: str) -> str:
        """A file's text.

        Raises:
            StoreError: if it is not what was written.
        """
        path = self.folder / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != self.files[name]["sha256"]:
            raise StoreError(f"{path}: not what was written; run the sweep again, which does the cell anew")
        return content.decode()

    def check(self, key: str) -> None:
        """Raise StoreError where a file is missing, cut short or changed."""
        if self.cell["key"] != key:
            raise StoreError(f"{self.folder / 'cell.json'}: of another cell")
        for name in self.files:
            self.text(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a sweep's folder.

    Raises:
        StoreError: if it is missing or damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path}: damaged ({error}); run the sweep again to repair it") from None


def as_json(content: Mapping[str, Any]) -> str:
    """JSON for people and for comparison: sorted, indented."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, indent=1) + "\n"
