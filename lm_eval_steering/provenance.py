"""What a number was made with: the versions of the libraries that decide it, and one hash over everything else."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from functools import cache
from typing import Any


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 over canonical JSON of the given parts; sets are sorted, what else JSON does not know is its text."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    # The order of a set of strings changes from process to process.
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def versions() -> dict[str, str]:
    """Versions of the libraries that decide a number."""
    return {name: _version(name) for name in ("lm-eval-steering", "lm_eval", "torch", "transformers", "numpy")}


@cache
def _version(name: str) -> str:
    return importlib.metadata.version(name)
