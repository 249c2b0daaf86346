"""What finding and loading a model needs of transformers' private names; `lmeval/compat.py` has all others.

They stand apart because this package works without lm-eval. Written for transformers 5.
"""

from __future__ import annotations

from typing import Any

# Name -> the public interface that would replace it.
PRIVATE = {"_name_or_path": "an argument of save_pretrained that leaves out where a config was read from"}


def forget_path(config: Any) -> None:
    """Make a config that is about to be saved say nothing of where it was read from."""
    config.__dict__.pop("_name_or_path", None)
