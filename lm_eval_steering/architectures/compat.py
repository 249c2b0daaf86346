"""Private names of transformers that this package and `export` use, which work without lm-eval.

`lmeval/compat.py` has all others.
"""

from __future__ import annotations

from typing import Any

# Name -> the public interface that would replace it.
PRIVATE = {"_name_or_path": "an argument of save_pretrained that leaves out where a config was read from"}


def forget_path(config: Any) -> None:
    """Remove from a config the path that it was read from, before it is saved."""
    config.__dict__.pop("_name_or_path", None)
