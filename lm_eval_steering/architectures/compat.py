"""Private names of transformers that finding and loading a model need; `lmeval/compat.py` has all others.

They stand apart because this package works without lm-eval. Written for transformers 5.
"""

from __future__ import annotations

from typing import Any

# Name -> the public interface that would replace it.
PRIVATE = {
    "_commit_hash": "a public attribute of PreTrainedConfig that says which commit of the hub it was read from",
    "_name_or_path": "an argument of save_pretrained that leaves out where a config was read from",
}


def commit_of(config: Any) -> str:
    """Commit of the hub that a config was read from; empty for a folder."""
    return str(getattr(config, "_commit_hash", None) or "")


def forget_path(config: Any) -> None:
    """Make a config that is about to be saved say nothing of where it was read from."""
    config.__dict__.pop("_name_or_path", None)
